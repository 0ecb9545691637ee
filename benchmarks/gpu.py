"""How long a round takes on a GPU: the aims of docs/performance.md, with random data.

    python benchmarks/gpu.py                        on the first GPU
    python benchmarks/gpu.py --device cpu --small   that it runs; its times mean nothing

`agnews`: the recipe's round (1,500 texts of up to 64 tokens over 10 clients, a BERT of MiniLM's
sizes with 8 experts in its last layer, fedalign-moe, 7,600 texts to test), clients one after the
other and all at once. `cifar10-split`: the recipe's round on 5,000 images. One layer of 64 experts:
forward and backward, during which nothing may wait for the GPU, and one expert after the other to
compare with. Weights and data are random, so that nothing is downloaded. Times are medians of what
follows a first round or call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertModel

from sluiceway.core.round_loop import Record
from sluiceway.core.settings import Optimisation, Training
from sluiceway.data import TextDataset
from sluiceway.experiment.heads import TextClassifier
from sluiceway.moe import upcycle
from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE, UpcycledRouter
from sluiceway.split import ACPSL, Conv4, split_train
from sluiceway.transport.local import federate


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything."""

    clients: int = 10
    texts: int = 150
    test: int = 7600
    layers: int = 6
    width: int = 384
    images: int = 1000
    split_test: int = 2000
    tokens: int = 4096
    experts: int = 64
    rounds: int = 6


SMALL = Sizes(3, 8, 20, 2, 48, 40, 20, 64, 8, 3)


def texts(count: int, seed: int) -> TextDataset:
    """Random tokens of AG News's lengths, about 50 and at most 64, in 4 classes."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (50 + 12 * torch.randn(count, generator=generator)).long().clamp(8, 64)
    mask = (torch.arange(64) < lengths[:, None]).long()
    ids = torch.randint(1000, 20000, mask.shape, generator=generator) * mask
    labels = torch.randint(4, (count,), generator=generator)
    return TextDataset({"input_ids": ids, "attention_mask": mask}, labels)


def classifier(sizes: Sizes) -> nn.Module:
    """A random BERT of MiniLM's sizes, its last layer 8 experts; these and the head are trained."""
    torch.manual_seed(0)
    backbone = BertModel(
        BertConfig(
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=12,
        ),
        add_pooling_layer=False,
    )
    upcycle(backbone, 1, 8, 2, noise=0.01)
    model = TextClassifier(backbone, sizes.width, 4)
    for name, param in model.named_parameters():
        moe = "intermediate.router" in name or "intermediate.experts" in name
        param.requires_grad_(moe or name.startswith("head"))
    return model


class Clock:
    """Seconds from round to round; the first is left out."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, list[float]()

    def start(self) -> None:
        self.last = now(self.device)

    def note(self, _: Record) -> None:
        here = now(self.device)
        self.seconds.append(here - self.last)
        self.last = here

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[1:])


def now(device: torch.device) -> float:
    """The time once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def federated_round(sizes: Sizes, device: torch.device, stacked: int) -> float:
    """Seconds of a round of `agnews`."""
    clock = Clock(device)
    result = federate(
        classifier(sizes),
        [texts(sizes.texts, n) for n in range(sizes.clients)],
        texts(sizes.test, 99),
        "fedalign-moe",
        rounds=sizes.rounds,
        training=Training(lr=1e-3, batch_size=16),
        device=str(device),
        stacked=stacked,
        threads=1 if device.type == "cpu" else None,
        on_start=clock.start,
        on_round=clock.note,
    )
    failed = [why for record in result.records for why in record.failed.values()]
    if failed:
        raise SystemExit(f"a client failed: {failed[0]}")
    return clock.median


def split_round(sizes: Sizes, device: torch.device) -> float:
    """Seconds of a round of `cifar10-split`: 5 clients, Conv4 cut at conv2, acp-sl."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> TensorDataset:
        labels = torch.randint(10, (count,), generator=generator)
        return TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), labels)

    torch.manual_seed(0)
    clock = Clock(device)
    split_train(
        Conv4(3, 10, 32),
        "conv2",
        [images(sizes.images) for _ in range(5)],
        images(sizes.split_test),
        ACPSL(warmup=1, ramp_rounds=0),
        rounds=sizes.rounds,
        training=Optimisation(optimizer="sgd", lr=0.02, momentum=0.9, batch_size=32),
        device=device,
        threads=1 if device.type == "cpu" else None,
        on_start=clock.start,
        on_round=clock.note,
    )
    return clock.median


def mixture(experts: int, width: int, inner: int, device: torch.device) -> UpcycledMoE:
    """A layer of experts with random weights, top-2."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 0.05 * torch.randn(*shape, generator=generator)

    layer = UpcycledMoE(
        UpcycledRouter(draw(experts, width), 2),
        UpcycledExperts(draw(experts, inner, width), draw(experts, width, inner), torch.tanh),
    )
    return layer.to(device)


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """Median time of a step."""
    step()
    found = []
    for _ in range(10):
        began = now(device)
        step()
        found.append(now(device) - began)
    return 1000 * statistics.median(found)


def layer_steps(sizes: Sizes, device: torch.device) -> tuple[float, float]:
    """Milliseconds of forward and backward in blocks, and expert by expert."""
    layer = mixture(sizes.experts, sizes.width, 4 * sizes.width, device)
    experts = layer.experts
    x = torch.randn(sizes.tokens, sizes.width, device=device)
    _, weights, indices = layer.router(x)
    rows, chosen = x.repeat_interleave(2, 0), indices.flatten()
    scale = weights.detach().reshape(-1, 1)

    def step(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def both() -> None:
            (run(rows, chosen) * scale).sum().backward()
            experts.zero_grad(set_to_none=True)

        return both

    def silent() -> None:
        if device.type != "cuda":
            return step(experts.in_blocks)()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).sum().backward()  # router, top-k and all
            step(experts.in_blocks)()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step(experts.in_blocks)()
    layer(x).sum().backward()
    silent()
    return milliseconds(step(experts.in_blocks), device), milliseconds(
        step(experts.in_turn), device
    )


def main() -> int:
    """Measure and print; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here; --device cpu --small tries the script out", file=sys.stderr)
        return 2
    sizes = SMALL if args.small else Sizes()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__} on {name}{', small sizes' if args.small else ''}\n")
    print("| | measured | aim |\n|---|---:|---:|")
    one, many = (federated_round(sizes, device, n) for n in (1, sizes.clients))
    print(f"| a round of agnews, one client after the other | {one:.3f} s | |")
    print(f"| a round of agnews, {sizes.clients} clients at once | {many:.3f} s | 0.4 s |")
    print(f"| a round of cifar10-split | {split_round(sizes, device):.3f} s | 0.5 s |", flush=True)
    blocks, turns = layer_steps(sizes, device)
    silent = "without waiting" if device.type == "cuda" else "in blocks"
    print(f"| a layer of {sizes.experts} experts, {silent} | {blocks:.2f} ms | |")
    print(f"| the same, one expert after the other | {turns:.2f} ms | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
