"""What a round costs beyond its computing: against the same steps written plainly, by turns.

    python benchmarks/rounds.py moe|split [--turns 15]
    python benchmarks/rounds.py moe --bfloat16

A ratio is of processor seconds of the one thread, so that other work on the machine counts less:
the median of all turns, with the least and the most.

moe: a round of one client on the quickstart's model (MiniLM, 8 experts top-2 in the last layer, the
output of its frozen layers kept) with 240 texts in batches of 16, against forward, backward,
clipping and steps on batches made beforehand, without observer, strategy or messages. Aim: 1.15.
Also, what `model.skip_padding` gains (aim: 1.24 on short texts), and with --bfloat16, what filling
experts' rows up to a multiple of 32 gains.

split: a round of one client on Conv4 (width 32) with 1,000 pictures of 3x32x32 in batches of 32,
against forward, backward and steps of the network that is not cut, on the same batches. acp-sl is
its default, and with masks that keep half of the channels. Aims: sl 1.05, acp-sl 1.10. Besides, sl
and masks with weights of convolutions in channels_last (`model.channels_last`), against the same
floor.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import argparse
import cProfile
import pstats
import statistics

import torch

import rounds_moe
import rounds_split
from measuring import report
from sluiceway.core.memory import keep_freed_memory
from sluiceway.experiment.models import load_pretrained


def shown(found: list[float]) -> str:
    """The median with the least and the most."""
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("section", choices=["moe", "split"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--profile", metavar="METHOD", help="where the time of its rounds goes")
    parser.add_argument("--bfloat16", action="store_true", help="moe: rows in multiples of 32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as runs do, and so for the floor too
    if args.profile:
        loaded, examples = load_pretrained("minilm"), rounds_moe.texts("short")
        with rounds_moe.ours(loaded, examples, args.profile) as run:
            run(1)
            profiler = cProfile.Profile()
            for number in range(2, 8):
                profiler.runcall(run, number)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
        return
    rows: dict[str, str] = {}
    if args.bfloat16:
        gains, equal = rounds_moe.bfloat16_rows(args.turns)
        rows["bfloat16 experts: gain of rows in multiples of 32"] = shown(gains)
        rows["share of batches with equal results"] = f"{equal:.2f}"
        report(rows)
        return
    kinds, measure = {
        "moe": (("long", "short"), rounds_moe.rounds_over_floor),
        "split": (("conv1", "conv2"), rounds_split.rounds_over_floor),
    }[args.section]
    for kind in kinds:
        found = measure(args.turns, kind)
        rows |= {f"{name}: ratio to the floor": shown(ratios) for name, ratios in found.items()}
        if args.section == "moe":
            gains = rounds_moe.gain_of_skipping(args.turns, kind)
            rows[f"fedavg, {kind} texts: gain of model.skip_padding"] = shown(gains)
    report(rows)


if __name__ == "__main__":
    main()
