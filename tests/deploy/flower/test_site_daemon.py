"""A site that stays open between messages, in a real process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra [flower] is not installed")

from sluiceway.deploy.flower import site_daemon as keeper
from sluiceway.deploy.flower.site_daemon import SiteDaemon, SiteFault, keep, kept, lock_of
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.remote_runs import facts_of
from sluiceway.transport.protocol import Request, Response


class Counter:
    """Counts what it was asked since it was opened."""

    def __init__(self) -> None:
        self.asked = 0

    def answer(self, ask: Request, folder: Path) -> Response:
        self.asked += 1
        if ask.what == "fail":
            raise ValueError("not\nhere")
        if ask.message is None:
            return Response({"asked": self.asked, **ask.facts})
        path = folder / "back"
        path.write_bytes(ask.message.read_bytes()[::-1])
        return Response({"asked": self.asked}, path)


@pytest.fixture
def room(tmp_path: Path) -> Any:
    """A room whose keeper is a thread of this process, with the lock of a real one."""
    place = tmp_path / "room"
    place.mkdir()
    site = Counter()

    def run() -> None:
        with lock_of(place).acquire(timeout=0):
            keep(site, place, 1.0)

    thread = threading.Thread(target=run)
    thread.start()
    while not kept(place):
        time.sleep(0.01)
    yield place
    thread.join()


def test_requests_reach_the_same_site(room: Path, tmp_path: Path) -> None:
    site = SiteDaemon(tmp_path / "site.toml", room, 1.0)
    out = tmp_path / "out"
    out.mkdir()
    message = tmp_path / "in"
    message.write_bytes(b"abc")
    assert site.answer(Request("a", {"x": [1, "é"]}), out).facts == {"asked": 1, "x": [1, "é"]}
    found = site.answer(Request("b", {}, message), out)
    assert found.facts == {"asked": 2}
    assert found.message is not None
    assert found.message.read_bytes() == b"cba"
    with pytest.raises(SiteFault, match=r"^ValueError: not\\nhere$"):
        site.answer(Request("fail"), out)
    assert not [path for path in room.iterdir() if path.suffix != ".lock"]


def test_a_real_keeper_joins_trains_and_ends_with_its_parent(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives as long as the process that it was told of, and no longer."""
    chosen = load_recipe(recipe, ["data.clients=2"])
    file, out = tmp_path / "site.toml", tmp_path / "out"
    file.write_text('device = "cpu"\n[data]\nshare = true\n')
    out.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    monkeypatch.setattr(os, "getppid", lambda: parent.pid)
    site = SiteDaemon(file, tmp_path / "room", 60)
    try:
        names = ("topic0", "topic1", "topic2")
        joined = site.answer(Request("join", {**facts_of(chosen, names), "client": 1}), out)
        assert len(joined.facts["label_counts"]) == 3
        with pytest.raises(SiteFault, match="SiteError: asked to train without a model"):
            site.answer(Request("train"), out)
        assert kept(site.room)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while kept(site.room) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not kept(site.room)


def test_a_keeper_that_cannot_open_its_site_says_why(tmp_path: Path) -> None:
    site = SiteDaemon(tmp_path / "none.toml", tmp_path / "room", 5)
    with pytest.raises(SiteFault, match=r"the site's process ended: InputError: .*cannot be read"):
        site.answer(Request("join"), tmp_path)
    assert keeper.last_line(site.room).startswith("InputError")
