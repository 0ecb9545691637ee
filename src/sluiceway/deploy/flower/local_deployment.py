"""`sluiceway run RECIPE --engine flower`: a whole deployment on this machine, for one run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import tomli_w

from sluiceway.core.checkpoints import StorageError
from sluiceway.core.files import scratch_folder
from sluiceway.core.guards import RunFailed
from sluiceway.core.signals import Stopped, check_stop
from sluiceway.deploy.flower.apps import DEFAULTS, IDLE
from sluiceway.deploy.flower.deployment import (
    HERE,
    SUPEREXEC,
    SUPERLINK,
    Deployment,
    DeploymentError,
    write_app,
)
from sluiceway.deploy.flower.server import heard
from sluiceway.errors import InputError, line
from sluiceway.experiment.builders import worker_count
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Progress

#: Seconds between two looks at what the ServerApp told, and at whether all processes are there.
TICK: Final = 0.2
#: Seconds without a word from the ServerApp after which the SuperLink is asked how it is, and that
#: it may take for the step in hand when it is to stop.
QUIET: Final = 20.0
LAST_STEP: Final = 600.0

#: Most clients whose sites stay open between rounds: each holds the model in memory, half a GB and
#: more. Of more clients, a site is opened for its turn and closed after it.
KEPT: Final = 8
#: Where the apps of whole recipes are.
APPS: Final = "sluiceway.deploy.flower.apps"


def run_trial(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress,
    front: Callable[[int], int] | None = None,
) -> dict[str, Any]:
    """Run a recipe over a SuperLink and a SuperNode for each client, all on this machine.

    What clients keep lies in `out/sites`, so that a run can be continued. All else that was made
    for the run is gone at its end.

    Args:
        recipe: its clients are SuperNodes that hold their part of its data.
        out: the run folder.
        resume, force: as of `experiment.run.run`.
        progress: what to tell while it goes on.
        front: from the SuperLink's port to one that SuperNodes are to dial instead, of something
            that passes all on, such as a meter; None for the SuperLink's own.

    Returns:
        What is in `summary.json`.

    Raises:
        InputError, StorageError, RunFailed, Stopped: see `experiment.run.run`.
    """
    with (
        scratch_folder() as folder,
        deployed(recipe, out.resolve(), folder, progress, front) as flower,
    ):
        config: dict[str, str | int | float | bool] = {
            "recipe": str(folder / "recipe.toml"),
            "out": str(out.resolve()),
            "resume": resume,
            "force": force,
            "at-once": worker_count(recipe, "cpu"),
            "told": str(folder / "told.jsonl"),
        }
        try:
            number = flower.run(folder / "app", config)
            followed(flower, number, folder / "told.jsonl", progress)
        except DeploymentError as error:
            raise RunFailed(str(error)) from None
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


@contextmanager
def deployed(
    recipe: Recipe,
    out: Path,
    folder: Path,
    progress: Progress,
    front: Callable[[int], int] | None = None,
) -> Iterator[Deployment]:
    """A SuperLink, what starts its ServerApp, and a SuperNode for each client."""
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe.resolved()), encoding="utf-8")
    write_app(folder / "app", f"{APPS}:server", f"{APPS}:client", DEFAULTS)
    count = recipe.data.clients
    progress.say(f"Flower: a SuperLink and {count} SuperNodes on this machine, over TLS")
    with Deployment(folder / "flower") as flower:
        if front is not None:
            flower.fleet = f"{HERE}:{front(flower.port)}"
        try:
            flower.start_link()
            flower.start_executor()
            names = [f"site-{number}" for number in range(count)]
            flower.register(*names)
        except DeploymentError as error:
            raise RunFailed(str(error)) from None
        for name in names:
            check_stop()
            site = shared_site(out / "sites" / name, recipe)
            flower.start_node(name, {"site": str(site), "keep": IDLE if count <= KEPT else 0})
        yield flower


def shared_site(folder: Path, recipe: Recipe) -> Path:
    """The file of a site that holds its client's part of the recipe's own data."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.toml"
    tables = {"device": recipe.run.device, "data": {"share": True}}
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def followed(flower: Deployment, run: str, told: Path, progress: Progress) -> None:
    """Pass on what the ServerApp of a run tells, until it ends. Raises what it ended with."""
    process, at = 0, 0
    quiet, stop_by = time.monotonic(), float("inf")
    while True:
        lines, at = new_lines(told, at)
        for what, value in lines:
            quiet = time.monotonic()
            if what == "process":
                process = int(value)
            elif what in OUTCOMES:
                OUTCOMES[what](value)
                return
            heard(what, value, progress)
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
            require_unfinished(flower, run, told, at)
        time.sleep(TICK)


def require_running(flower: Deployment, progress: Progress) -> None:
    """Say which SuperNode ended, for a run does without it. Raises RunFailed for other parts."""
    gone = flower.ended()
    if gone is None:
        return
    if gone in (SUPERLINK, SUPEREXEC):
        raise RunFailed(f"{gone} ended: {flower.last_words(gone)}")
    progress.say(f"{gone} ended: {flower.last_words(gone)}")
    flower.stop(gone)


def require_unfinished(flower: Deployment, run: str, told: Path, at: int) -> None:
    """Raise RunFailed if the ServerApp ended without having told so."""
    try:
        status, details = flower.status(run)
    except DeploymentError:
        return  # a SuperLink that is being started anew
    if status.startswith("finished") and not new_lines(told, at)[0]:
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


def raising(kind: Callable[[str], BaseException]) -> Callable[[str], NoReturn]:
    """A function that raises an error of that kind with the text it is given."""

    def end(text: str) -> NoReturn:
        raise kind(text)

    return end


#: What is done with a ServerApp's last line.
OUTCOMES: Final[Mapping[str, Callable[[str], None]]] = {
    "end": lambda text: None,
    "input": raising(InputError),
    "storage": raising(StorageError),
    "failed": raising(RunFailed),
    "error": raising(RunFailed),
    "stopped": raising(lambda text: Stopped()),
}
