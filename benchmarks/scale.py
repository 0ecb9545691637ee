"""Many clients and many rounds: does a round cost what its participants cost?

    python benchmarks/scale.py                        10,000 clients, 1 % a round, 1,000 rounds
    python benchmarks/scale.py --clients 1000 --rounds 200

A linear model on 16 numbers, 8 examples a client, saved every 10 rounds. The table has the median
time of a round and the memory of the process in each tenth of the run; then the run is resumed for
one round more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.round_loop import Record
from sluiceway.core.settings import Training
from sluiceway.transport.local import federate

CLASSES = 4


def main() -> None:
    """Run it, print the table, resume."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1_000)
    parser.add_argument("--share", type=float, default=0.01, help="of the clients in a round")
    parser.add_argument("--method", default="fedavg")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(16, CLASSES, generator=generator)

    def examples(count: int) -> TensorDataset:
        inputs = torch.randn(count, 16, generator=generator)
        return TensorDataset(inputs, (inputs @ truth).argmax(1))

    clients = [examples(8) for _ in range(args.clients)]
    test = examples(500)
    process, began = psutil.Process(), time.perf_counter()
    seconds: list[float] = []
    memory: list[float] = []

    def note(record: Record) -> None:
        seconds.append(time.perf_counter() - began - sum(seconds))
        memory.append(process.memory_info().rss / 1e6)

    def run(rounds: int, folder: Path, *, resume: bool) -> float:
        torch.manual_seed(0)
        result = federate(
            nn.Linear(16, CLASSES),
            clients,
            test,
            args.method,
            rounds=rounds,
            participation=args.share,
            training=Training(lr=0.1, batch_size=4, optimizer="sgd"),
            device="cpu",
            personal_examples=0,
            checkpoint=Checkpoint(folder, resume=resume, every=10),
            on_start=lambda: None,
            on_round=note,
        )
        return result.accuracy

    with tempfile.TemporaryDirectory() as folder:
        accuracy = run(args.rounds, Path(folder), resume=False)
        print(f"{args.clients} clients, {args.method}, accuracy {accuracy:.3f} at the end\n")
        print("| rounds | median s a round | memory at the end (MB) |")
        print("|---|---:|---:|")
        tenth = max(1, args.rounds // 10)
        for first in range(0, args.rounds, tenth):
            part = seconds[first : first + tenth]
            last = first + len(part)
            middle = statistics.median(part)
            print(f"| {first + 1} to {last} | {middle:.4f} | {memory[last - 1]:.0f} |")
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / 1e6
        before = time.perf_counter()
        again = run(args.rounds + 1, Path(folder), resume=True)
        print(
            f"\ncheckpoints: {size:.0f} MB; resumed for one more round in "
            f"{time.perf_counter() - before:.1f} s, accuracy {again:.3f}"
        )


if __name__ == "__main__":
    main()
