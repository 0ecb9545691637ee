"""What choosing and packing channels costs, on one core.

    python benchmarks/channels.py

Limits: scoring, packing and unpacking (both directions) take at most 10 % of the compute of client
and server for the 4-conv network at batch 64 of 3x32x32; packing float32 to int8 of kept channels
takes in at least 1 GB/s. Beside it a plain copy of the same tensor, in the same run. Codecs that
fill a budget of bytes ("bits", "step", "dct") do so at 32 times less, and are above the 10 % but
for small maps (docs/performance.md says of what). "acp-sl" is its default: all channels in the
eigenbasis, "dct"; its moments are of one batch in four, and "score" is a quarter of what they take.
Seconds are of CPU, since whatever else runs slows a step. The last column is what
reading both messages from bytes takes where they cross a process boundary, in which case it comes
on top.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from sluiceway.channels import (
    Basis,
    ClassStatistics,
    Moments,
    eigenbasis,
    fisher,
    fraction,
    pooled,
)
from sluiceway.core.memory import keep_freed_memory
from sluiceway.split import (
    ACPSL,
    BatchContext,
    BatchId,
    Channels,
    Compressor,
    Conv4,
    KeptChannels,
    cut,
    pack_smashed,
)
from sluiceway.split.compress import Quantize
from sluiceway.split.scorers import MomentScorer

BATCH, CLASSES, SHARE = 64, 10, 0.5
ID = BatchId(0, 1, 0)


def score(A: Tensor, labels: Tensor) -> Tensor:
    """A keep mask from the labels, as a client makes it of one batch."""
    seen = ClassStatistics.of(pooled(A), labels, CLASSES, cosines=False)
    return fraction(fisher(seen), SHARE)


class Step:
    """One step of split training, with a clock for each part."""

    def __init__(self, name: str, compressor: Compressor) -> None:
        torch.manual_seed(0)
        model = Conv4(3, CLASSES)
        self.front, self.back = cut(model, name)
        self.optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        self.images = torch.randn(BATCH, 3, 32, 32)
        self.labels = torch.randint(CLASSES, (BATCH,))
        self.compressor = compressor
        self.basis: Basis | None = None
        if isinstance(compressor, ACPSL):
            with torch.no_grad():
                found = self.moments(self.front(self.images))
            rotation, _ = eigenbasis(found.covariance)
            ones = torch.ones(len(rotation))
            self.basis = Basis(rotation.float(), found.mean.float(), ones, ones)

    def moments(self, A: Tensor) -> Moments:
        return Moments.of(A, torch.zeros_like(self.labels), 1)

    def run(self) -> dict[str, float]:
        """Seconds of each part."""
        spent: dict[str, float] = {}
        began = time.thread_time()
        basis = self.basis

        def lap(part: str) -> None:
            nonlocal began
            now = time.thread_time()
            spent[part] = spent.get(part, 0.0) + now - began
            began = now

        self.optimiser.zero_grad()
        A = self.front(self.images)
        lap("compute")
        mask = None if basis else score(A, self.labels)
        if basis:
            self.moments(A)
        lap("score")
        spent["score"] /= MomentScorer.every if basis else 1
        sent = basis.forward(A.detach()) if basis else A
        message, context = self.compressor.up(sent, ID, self.labels, mask)
        len(message)
        lap("pack")
        smashed = self.compressor.open(message)
        opened = basis.inverse(smashed.values) if basis else smashed.values
        lap("unpack")
        up = bytes(message)
        began = time.thread_time()
        self.compressor.open(up)
        lap("read")
        values = opened.requires_grad_()
        assert smashed.labels is not None
        functional.cross_entropy(self.back(values), smashed.labels).backward()
        lap("compute")
        assert values.grad is not None
        grad = basis.gradient(values.grad) if basis else values.grad
        message = self.compressor.down(grad, smashed.context)
        len(message)
        lap("pack")
        gradient = self.compressor.open_gradient(message, context)
        gradient = basis.gradient_back(gradient) if basis else gradient
        lap("unpack")
        down = bytes(message)
        began = time.thread_time()
        self.compressor.open_gradient(down, context)
        lap("read")
        A.backward(gradient)
        self.optimiser.step()
        lap("compute")
        return spent


def measure_share(rounds: int) -> None:
    """Each part of a step beside its compute, by cut and quantisation."""
    print(f"Batch {BATCH} x 3x32x32, {SHARE:.0%} of the channels kept; milliseconds a step\n")
    print("| cut | values | compute | score | pack | unpack | overhead | limit | read |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in ("conv1", "conv2", "conv3"):
        codecs: tuple[Quantize, ...] = ("none", "int8", "int4", "bits", "step", "dct")
        kinds: dict[str, Compressor] = {"acp-sl": ACPSL()}
        kinds |= {codec: Channels(quantize=codec) for codec in codecs}
        for kind, compressor in kinds.items():
            step = Step(name, compressor)
            laps = [step.run() for _ in range(rounds + 2)][2:]
            ms = {part: 1e3 * statistics.median(lap[part] for lap in laps) for part in laps[0]}
            # Of each step by itself: what slows the machine slows both parts of it.
            share = statistics.median(
                (lap["score"] + lap["pack"] + lap["unpack"]) / lap["compute"] for lap in laps
            )
            print(
                f"| {name} | {kind} | {ms['compute']:.1f} | {ms['score']:.2f} "
                f"| {ms['pack']:.2f} | {ms['unpack']:.2f} | {share:.1%} | 10 % "
                f"| {ms['read']:.2f} |",
                flush=True,
            )


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median time of a call."""
    call()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def pack(A: Tensor, mask: Tensor, codec: str) -> tuple[bytes, BatchContext]:
    return pack_smashed(A, KeptChannels(mask), ID, codec)


def measure_speed(rounds: int) -> None:
    """Input taken in per second, by shape, share kept and codec; the copy is of all of it."""
    print("\nGB/s of float32 input on one core (limit 1 GB/s for int8)\n")
    print("| smashed data | kept | copy | none | fp16 | int8 | int8-affine | int4-affine |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for shape in ((64, 32, 16, 16), (64, 32, 8, 8), (64, 64, 4, 4), (64, 64, 32, 32)):
        A = torch.randn(shape).relu()
        room = torch.empty_like(A)
        for kept in (0.25, 0.5, 1.0):
            mask = torch.arange(shape[1]) < kept * shape[1]
            codecs = ("none", "fp16", "int8", "int8-affine", "int4-affine")
            calls: list[Callable[[], object]] = [partial(room.copy_, A)]
            calls += [partial(pack, A, mask, codec) for codec in codecs]
            speeds = [f"{A.nbytes / 1e9 / seconds(call, rounds):.1f}" for call in calls]
            size = "x".join(map(str, shape))
            print(f"| {size} | {kept:.0%} | {' | '.join(speeds)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_memory()  # as runs do
    measure_share(rounds)
    measure_speed(rounds)


if __name__ == "__main__":
    main()
