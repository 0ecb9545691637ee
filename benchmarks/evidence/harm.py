"""Which parameters lose by skewed clients: clients' models with one group of parameters averaged.

    python benchmarks/evidence/harm.py                         AG News and 20 Newsgroups, 3 seeds

FedAvg runs some rounds. Of the last one, every client's own model is tested on the whole test set,
then with the averaged gates in it, the averaged experts, the averaged rest (head, attention), and
all of them. What averaging a group gains is what the group's drift had cost; if averaging gates or
experts lost accuracy, they would be the one-size-fits-none that FedAlign-MoE is made against.
The mean over clients and seeds, with a 95 % interval over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sluiceway.core.aggregation import aggregate
from sluiceway.core.settings import Training
from sluiceway.experiment.builders import head_for, parts_of
from sluiceway.experiment.compare import Interval
from sluiceway.experiment.models import assembled, load_pretrained
from sluiceway.experiment.recipe import Recipe, load_recipe
from sluiceway.experiment.session import Session
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import FedAvg, Update
from sluiceway.transport.local import usable_prefix

SETTINGS = {
    "AG News .1, 1 epoch": ["data.alpha=0.1"],
    "AG News .1, 5 epochs": ["data.alpha=0.1", "train.local_epochs=5"],
    "20 Newsgroups .1, 1 epoch": ["data.name=20newsgroups", "data.limit=1000", "data.alpha=0.1"],
}
COMMON = ["model.sliced=true", "data.limit=600", "data.max_tokens=24", "train.lr=2e-3"]
#: Test examples for each of the models.
TESTED = 300


def groups_of(strategy: FedAvg) -> dict[str, set[str]]:
    """The keys of what crosses, by what they belong to."""
    found: dict[str, set[str]] = {"gates": set(), "experts": set(), "the rest": set()}
    for piece in strategy.shared_pieces:
        if strategy.layout.owner(piece.key) is not None:
            found["experts"].add(piece.key)
        elif piece.param in strategy.layout.gate_params:
            found["gates"].add(piece.key)
        else:
            found["the rest"].add(piece.key)
    return found


def mixed(
    strategy: FedAvg, own: Update, new: Mapping[str, Tensor], keys: set[str]
) -> dict[str, Tensor]:
    """A client's model, but for the pieces of these keys, which are those of `new`."""
    tensors = {name: tensor.clone() for name, tensor in strategy.tensors.items()}
    for piece in strategy.shared_pieces:
        value = piece.of(dict(new)) if piece.key in keys else own.tensors.get(piece.key)
        if value is not None:
            piece.of(tensors).copy_(value)
    return tensors


def measured(recipe: Recipe, session: Session, rounds: int) -> dict[str, float]:
    """Mean accuracy of the clients' models after some rounds, by which group is averaged."""
    data = session.data(recipe.data, lambda line: None)
    loaded = load_pretrained(recipe.model.name, language=False)
    train, test = session.encoded(recipe.data, data, loaded, recipe.model)
    head = head_for(data.label_names, False, loaded, recipe.model)
    model = assembled(loaded, recipe.model, head, recipe.run.seed)
    place, clients = torch.device("cpu"), [train.subset(part) for part in parts_of(recipe, data)]
    strategy, training = FedAvg(), recipe.training()
    assert isinstance(training, Training)
    prepare(model, strategy, len(clients))
    trunk = usable_prefix(model, clients, place)
    assert trunk is not None
    *held, test_set = session.feature_cache(2048, 0).wrap(trunk, [*clients, test], place)
    with trunk.skipped():
        worker = Worker(model, held, test_set, strategy, training, seed=recipe.run.seed)
        for number in range(1, rounds + 1):
            broadcast = strategy.broadcast(number)
            updates = [
                copied(worker.train(i, broadcast, {}, personal=False))
                for i, examples in enumerate(held)
                if len(examples)
            ]
            if number < rounds:
                aggregate(strategy, updates)
        old = strategy.tensors
        aggregate(strategy, updates)
        new, strategy.tensors = strategy.tensors, old
        groups = groups_of(strategy)
        choices = {"none": set[str]()} | groups | {"all": set[str]().union(*groups.values())}
        return {
            name: sum(
                worker.evaluate(mixed(strategy, u, new, keys), range(TESTED)).accuracy
                for u in updates
            )
            / len(updates)
            for name, keys in choices.items()
        }


def copied(update: Update) -> Update:
    """The same, in memory of its own."""
    return replace(update, tensors={name: t.clone() for name, t in update.tensors.items()})


def main() -> None:
    """Print a table, a column a setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    session = Session()
    columns = {}
    for setting, overrides in SETTINGS.items():
        runs = [
            measured(
                load_recipe("agnews", [*COMMON, *overrides, f"run.seed={seed}"]),
                session,
                args.rounds,
            )
            for seed in range(args.seeds)
        ]
        columns[setting] = {name: Interval.of([run[name] for run in runs]) for name in runs[0]}
    print(f"| averaged | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for name in next(iter(columns.values())):
        cells = [
            f"{column[name].mean:.3f} ± {column[name].half:.3f}" for column in columns.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
