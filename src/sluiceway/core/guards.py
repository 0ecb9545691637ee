"""What keeps an update out of the average: the guards of a round."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, nan
from statistics import median, median_low
from typing import Final

import torch
from torch import Tensor

from sluiceway.errors import SluicewayError, line, quoted
from sluiceway.moe import Block, BlockRouting
from sluiceway.strategies import Strategy, Update

#: What is measured of an update, and how it is called in a message.
KINDS: Final = {
    "change": "the norm of its change, for its number of examples,",
    "extra": "the norm of its extra tensors",
    "tokens": "its number of tokens for each example",
    "loss": "the loss of its model on the test set",
}
#: Values of a measure that are remembered, the newest.
WINDOW: Final = 200
#: Rounds before this one over which it is seen whether a client goes against the others.
OFTEN: Final = 4
#: Metrics of an update, at most; and tokens, below 2^53, where float64 counts them exactly.
METRICS: Final = 64
MOST_TOKENS: Final = 1 << 53
#: How far a report's sums may be off, which clients compute in their own precision.
ROUNDING: Final = 1e-2

Measures = Mapping[str, float]


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


class Usual:
    """What is usual among a run's updates, against which outliers are seen.

    Each update has a few measures, see `measured`. The usual value of one is the larger of two
    medians: over the updates of the round, and over those that were used in the newest rounds
    before. So one client moves neither, and a run in which all clients change more than before has
    no outliers. Of extra tensors it is the largest of all rounds' medians: control variates are
    large when a client first takes part, and small once the others have converged. [ours]

    Args:
        most: how many times the usual value an update may have, > 1; 0 for any.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self.past: dict[str, deque[float]] = {}

    def limits(self, measures: Collection[Measures] = ()) -> Measures:
        """The largest value that each measure may have, given those of the round's updates."""
        now = {
            name: [one[name] for one in measures if isfinite(one.get(name, nan))] for name in KINDS
        }
        # Of two values the smaller; one alone says nothing about itself.
        return {
            name: self.limit(name, [median_low(values)] if len(values) > 1 else [])
            for name, values in now.items()
        }

    def limit(self, name: str, medians: Sequence[float] = ()) -> float:
        """The largest value that a measure may have, given medians besides those of the past."""
        past = self.past.get(name, ())
        over_rounds = max if name == "extra" else median
        usual = max((*([over_rounds(past)] if past else []), *medians), default=0.0)
        return self.most * usual if self.most and usual else float("inf")

    def note(self, name: str, values: Sequence[float]) -> None:
        """Count the values of a measure that were used in a round."""
        past = self.past.setdefault(name, deque(maxlen=window(name)))
        if name != "extra":
            past.extend(values)
        elif len(values) > 1 or not past:
            past.extend([median_low(values)] if values else [])

    def opposes(self, client: int, agreement: float) -> bool:
        """Whether a client goes against the others, on the mean of its newest rounds and this."""
        return sum(self.past.get(f"agreement {client}", ()), agreement) < 0

    def facts(self) -> dict[str, list[float]]:
        """What a checkpoint keeps of it, ready for JSON."""
        return {name: list(values) for name, values in self.past.items()}

    def take(self, facts: Mapping[str, Sequence[float]]) -> None:
        """Continue from what `facts` gave."""
        for name, values in facts.items():
            self.past[name] = deque(map(float, values), maxlen=window(name))


def window(name: str) -> int:
    """How many values of a measure are remembered."""
    return OFTEN if name.startswith("agreement") else WINDOW


def excess(measures: Measures, limits: Measures) -> str | None:
    """Which measure of an update is above its limit, in a few words; None if none is."""
    for name, limit in limits.items():
        if not measures.get(name, 0.0) <= limit:
            return f"{KINDS[name]} is {measures[name]:.3g}; expected at most {limit:.3g}"
    return None


