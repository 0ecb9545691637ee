"""Submitting a run and bringing it home."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from sluiceway.core.files import scratch_folder
from sluiceway.core.guards import RunFailed
from sluiceway.deploy.nvflare.admin import AdminSession
from sluiceway.deploy.nvflare.job import write_job
from sluiceway.deploy.nvflare.names import OUTCOME
from sluiceway.errors import BAD_INPUT, STOPPED, InputError
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Say


@dataclass(frozen=True)
class JobSpec:
    """A run that is to be made on a server.

    Attributes:
        recipe: what is run.
        name: of its folder there.
        sites: their names, by client number.
        resume, force: see `sluiceway.experiment.run.run`.
        wait: seconds to wait for sites that are not connected.
    """

    recipe: Recipe
    name: str
    sites: Sequence[str]
    resume: bool = False
    force: bool = False
    wait: float = 60.0


def submit(desk: AdminSession, order: JobSpec, out: Path | None, say: Say) -> None:
    """Submit a run, tell how it goes on, and bring home what is light of its folder.

    Args:
        out: where recipe.toml, metrics.jsonl and summary.json are put; None leaves them there.

    Raises:
        InputError: the server refuses the recipe, or there are not as many sites as clients.
        RunFailed: a site is not there, or the run could not go on.
        KeyboardInterrupt: it was asked to stop, and has.
    """
    with scratch_folder() as folder:
        job = sent(desk, order, folder / "job", say)
        attend(desk, job, say)
        brought = desk.fetch(job, folder / "brought")
        status = desk.status(job)
        found = outcome_in(brought)
        for text in found.get("lines", [])[desk.told :]:
            say(str(text))
        if brought is not None and out is not None:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copytree(brought, out, dirs_exist_ok=True)
            (out / OUTCOME).unlink(missing_ok=True)
    end_as(found, status)


def sent(desk: AdminSession, order: JobSpec, folder: Path, say: Say) -> str:
    """Submit a run, once its sites are there; returns the job's id.

    Args:
        folder: for the job; made here.

    Raises:
        InputError, RunFailed: see `submit`.
    """
    if len(order.sites) != order.recipe.data.clients:
        raise InputError(
            f"data.clients = {order.recipe.data.clients}, but {len(order.sites)} sites are named"
        )
    desk.await_sites(order.sites, order.wait, say)
    arguments = {
        "recipe": tomli_w.dumps(order.recipe.resolved()),
        "name": order.name,
        "sites": list(order.sites),
        "resume": order.resume,
        "force": order.force,
    }
    write_job(folder, order.name, order.sites, arguments)
    job = desk.submit(folder)
    say(f"job {job}: {order.name} at {', '.join(order.sites)}")
    return job


def attend(desk: AdminSession, job: str, say: Say) -> None:
    """Watch a job to its end; Ctrl-C asks it to stop, a second one aborts it."""
    try:
        desk.watch(job, say)
    except KeyboardInterrupt:
        try:
            desk.stop(job)
            desk.watch(job, say, check=lambda: None)
        except BaseException:  # it does not run yet, or this is the second Ctrl-C
            desk.abort(job)
            raise


def outcome_in(brought: Path | None) -> dict[str, Any]:
    """How the conductor says that it ended; empty if it could not."""
    if brought is None or not (brought / OUTCOME).exists():
        return {}
    found = json.loads((brought / OUTCOME).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def end_as(found: dict[str, Any], status: str) -> None:
    """Raise what the run ended with; nothing if it went well."""
    if not found:
        raise RunFailed(f"the job ended as {status}, before the run did; see the server's log")
    code, line = found.get("code"), str(found.get("line"))
    if code == STOPPED:
        raise KeyboardInterrupt
    if code == BAD_INPUT:
        raise InputError(line)
    if code:
        raise RunFailed(line)
