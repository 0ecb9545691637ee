"""One run of a recipe: load, partition, train, and leave a run folder behind."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch

import sluiceway
from sluiceway.engines.local import chosen_device
from sluiceway.experiment.errors import InputError
from sluiceway.experiment.kinds import Outcome, run_federated, run_split
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Progress, Session
from sluiceway.federated.checkpoints import Checkpoint
from sluiceway.federated.rounds import Record, Result


def run(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    session: Session | None = None,
    progress: Progress | None = None,
) -> tuple[Result, dict[str, Any]]:
    """Run a recipe on the embedded engine.

    Args:
        recipe: checked.
        out: the run folder; None writes nothing.
        resume: continue what is in `out`.
        session: shares data and frozen layers' outputs between runs.
        progress: what to tell while it goes on.

    Returns:
        The result, and the summary that is in `summary.json`.

    Raises:
        InputError, DataError, NoExpertsError, CheckpointError: one line each.
    """
    session = session or Session()
    progress = progress or Progress()
    began = time.perf_counter()
    folder = Folder(out, recipe, resume) if out else None
    device = usable_device(recipe.run.device)

    def on_start() -> None:
        progress.begin(recipe.run.rounds)
        if folder:
            folder.open()

    def on_round(record: Record) -> None:
        if folder:
            folder.add(record)
        progress.on_round(record)

    told = replace(progress, on_start=on_start, on_round=on_round)
    if recipe.run.kind == "split":
        if resume and out and (out / "metrics.jsonl").exists():
            raise InputError(f"{out}: a split run cannot be resumed; give --force to begin anew")
        outcome = run_split(recipe, device, session, told)
    else:
        checkpoint = Checkpoint(out / "checkpoints", resume) if out else None
        outcome = run_federated(recipe, device, session, told, checkpoint)
    summary = summarise(recipe, outcome, device, time.perf_counter() - began)
    if folder:
        folder.finish(outcome.result, summary)
    return outcome.result, summary


def usable_device(name: str) -> str:
    """The device that a recipe names. Raises InputError if this machine does not have it."""
    try:
        device = chosen_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"run.device = {name!r} cannot be used here: {why}") from None
    return device


@dataclass
class Folder:
    """A run folder: recipe.toml, metrics.jsonl, summary.json.

    Nothing is written before `open`, so that a run that is refused leaves nothing behind.

    Raises:
        InputError: the folder holds a run and `resume` was not asked, or another recipe's run.
    """

    out: Path
    recipe: Recipe
    resume: bool

    def __post_init__(self) -> None:
        self.text = tomli_w.dumps(self.recipe.resolved())
        written = self.out / "recipe.toml"
        if written.exists() and not self.resume:
            raise InputError(
                f"{self.out} already holds a run; give --resume, --force or another --out"
            )
        if written.exists() and written.read_text(encoding="utf-8") != self.text:
            raise InputError(f"{self.out} holds a run of another recipe; see {written}")

    def open(self) -> None:
        """Make the folder, with the resolved recipe in it."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "recipe.toml").write_text(self.text, encoding="utf-8")

    def add(self, record: Record) -> None:
        """Append a round to metrics.jsonl."""
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.as_dict()) + "\n")

    def finish(self, result: Result, summary: dict[str, Any]) -> None:
        """Write the summary, and metrics.jsonl anew.

        A round that was stopped between its line and its checkpoint left a line too many.
        """
        lines = [json.dumps(record.as_dict()) + "\n" for record in result.records]
        (self.out / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        write_json(self.out / "summary.json", summary)


def clear_folder(out: Path) -> None:
    """Remove what a run left in its folder, and nothing else."""
    for name in ("recipe.toml", "metrics.jsonl", "summary.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def summarise(recipe: Recipe, outcome: Outcome, device: str, seconds: float) -> dict[str, Any]:
    """What summary.json holds."""
    result = outcome.result
    personal = {str(client): value for client, value in sorted(result.personal_accuracy.items())}
    return {
        "recipe": recipe.resolved(),
        "method": recipe.method["name"],
        "seed": recipe.run.seed,
        "rounds": len(result.records),
        "accuracy": result.accuracy,
        "best_accuracy": result.best_accuracy,
        "accuracy_by_round": result.accuracy_by_round,
        "personal_accuracy": personal,
        "mean_personal_accuracy": sum(personal.values()) / len(personal) if personal else None,
        "accuracy_by_client": result.records[-1].accuracy_by_client,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "bytes_by_round": [record.bytes_up + record.bytes_down for record in result.records],
        "seconds": seconds,
        "clients": recipe.data.clients,
        "empty_clients": result.empty,
        "refused_updates": result.refused,
        "refused": [
            {"round": record.round, "client": client, "why": why}
            for record in result.records
            for client, why in record.refused.items()
        ],
        "data_source": outcome.source,
        "label_names": list(outcome.label_names),
        "label_counts": result.label_counts,
        "engine": recipe.run.engine,
        "device": device,
        "versions": versions(),
        **outcome.more,
    }


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {
        "sluiceway": sluiceway.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def write_json(path: Path, content: Any) -> None:
    """Write under a temporary name first, so that a reader never sees half a file."""
    made = path.with_name(f".{path.name}")
    made.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(made, path)
