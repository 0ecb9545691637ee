"""A deployment on this machine: server and sites as processes, over TLS on loopback."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sluiceway.deploy.nvflare.admin import opened
from sluiceway.deploy.nvflare.kits import CLASSES, Kit, localise, provision
from sluiceway.deploy.nvflare.start import command_of, environment_of
from sluiceway.deploy.nvflare.submit import JobSpec, submit
from sluiceway.deploy.processes import LOOPBACK, Processes, free_port
from sluiceway.deploy.site_file import write_site_file
from sluiceway.experiment.own_code import is_code, placed
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Progress
from sluiceway.files import scratch_folder

#: Seconds that server and sites have to start, many since the machine may be busy.
START_TIMEOUT = 180.0
ADMIN = "admin@sluiceway.local"


@dataclass
class Deployment(Processes):
    """Server and sites on this machine, whose processes start and end with the block.

    Attributes:
        folder: for the kits and their logs.
        sites: the site files, by site name.
        runs: where the server keeps run folders.
        classes: that jobs may name.
        environment: added for all processes.
        files: folders from which recipes may name files; on one's own machine any.
        model: the server's code that makes the model; None for none.
    """

    folder: Path = field(kw_only=True)
    sites: dict[str, Path] = field(kw_only=True)
    runs: Path = field(kw_only=True)
    classes: Sequence[str] = field(default=CLASSES, kw_only=True)
    environment: dict[str, str] = field(default_factory=dict, kw_only=True)
    files: Sequence[str] = field(default=("/",), kw_only=True)
    model: str | None = field(default=None, kw_only=True)

    def __enter__(self) -> Deployment:
        made = provision(
            self.folder, "localhost", free_port(), list(self.sites), ADMIN, classes=self.classes
        )
        self.kits: dict[str, Kit] = {kit.name: kit for kit in made}
        self.start_kit("server")
        for name in self.sites:
            self.start_kit(name)
        return self

    @property
    def admin(self) -> Kit:
        return self.kits[ADMIN]

    def start_kit(self, name: str) -> None:
        """Start the server or a site."""
        kit = self.kits[name]
        model = self.model if kit.role == "server" else None
        environment = environment_of(
            kit, self.sites.get(name), self.runs, f"{LOOPBACK}:0", self.files, model
        )
        localise(kit)
        log = kit.folder / "console.log"
        self.start(name, command_of(kit), {**self.environment, **environment}, log)

    def kill(self, name: str) -> None:
        """End the server or a site as a power failure would."""
        self.end(name, how=signal.SIGKILL)


def run_locally(
    recipe: Recipe, out: Path, *, resume: bool, force: bool, progress: Progress
) -> dict[str, Any]:
    """Run a recipe on a deployment of this machine, with as many sites as it has clients.

    The run folder is `out`, with checkpoints and client states, so that `resume` continues it.

    Returns:
        What is in its `summary.json`.

    Raises:
        InputError, RunFailed, Stopped: see `submit`.
    """
    names = [f"site-{number + 1}" for number in range(recipe.data.clients)]
    sites = {name: written(out, name, recipe) for name in names}
    threads = {"OMP_NUM_THREADS": str(recipe.run.threads)}
    progress.say(f"starting a server and {len(names)} sites on this machine")
    with (
        scratch_folder() as folder,
        Deployment(
            folder=folder / "kits",
            sites=sites,
            runs=out.parent,
            environment=threads,
            model=recipe.model.name if is_code(recipe.model.name) else None,
        ) as deployment,
        opened(deployment.admin, START_TIMEOUT) as session,
    ):
        spec = JobSpec(absolute(recipe), out.name, names, resume, force, START_TIMEOUT)
        submit(session, spec, None, progress.say)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def written(out: Path, name: str, recipe: Recipe) -> Path:
    """A site's file."""
    return write_site_file(out / "sites" / name, recipe.run.device, recipe.model.name)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, since processes have working folders of their own."""
    paths = {key: getattr(recipe.data, key) for key in ("path", "test_path")}
    paths = {key: placed(f"data.{key}", path, Path()) for key, path in paths.items()}
    name = recipe.model.name
    model = {"name": str(Path(name).resolve())} if Path(name).is_dir() else {}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=paths),
            "model": recipe.model.model_copy(update=model),
        }
    )
