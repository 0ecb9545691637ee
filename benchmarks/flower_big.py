"""An app whose one client answers with a file of many bytes; `benchmarks/flower.py big` runs it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sluiceway.deploy.flower.client import site_app
from sluiceway.transport.protocol import Request, Response


class Giver:
    """A site whose answer's message is a copy of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def answer(self, ask: Request, folder: Path) -> Response:
        """Copy the file."""
        return Response(message=Path(shutil.copy(self.path, folder / "copy")))


client = site_app(
    lambda context: Giver(Path(str(context.node_config["file"]))),
    lambda context: Path(str(context.node_config["room"])),
)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Ask for the file, and note how long it took."""
    from sluiceway.deploy.flower.transport import GridTransport

    config = context.run_config
    transport = GridTransport(grid, 1, piece=int(config["piece-mb"]) << 20)
    folder = Path(str(config["out"]))
    began = time.perf_counter()
    [(_, found)] = transport.ask({0: Request("give")}, folder)
    seconds = time.perf_counter() - began
    size = found.message.stat().st_size if isinstance(found, Response) and found.message else 0
    fresh = folder / "found.new"
    fresh.write_text(json.dumps({"seconds": seconds, "bytes": size}))
    fresh.rename(folder / "found.json")
