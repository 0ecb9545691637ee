"""The ServerApp's work: a recipe over the Grid, told to whoever started it."""

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

from sluiceway.core.checkpoints import CheckpointError, StorageError
from sluiceway.core.guards import RunFailed
from sluiceway.core.handshake import HandshakeError
from sluiceway.core.round_loop import Record
from sluiceway.core.signals import graceful_stop
from sluiceway.data import DataError
from sluiceway.deploy.flower.site_daemon import watch
from sluiceway.deploy.flower.transport import GridTransport
from sluiceway.errors import InputError
from sluiceway.experiment.progress import described
from sluiceway.experiment.recipe import Recipe, load_recipe
from sluiceway.experiment.report import write_report
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Progress
from sluiceway.moe import NoExpertsError

#: What may end a run with a line that is meant for people, by the name that is told of it.
ENDS: dict[str, tuple[type[BaseException], ...]] = {
    "input": (InputError, DataError, NoExpertsError, CheckpointError, HandshakeError),
    "storage": (StorageError,),
    "failed": (RunFailed,),
    "stopped": (KeyboardInterrupt,),
}


@dataclass(frozen=True)
class ProgressLog:
    """Tells how a run goes on: JSON lines into a file, or plain lines into the log.

    Attributes:
        path: the file, which only grows; None for the log.
    """

    path: Path | None

    def tell(self, what: str, value: Any) -> None:
        """Add a line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([what, value]) + "\n")
        elif what == "round":
            print(described(Record.of(value)), flush=True)
        elif what in ("say", *ENDS):
            print(value, flush=True)

    def progress(self) -> Progress:
        """What `run` is given."""
        return Progress(
            say=lambda text: self.tell("say", text),
            begin=lambda rounds: self.tell("begin", rounds),
            on_round=lambda record: self.tell("round", record.as_dict()),
            on_update=lambda done, of: self.tell("update", [done, of]),
        )


def heard(what: str, value: Any, progress: Progress) -> None:
    """Pass one told line on."""
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
        InputError and others of `ENDS`: the run did not reach its end; told before.
    """
    teller = ProgressLog(Path(str(config["told"])) if config["told"] else None)
    if teller.path is not None:
        # Flower would only interrupt it, and that waits for a SuperLink that is gone too.
        threading.Thread(target=watch, args=[os.getppid()], daemon=True).start()
    teller.tell("process", os.getpid())
    try:
        recipe, out = chosen(config)
        # Who started a trial says itself that it stops.
        with graceful_stop() if teller.path else graceful_stop(teller.progress().say):
            run(
                recipe,
                out,
                resume=bool(config["resume"]),
                force=bool(config["force"]),
                progress=teller.progress(),
                transport=carrier_of(grid, config, recipe.data.clients),
            )
        write_report([out])
        teller.tell("end", "")
    except BaseException as error:
        kind = next((name for name, types in ENDS.items() if isinstance(error, types)), "error")
        teller.tell(kind, str(error) or type(error).__name__)
        if kind == "stopped" and teller.path is not None:
            return
        raise


def carrier_of(grid: Grid, config: Mapping[str, UserConfigValue], clients: int) -> GridTransport:
    """The way to the SuperNodes. Raises InputError."""
    return GridTransport(
        grid,
        clients,
        patience=float(config["patience"]),
        at_once=int(config["at-once"]),
        piece=int(config["piece-mb"]) << 20,
    )


def chosen(config: Mapping[str, UserConfigValue]) -> tuple[Recipe, Path]:
    """The recipe and the run folder. Raises InputError."""
    for key in ("recipe", "out"):
        if not config[key]:
            raise InputError(f"give {key} in --run-config")
    settings = [text for text in str(config["set"]).splitlines() if text.strip()]
    recipe = load_recipe(str(config["recipe"]), [*settings, "run.engine=flower"])
    return recipe, Path(str(config["out"]))