@dataclass
class UpdateFilter:
    """Checks and counts a round's answers, and leaves out updates that would do harm.

    An update is used if nothing is wrong with it (see `examined`) and its measures are within their
    limits: those of earlier rounds at once, and by `settle` those of the whole round.

    Attributes:
        strategy: set up; what an update must have is asked of it.
        round: the round that is run.
        asked: the clients that were sent its broadcast.
        least: usable updates that the round needs, >= 1.
        on_update: called after every answer with (done, of).
        examples: by client, how many it said it holds when it joined; None if that is not known.
        usual: what is usual.
        at_once: apply the limits of earlier rounds to each update as it comes.
        agreement: by client, how far it goes the way of the others, where that was measured.
    """

    strategy: Strategy
    round: int
    asked: Collection[int]
    least: int = 1
    on_update: Callable[[int, int], None] = lambda done, of: None
    examples: Sequence[int] | None = None
    usual: Usual = field(default_factory=lambda: Usual(0))
    at_once: bool = True
    done: int = 0
    nbytes: int = 0
    rejected: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    measures: dict[int, Measures] = field(default_factory=dict)
    accepted: dict[int, tuple[int, Mapping[str, float]]] = field(default_factory=dict)
    outliers: set[int] = field(default_factory=set)
    agreement: dict[int, float] = field(default_factory=dict)
    error: BaseException | None = None

    def accept(self, answer: Update | Failure) -> Update | None:
        """The update, if nothing is wrong with it so far; None for any other, which is noted."""
        self.done += 1
        self.nbytes += answer.nbytes
        usable = None
        if isinstance(answer, Failure):
            self.failed[answer.client] = answer.why
            self.error = self.error or answer.error
        elif isinstance(found := self.examined(answer), str):
            self.rejected[answer.client] = found
        else:
            self.accepted[answer.client] = answer.examples, answer.metrics
            self.measures[answer.client] = found
            if self.at_once and (why := excess(found, self.known_limits)):
                self.leave_out(answer.client, why)
            else:
                usable = answer
        self.on_update(self.done, len(self.asked))
        return usable

    def examined(self, update: Update) -> Measures | str:
        """Its measures, or why it must not be aggregated; see `examined`."""
        known = self.strategy, self.round, self.asked, self.accepted, self.examples
        found = examined(update, *known)
        if isinstance(found, str) or not self.examples:
            return found
        # Who holds more than others makes more steps, and goes as much further at most.
        return {**found, "change": found["change"] / max(1.0, update.examples / self.typical)}

    @cached_property
    def typical(self) -> float:
        """The median of what clients hold, of those that hold any."""
        return median(held) if (held := [n for n in self.examples or () if n]) else 1.0

    @cached_property
    def known_limits(self) -> Measures:
        """The limits of earlier rounds."""
        return self.usual.limits()

    def settle(self) -> bool:
        """Apply the limits that the round's own updates give too, now that all are there.

        Returns:
            Whether exactly the updates that `accept` returned are still used.
        """
        limits, before = self.usual.limits(self.measures.values()), set(self.outliers)
        for client in before:
            del self.rejected[client]
        self.outliers.clear()
        for client, one in self.measures.items():
            if why := excess(one, limits):
                self.leave_out(client, why)
        return before == self.outliers

    def leave_out(self, client: int, why: str) -> None:
        """Do not use an update that has no fault in itself."""
        self.outliers.add(client)
        self.rejected[client] = why

    def may_lose_one(self) -> bool:
        """Whether the round has enough updates without one more, and most of those it got."""
        enough = len(self.used) > max(self.least, 2)
        return enough and 2 * (len(self.outliers) + 1) < len(self.accepted)

    @property
    def used(self) -> list[int]:
        """The clients whose updates count."""
        return [client for client in self.accepted if client not in self.outliers]

    @property
    def personal(self) -> dict[int, float]:
        """Accuracies of own models, of the clients that reported one."""
        reported = {client: self.accepted[client][1] for client in self.used}
        name = "personal_accuracy"
        return {client: found[name] for client, found in reported.items() if name in found}

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
        """The clients' mean training loss, example-weighted, of those that reported a finite one.

        NaN if there is none.
        """
        used = [self.accepted[client] for client in self.used]
        losses = [(n, metrics["loss"]) for n, metrics in used if isfinite(metrics.get("loss", nan))]
        weight = sum(n for n, _ in losses)
        return sum(n * x for n, x in losses) / weight if weight else nan


