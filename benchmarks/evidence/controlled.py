"""A small mixture of experts with known regions: how far clients disagree is a parameter.

    python benchmarks/evidence/controlled.py          5 seeds; table, JSON and plot into docs/

Tokens are of four regions, and in each another rule leads from a token to its label, so that every
region has its own right expert. A base model is trained on all regions; then ten clients train it
on data of their own, and one aggregation follows. Three parameters say how their models differ:

- roles: this share of the clients has its experts, and the gate's rows with them, in another order.
  Each such client computes the same as the others, but the expert of an index has another role.
- gates: every client's gate is turned away from the common one by a random matrix of this size,
  relative to the gate's own; the experts are the same.
- regions: all begin alike, but this share of a client's tokens is of one region, and it trains five
  times as long, so that gates and experts drift by themselves.

Shown are the accuracy of the aggregated model on all regions, and the mean accuracy of the clients'
models that went into it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pages import Value, table
from pictures import by_round, panels
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sluiceway.core.aggregation import aggregate
from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE, UpcycledRouter
from sluiceway.strategies import (
    Broadcast,
    FedAlignMoE,
    FedAvg,
    FedMoE,
    Median,
    Strategy,
    Update,
    Usage,
)

REGIONS, LABELS, WIDTH, HIDDEN, CLIENTS, TOKENS = 4, 4, 16, 24, 10, 256
#: Values of each parameter.
VALUES = {
    "roles": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "gates": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "regions": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
}

#: Compared, the first being what the others are held against.
METHODS: dict[str, Callable[[], Strategy]] = {
    "fedavg": FedAvg,
    "usage": Usage,
    "fedmoe": FedMoE,
    "median": lambda: FedAvg().with_rules(Median()),
    "fedalign-moe": FedAlignMoE,
    "weights = select": lambda: FedAlignMoE(weights="select"),
    "gates alone": lambda: FedAlignMoE(semantic=False),
    "match = meaning": lambda: FedAlignMoE(match="meaning"),
    "match, FedAvg": lambda: FedAlignMoE(
        match="meaning", align=False, consistency=False, adaptive=False, semantic=False
    ),
}


def world(size: int, seed: int, own: int = 0, share: float = 0.0) -> TensorDataset:
    """Tokens [1, WIDTH] of a region each, and their labels.

    The first half of a token says its region, the second has the label, which the rule of the
    region permutes. `share` of the tokens are of the region `own`, the others of any.
    """
    g = torch.Generator().manual_seed(seed)
    region = torch.randint(REGIONS, (size,), generator=g)
    region[: round(share * size)] = own
    place = 3 * F.one_hot(region, WIDTH // 2).float()
    place += 0.3 * torch.randn(size, WIDTH // 2, generator=g)
    content = torch.randn(size, WIDTH // 2, generator=g)
    label = (content[:, :LABELS].argmax(1) + region) % LABELS
    return TensorDataset(torch.cat([place, content], 1).unsqueeze(1), label)


class Small(nn.Module):
    """One mixture, and a fixed reading of its output as logits.

    Args:
        seed: of the experts' first values. The gate begins with expert e for region e.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        up = torch.randn(REGIONS, HIDDEN, WIDTH, generator=g) / WIDTH**0.5
        down = torch.randn(REGIONS, WIDTH, HIDDEN, generator=g) / HIDDEN**0.5
        gate = F.pad(torch.eye(REGIONS), (0, WIDTH - REGIONS))
        self.moe = UpcycledMoE(UpcycledRouter(gate, top_k=2), UpcycledExperts(up, down, nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.moe(x)[:, 0, :LABELS]
        return logits


def accuracy(model: nn.Module, tensors: Mapping[str, Tensor], test: TensorDataset) -> float:
    """Of the model with these values."""
    x, labels = test.tensors
    with torch.no_grad():
        logits = torch.func.functional_call(model, dict(tensors), (x,))
    return float((logits.argmax(1) == labels).float().mean())


def trained_base(seed: int) -> dict[str, Tensor]:
    """A model that knows all regions, trained in one place."""
    model = Small(seed)
    x, labels = world(4000, 1000 + seed).tensors
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    g = torch.Generator().manual_seed(seed)
    for _ in range(8):
        for part in torch.randperm(len(x), generator=g).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(x[part]), labels[part]).backward()
            optimiser.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def with_other_roles(base: Mapping[str, Tensor], client: int, share: float) -> dict[str, Tensor]:
    """The base, with experts and gate rows in another order on this share of the clients."""
    if client >= round(share * CLIENTS):
        return dict(base)
    return {name: tensor.roll(1 + client % (REGIONS - 1), 0) for name, tensor in base.items()}


def with_another_gate(base: Mapping[str, Tensor], seed: int, size: float) -> dict[str, Tensor]:
    """The base, its gate turned by a random matrix of `size` times its own norm."""
    g = torch.Generator().manual_seed(seed)
    turned = dict(base)
    (gate,) = (name for name in base if "router" in name or name.endswith("gate.weight"))
    noise = torch.randn(base[gate].shape, generator=g)
    turned[gate] = base[gate] + 2 * size * noise * base[gate].norm() / noise.norm()
    return turned


def one_point(
    parameter: str, value: float, seed: int, base: Mapping[str, Tensor]
) -> dict[str, float]:
    """Accuracy after one aggregation by each method, and the mean of the clients' own."""
    test = world(2000, 5000 + seed)
    share, epochs = (value, 5) if parameter == "regions" else (0.0, 1)
    sets = [world(TOKENS, 100 * seed + i, i % REGIONS, share) for i in range(CLIENTS)]
    training = Training(lr=3e-3, batch_size=16, local_epochs=epochs)
    found: dict[str, float] = {}
    for name, make in METHODS.items():
        model, strategy = Small(seed), make()
        with torch.no_grad():
            for key, param in model.named_parameters():
                param.copy_(base[key])
        prepare(model, strategy, CLIENTS)
        worker = Worker(model, sets, test, strategy, training, seed=seed)
        updates, own = [], []
        for client in range(CLIENTS):
            start = dict(base)
            if parameter == "roles":
                start = with_other_roles(base, client, value)
            if parameter == "gates":
                start = with_another_gate(base, 1000 * seed + client, value)
            updates.append(copied(worker.train(client, Broadcast(1, start), {}, personal=False)))
            own.append(accuracy(model, dict(model.named_parameters()), test))
        aggregate(strategy, updates)
        found[name] = accuracy(model, strategy.tensors, test)
        if name == "fedavg":
            found["clients"] = sum(own) / CLIENTS
    return found


def copied(update: Update) -> Update:
    """The same in memory of its own, which the next client does not train."""
    return replace(update, tensors={name: t.clone() for name, t in update.tensors.items()})


def main() -> None:
    """Run all points and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    shown = ["clients", *METHODS]
    runs: dict[str, dict[str, dict[int, Any]]] = {p: {m: {} for m in shown} for p in VALUES}
    for seed in range(args.seeds):
        base = trained_base(seed)
        for parameter, values in VALUES.items():
            found = [one_point(parameter, value, seed, base) for value in values]
            for method in shown:
                accuracies = [point[method] for point in found]
                runs[parameter][method][seed] = {"values": values, "accuracy_by_round": accuracies}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "controlled.json").write_text(json.dumps(runs), encoding="utf-8")
    panels(runs, list(runs), shown, args.out / "controlled.png", by_value, "parameter")
    for parameter, values in VALUES.items():
        columns: dict[str, Value] = {f"{v:g}": partial(at, i) for i, v in enumerate(values)}
        same = dict.fromkeys(columns, runs[parameter])
        print(f"{parameter}:\n\n{table(same, list(columns), shown, columns, 'fedavg')}\n")


def at(position: int, run: Mapping[str, Any]) -> float:
    """Accuracy at one value of the parameter."""
    return float(run["accuracy_by_round"][position])


def by_value(mine: Mapping[int, Mapping[str, Any]]) -> tuple[Any, Any]:
    """Values of a parameter [V], and accuracies [seeds, V]."""
    return mine[0]["values"], by_round(mine)[1]


if __name__ == "__main__":
    main()
