"""The server's half: carries asks to sites by calls into their processes."""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.collab.api.exceptions import RunAborted

from sluiceway.core.signals import Stopped, check_stop
from sluiceway.deploy.nvflare.chunks import ChunkError, Inbox, chunk_from, chunks_of
from sluiceway.deploy.nvflare.names import CARRYING, GRACE, PATIENCE
from sluiceway.errors import line
from sluiceway.transport.protocol import Request, Response
from sluiceway.transport.worker_pool import TaskFailure

#: Seconds between looks at whether the run is to stop.
TICK = 0.2
#: Bytes of a message that goes along with its ask.
AT_ONCE = 64 << 10
#: Messages that cross at a time, so that chunks of many sites do not fill the memory.
CROSSING = 4


class SiteLost(Exception):
    """A site that cannot be asked further; one line says why."""


@dataclass
class NvflareTransport:
    """Asks sites over NVFlare's Collab API, each in a thread of its own.

    Attributes:
        proxies: NVFlare's stand-ins for the sites, by client number; None for one that is not
            part of the job.
        sites: their names, by client number.
    """

    proxies: Sequence[Any]
    sites: Sequence[str]
    _crossing: threading.Semaphore = field(
        default_factory=lambda: threading.Semaphore(CROSSING), init=False
    )

    def ask(
        self, asks: Mapping[int, Request], folder: Path, timeout: float = 0
    ) -> Iterator[tuple[int, Response | TaskFailure]]:
        """See `Transport.ask`."""
        until = time.monotonic() + timeout if timeout else None
        over = threading.Event()
        answers: queue.Queue[tuple[int, Response | TaskFailure | BaseException]] = queue.Queue()

        def one(client: int, ask: Request) -> None:
            call = Call(self.proxies[client], folder / uuid.uuid4().hex, until, over, timeout)
            try:
                answers.put((client, call.carry(ask, self._crossing)))
            except SiteLost as gone:
                answers.put((client, TaskFailure(str(gone))))
            except BaseException as error:
                answers.put((client, error))

        threads = [threading.Thread(target=one, args=each, daemon=True) for each in asks.items()]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                client, found = waited(answers)
                if isinstance(found, BaseException):
                    raise found
                yield client, found
        finally:
            over.set()


def waited(answers: queue.Queue[Any]) -> Any:
    """The next of a queue. Raises Stopped if the run is to stop before there is one."""
    while True:
        check_stop()
        try:
            return answers.get(timeout=TICK)
        except queue.Empty:
            continue


@dataclass
class Call:
    """One ask to one site.

    Attributes:
        proxy: of the site.
        path: for the answer's message.
        until: when, by the monotonic clock, it is too late; None for never.
        over: set when nobody waits any more.
        timeout: what `until` was made of, for the error.
    """

    proxy: Any
    path: Path
    until: float | None
    over: threading.Event
    timeout: float
    key: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)

    def carry(self, ask: Request, crossing: threading.Semaphore) -> Response | TaskFailure:
        """The site's answer, with its message in `path`. Raises Gone."""
        if self.proxy is None:
            raise SiteLost("it is not connected")
        with crossing:
            self.send(ask)
        while (said := self.said()).get("state") == "busy":
            pass
        if said.get("state") == "lost":
            return TaskFailure(line(str(said.get("why"))))
        with crossing:
            try:
                facts, size = json.loads(said["facts"]), int(said["size"])
                if not isinstance(facts, dict):
                    raise ChunkError("its facts are no table")
                return Response(facts, self.received(size))
            except (KeyError, TypeError, ValueError) as error:
                raise SiteLost(line(f"its answer cannot be read: {error}")) from error

    def said(self) -> dict[str, Any]:
        """What the site says when asked whether it is done."""
        found = self.call("wait")
        return found if isinstance(found, dict) else {}

    def send(self, ask: Request) -> None:
        """Bring the ask and its message to the site, which begins to work."""
        size = ask.message.stat().st_size if ask.message else -1
        parts = chunks_of(ask.message) if ask.message else iter(())
        # A message of any size waits until the site has said that it is there.
        first = next(parts, None) if size <= AT_ONCE else None
        data, digest = (first.data, first.digest) if first else (b"", b"")
        facts = json.dumps(dict(ask.facts))
        self.call("give", what=ask.what, facts=facts, size=size, data=data, digest=digest)
        for part in parts:
            self.call("add", data=part.data, digest=part.digest)

    def received(self, size: int) -> Path | None:
        """The answer's message. Raises ChunkError."""
        if size < 0:
            return None
        inbox = Inbox(self.path, size)
        while not inbox.complete:
            inbox.add(chunk_from(self.call("take")))
        return self.path

    def call(self, method: str, /, **arguments: Any) -> Any:
        """One call into the site's process.

        Raises:
            Gone: it raised, does not answer, or it is too late.
            Stopped: the job was aborted.
        """
        if self.over.is_set():
            self.give_up("nobody waits for it any more")
        seconds = CARRYING if method in ("add", "take") else PATIENCE + GRACE
        if self.until is not None:
            left = self.until - time.monotonic()
            seconds = min(seconds, max(left, 0))
        if not seconds:
            self.give_up(f"no answer within {self.timeout:g} s")
        try:
            return getattr(self.proxy(timeout=seconds), method)(key=self.key, **arguments)
        except RunAborted as aborted:
            raise Stopped from aborted
        except Exception as error:
            if self.until is not None and time.monotonic() >= self.until:
                self.give_up(f"no answer within {self.timeout:g} s")
            raise SiteLost(line(reason(error))) from error

    def give_up(self, why: str) -> None:
        """Tell the site that nobody waits, without waiting for it. Raises Gone."""
        self.proxy(expect_result=False).drop(key=self.key)
        raise SiteLost(why)


def reason(error: BaseException) -> str:
    """What went wrong in a call, in a few words."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, TimeoutError) or "timeout" in type(cause).__name__.lower():
        return "it does not answer"
    return f"{cause}" or type(cause).__name__
