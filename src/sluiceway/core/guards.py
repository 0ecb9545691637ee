"""What keeps an update out of the average: the guards of a round."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from sluiceway.errors import SluicewayError
from sluiceway.moe import BlockRouting
from sluiceway.strategies import Strategy, Update


class RunFailed(SluicewayError, RuntimeError):
    """A run that cannot go on; what was saved before stays. The message is one line."""


class TooFewUpdates(RunFailed):
    """A round had fewer usable updates than it needs."""


class Diverged(RunFailed):
    """What the server itself trains is not finite any more."""


@dataclass(frozen=True)
class Failure:
    """A client that gave no update in a round.

    Attributes:
        client: its number.
        why: in a few words.
        nbytes: length of what it sent all the same.
        error: what was raised, where there is such a thing.
    """

    client: int
    why: str
    nbytes: int = 0
    error: BaseException | None = None


@dataclass
class UpdateFilter:
    """Checks and counts a round's answers, and leaves out updates that would do harm.

    Attributes:
        strategy: set up; what an update must have is asked of it.
        round: the round that is run.
        asked: the clients that were sent its broadcast.
        least: usable updates that the round needs, >= 1.
        on_update: called after every answer with (done, of).
    """

    strategy: Strategy
    round: int
    asked: Collection[int]
    least: int = 1
    on_update: Callable[[int, int], None] = lambda done, of: None
    done: int = 0
    nbytes: int = 0
    used: list[int] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    personal: dict[int, float] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    error: BaseException | None = None

    def accept(self, answer: Update | Failure) -> Update | None:
        """The update, if it passes `fault`; None for any other answer, which is noted."""
        self.done += 1
        self.nbytes += answer.nbytes
        usable = None
        if isinstance(answer, Failure):
            self.failed[answer.client] = answer.why
            self.error = self.error or answer.error
        elif why := fault(answer, self.strategy, self.round, self.asked, self.used):
            self.rejected[answer.client] = why
        else:
            usable = answer
            self.used.append(answer.client)
            self.losses.append((answer.examples, answer.metrics.get("loss", float("nan"))))
            if "personal_accuracy" in answer.metrics:
                self.personal[answer.client] = answer.metrics["personal_accuracy"]
        self.on_update(self.done, len(self.asked))
        return usable

    def too_few(self) -> TooFewUpdates | None:
        """The error to raise where the round has fewer usable updates than it needs."""
        if len(self.used) >= self.least:
            return None
        error = TooFewUpdates(
            f"round {self.round}: {len(self.used)} of {len(self.asked)} updates could be used, "
            f"run.min_clients = {self.least}{self.first_fault()}"
        )
        error.__cause__ = self.error
        return error

    def first_fault(self) -> str:
        """The first client that gave no usable update, and why; for a message."""
        faults = {**self.rejected, **self.failed}
        if not faults:
            return ""
        client = min(faults)
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        return f" (client {client}: {faults[client]}{more})"

    def mean_loss(self) -> float:
        """The clients' mean training loss, example-weighted; NaN without a usable update."""
        weight = sum(n for n, _ in self.losses)
        return sum(n * x for n, x in self.losses) / weight if weight else float("nan")


def fault(
    update: Update,
    strategy: Strategy,
    number: int,
    asked: Collection[int],
    used: Collection[int] = (),
) -> str | None:
    """Why this update must not be aggregated, in a few words; None if nothing is wrong.

    Args:
        update: as it came.
        strategy: set up; says what an update must have.
        number: of the round that is run.
        asked: the clients that take part in it.
        used: those of whom an update was used already.
    """
    if update.round != number:
        return f"stale: it answers round {update.round}, this is round {number}"
    if update.client not in asked:
        return "it was not asked in this round"
    if update.client in used:
        return "a second update in the same round"
    if update.examples <= 0:
        return f"{update.examples} examples"
    return (
        routing_fault(update, strategy)
        or tensors_fault(update, strategy)
        or extra_fault(update.extra, strategy.client_extra())
    )


def routing_fault(update: Update, strategy: Strategy) -> str | None:
    """What is wrong with the routing report."""
    blocks = strategy.layout.blocks
    if len(update.routing) != len(blocks):
        return f"routing of {len(update.routing)} blocks, expected {len(blocks)}"
    for number, (report, block) in enumerate(zip(update.routing, blocks, strict=True)):
        if why := report_fault(report, block.num_experts):
            return f"{why} in the routing report of block {number}"
    return None


def report_fault(report: BlockRouting, experts: int) -> str | None:
    """What is wrong with the report on one block of so many experts."""
    for name in ("load", "routing", "margin"):
        value: Tensor = getattr(report, name)
        if value.shape != (experts,):
            return f"{name} {list(value.shape)}, expected [{experts}]"
        if not finite(value):
            return f"NaN or Inf ({name})"
        if bool((value < 0).any()):
            return f"a number below zero ({name})"
    if report.region is not None:
        if report.region.dim() != 2 or len(report.region) != experts:
            return f"region {list(report.region.shape)}, expected [{experts}, d]"
        if not finite(report.region):
            return "NaN or Inf (region)"
    return None


def tensors_fault(update: Update, strategy: Strategy) -> str | None:
    """What is wrong with the trained tensors: exactly those that the strategy says must cross."""
    pieces = {p.key: p for p in strategy.shared_pieces if strategy.sends(p, update.routing)}
    held = set(update.tensors)
    if lacking := [key for key in pieces if key not in held]:
        return f"{lacking[0]} is missing"
    if strange := sorted(held - set(pieces)):
        return f"{strange[0]} was not to be sent"
    for key, piece in pieces.items():
        value, like = update.tensors[key], piece.of(strategy.tensors)
        if why := tensor_fault(key, value, like):
            return why
    return None


def extra_fault(extra: Mapping[str, Tensor], like: Mapping[str, Tensor] | None) -> str | None:
    """What is wrong with the extra tensors of an update; `like` None leaves names open."""
    if like is not None and (strange := sorted(set(extra) - set(like))):
        return f"{strange[0]} was not to be sent"
    for name, value in extra.items():
        if why := tensor_fault(name, value, value if like is None else like[name]):
            return why
    return None


def tensor_fault(name: str, value: Tensor, like: Tensor) -> str | None:
    """What is wrong with one tensor that should be of the shape and type of another."""
    if value.shape != like.shape:
        return f"{name} has shape {list(value.shape)}, expected {list(like.shape)}"
    if value.dtype != like.dtype:
        return f"{name} is {value.dtype}, expected {like.dtype}".replace("torch.", "")
    return None if finite(value) else f"NaN or Inf in {name}"


def finite(value: Tensor) -> bool:
    """Whether all values are finite. One sum tells unless it overflows, which is then checked."""
    if not value.is_floating_point():
        return True
    return isfinite(value.sum(dtype=torch.float32).item()) or bool(value.isfinite().all())
