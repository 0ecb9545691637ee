"""The admin's session with a server, in which runs are submitted and watched."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluiceway.core.guards import RunFailed
from sluiceway.core.signals import check_stop
from sluiceway.deploy.nvflare.kits import Kit
from sluiceway.deploy.nvflare.names import PROGRESS, RESULT
from sluiceway.errors import InputError, described
from sluiceway.experiment.session import Say

#: Seconds between looks at a job.
LOOK = 1.0


@dataclass
class AdminSession:
    """A session with a server.

    Attributes:
        session: NVFlare's; all that needs no code of ours is called on it.
        seen: lines of the newest job's progress that were passed on.
    """

    session: Any
    seen: int = 0

    def sites(self) -> list[str]:
        """Names of the sites that are connected."""
        return [str(client.name) for client in self.session.get_connected_client_list()]

    def wait_for_sites(self, wanted: Sequence[str], seconds: float, say: Say) -> None:
        """Wait for sites. Raises RunFailed: some are not connected in time."""
        deadline = time.monotonic() + seconds
        said = False
        while missing := [site for site in wanted if site not in self.sites()]:
            check_stop()
            if time.monotonic() > deadline:
                raise RunFailed(f"not connected after {seconds:g} s: {', '.join(missing)}")
            if not said:
                say(f"waiting for {', '.join(missing)}")
                said = True
            time.sleep(LOOK)

    def watch(self, job: str, say: Say, check: Callable[[], None] = check_stop) -> None:
        """Pass on the newest job's progress until it ends.

        Args:
            check: raises Stopped if this is to end before.
        """
        while True:
            check()
            status = str(self.session.get_job_status(job))
            if status.startswith("FINISHED"):
                return
            if status == "RUNNING":
                for text in self.lines(job):
                    say(text)
                    self.seen += 1
            time.sleep(LOOK)

    def lines(self, job: str) -> list[str]:
        """The job's progress since it was last asked for."""
        with contextlib.suppress(Exception):  # it is only starting, or has just ended
            found = self.session.do_app_command(job, PROGRESS, {"seen": self.seen})
            return [str(text) for text in found["lines"]]
        return []

    def fetch(self, job: str, folder: Path) -> Path | None:
        """Download the light part of the run folder; None if there is none."""
        with muted():
            found = Path(self.session.download_job_result(job, str(folder)))
        return next((path for path in found.rglob(RESULT) if path.is_dir()), None)


@contextlib.contextmanager
def opened(kit: Kit, seconds: float = 10) -> Iterator[AdminSession]:
    """A session with the server of an admin's kit.

    Raises:
        InputError: the kit is not an admin's.
        RunFailed: the server does not answer in time, or does not accept the kit.
    """
    if kit.role != "admin":
        raise InputError(f"{kit.folder} is a {kit.role}'s kit; submitting needs the admin's")
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    logging.getLogger().addHandler(logging.NullHandler())  # else NVFlare's warnings are printed
    deadline = time.monotonic() + seconds
    while True:
        check_stop()
        try:
            with muted():
                session = new_secure_session(kit.name, str(kit.folder), timeout=5)
            break
        except Exception as error:
            if time.monotonic() > deadline:
                raise RunFailed(f"no session with the server: {described(error)}") from error
            time.sleep(LOOK)
    try:
        yield AdminSession(session)
    finally:
        with muted(), contextlib.suppress(Exception):
            session.close()


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Drop what NVFlare prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
