"""The process in which a site works: a line of JSON asks, a line answers, messages are files."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from sluiceway.transport.protocol import ClientHandler, Request
from sluiceway.transport.worker_pool import described, leave_with


def serve(site: ClientHandler, asks: TextIO, answers: TextIO) -> None:
    """Answer each line of `asks` by one of `answers`, until there are no more."""
    for text in asks:
        print(json.dumps(answered(site, json.loads(text))), file=answers, flush=True)


def answered(site: ClientHandler, asked: dict[str, Any]) -> dict[str, Any]:
    """A site's answer: its facts and the path of its message, or "lost" and why."""
    message = Path(asked["message"]) if asked["message"] else None
    ask = Request(asked["what"], asked["facts"], message)
    try:
        answer = site.answer(ask, Path(asked["folder"]))
        facts = json.loads(json.dumps(dict(answer.facts)))
    except Exception as error:
        return {"lost": described(error)}
    return {"facts": facts, "message": str(answer.message) if answer.message else None}


def main() -> None:
    """Open the site whose file and startup kit are named, and serve it over stdin and stdout."""
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not end up among the answers
    from sluiceway.deploy.nvflare.kits import read_kit
    from sluiceway.deploy.site import open_site

    site: ClientHandler
    try:
        site = open_site(Path(sys.argv[1]), read_kit(Path(sys.argv[2])).keys)
    except Exception as error:
        site = Closed(described(error))
    serve(site, sys.stdin, answers)


class Closed(ClientHandler):
    """A site that could not be opened, and says why whatever it is asked."""

    def __init__(self, why: str) -> None:
        self.why = why

    def answer(self, ask: Request, folder: Path) -> Any:
        raise RuntimeError(self.why)


if __name__ == "__main__":
    main()
