"""What one lying client of five does to each strategy, with the guards and with robust rules.

    python benchmarks/liars.py                      every strategy, with the guards of a run alone
    python benchmarks/liars.py --rules              FedAvg, FedAlign-MoE and SCAFFOLD with each rule
    python benchmarks/liars.py --rule agreement     every strategy with one rule
    python benchmarks/liars.py --only fedavg

The model is a tiny BERT whose last layer has 4 experts, the data are three balanced classes that an
honest run learns in the 8 rounds. Accuracies after the last round; * marks runs in which updates
were left out. A lie is told in every round: a number at its worst, or what the client learned
turned around and made longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.worlds

from tests.worlds import TinyClassifier, TinyText

from sluiceway.core.guards import norm
from sluiceway.core.settings import Training
from sluiceway.errors import SluicewayError
from sluiceway.federated.client import Worker
from sluiceway.strategies import ROBUST, STRATEGIES, FedAlignMoE, Strategy, TrimmedMean, Update
from sluiceway.transport import local
from sluiceway.transport.local import federate

Lie = Callable[[Update, Mapping[str, Tensor]], Update]


def turned(factor: float) -> Lie:
    """What was learned, turned around and so many times as long."""

    def lie(update: Update, old: Mapping[str, Tensor]) -> Update:
        tensors = {key: old[key] - factor * (v - old[key]) for key, v in update.tensors.items()}
        return replace(update, tensors=tensors)

    return lie


def noise(factor: float) -> Lie:
    """Noise, so many times as long as what was learned."""

    def lie(update: Update, old: Mapping[str, Tensor]) -> Update:
        torch.manual_seed(update.round)
        drawn = {key: torch.randn_like(v) for key, v in update.tensors.items()}
        learned = norm((v, old[key]) for key, v in update.tensors.items())
        share = factor * learned / norm((v, None) for v in drawn.values())
        return replace(update, tensors={key: old[key] + share * v for key, v in drawn.items()})

    return lie


def once(number: int, told: Lie) -> Lie:
    """A lie of one round alone."""
    return lambda update, old: told(update, old) if update.round == number else update


def reported(**parts: float) -> Lie:
    """A part of the routing report that is this number everywhere."""

    def lie(update: Update, old: Mapping[str, Tensor]) -> Update:
        routing = []
        for report in update.routing:
            held = {name: getattr(report, name) for name in parts}
            changed: dict[str, Any] = {
                n: torch.full_like(t, parts[n]) for n, t in held.items() if t is not None
            }
            routing.append(replace(report, **changed))
        return replace(update, routing=routing)

    return lie


def busy(factor: int, told: Lie) -> Lie:
    """A lie with so many times the tokens, spread evenly over the experts, and full margins."""

    def lie(update: Update, old: Mapping[str, Tensor]) -> Update:
        routing = [
            replace(
                report,
                tokens=factor * report.tokens,
                load=torch.full_like(report.load, factor * float(report.load.mean())),
                margin=torch.ones_like(report.margin),
            )
            for report in update.routing
        ]
        return told(replace(update, routing=routing), old)

    return lie


def besides(factor: float) -> Lie:
    """Extra tensors (controls, moments) times a factor."""
    return lambda update, old: replace(
        update, extra={name: (factor * t).to(t.dtype) for name, t in update.extra.items()}
    )


LIES: dict[str, Lie] = {
    "honest": lambda update, old: update,
    "values 1e15": lambda update, old: replace(
        update, tensors={key: torch.full_like(v, 1e15) for key, v in update.tensors.items()}
    ),
    "turned x100": turned(100),
    "turned x9": turned(9),
    "turned x2": turned(2),
    "turned x1": turned(1),
    "turned x2, tokens x9": busy(9, turned(2)),
    "noise x9": noise(9),
    "once, x9": once(7, turned(9)),
    "at last, x9": once(8, turned(9)),
    "examples 2^62": lambda update, old: replace(update, examples=1 << 62),
    "load 1e12": reported(load=1e12),
    "margin 1e9": reported(margin=1e9),
    "region -1e30": reported(region=-1e30),
    "extra x-1": besides(-1),
    "extra x-9": besides(-9),
    "extra x1e15": besides(1e15),
}


class Lying(Worker):
    """Client 0 lies."""

    lie: Lie

    def train(
        self, number: int, broadcast: Any, state: dict[str, Tensor], *, personal: bool
    ) -> Update:
        update = super().train(number, broadcast, state, personal=personal)
        old = {piece.key: piece.of(self.strategy.tensors) for piece in self.strategy.shared_pieces}
        return Lying.lie(update, old) if number == 0 else update


def accuracy(strategy: Strategy, leave_one_out: bool) -> str:
    """Of a run, and whether updates were left out."""
    try:
        result = federate(
            TinyClassifier(),
            [TinyText(32, seed) for seed in range(5)],
            TinyText(60, 99),
            strategy,
            rounds=8,
            training=Training(lr=0.02, batch_size=8),
            device="cpu",
            personal_examples=0,
            leave_one_out=leave_one_out,
        )
    except SluicewayError as error:
        return f"ended: {error}"
    return f"{result.accuracy:.2f}{'*' if result.rejected else ''}"


def strategies(rules: bool, rule: str) -> dict[str, Callable[[], Strategy]]:
    """What is tried, by name: some strategies with each rule, or all with one or none."""

    def made(name: str, rule: str = "") -> Strategy:
        found = STRATEGIES[name](**({"lr": 0.03} if name in ("fedadam", "fedyogi") else {}))
        if rule:
            found.with_rules(TrimmedMean(share=0.2) if "trimmed" in rule else ROBUST[rule]())
        return found

    if rules:
        names = ("fedavg", "fedalign-moe", "scaffold")
        return {f"{n}, {r}": lambda n=n, r=r: made(n, r) for n in names for r in ROBUST}  # type: ignore[misc]
    all_of_them = {name: lambda name=name: made(name, rule) for name in STRATEGIES}

    def region() -> Strategy:
        found = FedAlignMoE(experts="region", gate="region")
        return found.with_rules(*([ROBUST[rule]()] if rule else []))

    return {**all_of_them, "region": region}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rules", action="store_true", help="with each robust rule")
    parser.add_argument("--rule", default="", help="every strategy with this one")
    parser.add_argument("--leave-one-out", action="store_true", help="with run.leave_one_out")
    parser.add_argument("--only", help="one strategy")
    args = parser.parse_args()
    torch.set_num_threads(1)
    local.Worker = Lying  # type: ignore[attr-defined]
    print("| |", " | ".join(LIES), "|")
    print("|---|" + "---:|" * len(LIES))
    for name, make in strategies(args.rules, args.rule).items():
        if args.only in (None, name):
            row = []
            for Lying.lie in LIES.values():
                row.append(accuracy(make(), args.leave_one_out))
            print(f"| {name} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
