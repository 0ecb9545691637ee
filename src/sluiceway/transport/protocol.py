"""What a server asks of sites that are elsewhere, and what carries it there and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sluiceway.transport.worker_pool import TaskFailure


@dataclass(frozen=True)
class Request:
    """A request to a site.

    Attributes:
        what: its name, such as "join" or "train".
        facts: small values beside the message, ready for JSON.
        message: file that goes along, of any length; None for none.
    """

    what: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    message: Path | None = None


@dataclass(frozen=True)
class Response:
    """What a site answers; the fields are those of `Request`."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    message: Path | None = None


class ClientHandler(Protocol):
    """A party at home: does what it is asked with data that stay with it."""

    def answer(self, ask: Request, folder: Path) -> Response:
        """Do what is asked.

        Args:
            ask: its message is a file of this machine.
            folder: empty, for the answer's message; whoever carries it removes it later.

        Raises:
            Exception: the site cannot; the server is told in one line.
        """
        ...


class Transport(Protocol):
    """Carries requests to sites and brings their answers.

    Attributes:
        sites: names of the sites, by client number.
    """

    sites: Sequence[str]

    def ask(
        self, asks: Mapping[int, Request], folder: Path, timeout: float = 0
    ) -> Iterator[tuple[int, Response | TaskFailure]]:
        """Ask several sites at once.

        Args:
            asks: by client number.
            folder: where messages of answers are put, in files of any name.
            timeout: seconds for all of them, 0 for any.

        Returns:
            Each client's number with its answer, in any order, as they become ready; a
            `TaskFailure` for a site that is away, could not do it, or took too long.
        """
        ...
