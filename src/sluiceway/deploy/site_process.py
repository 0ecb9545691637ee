"""A site's worker process, in which its model and data stay loaded between requests.

It listens on a local socket; whoever has a request connects, with a key that is in a file of the
site. So NVFlare's process of a job, or the process that Flower starts for every message, need not
load anything, and outlive a worker that crashes. Messages are frames of JSON, never pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from sluiceway.deploy.chunks import SiteFailure
from sluiceway.deploy.processes import LOOK, alive, last_line
from sluiceway.errors import described
from sluiceway.files import scratch_folder, write_atomically
from sluiceway.transport.framing import FACTS_LIMIT, FrameError, encode, parse
from sluiceway.transport.protocol import ClientHandler, Request, Response
from sluiceway.transport.tls import Credentials

#: Seconds between two attempts to connect to a process that is starting.
PAUSE: Final = 0.05
#: File with the socket's address and key, readable by its owner.
ADDRESS: Final = "process.json"
#: Raised where nobody listens, or not any more.
NOT_RUNNING: Final = (OSError, EOFError, ValueError, KeyError, AuthenticationError)


@dataclass
class SiteProcess(ClientHandler):
    """A `ClientHandler` in a process of its own, started when there is none.

    Attributes:
        command: starts it; see `site_command`.
        folder: in which it notes its address.
        log: gets its output.
    """

    command: Sequence[str]
    folder: Path
    log: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def handle(self, request: Request, folder: Path) -> Response:
        """See `ClientHandler.handle`. Raises SiteFailure, also if the process ends meanwhile."""
        message = None if request.message is None else str(request.message.resolve())
        facts = {"what": request.what, "facts": dict(request.facts), "message": message}
        with self.connect() as connection:
            try:
                connection.send_bytes(encode({**facts, "folder": str(folder.resolve())}))
                found = parse(connection.recv_bytes(FACTS_LIMIT))
            except (OSError, EOFError):
                raise SiteFailure(self._ended()) from None
        if "error" in found:
            raise SiteFailure(str(found["error"]))
        return Response(found["facts"], Path(found["message"]) if found["message"] else None)

    def connect(self) -> Connection[Any, Any]:
        """A connection to the process. Raises SiteFailure if it ends while it starts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        started = False
        with FileLock(self.folder / "process.lock"):
            while True:
                with contextlib.suppress(*NOT_RUNNING):
                    found = json.loads((self.folder / ADDRESS).read_text(encoding="utf-8"))
                    return Client(found["address"], authkey=bytes.fromhex(found["key"]))
                if self._process is None or self._process.poll() is not None:
                    if started:
                        raise SiteFailure(self._ended())
                    self.start()
                    started = True
                time.sleep(PAUSE)

    def start(self) -> None:
        """Start the process, without waiting until it listens."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def end(self) -> None:
        """Kill the process; the next request starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ended(self) -> str:
        """Why there is no response."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None and (code := self._process.wait(LOOK)) < 0:
                return f"its process ended by signal {-code}"
        return f"its process ended: {last_line(self.log)}"


def site_command(
    file: Path, folder: Path, *, parent: int, keys: Credentials | None = None, idle: float = 0
) -> list[str]:
    """What starts a site's process.

    Args:
        file: the site file.
        folder: in which it notes its address.
        parent: process id; the process ends when that one has ended.
        keys: the site's, for split learning.
        idle: seconds without a request after which it ends, 0 for never.
    """
    paths = [str(path) for path in (keys.certificate, keys.key, keys.root)] if keys else None
    arguments = {
        "file": str(file.resolve()),
        "folder": str(folder.resolve()),
        "keys": paths,
        "parent": parent,
        "idle": idle,
    }
    return [sys.executable, "-m", "sluiceway.deploy.site_process", json.dumps(arguments)]


def serve(site: ClientHandler, folder: Path, parent: int, idle: float = 0) -> None:
    """Handle requests one after another until `parent` has ended, or none came for `idle` s."""
    state = {"busy": False, "since": time.monotonic()}
    starter = os.getppid()

    def watch() -> None:
        while alive(parent, starter):
            if idle and not state["busy"] and time.monotonic() - state["since"] > idle:
                break
            time.sleep(LOOK)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    key = secrets.token_bytes(32)
    with (
        scratch_folder() as room,
        Listener(str(room / "socket"), "AF_UNIX", backlog=16, authkey=key) as listener,
    ):
        address = {"address": listener.address, "key": key.hex()}
        write_atomically(folder / ADDRESS, json.dumps(address), mode=0o600)
        while True:
            with (
                contextlib.suppress(OSError, EOFError, FrameError, AuthenticationError),
                listener.accept() as connection,
            ):
                state["busy"] = True
                connection.send_bytes(encode(handled(site, parse(connection.recv_bytes()))))
            state.update(busy=False, since=time.monotonic())


def handled(site: ClientHandler, asked: dict[str, Any]) -> dict[str, Any]:
    """The facts and the message's path of a site's response, or its error."""
    message = Path(asked["message"]) if asked["message"] else None
    try:
        response = site.handle(
            Request(asked["what"], asked["facts"], message), Path(asked["folder"])
        )
        path = None if response.message is None else str(response.message)
        return {"facts": dict(response.facts), "message": path}
    except Exception as error:
        return {"error": described(error)}


def main(text: str) -> None:
    """The process of `site_command`."""
    from sluiceway.deploy.site import open_site
    from sluiceway.errors import InputError

    given = json.loads(text)
    keys = Credentials(*map(Path, given["keys"])) if given["keys"] else None
    try:
        site = open_site(Path(given["file"]), keys)
    except InputError as error:
        sys.exit(described(error))
    serve(site, Path(given["folder"]), given["parent"], given["idle"])


if __name__ == "__main__":
    main(sys.argv[1])
