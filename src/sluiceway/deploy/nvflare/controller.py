"""The server's half of a job: runs the recipe, with sites in place of embedded clients."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.collab import collab

from sluiceway.core.round_loop import Record
from sluiceway.core.signals import ask_to_stop, graceful_stop
from sluiceway.deploy.nvflare.kits import read_kit
from sluiceway.deploy.nvflare.names import BROUGHT, GATE, KIT, OUTCOME, RUNS, STOP, TELL, typed
from sluiceway.deploy.nvflare.plain import refuse_tensors
from sluiceway.deploy.nvflare.transport import NvflareTransport
from sluiceway.errors import outcome_of
from sluiceway.experiment.progress import described
from sluiceway.experiment.recipe import recipe_from
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Progress
from sluiceway.transport.tls import Endpoint

refuse_tensors()

#: What of a run folder is brought to the submitter; checkpoints stay where the server keeps runs.
LIGHT = ("recipe.toml", "metrics.jsonl", "summary.json")


@dataclass
class ProgressLog:
    """Lines for people, kept so that the submitter can ask for them."""

    lines: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, text: str) -> None:
        with self.lock:
            self.lines.append(text)
        logging.getLogger("sluiceway").info(text)

    def after(self, seen: int) -> list[str]:
        """What came after the first `seen` lines."""
        with self.lock:
            return self.lines[seen:]


def doorway() -> Endpoint:
    """Where sites dial for split learning."""
    kit = read_kit(Path(os.environ[KIT]))
    listen, port = os.environ[GATE].rsplit(":", 1)
    return Endpoint(kit.keys, kit.address[0], int(port), listen)


class ServerController:
    """Runs a recipe in the server's job process.

    Args:
        recipe: as TOML text.
        name: of the run folder, below the folder where the server keeps runs.
        sites: their names, by client number.
        resume, force: see `run`.
    """

    def __init__(
        self, recipe: str, name: str, sites: list[str], resume: bool = False, force: bool = False
    ) -> None:
        self.recipe, self.name, self.sites = recipe, name, sites
        self.resume, self.force = resume, force
        self.diary = ProgressLog()

    @typed(collab.main)
    def conduct(self) -> None:
        """Called by NVFlare when all sites are there."""
        engine = collab.fl_ctx.get_engine()
        engine.register_app_command(TELL, self._tell)
        engine.register_app_command(STOP, self._stop)
        brought = Path(collab.workspace.get_run_dir(collab.fl_ctx.get_job_id())) / BROUGHT
        brought.mkdir(exist_ok=True)
        stand_ins = {proxy.name: proxy for proxy in collab.clients}
        transport = NvflareTransport([stand_ins.get(site) for site in self.sites], self.sites)
        out = Path(os.environ[RUNS]) / self.name
        code, line = outcome_of(lambda: self._run(transport, out))
        for name in LIGHT:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(out / name, brought / name)
        found = {"code": code, "line": line, "lines": self.diary.lines}
        (brought / OUTCOME).write_text(json.dumps(found), encoding="utf-8")

    def _run(self, transport: NvflareTransport, out: Path) -> None:
        def on_round(record: Record) -> None:
            self.diary.say(described(record))

        progress = Progress(say=self.diary.say, on_round=on_round)
        recipe = recipe_from(tomllib.loads(self.recipe))
        with graceful_stop(self.diary.say):
            run(
                recipe,
                out,
                resume=self.resume,
                force=self.force,
                progress=progress,
                transport=transport,
                endpoint=doorway(),
            )

    def _tell(self, topic: str, asked: Any, context: Any) -> dict[str, Any]:
        """The submitter asks for the lines after the first `seen`."""
        return {"lines": self.diary.after(int((asked or {}).get("seen", 0)))}

    def _stop(self, topic: str, asked: Any, context: Any) -> dict[str, Any]:
        """The submitter asks to stop after the step in hand."""
        self.diary.say("stopping after this step")
        ask_to_stop()
        return {}
