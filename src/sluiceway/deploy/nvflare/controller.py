"""The server's half of a job: runs the recipe, with sites in place of local clients."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

from nvflare.collab import collab

from sluiceway.core.signals import ask_to_stop, graceful_stop
from sluiceway.deploy.nvflare.kits import read_kit
from sluiceway.deploy.nvflare.names import (
    ENDPOINT,
    FILES,
    KIT,
    MODEL,
    OUTCOME,
    PROGRESS,
    RESULT,
    RUNS,
    STOP,
    refuse_tensors,
    require_name,
    typed,
)
from sluiceway.deploy.nvflare.transport import NvflareTransport
from sluiceway.deploy.site_file import require_allowed
from sluiceway.errors import InputError, outcome_of
from sluiceway.experiment.progress import described
from sluiceway.experiment.recipe import recipe_from
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Progress
from sluiceway.transport.tls import Endpoint

refuse_tensors()

#: Files of a run folder that the admin downloads; checkpoints stay with the server's runs.
LIGHT = (
    "recipe.toml",
    "metrics.jsonl",
    "summary.json",
    "model/last.safetensors",
    "model/best.safetensors",
)


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
        #: Progress so far, which the admin asks for; only grows.
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Add a line of progress."""
        self.lines.append(text)
        logging.getLogger("sluiceway").info(text)

    @typed(collab.main)
    def main(self) -> None:
        """Called by NVFlare when all sites are connected."""
        engine = collab.fl_ctx.get_engine()
        engine.register_app_command(PROGRESS, self._progress)
        engine.register_app_command(STOP, self._stop)
        result = Path(collab.workspace.get_run_dir(collab.fl_ctx.get_job_id())) / RESULT
        result.mkdir(exist_ok=True)
        proxies = {proxy.name: proxy for proxy in collab.clients}
        transport = NvflareTransport([proxies.get(site) for site in self.sites], self.sites)
        code, line = outcome_of(lambda: self._run(transport, self.out()))
        (result / "model").mkdir(exist_ok=True)
        for name in LIGHT:
            with contextlib.suppress(FileNotFoundError, InputError):
                shutil.copy(self.out() / name, result / name)
        outcome = {"code": code, "line": line, "lines": self.lines}
        (result / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")

    def out(self) -> Path:
        """The run folder. Raises InputError: the name is none."""
        return Path(os.environ[RUNS]) / require_name(self.name)

    def _run(self, transport: NvflareTransport, out: Path) -> None:
        kit = read_kit(Path(os.environ[KIT]))
        listen, port = os.environ[ENDPOINT].rsplit(":", 1)
        recipe = recipe_from(tomllib.loads(self.recipe), model=os.environ.get(MODEL))
        require_allowed(recipe, json.loads(os.environ.get(FILES, "[]")))
        with graceful_stop(self.say):
            run(
                recipe,
                out,
                resume=self.resume,
                force=self.force,
                progress=Progress(self.say, on_round=lambda record: self.say(described(record))),
                transport=transport,
                endpoint=Endpoint(kit.keys, kit.address[0], int(port), listen),
            )

    def _progress(self, topic: str, asked: Any, context: Any) -> dict[str, Any]:
        """The lines after the first `seen`, for the admin."""
        return {"lines": self.lines[int((asked or {}).get("seen", 0)) :]}

    def _stop(self, topic: str, asked: Any, context: Any) -> dict[str, Any]:
        """Stop after the step in hand, for the admin."""
        self.say("stopping after this step")
        ask_to_stop()
        return {}
