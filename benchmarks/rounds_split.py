"""Split rounds against their floor; run by rounds.py, which says how."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.data import TensorDataset

from sluiceway.core.batches import Batch
from sluiceway.core.evaluation import label_counts
from sluiceway.core.round_loop import Rounds
from sluiceway.core.settings import Optimisation
from sluiceway.split import ACPSL, Compressor, Conv4
from sluiceway.split.rounds import SplitLoop
from sluiceway.split.setup import SharedSetup, SplitSettings
from sluiceway.strategies import FedAvg

IMAGES, BATCH, CLASSES, WIDTH = 1000, 32, 10, 32
TRAINING = Optimisation(batch_size=BATCH)


class Pictures(TensorDataset):
    """Noise with labels; a whole batch at once, as the library's own image sets give it."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.images = torch.randn(size, 3, 32, 32, generator=generator)
        self.labels = torch.randint(CLASSES, (size,), generator=generator)
        super().__init__(self.images, self.labels)

    def gather(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[indices], self.labels[indices]


def network() -> Conv4:
    torch.manual_seed(0)
    return Conv4(3, CLASSES, WIDTH)


def floor(examples: Pictures) -> Callable[[int], None]:
    """An epoch of the unsplit network."""
    model = network()
    optimiser = TRAINING.optimiser(list(model.parameters()))
    model.train()

    def epoch(number: int) -> None:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(number))
        for part in order.split(BATCH):
            images, labels = examples.gather(part)
            functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return epoch


def split(
    examples: Pictures, method: Compressor, cut: str, layout: torch.memory_format
) -> Callable[[int], None]:
    """A round of split training, evaluated on ten pictures."""
    device = torch.device("cpu")
    settings = SplitSettings(
        cut, method, "parallel", None, FedAvg(), TRAINING, functional.cross_entropy, device, 0
    )
    example = Batch.of(examples, torch.tensor([0]), device)
    model = network()
    model.to(memory_format=layout)  # type: ignore[call-overload]
    setup = SharedSetup(model, settings, example, CLASSES, 1)
    clients = [setup.client(0, examples)]
    loop = SplitLoop(setup, Rounds(), Pictures(10), label_counts([examples]), clients)

    def round(number: int) -> None:
        loop.run_round(number, [0])

    return round


def rounds_over_floor(turns: int, cut: str) -> dict[str, list[float]]:
    """Processor seconds of each kind of round over those of the floor, turn by turn."""
    examples, half = Pictures(IMAGES), ACPSL(warmup=0, ramp_rounds=0, share=0.5)
    rounds = {"floor": floor(examples)}
    plain, last = torch.contiguous_format, torch.channels_last
    for name, method, layout in (
        ("sl", Compressor(), plain),
        ("acp-sl", ACPSL(), plain),
        ("acp-sl, masks", half, plain),
        ("sl in channels_last", Compressor(), last),
        ("acp-sl, masks, in channels_last", half, last),
    ):
        rounds[f"{name}, cut at {cut}"] = split(examples, method, cut, layout)
    found: dict[str, list[float]] = {name: [] for name in rounds}
    for turn in range(turns + 1):  # the first warms up
        for name, run in rounds.items():
            began = time.thread_time()
            run(turn + 1)
            found[name].append(time.thread_time() - began)
    base = found.pop("floor")[1:]
    return {n: [s / b for s, b in zip(t[1:], base, strict=True)] for n, t in found.items()}
