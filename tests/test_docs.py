"""What the documentation shows runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from tests.worlds import TinyClassifier, TinyText

from sluiceway.transport.local import federate

ROOT = Path(__file__).parents[1]
IMPORTS = """
from typing import ClassVar
from pydantic.dataclasses import dataclass
from torch import Tensor
from sluiceway.moe import ParamSlice
from sluiceway.strategies import FedAvg, Update
from sluiceway.strategies.base import PARAMETERS
"""


def test_the_documented_strategy_runs(text_test: TinyText) -> None:
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(IMPORTS + code, names)
    clients = [TinyText(8, 1), TinyText(40, 2)]
    uniform = federate(
        TinyClassifier(),
        clients,
        text_test,
        names["Uniform"](),
        rounds=1,
        device="cpu",  # type: ignore[operator]
    )
    assert uniform.records[0].refused == {}


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "own_model.py"))
    shown = capsys.readouterr().out
    assert re.search(r"fedavg: 0\.\d+, .*MB up\nfedalign-moe: 0\.\d+", shown)
