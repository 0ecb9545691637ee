"""What differential privacy costs in accuracy, for 100 clients.

    python benchmarks/private_accuracy.py [--seeds 0,1,2] [--rounds 5]

AG News, 2,000 texts at 100 clients (Dirichlet 1), 500 to test; MiniLM as it is, with a linear head
that starts from class means and alone is trained, one epoch a round. Noise is from a number, so
that the table can be repeated. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from statistics import fmean

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Batch
from sluiceway.core.settings import Training
from sluiceway.data import TextDataset, partition
from sluiceway.experiment.builders import language_model
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.session import Session
from sluiceway.strategies import ClassMeans, FedAvg, Gaussian, Strategy
from sluiceway.transport.local import federate

SETTINGS = [
    "data.limit=2000",
    "data.test_limit=500",
    "data.clients=100",
    "data.alpha=1",
    "model.experts=0",
    "model.layers=1",
]
#: Rows: where noise is added, and what is given besides epsilon.
ROWS: dict[str, dict[str, object] | None] = {
    "no privacy": None,
    "server, clip 0.1": {"where": "server", "clip": 0.1},
    "server, clip 1": {"where": "server", "clip": 1.0},
    "server, clip 0.1 at first, median": {"where": "server", "clip": 0.1, "quantile": 0.5},
    "client, clip 0.1": {"where": "client", "clip": 0.1},
}


class Features(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """What enters the head of each text, [N, d], with the labels."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


@torch.no_grad()
def featured(model: nn.Module, head: nn.Linear, examples: TextDataset) -> Features:
    """The head's inputs of a data set of (inputs, label)."""
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    model.eval()
    labels = []
    for rows in torch.arange(len(examples)).split(32):
        batch = Batch.of(examples, rows, torch.device("cpu"))
        batch.run(model)
        labels.append(batch.labels)
    hook.remove()
    return Features(torch.cat(seen), torch.cat(labels))


def main() -> None:
    """Run every row at every epsilon and seed."""
    arguments = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    arguments.add_argument("--seeds", default="0,1,2")
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe("agnews", SETTINGS)
    session = Session()
    data = session.data(recipe.data, print)
    model, train, test, _ = language_model(recipe, data, session)
    head = [one for one in model.modules() if isinstance(one, nn.Linear)][-1]
    held, tested = featured(model, head, train), featured(model, head, test)
    print(
        "| | start, epsilon 1 | 4 | 8 | trained, epsilon 1 | 4 | 8 |\n|---|---|---|---|---|---|---|"
    )
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for name, given in ROWS.items():
        cells = []
        for rounds in (0, args.rounds):
            for epsilon in (1.0, 4.0, 8.0) if given else (1.0,):
                found = [accuracy(held, tested, given, epsilon, rounds, seed) for seed in seeds]
                cells += [f"{fmean(found):.3f}"] * (1 if given else 3)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def accuracy(
    held: Features,
    tested: Features,
    given: dict[str, object] | None,
    epsilon: float,
    rounds: int,
    seed: int,
) -> float:
    """The last round's accuracy; of no rounds that of the head's start."""
    parts = partition("dirichlet", held.labels.numpy(), 100, seed, alpha=1.0)
    clients = [
        Features(held.inputs[torch.as_tensor(p).long()], held.labels[torch.as_tensor(p).long()])
        for p in parts
    ]
    strategy: Strategy = FedAvg() if rounds else ClassMeans()
    if given is not None:
        strategy = strategy.with_privacy(
            Gaussian(epsilon=epsilon, noise_seed=seed, **given)  # type: ignore[arg-type]
        )
    torch.manual_seed(seed)
    result = federate(
        nn.Sequential(nn.Linear(held.inputs.shape[1], 4)),
        clients,
        tested,
        strategy,
        rounds=max(rounds, 1),
        seed=seed,
        training=Training(lr=1e-3, batch_size=16),
        head_start="means",
        personal_examples=0,
        device="cpu",
        stacked=1,
    )
    return result.accuracy


if __name__ == "__main__":
    main()
