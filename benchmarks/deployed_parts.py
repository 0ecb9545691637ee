"""Parts of a deployment that `benchmarks/deployed.py` measures: a site that responds with bytes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nvflare.collab import collab

from sluiceway.deploy.nvflare.executor import ClientExecutor
from sluiceway.deploy.nvflare.kits import read_kit
from sluiceway.deploy.nvflare.names import RESULT, refuse_tensors, typed
from sluiceway.deploy.nvflare.transport import NvflareTransport
from sluiceway.deploy.site_process import serve
from sluiceway.transport.protocol import ClientHandler, Request, Response
from sluiceway.transport.tls import TlsClient

refuse_tensors()

#: Bytes that are written at a time.
BLOCK = 1 << 20


class Bytes(ClientHandler):
    """A site that responds with a message of the requested length."""

    def handle(self, request: Request, folder: Path) -> Response:
        """Write `size` bytes, no two blocks of which are the same."""
        left, path = int(request.facts["size"]), folder / "bytes"
        block = os.urandom(BLOCK)
        with path.open("wb") as file:
            while left:
                file.write((left.to_bytes(8, "little") + block)[: min(BLOCK, left)])
                left -= min(BLOCK, left)
        return Response({}, path)


class BytesExecutor(ClientExecutor):
    """Has `Bytes` handle requests."""

    def command(self, folder: Path) -> list[str]:
        """What starts it."""
        module = "benchmarks.deployed_parts"
        return [sys.executable, "-m", module, "site", str(folder), str(os.getpid())]


class Clock:
    """Sends messages of some lengths to the first site, and notes how long each took.

    Args:
        both: bytes of requests, and of their responses.
        back: bytes of responses to requests without a message.
    """

    def __init__(self, both: list[int], back: list[int]) -> None:
        self.both, self.back = both, back

    @typed(collab.main)
    def main(self) -> None:
        """Called by NVFlare."""
        proxy = collab.clients[0]
        result = Path(collab.workspace.get_run_dir(collab.fl_ctx.get_job_id())) / RESULT
        result.mkdir(exist_ok=True)
        seconds(proxy, 1, there=False)  # the site's process is up from here on
        found = {
            "both": [seconds(proxy, size, there=True) for size in self.both],
            "back": [seconds(proxy, size, there=False) for size in self.back],
        }
        (result / "times.json").write_text(json.dumps(found), encoding="utf-8")


def seconds(proxy: Any, size: int, there: bool) -> float:
    """Seconds until a response of that length is here; the request is as long, or has no file."""
    transport = NvflareTransport([proxy], [str(proxy.name)])
    with tempfile.TemporaryDirectory() as folder:
        message = Path(folder) / "request"
        message.write_bytes(bytes(size if there else 0))
        request = Request("bytes", {"size": size}, message if there else None)
        began = time.perf_counter()
        [(_, found)] = transport.send({0: request}, Path(folder))
        if not isinstance(found, Response) or found.message is None:
            raise RuntimeError(f"{size} bytes: {found}")
        if found.message.stat().st_size != size:
            raise RuntimeError(f"{size} bytes came as {found.message.stat().st_size}")
        return time.perf_counter() - began


if __name__ == "__main__":
    what, place, number = sys.argv[1:]
    if what == "echo":  # send back every frame, until this process is killed
        keys = read_kit(Path(place)).keys
        TlsClient(keys, "localhost", int(number), lambda facts, body: (facts, body)).thread.join()
    serve(Bytes(), Path(place), int(number))
