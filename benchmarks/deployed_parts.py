"""Parts of a deployment that `benchmarks/deployed.py` measures: a site that answers with bytes."""

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
from sluiceway.deploy.nvflare.names import BROUGHT, typed
from sluiceway.deploy.nvflare.plain import refuse_tensors
from sluiceway.deploy.nvflare.transport import NvflareTransport
from sluiceway.deploy.nvflare.worker import serve
from sluiceway.transport.protocol import Request, Response
from sluiceway.transport.tls import TlsClient

refuse_tensors()

#: Bytes that are written at a time.
BLOCK = 1 << 20


class Bytes:
    """A site that answers with a message of the length it is asked for."""

    def answer(self, ask: Request, folder: Path) -> Response:
        """Write `size` bytes, no two blocks of which are the same."""
        left, path = int(ask.facts["size"]), folder / "answer"
        block = os.urandom(BLOCK)
        with path.open("wb") as file:
            while left:
                file.write((left.to_bytes(8, "little") + block)[: min(BLOCK, left)])
                left -= min(BLOCK, left)
        return Response({}, path)


class BytesRelay(ClientExecutor):
    """Hands asks to `Bytes`."""

    def command(self) -> list[str]:
        """What starts it."""
        return [sys.executable, "-m", "benchmarks.deployed_parts"]


class Clock:
    """Asks the first site for messages of some lengths, and notes how long each took.

    Args:
        both: bytes of messages that go there, and of answers that come back.
        back: bytes of answers to asks without a message.
    """

    def __init__(self, both: list[int], back: list[int]) -> None:
        self.both, self.back = both, back

    @typed(collab.main)
    def conduct(self) -> None:
        """Called by NVFlare."""
        proxy = collab.clients[0]
        brought = Path(collab.workspace.get_run_dir(collab.fl_ctx.get_job_id())) / BROUGHT
        brought.mkdir(exist_ok=True)
        asked(proxy, 1, there=False)  # the site's process is up from here on
        found = {
            "both": [asked(proxy, size, there=True) for size in self.both],
            "back": [asked(proxy, size, there=False) for size in self.back],
        }
        (brought / "times.json").write_text(json.dumps(found), encoding="utf-8")


def asked(proxy: Any, size: int, there: bool) -> float:
    """Seconds until a message of that length is here, after one went there or not."""
    transport = NvflareTransport([proxy], [str(proxy.name)])
    with tempfile.TemporaryDirectory() as folder:
        message = Path(folder) / "ask"
        message.write_bytes(bytes(size if there else 0))
        ask = Request("bytes", {"size": size}, message if there else None)
        began = time.perf_counter()
        for _, answer in transport.ask({0: ask}, Path(folder)):
            if not isinstance(answer, Response) or answer.message is None:
                raise RuntimeError(f"{size} bytes: {answer}")
            if answer.message.stat().st_size != size:
                raise RuntimeError(f"{size} bytes came as {answer.message.stat().st_size}")
        return time.perf_counter() - began


def echo(kit: Path, port: int) -> None:
    """Dial the gate at a port of this machine, and send back what comes, until ended."""
    answered = TlsClient(read_kit(kit).keys, "localhost", port, lambda facts, body: (facts, body))
    answered.thread.join()


def bring() -> None:
    """Be a site's process that answers with bytes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Bytes(), sys.stdin, answers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["echo"]:
        echo(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        bring()
