"""Submitting a run, watching it and downloading its result."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from sluiceway.core.guards import RunFailed
from sluiceway.core.signals import Stopped
from sluiceway.deploy.nvflare.admin import AdminSession
from sluiceway.deploy.nvflare.job import write_job
from sluiceway.deploy.nvflare.names import OUTCOME, STOP, require_name
from sluiceway.deploy.outcome import raise_outcome
from sluiceway.errors import InputError
from sluiceway.experiment.own_code import code_by_name
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Say
from sluiceway.files import scratch_folder, write_atomically


@dataclass(frozen=True)
class JobSpec:
    """A run on a server.

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


def submit(session: AdminSession, spec: JobSpec, out: Path | None, say: Say) -> None:
    """Submit a run, pass on its progress, and download the light part of its folder.

    Args:
        out: where recipe, metrics, summary and the trained model are put; None downloads nothing.

    Raises:
        InputError: the server refuses the recipe, or there are not as many sites as clients.
        RunFailed: a site is not connected, or the run could not go on.
        Stopped: it was asked to stop, and has.
    """
    with scratch_folder() as folder:
        job = start_job(session, spec, folder / "job", say)
        watch(session, job, say)
        result = session.fetch(job, folder / "result")
        status = session.session.get_job_status(job)
        outcome = outcome_in(result)
        for text in outcome.get("lines", [])[session.seen :]:
            say(str(text))
        if result is not None and out is not None:
            out.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(out / "model", ignore_errors=True)  # of an earlier run
            shutil.copytree(result, out, dirs_exist_ok=True)
            (out / OUTCOME).unlink(missing_ok=True)
            if (out / "recipe.toml").exists():  # with the paths of this machine
                write_atomically(out / "recipe.toml", tomli_w.dumps(spec.recipe.resolved()))
    if not outcome:
        raise RunFailed(f"the job ended as {status}, before the run did; see the server's log")
    raise_outcome(outcome.get("code", 0), str(outcome.get("line")))


def start_job(session: AdminSession, spec: JobSpec, folder: Path, say: Say) -> str:
    """Submit a run, once its sites are connected; returns the job's id.

    Args:
        folder: for the job; made here.

    Raises:
        InputError, RunFailed: see `submit`.
    """
    require_name(spec.name)
    if len(spec.sites) != spec.recipe.data.clients:
        raise InputError(
            f"data.clients = {spec.recipe.data.clients}, but {len(spec.sites)} sites are named"
        )
    session.wait_for_sites(spec.sites, spec.wait, say)
    arguments = {
        "recipe": tomli_w.dumps(code_by_name(spec.recipe.resolved())),
        "name": spec.name,
        "sites": list(spec.sites),
        "resume": spec.resume,
        "force": spec.force,
    }
    write_job(folder, spec.name, spec.sites, arguments)
    session.seen = 0
    job = str(session.session.submit_job(str(folder)))
    say(f"job {job}: {spec.name} at {', '.join(spec.sites)}")
    return job


def watch(session: AdminSession, job: str, say: Say) -> None:
    """Watch a job to its end; Ctrl-C asks it to stop, a second one aborts it."""
    try:
        session.watch(job, say)
    except KeyboardInterrupt:
        try:
            session.session.do_app_command(job, STOP, {})
            session.watch(job, say, check=lambda: None)
        except BaseException:  # it does not run yet, or this is the second Ctrl-C
            with contextlib.suppress(Exception):
                session.session.abort_job(job)
            raise Stopped from None


def outcome_in(result: Path | None) -> dict[str, Any]:
    """The outcome that the controller has written; empty if it could not."""
    if result is None or not (result / OUTCOME).exists():
        return {}
    found = json.loads((result / OUTCOME).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
