"""A job as NVFlare takes it: a folder of configuration, with no code in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sluiceway.deploy.nvflare.names import CONDUCTOR, RELAY

#: Seconds that sites may take to start their processes.
STARTING = 300


def write_job(
    folder: Path,
    name: str,
    sites: Sequence[str],
    arguments: Mapping[str, Any],
    *,
    conductor: str = "sluiceway.deploy.nvflare.controller.ServerController",
    relay: str = "sluiceway.deploy.nvflare.executor.ClientExecutor",
) -> None:
    """Write a job.

    Args:
        folder: for it; made here.
        name: of the job.
        sites: that take part.
        arguments: of the conductor; texts, numbers, truth values and lists of them.
        conductor, relay: classes that the kits allow.
    """
    controller = {
        "id": "controller",
        "path": "nvflare.collab.runtime.controller.CollabController",
        "args": {"server_obj_id": CONDUCTOR, "sync_task_timeout": STARTING},
    }
    executor = {
        "path": "sluiceway.deploy.nvflare.restart.SiteExecutor",
        "args": {"client_obj_id": RELAY},
    }
    server = {
        "format_version": 2,
        "workflows": [controller],
        "components": [{"id": CONDUCTOR, "path": conductor, "args": dict(arguments)}],
    }
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": executor}],
        "components": [{"id": RELAY, "path": relay, "args": {}}],
    }
    # A site that goes away does not end the job: whether a round stands is for the run to decide.
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
