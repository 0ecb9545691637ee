"""The messages that open and close a client's round, as they are read; see `federated.wire`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from sluiceway.federated.wire import WireError, described, integer, parts_of
from sluiceway.oneline import quoted
from sluiceway.strategies import Broadcast

#: What the tensors of the two messages may be.
OPENING: Final = ("model", "extra", "mask")
CLOSING: Final = ("model", "extra", "scores")
RATING: Final = ("scores",)


def read_opening(message: bytes, number: int, channels: int) -> tuple[Broadcast, Tensor | None]:
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


def read_closing(
    message: bytes, client: int, number: int, channels: int
) -> dict[str, dict[str, Tensor]]:
    """The client's message: "model", "extra" and, if it sends them, "scores" as `channels`.

    Args:
        client, number: whose message it must be, and of which round.
        channels: C at the cut.

    Raises:
        WireError: no such message, another client's or round's, or scores that are not [C] and
            finite.
    """
    where = "closing message"
    facts, parts = parts_of(message, CLOSING, where)
    for name, expected in {"client": client, "round": number}.items():
        same(where, name, integer(facts, name, where), expected)
    integer(facts, "examples", where)
    if scores_of(parts, channels, where) is None:
        return {name: part for name, part in parts.items() if name != "scores"}
    return parts


def read_rating(message: bytes, client: int, channels: int) -> Tensor | None:
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
