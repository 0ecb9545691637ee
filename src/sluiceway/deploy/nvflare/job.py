"""A job as NVFlare takes it: a folder of configuration, without code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sluiceway.deploy.nvflare.names import CONTROLLER, EXECUTOR

#: Seconds that sites have to start their processes.
START_TIMEOUT = 300


def write_job(
    folder: Path,
    name: str,
    sites: Sequence[str],
    arguments: Mapping[str, Any],
    *,
    controller: str = "sluiceway.deploy.nvflare.controller.ServerController",
    executor: str = "sluiceway.deploy.nvflare.executor.ClientExecutor",
) -> None:
    """Write a job.

    Args:
        folder: for it; made here.
        name: of the job.
        sites: that take part.
        arguments: of the controller; strings, numbers, booleans and lists of them.
        controller, executor: classes that the kits allow.
    """

    def part(path: str, **arguments: Any) -> dict[str, Any]:
        return {"path": path, "args": arguments}

    collab = part(
        "nvflare.collab.runtime.controller.CollabController",
        server_obj_id=CONTROLLER,
        sync_task_timeout=START_TIMEOUT,
    )
    restart = part("sluiceway.deploy.nvflare.restart.SiteExecutor", client_obj_id=EXECUTOR)
    server = {
        "format_version": 2,
        "workflows": [{"id": "controller", **collab}],
        "components": [{"id": CONTROLLER, **part(controller, **arguments)}],
    }
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": restart}],
        "components": [{"id": EXECUTOR, **part(executor)}],
    }
    # min_clients = 1: whether a round without some sites counts is for the run to decide.
    meta = {
        "name": name,
        "min_clients": 1,
        "resource_spec": {},
        "deploy_map": {"app": ["server", *sites]},
    }
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    for path, table in (
        (config / "config_fed_server.json", server),
        (config / "config_fed_client.json", client),
        (folder / "meta.json", meta),
    ):
        path.write_text(json.dumps(table, indent=2), encoding="utf-8")
