"""One run of a recipe: load, partition, train, and leave a run folder behind."""

from __future__ import annotations

import contextlib
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sluiceway
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.round_loop import Record, Result
from sluiceway.errors import InputError
from sluiceway.experiment.kinds import Outcome, run_federated, run_split
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.remote_runs import serve_federated, serve_split
from sluiceway.experiment.run_directory import RunDirectory
from sluiceway.experiment.session import Progress, Session
from sluiceway.transport.local import chosen_device
from sluiceway.transport.protocol import Transport
from sluiceway.transport.tls import Endpoint


def run(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    session: Session | None = None,
    progress: Progress | None = None,
    transport: Transport | None = None,
    doorway: Endpoint | None = None,
) -> tuple[Result, dict[str, Any]]:
    """Run a recipe on the embedded engine, or across sites.

    Args:
        recipe: checked.
        out: the run folder; None writes nothing.
        resume: continue what is in `out`.
        force: replace what is in `out`.
        session: shares data and frozen layers' outputs between runs.
        progress: what to tell while it goes on.
        carrier: reaches the sites that are the clients; None plays them here.
        doorway: where sites dial in a split run.

    Returns:
        The result, and the summary that is in `summary.json`.

    Raises:
        InputError, DataError, NoExpertsError, CheckpointError: bad input, one line each.
        StorageError, RunFailed: the run cannot go on, one line each.
        Stopped: see `graceful_stop`.
    """
    session = session or Session()
    progress = progress or Progress()
    if transport is None and recipe.run.engine != "local":
        raise InputError(
            f"run.engine = {recipe.run.engine!r} is for `sluiceway run`; here it must be 'local'"
        )
    began = time.perf_counter()
    device = usable_device(recipe.run.device)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunDirectory(out, recipe, resume, force)) if out else None

        def on_start() -> None:
            progress.begin(recipe.run.rounds)
            if folder:
                folder.open()

        def on_round(record: Record) -> None:
            if folder:
                folder.add(record)
            progress.on_round(record)

        told = replace(progress, on_start=on_start, on_round=on_round)
        checkpoint = checkpoint_of(recipe, out, resume, progress) if out else None
        given = recipe, device, session, told, checkpoint
        split = recipe.run.kind == "split"
        if transport is None:
            outcome = (run_split if split else run_federated)(*given)
        elif split:
            outcome = serve_split(*given, transport, doorway)
        else:
            outcome = serve_federated(*given, transport)
        summary = summarise(recipe, outcome, device, time.perf_counter() - began)
        if folder:
            folder.finish(outcome.result, summary)
    return outcome.result, summary


def checkpoint_of(recipe: Recipe, out: Path, resume: bool, progress: Progress) -> Checkpoint:
    """Where and how often the run is saved."""
    return Checkpoint(
        out / "checkpoints",
        resume,
        every=recipe.run.checkpoint_every,
        keep=recipe.run.checkpoint_keep,
        say=progress.say,
    )


def usable_device(name: str) -> str:
    """The device that a recipe names. Raises InputError if this machine does not have it."""
    try:
        device = chosen_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"run.device = {name!r} cannot be used here: {why}") from None
    return device


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
        "refused": named(result, "refused"),
        "failed_updates": result.failed,
        "failed": named(result, "failed"),
        "repeated_rounds": sum(record.repeats for record in result.records),
        "data_source": outcome.source,
        "label_names": list(outcome.label_names),
        "label_counts": result.label_counts,
        "engine": recipe.run.engine,
        "device": device,
        "versions": versions(),
        **outcome.more,
    }


def named(result: Result, key: str) -> list[dict[str, Any]]:
    """Every client that a round did without, and why; `key` is "refused" or "failed"."""
    return [
        {"round": record.round, "client": client, "why": why}
        for record in result.records
        for client, why in getattr(record, key).items()
    ]


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {
        "sluiceway": sluiceway.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
