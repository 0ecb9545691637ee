"""A few hundred of the broken inputs of benchmarks/fuzz.py, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = "benchmarks/fuzz.py"


@pytest.mark.slow
def test_broken_inputs_are_read_or_refused_in_a_line() -> None:
    found = subprocess.run(
        [sys.executable, SCRIPT, "--inputs", "600", "--seed", "11"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    rows = [line.split("|") for line in found.stdout.splitlines()[2:]]
    assert len(rows) == 14
    # Most are refused, and of most kinds some are not: the limits do not refuse everything.
    assert sum(int(row[4]) for row in rows) > 400
    assert sum(int(row[3]) > 0 for row in rows) >= 7
