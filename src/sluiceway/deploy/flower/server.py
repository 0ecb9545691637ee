"""The ServerApp's work: a recipe over the Grid, with its progress for whoever started it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app.user_config import UserConfigValue
from flwr.serverapp import Grid

from sluiceway.core.round_loop import Record
from sluiceway.core.signals import graceful_stop
from sluiceway.deploy.flower.transport import GridTransport
from sluiceway.deploy.processes import exit_with
from sluiceway.errors import STOPPED, InputError, exit_code_of
from sluiceway.experiment.progress import described
from sluiceway.experiment.recipe import Recipe, load_recipe
from sluiceway.experiment.report import write_report
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Progress


@dataclass(frozen=True)
class ProgressLog:
    """Progress of a run: JSON lines into a file, or plain lines into the log.

    Attributes:
        path: the file, which only grows; None for the log.
    """

    path: Path | None

    def write(self, what: str, value: Any) -> None:
        """Add a line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([what, value]) + "\n")
        elif what == "round":
            print(described(Record.of(value)), flush=True)
        elif what == "say":
            print(value, flush=True)

    def progress(self) -> Progress:
        """The callbacks for `run`."""
        return Progress(
            say=lambda text: self.write("say", text),
            begin=lambda rounds: self.write("begin", rounds),
            on_round=lambda record: self.write("round", record.as_dict()),
            on_update=lambda done, of: self.write("update", [done, of]),
        )


def pass_on(what: str, value: Any, progress: Progress) -> None:
    """Call the callback of a line of `ProgressLog`."""
    calls: dict[str, Callable[[Any], None]] = {
        "say": progress.say,
        "begin": progress.begin,
        "round": lambda plain: progress.on_round(Record.of(plain)),
        "update": lambda pair: progress.on_update(*pair),
    }
    if what in calls:
        calls[what](value)


def serve_recipe(grid: Grid, config: Mapping[str, UserConfigValue]) -> None:
    """Run the recipe that the run configuration names.

    Args:
        config: `apps.DEFAULTS` and what was given.

    Raises:
        InputError and what else `run` raises, after it was written to the log.
    """
    log = ProgressLog(Path(str(config["told"])) if config["told"] else None)
    if log.path is not None:
        # Flower would only interrupt it, and then wait for a SuperLink that has ended too.
        threading.Thread(target=exit_with, args=[os.getppid()], daemon=True).start()
    log.write("process", os.getpid())
    try:
        recipe, out = recipe_and_folder(config)
        transport = GridTransport(
            grid,
            recipe.data.clients,
            wait=float(config["patience"]),
            concurrent=int(config["at-once"]),
            chunk=int(config["piece-mb"]) << 20,
        )
        # A local deployment itself says that it stops.
        with graceful_stop() if log.path else graceful_stop(log.progress().say):
            run(
                recipe,
                out,
                resume=bool(config["resume"]),
                force=bool(config["force"]),
                progress=log.progress(),
                transport=transport,
            )
        write_report([out])
        log.write("end", [0, ""])
    except BaseException as error:
        code, why = exit_code_of(error), str(error) or type(error).__name__
        log.write("end", [code, why])
        if log.path is None:
            print(why, flush=True)
        elif code == STOPPED:
            return
        raise


def recipe_and_folder(config: Mapping[str, UserConfigValue]) -> tuple[Recipe, Path]:
    """The recipe and the run folder. Raises InputError."""
    for key in ("recipe", "out"):
        if not config[key]:
            raise InputError(f"give {key} in --run-config")
    settings = [text for text in str(config["set"]).splitlines() if text.strip()]
    recipe = load_recipe(str(config["recipe"]), [*settings, "run.engine=flower"], code=False)
    return recipe, Path(str(config["out"]))
