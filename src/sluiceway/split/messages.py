"""The messages that open and close a client's round, as they are read; see `federated.wire`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sluiceway.core.messages import WireError, described, integer, parts_of
from sluiceway.errors import line, quoted
from sluiceway.strategies import Broadcast

#: What the tensors of the two messages may be.
OPENING: Final = ("model", "extra", "mask")
CLOSING: Final = ("model", "extra", "scores", "counts", "loss")
RATING: Final = ("scores",)


def read_round_start(message: bytes, number: int, channels: int) -> tuple[Broadcast, Tensor | None]:
    """The server's message: layers and what goes with them, and a merged mask if it has one.

    Args:
        number: the round that begins.
        channels: C at the cut.

    Returns:
        The broadcast, and the mask [C] bool.

    Raises:
        WireError: no such message, of another round, or a mask that is not [C] bool with at least
            one channel.
    """
    facts, parts = parts_of(message, OPENING, "opening message")
    same("opening message", "round", integer(facts, "round", "opening message"), number)
    mask = only("opening message", "mask", "kept", parts["mask"])
    if mask is not None:
        fits = mask.dtype == torch.bool and mask.shape == (channels,)
        # A byte of a message may be any: above 1 it is true, but counts as more than one.
        if not fits or int(mask.view(torch.uint8).max()) != 1:
            raise WireError(
                f"opening message: mask/kept is {described(mask)}; expected bool [{channels}] with "
                "at least one channel kept"
            )
    return Broadcast(number, parts["model"], parts["extra"]), mask


@dataclass(frozen=True)
class RoundEnd:
    """What a client sends at the end of a round.

    Attributes:
        model: its layers. extra: what its strategy sends beside them.
        scores: [C] float32; None if it sends none.
        counts: BatchNorm's counts of batches by name, which no average is made of.
        loss: (examples, sum of their losses) of the tail in a U-shape; (0, 0) without one.
    """

    model: Mapping[str, Tensor]
    extra: Mapping[str, Tensor]
    scores: Tensor | None
    counts: Mapping[str, int]
    loss: tuple[int, float]


def read_round_end(message: bytes, client: int, number: int, channels: int) -> RoundEnd:
    """The client's message.

    Args:
        client, number: whose message it must be, and of which round.
        channels: C at the cut.

    Raises:
        WireError: no such message, another client's or round's, scores that are not [C] and
            finite, or counts that are none.
    """
    where = "closing message"
    facts, parts = parts_of(message, CLOSING, where)
    for name, expected in {"client": client, "round": number}.items():
        same(where, name, integer(facts, name, where), expected)
    integer(facts, "examples", where)
    counts = {name: count_of(name, tensor, where) for name, tensor in parts["counts"].items()}
    scores = scores_of(parts, channels, where)
    return RoundEnd(parts["model"], parts["extra"], scores, counts, loss_of(parts, where))


def count_of(name: str, tensor: Tensor, where: str) -> int:
    """A count of batches. Raises WireError."""
    if tensor.dtype != torch.int64 or tensor.dim() or int(tensor) < 0:
        raise WireError(f"{where}: counts/{line(name, 80)} is no count; expected int64 [] from 0")
    return int(tensor)


def loss_of(parts: Mapping[str, Mapping[str, Tensor]], where: str) -> tuple[int, float]:
    """Examples, and the sum of their losses. Raises WireError."""
    if not parts["loss"]:
        return 0, 0.0
    kinds = {"examples": torch.int64, "sum": torch.float64}
    for name, tensor in parts["loss"].items():
        if kinds.get(name) != tensor.dtype or tensor.dim():
            raise WireError(
                f"{where}: loss/{line(name, 80)} is {described(tensor)}; expected loss/examples, "
                "int64 [], and loss/sum, float64 []"
            )
    if parts["loss"].keys() != kinds.keys():
        raise WireError(f"{where}: loss/examples and loss/sum go together")
    return int(parts["loss"]["examples"]), float(parts["loss"]["sum"])


def read_initial_scores(message: bytes, client: int, channels: int) -> Tensor | None:
    """The message of a client that rated its channels before the first round.

    Args:
        client: whose message it must be.
        channels: C at the cut.

    Returns:
        Scores, [C]; None of a client whose batches are all too small for its layers.

    Raises:
        WireError: no such message, another client's, or scores that are not [C] and finite.
    """
    where = "rating message"
    facts, parts = parts_of(message, RATING, where)
    same(where, "client", integer(facts, "client", where), client)
    return scores_of(parts, channels, where)


def scores_of(
    parts: Mapping[str, Mapping[str, Tensor]], channels: int, where: str
) -> Tensor | None:
    """The scores of a message, [C]; None without any. Raises WireError."""
    scores = only(where, "scores", "channels", parts["scores"])
    if scores is None:
        return None
    if scores.dtype != torch.float32 or scores.shape != (channels,):
        raise WireError(
            f"{where}: scores/channels is {described(scores)}; expected float32 [{channels}]"
        )
    if not bool(scores.isfinite().all()):
        raise WireError(f"{where}: scores/channels has NaN or infinity; expected finite numbers")
    return scores


def same(where: str, name: str, got: int, expected: int) -> None:
    """Raise WireError unless the message is of that round or client."""
    if got != expected:
        raise WireError(f"{where}: {name} is {got}; expected {expected}")


def only(where: str, part: str, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The one tensor that a part may have; None without any."""
    for other in tensors:
        if other != name:
            raise WireError(f"{where}: tensor {quoted(f'{part}/{other}')}; expected {part}/{name}")
    return tensors.get(name)
