"""A deployment on this machine, for trials: server and sites as processes, over TLS on loopback."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sluiceway.core.files import scratch_folder
from sluiceway.deploy.nvflare.admin import opened
from sluiceway.deploy.nvflare.kits import CLASSES, Kit, provision, settle
from sluiceway.deploy.nvflare.start import command_of, environment_of
from sluiceway.deploy.nvflare.submit import JobSpec, submit
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Progress

#: Seconds that server and sites may take to be there: on a busy machine they need many.
STARTING = 180.0
#: Seconds in which processes that were asked to end must have ended.
ENDING = 5.0
#: Of prctl: the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1
ADMIN = "admin@sluiceway.local"


@dataclass
class Deployment:
    """Processes of kits on this machine; ends them all when left.

    Attributes:
        folder: for the kits and their logs.
        sites: names.
        runs: where the server keeps run folders.
        classes: what jobs may name.
        more: environment for all processes.
    """

    folder: Path
    sites: Sequence[str]
    runs: Path
    classes: Sequence[str] = CLASSES
    more: dict[str, str] = field(default_factory=dict)
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

    def __enter__(self) -> Deployment:
        made = provision(
            self.folder, "localhost", free_port(), self.sites, ADMIN, classes=self.classes
        )
        self.kits: dict[str, Kit] = {kit.name: kit for kit in made}
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.started):
            self.end(name)

    @property
    def admin(self) -> Kit:
        return self.kits[ADMIN]

    def start(self, name: str, site: Path | None = None) -> None:
        """Start the server, or a site with its file."""
        kit = self.kits[name]
        told = environment_of(kit, site, self.runs, "127.0.0.1:0")
        settle(kit)
        with (kit.folder / "console.log").open("ab") as log:
            self.started[name] = subprocess.Popen(
                command_of(kit),
                env={**os.environ, **self.more, **told},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for whoever submits
                preexec_fn=end_with_parent,
            )

    def end(self, name: str, how: int = signal.SIGTERM) -> None:
        """End a party, with every process that it started."""
        process = self.started.pop(name)
        family = family_of(process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            family[0].send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        for member in (*family, *family_of(process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def end_with_parent() -> None:
    """Where the system can (Linux), have this process ended when the one that started it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def family_of(number: int) -> list[psutil.Process]:
    """A process and all that it started, which NVFlare puts into groups of their own."""
    try:
        process = psutil.Process(number)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextlib.contextmanager
def running(deployment: Deployment, files: Sequence[Path]) -> Iterator[Deployment]:
    """A deployment whose server and sites are started; `files` are the sites' own, by number."""
    with deployment:
        deployment.start("server")
        for name, file in zip(deployment.sites, files, strict=True):
            deployment.start(name, file)
        yield deployment


def run_trial(
    recipe: Recipe, out: Path, *, resume: bool, force: bool, progress: Progress
) -> dict[str, Any]:
    """Run a recipe on a deployment of this machine, with as many sites as it has clients.

    The run folder is `out`, checkpoints and all, so that a trial that was stopped continues.

    Returns:
        What is in its `summary.json`.

    Raises:
        InputError, RunFailed, KeyboardInterrupt: see `submit`.
    """
    names = [f"site-{number + 1}" for number in range(recipe.data.clients)]
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        files = site_files(folder / "homes", out / "sites", names)
        threads = str(recipe.run.threads)
        deployment = Deployment(
            folder / "kits", names, out.parent, more={"OMP_NUM_THREADS": threads}
        )
        stack.enter_context(running(deployment, files))
        progress.say(f"starting a server and {len(names)} sites on this machine")
        desk = stack.enter_context(opened(deployment.admin, STARTING))
        order = JobSpec(placed(recipe), out.name, names, resume, force, STARTING)
        submit(desk, order, None, progress.say)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def placed(recipe: Recipe) -> Recipe:
    """The recipe with paths that hold wherever a process works."""
    paths = {key: getattr(recipe.data, key) for key in ("path", "test_path")}
    paths = {key: str(Path(path).resolve()) for key, path in paths.items() if path is not None}
    name = recipe.model.name
    model = {"name": str(Path(name).resolve())} if Path(name).is_dir() else {}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=paths),
            "model": recipe.model.model_copy(update=model),
        }
    )


def site_files(folder: Path, kept: Path, names: Sequence[str]) -> list[Path]:
    """Write a site file for each, that takes the client's part of the recipe's own partition."""
    files = []
    for name in names:
        path = folder / name / "site.toml"
        path.parent.mkdir(parents=True)
        lines = f'folder = "{(kept / name).resolve()}"\n[data]\nshare = true\n'
        path.write_text(lines, encoding="utf-8")
        files.append(path)
    return files
