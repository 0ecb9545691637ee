"""Draws the README's pictures from the folders that `make demo` leaves.

python benchmarks/evidence/quickstarts.py
"""

from __future__ import annotations

import json
from pathlib import Path

from pages import Runs
from pictures import by_megabytes, by_round, panels

ROOT = Path(__file__).parent.parent.parent


def runs_of(name: str) -> Runs:
    """The summaries of a comparison, by its one setting, variant and seed."""
    compared = json.loads((ROOT / "runs" / name / "compare.json").read_text("utf-8"))
    return {
        name: {
            variant["name"].partition(",")[0]: {
                int(path.parent.name.removeprefix("seed-")): json.loads(path.read_text("utf-8"))
                for path in (ROOT / "runs" / name / variant["folder"]).glob("seed-*/summary.json")
            }
            for variant in compared["variants"]
        }
    }


def main() -> None:
    """One picture a quickstart: by round, and by what was sent for split learning."""
    for name, points, axis_name in (
        ("quickstart", by_round, "round"),
        ("split-quickstart", by_megabytes, "MB sent, both directions"),
    ):
        runs = runs_of(name)
        path = ROOT / "docs" / f"{name}.png"
        panels(runs, [name], list(runs[name]), path, points, axis_name, log=axis_name != "round")


if __name__ == "__main__":
    main()