def fault(
    update: Update,
    strategy: Strategy,
    number: int,
    asked: Collection[int],
    used: Collection[int] = (),
    examples: Sequence[int] | None = None,
) -> str | None:
    """Why this update must not be aggregated, in a few words; None if nothing is wrong."""
    found = examined(update, strategy, number, asked, used, examples)
    return found if isinstance(found, str) else None


def examined(
    update: Update,
    strategy: Strategy,
    number: int,
    asked: Collection[int],
    used: Collection[int] = (),
    examples: Sequence[int] | None = None,
) -> Measures | str:
    """The measures of an update, or why it must not be aggregated, in a few words.

    It is one schema of all that an update may be: which round and client, ranges of every number,
    and exactly the tensors, extras and reports that the strategy asked for. What is quoted from an
    update is on one line and short.

    Args:
        update: as it came.
        strategy: set up; says what an update must have.
        number: of the round that is run.
        asked: the clients that take part in it.
        used: those of whom an update was used already.
        examples: by client, what it said when it joined; None if that is not known.
    """
    if update.round != number:
        return f"stale: it answers round {update.round}, this is round {number}"
    if update.client not in asked:
        return "it was not asked in this round"
    if update.client in used:
        return "a second update in the same round"
    if update.examples <= 0:
        return f"{update.examples} examples"
    if examples is not None and update.examples > examples[update.client]:
        return f"{update.examples} examples; it joined with {examples[update.client]}"
    why = (
        routing_fault(update, strategy)
        or tensors_fault(update, strategy)
        or extra_fault(update.extra, strategy.client_extra())
        or strategy.fault(update)
    )
    return why or measured(update, strategy)


def metrics_fault(metrics: Mapping[str, float]) -> str | None:
    """What is wrong with the numbers for people to read."""
    if len(metrics) > METRICS:
        return f"{len(metrics)} metrics, expected at most {METRICS}"
    for name, value in metrics.items():
        # Of a client whose classes were never tested the accuracy is NaN.
        if name == "personal_accuracy" and not (value != value or 0 <= value <= 1):
            return f"{name} is {value}; expected 0 to 1"
        # Steps that are skipped, because they overflow float16, count in the loss.
        skipped = name in ("loss", "penalty") and metrics.get("skipped_steps", 0) > 0
        if name != "personal_accuracy" and not isfinite(value) and not skipped:
            return f"{line(name, 80)} is {value}"
    return None


def routing_fault(update: Update, strategy: Strategy) -> str | None:
    """What is wrong with the routing report."""
    blocks = strategy.layout.blocks
    if len(update.routing) != len(blocks):
        return f"routing of {len(update.routing)} blocks, expected {len(blocks)}"
    wanted = strategy.wants_regions()
    for number, (report, block) in enumerate(zip(update.routing, blocks, strict=True)):
        if why := report_fault(report, block, wanted):
            return f"{why} in the routing report of block {number}"
    return None


def report_fault(report: BlockRouting, block: Block, regions: bool) -> str | None:
    """What is wrong with the report on a block, with regions or without."""
    experts, tokens = block.num_experts, report.tokens
    for name in ("load", "routing", "margin"):
        value: Tensor = getattr(report, name)
        if value.shape != (experts,):
            return f"{name} {quoted(list(value.shape))}, expected [{experts}]"
        if not finite(value):
            return f"NaN or Inf ({name})"
        if bool((value < 0).any()):
            return f"a number below zero ({name})"
    loads, shares = float(report.load.sum()), float(report.routing.sum())
    if not 0 <= tokens < MOST_TOKENS:
        return f"{tokens} tokens"
    if float(report.load.max()) > tokens or loads > block.top_k * tokens:
        return f"load of {loads:.6g} tokens, expected at most {block.top_k} x {tokens}"
    if abs(shares - (tokens > 0)) > ROUNDING:
        return f"routing adds up to {shares:.6g}, expected {int(tokens > 0)}"
    if float(report.margin.max()) > 1 + ROUNDING:
        return f"margin {float(report.margin.max()):.6g}, expected 0 to 1"
    if report.region is None:
        return "no region" if regions else None
    if not regions:
        return "region that was not asked for"
    if report.region.shape != (experts, block.hidden):
        shape = quoted(list(report.region.shape))
        return f"region {shape}, expected [{experts}, {block.hidden}]"
    return None if finite(report.region) else "NaN or Inf (region)"


