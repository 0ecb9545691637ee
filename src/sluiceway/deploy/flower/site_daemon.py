"""Keeps a site open between Flower's messages, each of which has a process of its own.

Without it a site loads its libraries, its model and its data anew for every round. The keeper is a
process of the site, started by the first message. It and the processes of messages know each other
by files in a folder of the site: a request as JSON, its answer as JSON, and a lock that says if
there is a keeper, which the system lets go of however it ends.

It ends when the process that started the ClientApp does (Flower's SuperExec, which ends with its
SuperNode), or when nobody has asked it anything for a while.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from sluiceway.errors import line
from sluiceway.transport.protocol import ClientHandler, Request, Response

#: Seconds between two looks for a request or an answer, and at whether the other side is there.
TICK: Final = 0.05
LOOK: Final = 1.0


class SiteFault(Exception):
    """What a site said in place of an answer, in one line."""


class SiteDaemon:
    """A `ClientHandler` that is open in a process of its own.

    Args:
        file: the site's.
        room: folder for what is exchanged with the keeper.
        idle: seconds without a request after which it ends, > 0.
    """

    def __init__(self, file: Path, room: Path, idle: float) -> None:
        self.file = file
        self.room = room
        self.idle = idle

    def answer(self, ask: Request, folder: Path) -> Response:
        """See `ClientHandler.answer`. Raises Told."""
        self.room.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        asked, taken, done = (self.room / f"{name}.{end}" for end in ("ask", "taken", "done"))
        message = None if ask.message is None else str(ask.message.resolve())
        said = {"what": ask.what, "facts": ask.facts, "message": message}
        put_json(asked, {**said, "folder": str(folder.resolve())})
        process: subprocess.Popen[bytes] | None = None
        looked = 0.0
        try:
            while not done.exists():
                if time.monotonic() - looked > LOOK and not kept(self.room) and not done.exists():
                    if taken.exists() or (process is not None and process.poll() is not None):
                        raise SiteFault(f"the site's process ended: {last_line(self.room)}")
                    process = process or self.started()
                    looked = time.monotonic()
                time.sleep(TICK)
            found = json.loads(done.read_text(encoding="utf-8"))
        finally:
            for path in (asked, taken, done):
                path.unlink(missing_ok=True)
        if "fault" in found:
            raise SiteFault(found["fault"])
        return Response(found["facts"], Path(found["message"]) if found["message"] else None)

    def started(self) -> subprocess.Popen[bytes]:
        """Start a keeper that ends with the process that started this one."""
        words = [str(self.file.resolve()), str(self.room.resolve()), str(os.getppid())]
        with (self.room / "keeper.log").open("wb") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sluiceway.deploy.flower.site_daemon",
                    *words,
                    str(self.idle),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def put_json(path: Path, content: object) -> None:
    """Write a file that is whole as soon as it is there."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content), encoding="utf-8")
    os.replace(fresh, path)


def lock_of(room: Path) -> FileLock:
    return FileLock(room / "keeper.lock")


def kept(room: Path) -> bool:
    """Whether there is a keeper."""
    try:
        with lock_of(room).acquire(timeout=0):
            return False
    except Timeout:
        return True


def last_line(room: Path) -> str:
    """The last line of the keeper's log, for a message."""
    said = (room / "keeper.log").read_text(errors="replace").strip().splitlines()
    return line(said[-1]) if said else "it said nothing"


def keep(site: ClientHandler, room: Path, idle: float) -> None:
    """Answer requests until there have been none for `idle` seconds."""
    since = time.monotonic()
    while time.monotonic() - since < idle:
        for asked in sorted(room.glob("*.ask"), key=lambda path: path.stat().st_mtime):
            serve(site, asked)
            since = time.monotonic()
        time.sleep(TICK)


def serve(site: ClientHandler, asked: Path) -> None:
    """Answer one request."""
    taken = asked.with_suffix(".taken")
    try:
        os.replace(asked, taken)
        said = json.loads(taken.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # nobody waits any more
    message = Path(said["message"]) if said["message"] else None
    try:
        answer = site.answer(Request(said["what"], said["facts"], message), Path(said["folder"]))
        path = None if answer.message is None else str(answer.message)
        found = {"facts": answer.facts, "message": path}
    except Exception as error:
        found = {"fault": in_a_line(error)}
    put_json(asked.with_suffix(".done"), found)


def in_a_line(error: Exception) -> str:
    """An error as the server is told it."""
    if isinstance(error, SiteFault):
        return str(error)
    kind = type(error).__name__
    return line(f"{kind}: {error}" if str(error) else kind)


def watch(parent: int) -> None:
    """End this process when that one is gone."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(0)
        time.sleep(LOOK)


def main(words: list[str]) -> None:
    """The keeper's process.

    Args:
        words: the site file, the room, the process to end with (1 for none), and idle seconds.
    """
    file, room, parent, idle = words
    try:
        # Who looks whether there is a keeper holds the lock for an instant.
        with lock_of(Path(room)).acquire(timeout=LOOK):
            if int(parent) > 1:
                threading.Thread(target=watch, args=[int(parent)], daemon=True).start()
            from sluiceway.deploy.site import open_site
            from sluiceway.errors import InputError

            try:
                site = open_site(Path(file))
            except InputError as error:
                sys.exit(in_a_line(error))
            keep(site, Path(room), float(idle))
    except Timeout:
        return  # another was faster


if __name__ == "__main__":
    main(sys.argv[1:])
