"""The messages at the start and end of a client's round, and the checks of their reader.

Each is a safetensors message as in `core.messages`, whose parts may hold these tensors:

    round start     model, extra (the strategy's), mask/kept [C] bool,
                    basis/rotation [C, C] float16, basis/mean, basis/scale and basis/weight
                    [C] float32
    round end       model, extra, counts (of BatchNorm, int64 []),
                    scores/channels float32, [C] or what else is measured,
                    loss/examples int64 [] and loss/sum float64 [] (of the tail in a U-shape)
    initial scores  scores/channels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sluiceway.channels import Basis
from sluiceway.core.messages import Facts, WireError, described, integer, parts_of
from sluiceway.errors import quoted
from sluiceway.strategies import Broadcast

ROUND_START: Final = ("model", "extra", "mask", "basis")
ROUND_END: Final = ("model", "extra", "scores", "counts", "loss")
INITIAL_SCORES: Final = ("scores",)

Parts = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class RoundEnd:
    """What a client sends at the end of a round.

    Attributes:
        model: its layers.
        extra: what its strategy sends with them.
        scores: float32, as many as expected; None if it sends none.
        counts: BatchNorm's counts of batches by name, which are not averaged.
        loss: (examples, sum of their losses) of the tail in a U-shape; (0, 0) without one.
    """

    model: Mapping[str, Tensor]
    extra: Mapping[str, Tensor]
    scores: Tensor | None
    counts: Mapping[str, int]
    loss: tuple[int, float]


def read_round_start(
    message: bytes, round: int, channels: int
) -> tuple[Broadcast, Tensor | None, Basis | None]:
    """The server's message: layers and what goes with them, a merged mask or basis if it has one.

    Args:
        round: the round that begins.
        channels: C at the cut.

    Returns:
        The broadcast, the mask [C] bool, and the basis.

    Raises:
        WireError: no such message, another round's, a mask without a channel, or a basis that is
            not finite or cannot be undone.
    """
    where = "round-start message"
    facts, parts = parts_of(message, ROUND_START, where)
    _require(facts, where, round=round)
    mask = _tensors(parts, "mask", {"kept": (torch.bool, (channels,))}, where).get("kept")
    # A byte of a message may be any: above 1 it is true, but counts as more than one.
    if mask is not None and int(mask.view(torch.uint8).max()) != 1:
        raise WireError(f"{where}: mask/kept: expected zeros and ones, at least one channel kept")
    kinds = {
        "rotation": (torch.float16, (channels, channels)),
        "mean": (torch.float32, (channels,)),
        "scale": (torch.float32, (channels,)),
        "weight": (torch.float32, (channels,)),
    }
    found = _tensors(parts, "basis", kinds, where)
    if found and not (
        all(bool(part.isfinite().all()) for part in found.values())
        and all(bool(found[name].min() > 0) for name in ("scale", "weight"))
    ):
        raise WireError(f"{where}: basis: expected finite numbers, scales and weights above 0")
    basis = Basis(**{name: part.float() for name, part in found.items()}) if found else None
    return Broadcast(round, parts["model"], parts["extra"]), mask, basis


def read_round_end(message: bytes, client: int, round: int, scores: int) -> RoundEnd:
    """The client's message.

    Args:
        client, round: whose message it must be, and of which round.
        scores: how many, C at the cut, or what a client measures besides.

    Raises:
        WireError: no such message, or another client's or round's.
    """
    where = "round-end message"
    facts, parts = parts_of(message, ROUND_END, where)
    _require(facts, where, client=client, round=round)
    integer(facts, "examples", where)
    kinds = dict.fromkeys(parts["counts"], (torch.int64, ()))
    counts = {name: int(t) for name, t in _tensors(parts, "counts", kinds, where).items()}
    if negative := [name for name, count in counts.items() if count < 0]:
        raise WireError(f"{where}: {quoted(f'counts/{negative[0]}')} is below zero")
    kinds = {"examples": (torch.int64, ()), "sum": (torch.float64, ())}
    loss = _tensors(parts, "loss", kinds, where)
    return RoundEnd(
        parts["model"],
        parts["extra"],
        _scores(parts, scores, where),
        counts,
        (int(loss["examples"]), float(loss["sum"])) if loss else (0, 0.0),
    )


def read_initial_scores(message: bytes, client: int, scores: int) -> Tensor | None:
    """The message of a client that scored its channels before the first round.

    Args:
        scores: how many.

    Returns:
        The scores; None of a client whose batches are all too small for its layers.

    Raises:
        WireError: no such message, or another client's.
    """
    where = "message of initial scores"
    facts, parts = parts_of(message, INITIAL_SCORES, where)
    _require(facts, where, client=client)
    return _scores(parts, scores, where)


def _require(facts: Facts, where: str, **expected: int) -> None:
    """Raise WireError unless the message is of that client and round."""
    for name, value in expected.items():
        if (got := integer(facts, name, where)) != value:
            raise WireError(f"{where}: {name} is {got}; expected {value}")


def _tensors(
    parts: Parts, part: str, kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], where: str
) -> Mapping[str, Tensor]:
    """The tensors of a part: all of these names, types and shapes, or none. Raises WireError."""
    found = parts[part]
    for name, (dtype, shape) in kinds.items() if found else ():
        if name not in found or found[name].dtype != dtype or found[name].shape != shape:
            got = described(found[name]) if name in found else "missing"
            kind = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            raise WireError(f"{where}: {quoted(f'{part}/{name}')} is {got}; expected {kind}")
    if strange := found.keys() - kinds.keys():
        raise WireError(f"{where}: tensor {quoted(f'{part}/{min(strange)}')} is not expected")
    return found


def _scores(parts: Parts, count: int, where: str) -> Tensor | None:
    """So many scores of a message; None without any. Raises WireError."""
    kinds = {"channels": (torch.float32, (count,))}
    scores = _tensors(parts, "scores", kinds, where).get("channels")
    if scores is not None and not bool(scores.isfinite().all()):
        raise WireError(f"{where}: scores/channels has NaN or infinity; expected finite numbers")
    return scores
