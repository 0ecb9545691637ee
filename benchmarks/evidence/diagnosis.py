"""How far clients diverge in real settings, measured where plain averaging takes their updates.

    python benchmarks/evidence/diagnosis.py                        20 Newsgroups, alpha 1, .1, .05
    python benchmarks/evidence/diagnosis.py --recipe banking77 --set data.limit=2000

FedAvg runs as ever, and in every round it is measured, over pairs of clients or over clients:

- routing overlap: sum_e min(r_i(e), r_j(e)) of their routing distributions, 1 if they are the same;
- gate, expert and other drift: |w_i - w| / |w|, from the values that the round began with;
- gate and expert consensus: cosine between two clients' changes of the gate, of the same expert;
- region similarity: S_ij(e) of docs/methods.md, 1 if the same expert serves the same tokens;
- moved: share of the experts that `match = "meaning"` would give another index.

Means over rounds, blocks and seeds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway import fedalign
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Session
from sluiceway.moe import Block, ParamSlice
from sluiceway.strategies import STRATEGIES, FedAlignMoE, Update
from sluiceway.strategies.parameters import PARAMETERS

MEASURES = (
    "routing overlap",
    "gate drift",
    "expert drift",
    "other drift",
    "gate consensus",
    "expert consensus",
    "region similarity",
    "moved",
)


@dataclass(config=PARAMETERS, kw_only=True)
class Diagnosis(FedAlignMoE):
    """FedAvg that reports how far its clients' updates are apart."""

    name: ClassVar[str] = "diagnosis"
    align: bool = False
    consistency: bool = False
    adaptive: bool = False
    semantic: bool = False

    def wants_regions(self) -> bool:
        return True

    def streams(self) -> bool:
        return False

    def begin(self, number: int, updates: Sequence[Update] = ()) -> None:
        super().begin(number, updates)
        if not updates:
            return
        held = list(updates)
        found = [self.measured(held, block) for block in self.layout.blocks]
        self.found = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
        owned = {
            *self.layout.gate_params,
            *(p.param for b in self.layout.blocks for e in b.pieces for p in e),
        }
        others = [piece for piece in self.shared_pieces if piece.param not in owned]
        self.found["other drift"] = self.drift(held, others)

    def measured(self, held: Sequence[Update], block: Block) -> dict[str, float]:
        """The measures of one block."""
        routing, load, regions = (
            torch.stack([getattr(u.routing[block.position], part).double() for u in held])
            for part in ("routing", "load", "region")
        )
        pairs = list(itertools.combinations(range(len(held)), 2))
        used = (load > 0).T
        both = torch.stack([used[:, i] & used[:, j] for i, j in pairs], 1)

        def over_pairs(values: Tensor) -> float:
            """Mean over experts and pairs of clients that both used the expert."""
            return float(torch.stack([values[:, i, j] for i, j in pairs], 1)[both].mean())

        gate = [ParamSlice.whole(name) for name in block.gate]
        experts = [block.expert(e) for e in range(block.num_experts)]
        gates = self.directions(held, gate)
        overlap = [float(torch.minimum(routing[i], routing[j]).sum()) for i, j in pairs]
        order = fedalign.match_experts(regions, load)
        return {
            "routing overlap": sum(overlap) / len(overlap),
            "gate drift": self.drift(held, gate),
            "expert drift": self.drift(held, [piece for expert in experts for piece in expert]),
            "gate consensus": float(torch.stack([gates[i, j] for i, j in pairs]).mean()),
            "expert consensus": over_pairs(
                torch.stack([self.directions(held, expert) for expert in experts])
            ),
            "region similarity": over_pairs(fedalign.region_similarity(regions, load)),
            "moved": float((order != torch.arange(block.num_experts)).double().mean()),
        }

    def drift(self, held: Sequence[Update], pieces: Sequence[ParamSlice]) -> float:
        """Mean over clients of |w_i - w| / |w|, over the pieces together; absent ones have none."""
        size = sum(float(p.of(self.tensors).double().square().sum()) for p in pieces)
        moved = [
            sum(
                float((u.tensors[p.key].double() - p.of(self.tensors).double()).square().sum())
                for p in pieces
                if p.key in u.tensors
            )
            for u in held
        ]
        return float(sum((one / size) ** 0.5 for one in moved) / len(held))

    def report(self) -> dict[str, float]:
        return self.found


def main() -> None:
    """Print a table, a column a setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--alphas", default="1,0.1,0.05")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    args = parser.parse_args()
    STRATEGIES[Diagnosis.name] = Diagnosis
    session, columns = Session(), {}
    for alpha in args.alphas.split(","):
        reports: list[dict[str, Any]] = []
        for seed in range(args.seeds):
            settings = [f"data.alpha={alpha}", f"run.seed={seed}", f"run.rounds={args.rounds}"]
            settings += [*args.settings, "method.name=diagnosis"]
            recipe = load_recipe(args.recipe, settings)
            result, _ = run(recipe, session=session)
            reports += [record.report for record in result.records]
        columns[alpha] = {
            name: sum(report[name] for report in reports) / len(reports) for name in MEASURES
        }
    print(f"| alpha | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for name in MEASURES:
        print(f"| {name} | {' | '.join(f'{c[name]:.3f}' for c in columns.values())} |")


if __name__ == "__main__":
    main()
