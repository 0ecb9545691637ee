"""A message that stays tensors is the message as bytes: its values, length, refusals, and runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from tests.split.small import METHODS_AND_SCHEDULES, Pictures, clients, numbers, same, train
from torch import Tensor

from sluiceway.core.round_loop import Result
from sluiceway.split import (
    METHODS,
    BatchId,
    Channels,
    Compressor,
    TopK,
    WireError,
    quantise,
    server,
)
from sluiceway.split.client import SplitClient
from sluiceway.split.packing import Encoded
from sluiceway.split.server import SplitServer

ID = BatchId(2, 3, 4)
ROUNDINGS = [(q, affine) for q in ("none", "fp16", "int8", "int4") for affine in (True, False)]


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Bit for bit, signs of zeros included."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


def smashed(batch: int, sides: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    scale = 10.0 ** torch.arange(-4, 4).view(8, *[1] * len(sides))
    return torch.randn(batch, 8, *sides, generator=generator) * scale


@pytest.mark.parametrize(("quantize", "affine"), ROUNDINGS)
@pytest.mark.parametrize("feedback", [False, True])
def test_both_forms_have_the_same_values_and_length(
    quantize: Any, affine: bool, feedback: bool
) -> None:
    settings = {"quantize": quantize, "affine": affine, "error_feedback": feedback}
    masks = (None, torch.arange(8) % 3 == 0, torch.arange(8) == 7)
    kinds: list[Callable[[], tuple[Compressor, Tensor | None]]] = [
        *(lambda mask=mask: (Channels(**settings), mask) for mask in masks),  # type: ignore[misc]
        *(lambda share=share: (TopK(share=share, **settings), None) for share in (0.04, 0.5, 1.0)),  # type: ignore[misc]
    ]
    for kind, batch, sides in product(kinds, (1, 3, 32), ((), (5,), (3, 3))):
        (one, mask), (other, _) = kind(), kind()
        A, labels = smashed(batch, sides), torch.arange(batch) * (9 if batch == 32 else 1)
        message, context = one.up(A, ID, labels, mask)
        packed = bytes(message)
        assert len(message) == len(packed)
        kept = None if mask is None else int(mask.sum())
        assert len(packed) == one.bytes_up(tuple(A.shape), kept, 2 if batch == 32 else 1)
        mine, theirs = one.open(message, classes=300), other.open(packed, classes=300)
        assert equal(mine.values, theirs.values)
        assert equal(mine.labels, theirs.labels)
        grad = smashed(batch, sides).flip(0) - 1
        for _ in range(2):  # of error feedback the second depends on the first
            down = one.down(grad, mine.context)
            back = bytes(other.down(grad, theirs.context))
            assert len(down) == len(back) == one.bytes_down(tuple(A.shape), kept)
            assert bytes(down) == back
            assert equal(one.open_gradient(down, context), other.open_gradient(back, context))


def test_nothing_is_copied_where_nothing_is_dropped_or_rounded() -> None:
    A = smashed(4, (3, 3))
    for memory in (torch.contiguous_format, torch.channels_last):
        given = A.contiguous(memory_format=memory)
        message, context = Compressor().up(given, ID)
        opened = Compressor().open(message)
        assert opened.values.data_ptr() == given.data_ptr()
        assert equal(opened.values.contiguous(), A)
        assert bytes(message) == bytes(Compressor().up(A, ID)[0])
        down = Compressor().down(given, opened.context)
        assert Compressor().open_gradient(down, context).data_ptr() == given.data_ptr()


def test_both_forms_are_refused_alike() -> None:
    A, labels = smashed(3, (2,)), torch.tensor([0, 4, 2])
    known: list[tuple[Compressor, dict[str, Any], str]] = [
        (Compressor(quantize="int8"), {}, "codec: expected int8-affine, got none"),
        (TopK(), {}, "kind: expected elements, got channels"),
        (Compressor(limit=191), {}, "the limit is 191|exceed 191"),
        (Compressor(), {"shape": (None, 8, 3)}, r"shape: expected \[any, 8, 3\]"),
        (Compressor(), {"batch": BatchId(2, 3, 5)}, "batch: expected"),
        (Compressor(), {"labels": False}, "labels: expected none, got some"),
        (Compressor(), {"classes": 4}, "labels: expected below 4, got 4"),
    ]
    sent, context = Compressor().up(A, ID, labels)
    gradient = Compressor().down(A, context)
    for form in (lambda message: message, bytes):
        for receiver, facts, why in known:
            with pytest.raises(WireError, match=why):
                receiver.open(form(sent), **facts)
        with pytest.raises(WireError, match="expected smashed data, got a gradient"):
            Compressor().open(form(gradient))
        _, other = Channels().up(A, ID, mask=torch.arange(8) > 0)
        with pytest.raises(WireError, match="expected 7 kept, got 8"):
            Compressor().open_gradient(form(gradient), other)


def through_bytes(cls: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack the messages that a method of the class sends, as if they went to another process."""
    method = getattr(cls, name)

    def packed(self: object, *given: Any) -> Any:
        found = method(self, *given)
        if isinstance(found, Encoded):
            return bytes(found)
        if isinstance(found, tuple):
            return [bytes(one) for one in found[0]], found[1]
        return [bytes(one) for one in found]

    monkeypatch.setattr(cls, name, packed)


def also_through_bytes(run: Callable[[], Result], monkeypatch: pytest.MonkeyPatch) -> Result:
    """The result of a run, which is the same where its messages are packed."""
    found = run()
    for method in ("smashed_data", "tail_gradient"):
        through_bytes(SplitClient, method, monkeypatch)
    for method in ("step", "step_u"):
        through_bytes(SplitServer, method, monkeypatch)
    packed = run()
    assert numbers(packed.records) == numbers(found.records)
    assert same(packed.tensors, found.tensors)
    return found


@pytest.mark.parametrize(("name", "schedule"), METHODS_AND_SCHEDULES)
def test_a_run_is_the_same_through_bytes(
    name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Result:
        method = METHODS[name](quantize="int8" if name != "sl" else "none", error_feedback=True)
        sets = [*clients(), Pictures(9, 6)]
        return train(method, sets, schedule=schedule, test=Pictures(40, 99))

    also_through_bytes(run, monkeypatch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(
    ("name", "schedule"),
    [("sl", "parallel"), ("acp-sl", "copies"), ("l1", "sequential"), ("quantize", "u")],
)
def test_a_step_waits_for_a_gpu_only_to_refuse(
    name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else of a step synchronises: that fails in this mode."""

    def in_mode(mode: str, owner: Any, method: str) -> None:
        call = getattr(owner, method)

        def called(*args: Any, **named: Any) -> Any:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return call(*args, **named)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        monkeypatch.setattr(owner, method, called)

    for method in ("smashed_data", "tail_gradient", "receive"):
        in_mode("error", SplitClient, method)
    for method in ("open", "step", "step_u"):
        in_mode("error", SplitServer, method)
    # What a message is refused by.
    in_mode("default", server, "finite")
    in_mode("default", quantise, "_valid")
    result = train(name, schedule=schedule, device="cuda")
    assert len(result.records) == 3
    assert not any(record.rejected for record in result.records)
