"""What aggregation costs the server: time against FedAvg and one pass, memory in updates.

    python benchmarks/aggregate.py            CPU time, 10 and 100 updates of 8 experts of 192
    python benchmarks/aggregate.py --width 1536            the same of whole experts
    python benchmarks/aggregate.py --memory   peak memory, 50 updates of 100 MB (needs 6 GB of disk)
    python benchmarks/aggregate.py --memory --width 192 --updates 1000   many small ones (5 GB)

Aims: FedAlign-MoE takes at most 1.5 times FedAvg's time plus one pass over the updates (its experts
by region, the default, take two and a half times that, see docs/methods.md); FedAvg holds at most 4
updates in memory, and memory does not grow with their number.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sluiceway.core.aggregation import aggregate
from sluiceway.core.guards import finite
from sluiceway.core.messages import read_update, write_update
from sluiceway.core.parameters import exchanged
from sluiceway.federated.client import trained_layout
from sluiceway.moe import BlockRouting, MoELayout, moe_layout
from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE, UpcycledRouter
from sluiceway.strategies import Strategy, Update, strategy

EXPERTS, HIDDEN = 8, 384


def world(width: int) -> tuple[dict[str, Tensor], MoELayout]:
    """One mixture block of the given expert width, and where its experts are."""
    shape = (EXPERTS, width, HIDDEN)
    experts = UpcycledExperts(
        torch.randn(shape) * 0.02, torch.randn(EXPERTS, HIDDEN, width) * 0.02, nn.GELU()
    )
    router = UpcycledRouter(torch.randn(EXPERTS, HIDDEN) * 0.02, 2)
    model = nn.Sequential(UpcycledMoE(router, experts))
    tensors = {name: t.detach() for name, t in exchanged(model).items()}
    return tensors, trained_layout(moe_layout(model), set(tensors))


def one_update(client: int, tensors: dict[str, Tensor], found: MoELayout) -> Update:
    """A random update near the given tensors, every expert used."""
    g = torch.Generator().manual_seed(client)
    moved = {
        piece.key: piece.of(tensors) + 0.01 * torch.randn(piece.of(tensors).shape, generator=g)
        for piece in found.pieces(tensors)
    }
    r = torch.rand(EXPERTS, generator=g).double() + 0.1
    report = BlockRouting(
        load=torch.randint(1, 99, (EXPERTS,), generator=g).double(),
        routing=r / r.sum(),
        margin=torch.rand(EXPERTS, generator=g).double(),
        region=torch.randn(EXPERTS, HIDDEN, generator=g),
        tokens=500,
    )
    return Update(client, 1, 100 + client, moved, [report])


def files(folder: Path, count: int, tensors: dict[str, Tensor], found: MoELayout) -> list[Path]:
    """Packed updates on disk."""
    paths = [folder / f"update-{i}" for i in range(count)]
    for i, path in enumerate(paths):
        write_update(path, one_update(i, tensors, found))
    return paths


def ready(name: str, tensors: dict[str, Tensor], found: MoELayout, clients: int) -> Strategy:
    made = strategy(name)
    made.setup(tensors, found, clients)
    return made


def one_pass(paths: list[Path]) -> None:
    """Read every value of every update once."""
    for path in paths:
        update = read_update(path)
        for tensor in update.tensors.values():
            finite(tensor)


def timed(count: int, rounds: int, width: int) -> dict[str, list[float]]:
    """CPU seconds of each strategy and of one pass, in turn, `rounds` times after a warm-up."""
    tensors, found = world(width)
    taken: dict[str, list[float]] = {"fedavg": [], "fedalign-moe": [], "pass": []}
    with tempfile.TemporaryDirectory() as name:
        paths = files(Path(name), count, tensors, found)
        for _ in range(rounds + 1):
            for method in ("fedavg", "fedalign-moe"):
                made = ready(method, tensors, found, count)
                began = time.process_time()
                aggregate(made, map(read_update, paths))
                taken[method].append(time.process_time() - began)
            began = time.process_time()
            one_pass(paths)
            taken["pass"].append(time.process_time() - began)
    return {what: spent[1:] for what, spent in taken.items()}


def measure_time(rounds: int, width: int) -> None:
    """Time both strategies and one pass in turn, on the same files."""
    print("| updates | FedAvg s | one pass s | FedAlign-MoE s | limit s | share of the limit |")
    print("|---:|---:|---:|---:|---:|---:|")
    for count in (10, 100):
        taken = timed(count, rounds, width)
        avg, align, once = (statistics.median(taken[k]) for k in ("fedavg", "fedalign-moe", "pass"))
        ratios = [
            a / (1.5 * f + p)
            for f, a, p in zip(taken["fedavg"], taken["fedalign-moe"], taken["pass"], strict=True)
        ]
        share = statistics.median(ratios)
        print(
            f"| {count} | {avg:.2f} | {once:.2f} | {align:.2f} | {1.5 * avg + once:.2f} "
            f"| {share:.2f} |"
        )


class Peak(threading.Thread):
    """Samples this process's memory: what it allocated, and file pages that it has mapped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.going = True
        self.anonymous = self.mapped = 0

    def run(self) -> None:
        while self.going:
            now = memory()
            self.anonymous = max(self.anonymous, now["RssAnon"])
            self.mapped = max(self.mapped, now["RssFile"])
            time.sleep(0.002)


def memory() -> dict[str, int]:
    """Bytes of this process's memory by kind (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")
    }


def measure_memory(name: str, count: int, width: int) -> None:
    """Peak memory of one strategy over `count` updates, above what it began with."""
    tensors, found = world(width)
    size = sum(t.nbytes for t in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        # Made elsewhere, so that memory freed here does not hide what aggregation takes.
        maker = multiprocessing.get_context("spawn").Process(
            target=files, args=(Path(folder), count, tensors, found)
        )
        maker.start()
        maker.join()
        paths = [Path(folder) / f"update-{i}" for i in range(count)]
        start = memory()
        made = ready(name, tensors, found, count)
        peak = Peak()
        peak.start()

        def coming() -> Iterator[Update]:
            for path in paths:
                yield read_update(path)

        aggregate(made, coming())
        peak.going = False
        peak.join()
    held = (peak.anonymous - start["RssAnon"]) / size
    mapped = (peak.mapped - start["RssFile"]) / size
    print(f"| {name} | {count} | {size / 1e6:.0f} | {held:.2f} | {mapped:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--width", type=int, help="of an expert; 192, or 4064 for memory")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.only:
        measure_memory(args.only, args.updates, args.width or 4064)
    elif args.memory:
        print("| method | updates | MB each | allocated, in updates | mapped files, in updates |")
        print("|---|---:|---:|---:|---:|", flush=True)
        for name in ("fedavg", "fedalign-moe"):  # a process each: peaks do not mix
            command = [sys.executable, __file__, "--only", name, "--updates", str(args.updates)]
            command += ["--width", str(args.width or 4064)]
            subprocess.run(command, check=True)
    else:
        measure_time(args.rounds, args.width or 192)


if __name__ == "__main__":
    main()
