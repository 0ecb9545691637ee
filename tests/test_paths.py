"""The two paths of docs/data.md, command by command as they stand there."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sluiceway.deploy.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.engine]
ROOT = Path(__file__).parents[1]


def commands(example: str) -> str:
    """The shell block that follows the example's name in the documentation."""
    text = (ROOT / "docs" / "data.md").read_text()
    found = re.search(rf"`examples/{example}`.*?```sh\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def walk(example: str, place: Path) -> Path:
    """Run the block in a copy of the example; whatever it started ends with it."""
    shutil.copytree(ROOT / "examples" / example, place, dirs_exist_ok=True)
    script = commands(example).replace("8002", str(free_port()))
    ended = "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"
    (place / "walk.sh").write_text(f"set -e\n{ended}\n{script}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "walk.sh"], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (place / "said").write_text(done.stderr)
    return place


def test_the_hospitals_path(tmp_path: Path) -> None:
    pytest.importorskip("nvflare", reason="the extra nvflare is not installed")
    place = walk("hospital", tmp_path)
    summary = json.loads((place / "runs" / "study" / "summary.json").read_text())
    said = re.findall(r"labels predicted: accuracy ([\d.]+)", (place / "said").read_text())
    reported = f"{summary['accuracy']:.4f}"
    assert (said[0], said[2]) == (reported, reported)
    assert summary["accuracy"] > 0.5
    assert summary["engine"] == "nvflare"
    assert [sum(counts) for counts in summary["label_counts"]] == [500, 500]
    assert (place / "checked.csv").read_text() == (place / "again.csv").read_text()
    assert len((place / "labels.csv").read_text().splitlines()) == 201
    assert (place / "model" / "net.py").exists()


def test_the_researchers_path(tmp_path: Path) -> None:
    place = walk("researcher", tmp_path)
    summary = json.loads((place / "runs" / "own" / "summary.json").read_text())
    assert (summary["method"], summary["metric"]) == ("Uniform", "macro_f1")
    assert "2 of 152 rows without note or kind left out" in summary["data_source"]
    table = json.loads((place / "runs" / "sweep" / "compare.json").read_text())
    assert len(table["variants"]) == 4
    assert (place / "runs" / "sweep" / "report.html").exists()
    code = "import runpy, sys; sys.modules['sluiceway'] = None; runpy.run_path('elsewhere.py')"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with (place / "labels.csv").open(encoding="utf-8") as file:
        here = [
            f"{row['input']},{row['predicted']},{float(row['probability']):.6f}"
            for row in csv.DictReader(file)
        ]
    assert done.stdout.splitlines() == here
    assert len(here) == 20
