"""An app whose one client responds with a large file; `benchmarks/flower.py big` runs it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sluiceway.deploy.flower.client import site_app
from sluiceway.files import write_atomically
from sluiceway.transport.protocol import ClientHandler, Request, Response


class FileSite(ClientHandler):
    """A site that responds with a copy of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def handle(self, request: Request, folder: Path) -> Response:
        """Copy the file."""
        return Response(message=Path(shutil.copy(self.path, folder / "copy")))


client = site_app(
    lambda context: FileSite(Path(str(context.node_config["file"]))),
    lambda context: Path(str(context.node_config["room"])),
)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Request the file, and note how long it took."""
    from sluiceway.deploy.flower.transport import GridTransport

    config = context.run_config
    transport = GridTransport(grid, 1, chunk=int(config["piece-mb"]) << 20)
    folder = Path(str(config["out"]))
    began = time.perf_counter()
    [(_, found)] = transport.send({0: Request("give")}, folder)
    seconds = time.perf_counter() - began
    size = found.message.stat().st_size if isinstance(found, Response) and found.message else 0
    write_atomically(folder / "found.json", json.dumps({"seconds": seconds, "bytes": size}))
