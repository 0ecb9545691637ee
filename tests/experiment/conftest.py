"""What the tests of the command share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sluiceway.cli import main

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a recipe by the command, as (recipe, name of its folder, settings); the summary."""

    def one(recipe: Path | str, name: str = "out", *settings: str) -> dict[str, Any]:
        flags = [part for setting in settings for part in ("--set", setting)]
        assert main(["run", str(recipe), "--out", str(tmp_path / name), *flags]) == 0
        found: dict[str, Any] = json.loads((tmp_path / name / "summary.json").read_text())
        return found

    return one


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Gives the one line that says why a command is bad input."""

    def line(*arguments: str | Path) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        (found,) = [line for line in said.splitlines() if line.startswith("sluiceway")]
        return found

    return line
