"""What robust rules cost when all clients are honest, and their data unlike.

    python benchmarks/honest_price.py [--seeds 0,1,2] [--validate]

AG News (2,000 texts) and Banking77 (3,333) at 10 clients, Dirichlet 0.1 and 0.5; frozen MiniLM with
an untrained linear head, FedAvg, one epoch a round at lr 3e-3 for 10 rounds and 1e-2 for 20.
Accuracy on 1,500 test texts, mean of the seeds; with `--validate` on texts of the training set that
no client holds, by which settings are chosen. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from private_accuracy import Features, featured
from sluiceway.core.settings import Training
from sluiceway.data import partition
from sluiceway.experiment.builders import language_model
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.session import Session
from sluiceway.strategies import ROBUST, FedAvg, TrimmedMean
from sluiceway.transport.local import federate

#: By recipe: training texts, of which a third is held out; rounds; learning rate.
SETS = {"agnews": (3000, 10, 3e-3), "banking77": (5000, 20, 1e-2)}
ALPHAS = (0.1, 0.5)


def features(name: str) -> tuple[Features, Features, Features]:
    """What enters the head: of the clients' texts, of those held out, and of the test texts."""
    recipe = load_recipe(
        name,
        [
            f"data.limit={SETS[name][0]}",
            *("data.test_limit=1500", "data.clients=10", "model.experts=0", "model.layers=1"),
        ],
    )
    session = Session()
    data = session.data(recipe.data, lambda line: None)
    model, train, test, _ = language_model(recipe, data, session)
    head = [one for one in model.modules() if isinstance(one, nn.Linear)][-1]
    seen = featured(model, head, train)
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
    clients, held_out = order.split([len(order) * 2 // 3, len(order) - len(order) * 2 // 3])
    return part(seen, clients), part(seen, held_out), featured(model, head, test)


def part(whole: Features, rows: torch.Tensor) -> Features:
    """Some rows."""
    return Features(whole.inputs[rows], whole.labels[rows])


def main() -> None:
    """Every rule on every set at every alpha."""
    arguments = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    arguments.add_argument("--seeds", default="0,1,2")
    arguments.add_argument("--validate", action="store_true")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    made = {name: features(name) for name in SETS}
    print("| |", " | ".join(f"{name}, {alpha}" for name in SETS for alpha in ALPHAS), "|")
    print("|---|" + "---:|" * len(SETS) * len(ALPHAS))
    for rule in (None, *ROBUST):
        cells = []
        for name, (held, held_out, test) in made.items():
            _, rounds, lr = SETS[name]
            for alpha in ALPHAS:
                found = []
                for seed in map(int, args.seeds.split(",")):
                    parts = partition("dirichlet", held.labels.numpy(), 10, seed, alpha=alpha)
                    strategy = FedAvg()
                    if rule:
                        share = {"share": 0.2} if ROBUST[rule] is TrimmedMean else {}
                        strategy.with_rules(ROBUST[rule](**share))
                    torch.manual_seed(seed)
                    result = federate(
                        nn.Sequential(nn.Linear(held.inputs.shape[1], int(held.labels.max()) + 1)),
                        [part(held, torch.as_tensor(rows).long()) for rows in parts],
                        held_out if args.validate else test,
                        strategy,
                        rounds=rounds,
                        seed=seed,
                        training=Training(lr=lr, batch_size=32),
                        evaluate_every=rounds,
                        personal_examples=0,
                        device="cpu",
                        stacked=1,
                    )
                    found.append(result.accuracy)
                cells.append(f"{fmean(found):.3f}")
        print(f"| {rule or 'none'} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