def tensors_fault(update: Update, strategy: Strategy) -> str | None:
    """What is wrong with the trained tensors: exactly those that the strategy says must cross."""
    pieces = {p.key: p for p in strategy.shared_pieces if strategy.sends(p, update.routing)}
    held = set(update.tensors)
    if lacking := [key for key in pieces if key not in held]:
        return f"{lacking[0]} is missing"
    if strange := sorted(held - set(pieces)):
        return f"{line(strange[0], 80)} was not to be sent"
    for key, piece in pieces.items():
        value, like = update.tensors[key], piece.of(strategy.tensors)
        if why := kind_fault(key, value, like):
            return why
    return None


def extra_fault(extra: Mapping[str, Tensor], like: Mapping[str, Tensor] | None) -> str | None:
    """What is wrong with the extra tensors of an update; `like` None leaves names open."""
    if like is not None and (strange := sorted(set(extra) - set(like))):
        return f"{line(strange[0], 80)} was not to be sent"
    for name, value in extra.items():
        if why := kind_fault(name, value, value if like is None else like[name]):
            return why
    return None


def tensor_fault(name: str, value: Tensor, like: Tensor) -> str | None:
    """What is wrong with one tensor that should be finite, of the shape and type of another."""
    if why := kind_fault(name, value, like):
        return why
    return None if finite(value) else f"NaN or Inf in {line(name, 80)}"


def kind_fault(name: str, value: Tensor, like: Tensor) -> str | None:
    """What is wrong with the shape or type of a tensor."""
    name = line(name, 80)
    if value.shape != like.shape:
        return f"{name} has shape {quoted(list(value.shape))}, expected {list(like.shape)}"
    if value.dtype != like.dtype:
        return f"{name} is {value.dtype}, expected {like.dtype}".replace("torch.", "")
    return None


def finite(value: Tensor) -> bool:
    """Whether all values are finite. One sum tells unless it overflows, which is then checked."""
    if not value.is_floating_point():
        return True
    return isfinite(value.sum(dtype=torch.float32).item()) or bool(value.isfinite().all())


def measured(update: Update, strategy: Strategy) -> Measures | str:
    """The measures of an update that `Usual` compares, those that it has.

    change: L2 norm of all the parameters it sends minus those that were broadcast; running
        statistics of BatchNorm are none.
    extra: L2 norm of what else its strategy's client half sends.
    tokens: of the block with the most, for each example.

    Returns:
        What is wrong instead, if a value is not finite, or too large for its square to be; or with
        the numbers for people.
    """
    pieces = {piece.key: piece for piece in strategy.shared_pieces}
    changes: dict[bool, list[tuple[Tensor, Tensor | None]]] = {False: [], True: []}
    for key, value in update.tensors.items():
        changes[pieces[key].is_statistic].append((value, pieces[key].of(strategy.tensors)))
    found = {"change": norm(changes[False])}
    if update.extra:
        found["extra"] = norm((value, None) for value in update.extra.values())
    if not all(map(isfinite, [*found.values(), norm(changes[True])])):
        return values_fault({**update.tensors, **update.extra})
    if why := metrics_fault(update.metrics):
        return why
    if update.routing:
        found["tokens"] = max(report.tokens for report in update.routing) / update.examples
    return found


def values_fault(tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with tensors whose norm is not finite."""
    for name in tensors:
        if not finite(tensors[name]):
            return f"NaN or Inf in {line(name, 80)}"
    return "values that are too large: their norm is not finite"


def norm(changes: Iterable[tuple[Tensor, Tensor | None]]) -> float:
    """The L2 norm of new values minus old ones over all the pairs, None for zeros.

    Tensors that are not of floating-point numbers count nothing. A GPU is waited for once.
    """
    norms = [
        torch.linalg.vector_norm(
            new if old is None else new - old.to(new.device), dtype=torch.float32
        )
        for new, old in changes
        if new.is_floating_point()
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
