"""Temporary folders end with their process, or with the next run."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sluiceway.files import scratch_folder

HOLD = """
import sys, time
from sluiceway.files import scratch_folder
with scratch_folder() as folder:
    (folder / "message").write_text("a client's update")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_killed_runs_folder_is_removed_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout is not None
        other = Path(held.stdout.readline().strip())
        assert other.parent == tmp_path
        with scratch_folder() as mine:
            assert (other / "message").exists()
            assert mine.is_dir()
        assert not mine.exists()
        held.send_signal(signal.SIGKILL)
    assert other.exists()
    with scratch_folder():
        assert not other.exists()
    assert not list(tmp_path.iterdir())
