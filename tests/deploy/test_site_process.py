"""A site's worker process: it responds, reports errors, restarts, and ends with its parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluiceway.deploy.chunks import SiteFailure
from sluiceway.deploy.site_process import ADDRESS, SiteProcess, site_command
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.remote_runs import facts_of
from sluiceway.transport.protocol import Request

SITE = """
import os, sys
from pathlib import Path
from sluiceway.deploy.site_process import serve
from sluiceway.transport.protocol import Response

class Counting:
    count = 0
    def handle(self, request, folder):
        self.count += 1
        if request.what == "die":
            os.kill(os.getpid(), 9)
        if request.what == "fail":
            raise ValueError("two\\nlines")
        if request.message is None:
            return Response({"count": self.count, **request.facts})
        (folder / "back").write_bytes(request.message.read_bytes()[::-1])
        return Response({"count": self.count}, folder / "back")

serve(Counting(), Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
"""


def process(place: Path, idle: float = 0) -> SiteProcess:
    script = place / "site.py"
    script.write_text(SITE)
    command = [sys.executable, str(script), str(place), str(os.getpid()), str(idle)]
    return SiteProcess(command, place, place / "process.log")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteProcess]:
    made = process(tmp_path)
    yield made
    made.end()


def test_requests_reach_one_process_that_is_restarted(site: SiteProcess, tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.write_bytes(b"abc")
    facts = site.handle(Request("a", {"x": [1, "é"]}), tmp_path).facts
    assert facts == {"count": 1, "x": [1, "é"]}
    # Another client, as Flower's process of the next message is, finds it by its files.
    other = SiteProcess(["false"], site.folder, site.log)
    found = other.handle(Request("b", {}, message), tmp_path)
    assert found.facts == {"count": 2}
    assert found.message is not None
    assert found.message.read_bytes() == b"cba"
    with pytest.raises(SiteFailure, match=r"^ValueError: two$"):
        site.handle(Request("fail"), tmp_path)
    with pytest.raises(SiteFailure, match=r"^its process ended by signal 9$"):
        site.handle(Request("die"), tmp_path)
    assert site.handle(Request("a"), tmp_path).facts == {"count": 1}


def test_a_wrong_key_is_refused(site: SiteProcess, tmp_path: Path) -> None:
    site.handle(Request("a"), tmp_path)
    address = json.loads((tmp_path / ADDRESS).read_text())
    assert (tmp_path / ADDRESS).stat().st_mode & 0o077 == 0
    (tmp_path / ADDRESS).write_text(json.dumps({**address, "key": "00" * 32}))
    with pytest.raises(SiteFailure, match="its process ended"):
        SiteProcess(["false"], site.folder, site.log).handle(Request("a"), tmp_path)
    (tmp_path / ADDRESS).write_text(json.dumps(address))
    assert site.handle(Request("a"), tmp_path).facts == {"count": 2}


def ends(process: subprocess.Popen[bytes], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return process.poll() is not None


def test_an_idle_process_ends(tmp_path: Path) -> None:
    site = process(tmp_path, idle=0.5)
    site.handle(Request("a"), tmp_path)
    assert site._process is not None
    assert ends(site._process)


@pytest.mark.slow
def test_a_real_site_joins_and_ends_with_its_parent(recipe: Path, tmp_path: Path) -> None:
    chosen = load_recipe(recipe, ["data.clients=2"])
    file, out = tmp_path / "site.toml", tmp_path / "out"
    file.write_text('device = "cpu"\nrecipe_files = ["/"]\n[data]\nshare = true\n')
    out.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    folder = tmp_path / "process"
    command = site_command(file, folder, parent=parent.pid)
    site = SiteProcess(command, folder, tmp_path / "process.log")
    try:
        names = ("topic0", "topic1", "topic2")
        joined = site.handle(Request("join", {**facts_of(chosen, names), "client": 1}), out)
        assert len(joined.facts["label_counts"]) == 3
        with pytest.raises(SiteFailure, match="SiteError: asked to train without a model"):
            site.handle(Request("train"), out)
        assert site._process is not None
        assert site._process.poll() is None
    finally:
        parent.kill()
        parent.wait()
    assert ends(site._process)


@pytest.mark.slow
def test_a_process_that_cannot_open_its_site(tmp_path: Path) -> None:
    command = site_command(tmp_path / "none.toml", tmp_path, parent=os.getpid())
    site = SiteProcess(command, tmp_path / "process", tmp_path / "process.log")
    with pytest.raises(SiteFailure, match=r"its process ended: InputError: .*cannot be read"):
        site.handle(Request("join"), tmp_path)
