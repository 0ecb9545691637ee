"""The head's closed-form start: sums that every client sends once, before the first round.

`fedalign.heads` has the mathematics. A client's sums are one message of float32 tensors: `labels`
[C, d + 1], and for the ridge regression `gram`, half of a symmetric matrix of size d + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sluiceway import fedalign
from sluiceway.core.guards import Failure, RunFailed, tensor_fault
from sluiceway.core.messages import Facts, integer, packed_length, read_tensors, write_tensors
from sluiceway.errors import InputError, line
from sluiceway.strategies import Strategy
from sluiceway.strategies.base import Mechanism

#: How the head starts: as the model has it, or in closed form.
HeadStart = Literal["random", "means", "ridge"]


@dataclass(frozen=True)
class HeadSums:
    """What one client sends.

    Attributes:
        client: its number, from 0.
        tensors: see above.
        nbytes: length of the packed message.
    """

    client: int
    tensors: Mapping[str, Tensor]
    nbytes: int = 0


def sums_parts(sums: HeadSums) -> tuple[dict[str, Mapping[str, Tensor]], Facts]:
    """What the packed message holds."""
    return {"sums": sums.tensors}, {"client": sums.client}


def write_sums(path: Path, sums: HeadSums) -> int:
    """Pack a client's sums; returns the length in bytes. Raises StorageError."""
    return write_tensors(path, *sums_parts(sums))


def sums_length(sums: HeadSums) -> int:
    """The length of the packed message in bytes."""
    return packed_length(*sums_parts(sums))


def read_sums(path: Path) -> HeadSums:
    """Unpack a client's sums, lazily. Raises WireError."""
    facts, parts = read_tensors(path, ["sums"])
    client = integer(facts, "client", line(path.name, 80))
    return HeadSums(client, parts["sums"], path.stat().st_size)


def require_head(kind: HeadStart, strategy: Strategy) -> None:
    """Check that a head can start like this, of a strategy that is set up. Raises InputError."""
    if kind == "random" and not strategy.trains_clients:
        raise InputError(
            f"method {strategy.name} trains nothing: it needs model.head_start = 'means' or 'ridge'"
        )
    if kind != "random" and not strategy.layout.head:
        raise InputError(
            f"model.head_start = {kind!r} needs a model whose last layer is linear, trained, and "
            "gives a logit for each class"
        )


@dataclass
class StartingHead:
    """The server's side: adds up the clients' sums as they arrive.

    Attributes:
        kind: "means" or "ridge".
        head: the head's initial values by name, its weight first.
        label_counts: [clients, classes], as clients said when they joined.
        privacy: adds noise; None for none.
        feature_size: the mean norm of what enters the head, on examples of no client; asked for
            under privacy, where no client tells it.
        nbytes: of all messages.
        failed: clients without usable sums, and why.
    """

    kind: HeadStart
    head: Mapping[str, Tensor]
    label_counts: Tensor
    privacy: Mechanism | None = None
    feature_size: Callable[[], float] = lambda: 1.0
    nbytes: int = 0
    failed: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        classes, features = next(iter(self.head.values())).shape
        self.size = features + 1
        self.total = {"labels": torch.zeros(classes, self.size, dtype=torch.float64)}
        if self.kind == "ridge":
            half = self.size * (self.size + 1) // 2
            self.total["gram"] = torch.zeros(half, dtype=torch.float64)

    def take(self, answers: Iterable[HeadSums | Failure]) -> dict[str, Tensor]:
        """The head's new values by name, from what every client answers.

        Raises:
            RunFailed: no client gave usable sums.
        """
        used = 0
        for answer in answers:
            self.nbytes += answer.nbytes
            why = answer.why if isinstance(answer, Failure) else self.fault(answer)
            if why:
                self.failed[answer.client] = why
                continue
            assert isinstance(answer, HeadSums)
            used += 1
            for name, total in self.total.items():
                sums = answer.tensors[name]
                if self.privacy is not None and self.privacy.where == "server":
                    sums = self.privacy.head_share(sums)
                total.add_(sums)
        if not used:
            client, why = next(iter(self.failed.items()))
            raise RunFailed(f"no client gave sums for the head's start (client {client}: {why})")
        return self.values()

    def fault(self, sums: HeadSums) -> str | None:
        """What is wrong with a client's sums, in a few words; None if nothing is."""
        if strange := sorted(set(sums.tensors) ^ set(self.total)):
            return f"{line(strange[0], 80)} is missing from its sums, or was not to be sent"
        for name, like in self.total.items():
            if why := tensor_fault(name, sums.tensors[name], like.float()):
                return why
        if self.privacy is not None:  # by which clients count alike, and tell no counts
            return None
        counts = torch.zeros(len(self.total["labels"]))
        held = self.label_counts[sums.client][: len(counts)]
        counts[: len(held)] = held.float()
        if not torch.equal(sums.tensors["labels"][:, -1], counts):
            return "its sums are not over the examples that it says it holds"
        return None

    def values(self) -> dict[str, Tensor]:
        """The head from the sums so far."""
        sums = self.total["labels"]
        if self.privacy is not None:
            sums = self.privacy.head_total(sums, self.feature_size())
        if self.kind == "ridge":
            gram = fedalign.unpacked_triangle(self.total["gram"])
            weight, bias = fedalign.ridge_head(gram, sums)
        else:
            weight, bias = fedalign.means_head(sums)
        found = zip(self.head.items(), (weight, bias), strict=False)  # a head may have no bias
        return {name: value.to(old.dtype) for (name, old), value in found}
