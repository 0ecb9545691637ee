"""Requests of a server to clients elsewhere, and the transport that carries them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Request:
    """A request to a client.

    Attributes:
        what: its name, such as "join" or "train".
        facts: small values, ready for JSON.
        message: file that is sent along, of any length; None for none.
    """

    what: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    message: Path | None = None


@dataclass(frozen=True)
class Response:
    """The response to a request; the fields are those of `Request`."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    message: Path | None = None


@dataclass(frozen=True)
class TaskFailure:
    """A task without a result.

    Attributes:
        why: in a few words.
        error: the exception it raised, if it did; its cause is the traceback in the worker.
        trace: that traceback, as text.
    """

    why: str
    error: BaseException | None = None
    trace: str = ""


class ClientHandler(Protocol):
    """A client at its site: handles requests with data that stay with it."""

    def handle(self, request: Request, folder: Path) -> Response:
        """Handle a request.

        Args:
            request: its message is a file of this machine.
            folder: empty, for the response's message; the transport removes it later.

        Raises:
            Exception: the site cannot; the server gets the error in one line.
        """
        ...


class Transport(Protocol):
    """Sends requests to sites and returns their responses.

    Attributes:
        sites: names of the sites, by client number.
    """

    sites: Sequence[str]

    def send(
        self, requests: Mapping[int, Request], folder: Path, timeout: float = 0
    ) -> Iterator[tuple[int, Response | TaskFailure]]:
        """Send requests to several sites at once.

        Args:
            requests: by client number.
            folder: where messages of responses are put, in files of any name.
            timeout: seconds for all of them, 0 for any.

        Returns:
            Each client's number with its response, in any order, as they become ready; a
            `TaskFailure` for a site that is not connected, fails or takes too long.
        """
        ...
