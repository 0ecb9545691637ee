"""A real SuperLink with real SuperNodes, over TLS, each node with its key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra [flower] is not installed")

from sluiceway.cli import main
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run

SMALL = ["run.rounds=2", "data.clients=2"]


def settings() -> list[str]:
    return [word for setting in SMALL for word in ("--set", setting)]


def running(folder: Path) -> list[str]:
    """Command lines of processes that have anything to do with a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_one_command_gives_the_embedded_numbers(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    here, embedded = run(load_recipe(recipe, SMALL))
    out = tmp_path / "out"
    assert main(["run", str(recipe), *settings(), "--engine", "flower", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["engine"] == "flower"
    assert summary.keys() == embedded.keys()
    assert summary["accuracy_by_round"] == here.accuracy_by_round
    for key in ("bytes_up", "bytes_down", "personal_accuracy", "label_counts", "refused", "failed"):
        assert summary[key] == embedded[key]
    assert (out / "report.html").exists()
    assert running(tmp_path) == []
    assert list((tmp_path / "tmp").glob("sluiceway-*")) == []
