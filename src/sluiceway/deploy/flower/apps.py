"""The ServerApp and the ClientApp of whole recipes, for `flwr run` and for `--engine flower`.

An app that names these two has no code of its own, so what runs at a site is what was installed
there:

    [tool.flwr.app.components]
    serverapp = "sluiceway.deploy.flower.apps:server"
    clientapp = "sluiceway.deploy.flower.apps:client"
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from flwr.app import Context
from flwr.app.user_config import UserConfigValue
from flwr.serverapp import Grid, ServerApp

from sluiceway.deploy.flower.client import site_app
from sluiceway.deploy.flower.site_daemon import SiteDaemon
from sluiceway.transport.protocol import ClientHandler

#: Seconds without a request after which a site is closed, unless the node config has "keep".
IDLE: Final = 600.0
#: The run configuration, with what is meant where `flwr run --run-config` does not say it.
DEFAULTS: Final[dict[str, UserConfigValue]] = {
    "recipe": "",  # a shipped recipe's name, or a TOML file on the SuperLink's machine
    "set": "",  # key=value lines over it
    "out": "",  # the run folder, on the SuperLink's machine
    "resume": False,
    "force": False,
    "patience": 120.0,  # seconds to wait for the SuperNodes
    "at-once": 0,  # SuperNodes that train at the same time, 0 for all
    "piece-mb": 256,  # of a file in one message
    "told": "",  # file that is told how the run goes on; "" for the log
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
    from sluiceway.errors import InputError

    named = context.node_config.get("site")
    if not isinstance(named, str) or not named:
        raise InputError(
            "start the SuperNode with --node-config 'site=\"/path/of/site.toml\"', "
            "in which this site says where its data are"
        )
    return Path(named)


def opened(context: Context) -> ClientHandler:
    """The site of a SuperNode: open in a process of its own, or with keep=0 for this message."""
    file, idle = site_file(context), float(context.node_config.get("keep", IDLE))
    if idle > 0:
        return SiteDaemon(file, file.parent / "keeper", idle)
    from sluiceway.deploy.site import open_site

    return open_site(file)


def under_way(context: Context) -> Path:
    """Where files are kept that are on their way."""
    return site_file(context).parent / "underway"


client = site_app(opened, under_way)
