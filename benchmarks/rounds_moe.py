"""MoE rounds against their floor; run by rounds.py, which says how."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from sluiceway.core.batches import FEATURES, Batch
from sluiceway.core.evaluation import label_counts
from sluiceway.core.round_loop import Loop, Rounds
from sluiceway.core.settings import Training
from sluiceway.data import TextDataset
from sluiceway.experiment.models import Pretrained, classifier, load_pretrained
from sluiceway.experiment.recipe import Model
from sluiceway.federated.client import prepare
from sluiceway.moe import UpcycledMoE, upcycled
from sluiceway.strategies import strategy
from sluiceway.transport.local import LocalEngine, standing

TEXTS, CLASSES = 240, 20
ROWS = upcycled.ROWS
TRAINING = Training()
CPU = torch.device("cpu")


def texts(kind: str, seed: int = 0) -> TextDataset:
    """Random tokens: "long" texts as 20 Newsgroups cut to 64 tokens has them, "short" ones as
    Banking77 (the median 13, half of a batch of 16 is padding)."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(TEXTS, generator=generator)
    middle, spread = (13, 0.4) if kind == "short" else (110, 0.8)
    lengths = (middle * (spread * draw).exp()).long().clamp(4, 64)
    mask = (torch.arange(64) < lengths[:, None]).long()
    ids = torch.randint(1000, 20000, mask.shape, generator=generator) * mask
    labels = torch.randint(CLASSES, (TEXTS,), generator=generator)
    return TextDataset({"input_ids": ids, "attention_mask": mask}, labels)


def model_of(loaded: Pretrained, skip: bool = False) -> nn.Module:
    """The quickstart's: MiniLM with 8 experts top-2 in its last layer, which is trained."""
    fresh = Pretrained(
        copy.deepcopy(loaded.backbone), loaded.tokenizer, loaded.source, loaded.hidden
    )
    return classifier(fresh, Model(skip_padding=skip), classes=CLASSES, seed=0)


@contextlib.contextmanager
def ours(
    loaded: Pretrained, examples: TextDataset, method: str, skip: bool = False
) -> Iterator[Callable[[int], object]]:
    """A round of the embedded engine with one client: observer, guards, counted bytes, records."""
    model, plan = model_of(loaded, skip), strategy(method)
    prepare(model, plan, 1)
    with standing(
        model,
        [examples],
        examples,
        plan,
        TRAINING,
        loss=F.cross_entropy,
        device=CPU,
        seed=0,
        personal_examples=0,
    ) as worker:
        assert hasattr(worker.clients[0], "features"), "the frozen layers' output is not kept"
        with LocalEngine(worker) as engine:
            rounds = Rounds(rounds=99_999, evaluate_every=99_999)
            loop = Loop(plan, engine, rounds, label_counts([examples]))
            loop.last_rounds = {}  # personal models are not evaluated
            yield lambda number: loop.run_round(number, [0])


@contextlib.contextmanager
def floor(loaded: Pretrained, examples: TextDataset) -> Iterator[Callable[[int], object]]:
    """Forward, backward, clipping and a step on batches that are there already."""
    model, plan = model_of(loaded), strategy("fedavg")
    prepare(model, plan, 1)
    with standing(
        model,
        [examples],
        examples,
        plan,
        TRAINING,
        loss=F.cross_entropy,
        device=CPU,
        seed=0,
    ) as worker:
        params = list(worker.params.values())
        worker.training_mode()
        prepared: list[Batch] = []

        def prepare_batches(number: int) -> None:
            generator = torch.Generator().manual_seed(number)
            order = torch.randperm(len(examples), generator=generator)
            prepared[:] = [
                Batch.of(worker.clients[0], rows, CPU) for rows in order.split(TRAINING.batch_size)
            ]

        def one_round(number: int) -> None:
            optimiser = TRAINING.optimiser(params)
            for batch in prepared:
                assert isinstance(batch.inputs, dict)
                logits = model(**batch.inputs, **{FEATURES: batch.features})
                F.cross_entropy(logits, batch.labels).backward()
                nn.utils.clip_grad_norm_(params, TRAINING.max_grad_norm)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)

        one_round.before = prepare_batches  # type: ignore[attr-defined]
        yield one_round


def rounds_over_floor(turns: int, kind: str) -> dict[str, list[float]]:
    """Processor seconds of each method's round over those of the floor, turn by turn."""
    loaded, examples = load_pretrained("minilm"), texts(kind)
    with contextlib.ExitStack() as stack:
        runs = {"floor": stack.enter_context(floor(loaded, examples))}
        for method in ("fedavg", "fedalign-moe"):
            runs[method] = stack.enter_context(ours(loaded, examples, method))
        seconds = by_turns(runs, turns)
    base = seconds.pop("floor")
    return {
        f"{name}, {kind} texts": [s / b for s, b in zip(found, base, strict=True)]
        for name, found in seconds.items()
    }


def gain_of_skipping(turns: int, kind: str) -> list[float]:
    """Processor seconds of a round of fedavg over those with `model.skip_padding`."""
    loaded, examples = load_pretrained("minilm"), texts(kind)
    with contextlib.ExitStack() as stack:
        runs = {
            name: stack.enter_context(ours(loaded, examples, "fedavg", skip))
            for name, skip in (("all", False), ("real", True))
        }
        seconds = by_turns(runs, turns)
    return [a / b for a, b in zip(seconds["all"], seconds["real"], strict=True)]


def by_turns(runs: dict[str, Callable[[int], object]], turns: int) -> dict[str, list[float]]:
    """Processor seconds of the thread, after two turns that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1, turns + 3):
        for name, run in runs.items():
            if before := getattr(run, "before", None):
                before(turn)
            began = time.thread_time()
            run(turn)
            found[name].append(time.thread_time() - began)
    return {name: seconds[2:] for name, seconds in found.items()}


def bfloat16_rows(turns: int) -> tuple[list[float], float]:
    """Forward and backward of bfloat16 experts on batches of changing size.

    Returns:
        Time with as many rows as there are over time with multiples of 32, turn by turn; the share
        of batches whose output and gradients are equal to the bit.
    """
    loaded = load_pretrained("minilm")
    block = next(m for m in model_of(loaded).modules() if isinstance(m, UpcycledMoE))
    block = copy.deepcopy(block).bfloat16().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    ratios, equal = [], []
    for turn in range(turns + 1):
        spent = {1: 0.0, ROWS: 0.0}
        for _ in range(15):
            tokens = int(torch.randint(200, 1024, (1,), generator=generator))
            hidden = torch.randn(tokens, 384, generator=generator).bfloat16()
            cotangent = torch.randn(tokens, 384, generator=generator).bfloat16()
            results = []
            for upcycled.ROWS in spent if turn % 2 else reversed(spent):
                x = hidden.clone().requires_grad_(True)
                began = time.thread_time()
                out = block(x)
                grads = torch.autograd.grad(out, [x, *block.parameters()], cotangent)
                spent[upcycled.ROWS] += time.thread_time() - began
                results.append((out, *grads))
            pairs = zip(*results, strict=True)
            equal.append(all(torch.equal(one, two) for one, two in pairs))
        ratios.append(spent[1] / spent[ROWS])
    return ratios[1:], sum(equal) / len(equal)
