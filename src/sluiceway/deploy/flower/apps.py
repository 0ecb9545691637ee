"""The ServerApp and the ClientApp of whole recipes, for `flwr run` and for `--engine flower`.

An app that names these two has no code of its own, so a site runs what is installed there:

    [tool.flwr.app.components]
    serverapp = "sluiceway.deploy.flower.apps:server"
    clientapp = "sluiceway.deploy.flower.apps:client"
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from flwr.app import Context
from flwr.app.user_config import UserConfigValue
from flwr.serverapp import Grid, ServerApp

from sluiceway.deploy.flower.client import site_app
from sluiceway.deploy.site_process import SiteProcess, site_command
from sluiceway.errors import InputError
from sluiceway.transport.protocol import ClientHandler

#: Seconds without a request after which a site is closed, unless the node config has "keep".
IDLE: Final = 600.0
#: The run configuration, with the defaults of `flwr run --run-config`.
DEFAULTS: Final[dict[str, UserConfigValue]] = {
    "recipe": "",  # a shipped recipe's name, or a TOML file on the SuperLink's machine
    "set": "",  # key=value lines over it
    "out": "",  # the run folder, on the SuperLink's machine
    "resume": False,
    "force": False,
    "patience": 120.0,  # seconds to wait for the SuperNodes
    "at-once": 0,  # SuperNodes that train at the same time, 0 for all
    "piece-mb": 256,  # of a file in one message
    "told": "",  # file that gets the run's progress; "" for the log
}

server = ServerApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run a recipe whose clients are the SuperNodes.

    Raises:
        InputError: see `experiment.run.run`.
    """
    from sluiceway.deploy.flower.server import serve_recipe

    serve_recipe(grid, {**DEFAULTS, **context.run_config})


def site_file(context: Context) -> Path:
    """The site file that a SuperNode was started with. Raises InputError."""
    named = context.node_config.get("site")
    if not isinstance(named, str) or not named:
        raise InputError(
            "start the SuperNode with --node-config 'site=\"/path/of/site.toml\"', "
            "the file of settings of this site"
        )
    return Path(named)


def opened(context: Context) -> ClientHandler:
    """The site of a SuperNode: in a process of its own, or with keep=0 for this message only."""
    file, idle = site_file(context), float(context.node_config.get("keep", IDLE))
    if idle > 0:
        folder = file.parent / "process"
        # It ends with Flower's SuperExec, which ends with its SuperNode.
        command = site_command(file, folder, parent=os.getppid(), idle=idle)
        return SiteProcess(command, folder, folder / "process.log")
    from sluiceway.deploy.site import open_site

    return open_site(file)


client = site_app(opened, lambda context: site_file(context).parent / "transfers")
