"""`sluiceway run RECIPE --engine flower`: a whole deployment on this machine, for one run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import tomli_w

from sluiceway.core.guards import RunFailed
from sluiceway.core.signals import Stopped, check_stop
from sluiceway.deploy.flower import own_user
from sluiceway.deploy.flower.apps import DEFAULTS, IDLE
from sluiceway.deploy.flower.deployment import (
    SUPEREXEC,
    SUPERLINK,
    Deployment,
    DeploymentError,
    write_app,
)
from sluiceway.deploy.flower.server import pass_on
from sluiceway.deploy.outcome import raise_outcome
from sluiceway.deploy.processes import LOOPBACK
from sluiceway.deploy.site_file import write_site_file
from sluiceway.errors import line
from sluiceway.experiment.builders import worker_count
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Progress
from sluiceway.files import scratch_folder

#: Seconds between two looks at the ServerApp's progress, and at whether all processes are alive.
TICK: Final = 0.2
#: Seconds without progress after which the SuperLink is asked for the run's status, and that the
#: step in hand may take when the run is to stop.
QUIET: Final = 20.0
LAST_STEP: Final = 600.0
#: Most clients whose sites stay open between rounds: each holds the model in memory, half a GB and
#: more. Of more clients, a site is opened for each message.
OPEN_SITES: Final = 8
#: The module of the apps of whole recipes.
APPS: Final = "sluiceway.deploy.flower.apps"


def run_locally(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress,
    relay: Callable[[int], int] | None = None,
) -> dict[str, Any]:
    """Run a recipe over a SuperLink and a SuperNode for each client, all on this machine.

    Client states are in `out/sites`, so that a run can be continued. All else that was made for the
    run is deleted at its end.

    Args:
        recipe: its clients are SuperNodes that hold their part of its data.
        out: the run folder.
        resume, force: as of `experiment.run.run`.
        progress: callbacks.
        relay: from the SuperLink's port to the port of a relay in front of it, which SuperNodes
            connect to; None for none.

    Returns:
        What is in `summary.json`.

    Raises:
        InputError, RunFailed, Stopped: see `experiment.run.run`.
    """
    count, out = recipe.data.clients, out.resolve()
    names = [f"site-{number}" for number in range(count)]
    progress.say(f"Flower: a SuperLink and {count} SuperNodes on this machine, over TLS")
    if not own_user.TABLE.exists():
        progress.say(
            "while it runs, other users of this machine can run code as you: Flower's port"
        )
    with scratch_folder() as folder, Deployment(folder=folder / "flower") as flower:
        (folder / "recipe.toml").write_text(tomli_w.dumps(recipe.resolved()), encoding="utf-8")
        write_app(folder / "app", f"{APPS}:server", f"{APPS}:client", DEFAULTS)
        config: dict[str, str | int | float | bool] = {
            "recipe": str(folder / "recipe.toml"),
            "out": str(out),
            "resume": resume,
            "force": force,
            "at-once": worker_count(recipe, "cpu"),
            "told": str(folder / "progress.jsonl"),
        }
        if relay is not None:
            flower.fleet = f"{LOOPBACK}:{relay(flower.port)}"
        try:
            flower.start_link()
            flower.start_executor()
            flower.register(*names)
            for name in names:
                check_stop()
                site = write_site_file(out / "sites" / name, recipe.run.device)
                keep = IDLE if count <= OPEN_SITES else 0
                flower.start_node(name, {"site": str(site), "keep": keep})
            run = flower.run(folder / "app", config)
            follow(flower, run, folder / "progress.jsonl", progress)
        except DeploymentError as error:
            raise RunFailed(str(error)) from None
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def follow(flower: Deployment, run: str, log: Path, progress: Progress) -> None:
    """Pass on the progress of a run's ServerApp until it ends. Raises what it ended with."""
    process, at = 0, 0
    quiet, stop_by = time.monotonic(), float("inf")
    while True:
        lines, at = new_lines(log, at)
        for what, value in lines:
            quiet = time.monotonic()
            if what == "process":
                process = int(value)
            elif what == "end":
                raise_outcome(*value)
                return
            pass_on(what, value, progress)
        try:
            check_stop()
        except Stopped:
            if not process or time.monotonic() > stop_by:
                raise
            if stop_by == float("inf"):
                stop_by = time.monotonic() + LAST_STEP
                os.kill(process, signal.SIGTERM)
        require_running(flower, progress)
        if not lines and time.monotonic() - quiet > QUIET:
            quiet = time.monotonic()
            require_unfinished(flower, run, log, at)
        time.sleep(TICK)


def require_running(flower: Deployment, progress: Progress) -> None:
    """Report a SuperNode that ended; the run continues. Raises RunFailed for other processes."""
    name = flower.ended()
    if name is None:
        return
    why = f"{name} ended: {flower.last_line(name)}"
    if name in (SUPERLINK, SUPEREXEC):
        raise RunFailed(why)
    progress.say(why)
    flower.end(name)


def require_unfinished(flower: Deployment, run: str, log: Path, at: int) -> None:
    """Raise RunFailed if the ServerApp ended without its last line of progress."""
    try:
        status, details = flower.status(run)
    except DeploymentError:
        return  # a SuperLink that is being restarted
    if status.startswith("finished") and not new_lines(log, at)[0]:
        raise RunFailed(f"the ServerApp ended: {line(details or status)}")


def new_lines(path: Path, at: int) -> tuple[list[tuple[str, Any]], int]:
    """Whole lines of a file from a byte on, and where the next begins."""
    if not path.exists():
        return [], at
    with path.open("rb") as file:
        file.seek(at)
        fresh = file.read()
    whole = fresh[: fresh.rfind(b"\n") + 1]
    return [tuple(json.loads(text)) for text in whole.splitlines()], at + len(whole)
