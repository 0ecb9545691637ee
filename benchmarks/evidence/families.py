"""The table of families of mixtures of experts in docs/models.md, from the outcomes of their tests.

    python benchmarks/evidence/families.py            about a minute and a half of one core

Each cell is "yes" if every test of it passed just now, and "no" otherwise, on tiny random models of
the transformers release that is installed.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.moe.conftest import MIXTURES  # noqa: E402
from tests.moe.test_structure import COLUMNS, FOUND, REFUSED  # noqa: E402

#: The tests behind each column, by name.
TESTS = {
    "test_zeroed_expert_changes_exactly_its_tokens": "found",
    "test_found_by_structure": "found",
    "test_unrecognised_experts_are_not_upcycled": "found",
    "test_lora": "LoRA",
    "test_an_experts_part_of_the_adapters_is_what_peft_merges": "LoRA",
    "test_counts_equal_a_loop_over_tokens": "loads",
    "test_loads_equal_brute_force": "loads",
    "test_two_rounds": "rounds",
    "test_a_round_of_every_family": "rounds",
}
FILES = ["moe/test_structure.py", "moe/test_layout.py", "moe/test_observe.py"]
FILES += ["moe/test_adapters.py", "federated/test_families.py"]


class Outcomes:
    """Whether the tests of a family and a column passed."""

    def __init__(self) -> None:
        self.cells: dict[str, tuple[str, str]] = {}
        self.passed: dict[tuple[str, str], list[bool]] = defaultdict(list)

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        kept = [item for item in items if item.originalname in TESTS]
        for item in kept:
            given = item.callspec.params
            family = str(given.get("name") or given["family"])
            column = TESTS[item.originalname]
            if column == "rounds":
                column = "LoRA" if given.get("lora") else str(given["method"])
            self.cells[item.nodeid] = (family, column)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.passed[self.cells[report.nodeid]].append(report.passed)

    def of(self, family: str, column: str) -> bool:
        return bool(self.passed[family, column]) and all(self.passed[family, column])


def row(outcomes: Outcomes, family: str) -> list[str]:
    if family in REFUSED:
        return [f"`{family}`", "refused" if outcomes.of(family, "found") else "no", *[""] * 4]
    how = "by name" if family in MIXTURES else "by structure"
    cells = [how if outcomes.of(family, "found") else "no"]
    cells += ["yes" if outcomes.of(family, column) else "no" for column in COLUMNS[1:]]
    return [f"`{family}`", *cells]


def main() -> None:
    outcomes = Outcomes()
    where = [str(ROOT / "tests" / name) for name in FILES]
    pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *where], plugins=[outcomes])
    heads = ["family", "found", "LoRA", "loads equal a count by hand", *COLUMNS[3:]]
    rows = [heads, ["---"] * len(heads)]
    rows += [row(outcomes, family) for family in sorted([*MIXTURES, *FOUND, *REFUSED])]
    docs = ROOT / "docs" / "models.md"
    before, _, after = docs.read_text("utf-8").split("<!-- families -->")
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    marked = "<!-- families -->".join([before, f"\n{table}\n", after])
    docs.write_text(marked, encoding="utf-8")


if __name__ == "__main__":
    main()
