"""The server's half of a job: carries requests to sites by calls of NVFlare's Collab API."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.collab.api.exceptions import RunAborted

from sluiceway.core.signals import Stopped, check_stop
from sluiceway.deploy.chunks import Chunk, ChunkError, Transfer
from sluiceway.deploy.nvflare.names import (
    CALL_TIMEOUT,
    CHUNK,
    CHUNK_TIMEOUT,
    FIRST_CHUNK,
    WAIT,
)
from sluiceway.errors import line
from sluiceway.transport.protocol import Request, Response, TaskFailure

#: Seconds between looks at whether the run is to stop.
TICK = 0.2
#: Chunks that cross at the same time, so that those of many sites do not fill the memory.
CROSSING = 4


class SiteUnreachable(Exception):
    """A site that does not reply; one line says why."""


@dataclass
class NvflareTransport:
    """A `Transport` over NVFlare; each site has a thread.

    Attributes:
        proxies: NVFlare's proxies of the sites, by client number; None for one that is not part of
            the job.
        sites: their names, by client number.
    """

    proxies: Sequence[Any]
    sites: Sequence[str]
    _crossing: threading.Semaphore = field(
        default_factory=lambda: threading.Semaphore(CROSSING), init=False
    )

    def send(
        self, requests: Mapping[int, Request], folder: Path, timeout: float = 0
    ) -> Iterator[tuple[int, Response | TaskFailure]]:
        """See `Transport.send`."""
        deadline = time.monotonic() + timeout if timeout else float("inf")
        over = threading.Event()
        results: queue.Queue[tuple[int, Response | TaskFailure | BaseException]] = queue.Queue()

        def one(client: int, request: Request) -> None:
            call = Call(self.proxies[client], deadline, over, f"no answer within {timeout:g} s")
            try:
                results.put((client, call.carry(request, folder, self._crossing)))
            except (SiteUnreachable, ChunkError) as error:
                results.put((client, TaskFailure(line(str(error)))))
            except BaseException as error:
                results.put((client, error))

        for each in requests.items():
            threading.Thread(target=one, args=each, daemon=True).start()
        try:
            for _ in requests:
                client, found = next_of(results)
                if isinstance(found, BaseException):
                    raise found
                yield client, found
        finally:
            over.set()


def next_of(results: queue.Queue[Any]) -> Any:
    """The next of a queue. Raises Stopped if the run is to stop before there is one."""
    while True:
        check_stop()
        try:
            return results.get(timeout=TICK)
        except queue.Empty:
            continue


@dataclass
class Call:
    """A request to one site.

    Attributes:
        proxy: of the site.
        deadline: by the monotonic clock; infinity for none.
        over: set when nobody waits for the response any more.
        late: the error after the deadline.
    """

    proxy: Any
    deadline: float
    over: threading.Event
    late: str

    def carry(
        self, request: Request, folder: Path, crossing: threading.Semaphore
    ) -> Response | TaskFailure:
        """The site's response. Raises SiteUnreachable, ChunkError."""
        if self.proxy is None:
            raise SiteUnreachable("it is not connected")
        transfer = Transfer(request, folder, CHUNK, first=FIRST_CHUNK, eager=False)
        while transfer.result is None:
            chunk = transfer.next() or Chunk(transfer.id, "wait")
            with nullcontext() if chunk.kind == "wait" else crossing:
                transfer.take(self.exchange(chunk))
        return transfer.result

    def exchange(self, chunk: Chunk) -> Chunk:
        """One call into the site's process.

        Raises:
            SiteUnreachable: it does not reply, or it is too late. ChunkError: see `Chunk.read`.
            Stopped: the job was aborted.
        """
        left = self.deadline - time.monotonic()
        if self.over.is_set() or left <= 0:
            # Without waiting for the reply.
            cancel = Chunk(chunk.transfer, "cancel")
            self.proxy(expect_result=False).exchange(header=cancel.header(), data=b"")
            raise SiteUnreachable(self.late)
        large = chunk.kind == "fetch" or len(chunk.data) > FIRST_CHUNK
        proxy = self.proxy(timeout=min(left, CHUNK_TIMEOUT if large else WAIT + CALL_TIMEOUT))
        try:
            found = proxy.exchange(header=chunk.header(), data=chunk.data)
        except RunAborted as aborted:
            raise Stopped from aborted
        except Exception as error:
            if time.monotonic() >= self.deadline:
                return self.exchange(chunk)  # which cancels
            raise SiteUnreachable(reason(error)) from error
        if not isinstance(found, dict):
            raise ChunkError("a reply that is not a chunk")
        header, data = found.get("header"), found.get("data")
        if not isinstance(header, str) or not isinstance(data, bytes):
            raise ChunkError("a reply that is not a chunk")
        return Chunk.read(header, data)


def reason(error: BaseException) -> str:
    """Why a call failed, in a few words."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, TimeoutError) or "timeout" in type(cause).__name__.lower():
        return "it does not answer"
    return f"{cause}" or type(cause).__name__
