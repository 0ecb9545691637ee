"""What `import sluiceway` offers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sluiceway
from sluiceway.experiment.methods import methods
from sluiceway.experiment.reference import methods_table


def test_every_method_is_in_the_face() -> None:
    offered = dir(sluiceway)
    for method in methods():
        assert getattr(sluiceway, method.cls.__name__) is method.cls
        assert method.cls.__name__ in offered
    for name in offered:
        assert getattr(sluiceway, name) is not None
    assert sluiceway.anatomy is sluiceway.moe_layout
    with pytest.raises(AttributeError, match="has no attribute 'Nosuch'"):
        _ = sluiceway.Nosuch


def test_the_face_needs_no_torch_until_it_is_asked() -> None:
    code = "import sys, sluiceway; from sluiceway import errors; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_readme_has_the_table_of_methods() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for kind in ("federated", "split"):
        table = methods_table(kind)
        assert table in text, f"the table of README.md should be\n{table}"
    for method in methods():
        assert f"`{method.name}`" in text


def test_both_halves_have_the_same_defaults() -> None:
    """But for torch's threads: a split run in this process takes one, a federated one none."""
    one, other = (
        inspect.signature(f).parameters for f in (sluiceway.federate, sluiceway.split_train)
    )
    common = one.keys() & other.keys()
    assert {"device", "rounds", "participation", "seed", "min_clients"} <= common
    values = {k: (one[k].default, other[k].default) for k in common - {"on_start", "on_round"}}
    apart = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    assert apart == {"threads": (None, 1)}
