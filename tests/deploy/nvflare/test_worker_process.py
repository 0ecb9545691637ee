"""A site's process: it answers, says why it cannot, and is started again when it has died."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluiceway.deploy.nvflare.worker_process import SiteProcess

SITE = """
import os, sys
from pathlib import Path
from sluiceway.transport.protocol import Response
from sluiceway.deploy.nvflare.worker import serve

class Doubling:
    def answer(self, ask, folder):
        if ask.what == "die":
            os.kill(os.getpid(), 9)
        if ask.what == "fail":
            raise ValueError("two\\nlines")
        (folder / "twice").write_bytes(ask.message.read_bytes() * 2)
        return Response({"n": ask.facts["n"] * 2}, folder / "twice")

serve(Doubling(), sys.stdin, sys.stdout)
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[SiteProcess]:
    script = tmp_path / "site.py"
    script.write_text(SITE)
    home = SiteProcess([sys.executable, str(script)])
    yield home
    home.end()


def test_a_site_that_died_is_started_again(home: SiteProcess, tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.write_bytes(b"ab")
    said = home.ask("double", {"n": 2}, message, tmp_path)
    assert said["facts"] == {"n": 4}
    assert Path(said["message"]).read_bytes() == b"abab"
    assert home.ask("fail", {}, None, tmp_path) == {"lost": "ValueError: two"}
    assert home.ask("die", {}, None, tmp_path) == {"lost": "its process ended by signal 9"}
    assert home.ask("double", {"n": 3}, message, tmp_path)["facts"] == {"n": 6}
