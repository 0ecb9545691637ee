"""What own data have in common: files by path or pattern, and a part held out to test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sluiceway.data.errors import DataError
from sluiceway.data.tables import AnyTable, holdout
from sluiceway.files import listed

#: A file or folder, a pattern, or several of them.
Paths = str | Path | Sequence[str | Path]


def found_files(paths: Paths) -> list[Path]:
    """The files and folders that are named, patterns (`*`, `?`, `[...]`, `**`) expanded by name.

    Raises:
        DataError: a pattern that nothing matches, or nothing is named.
    """
    found: list[Path] = []
    for each in listed(paths):
        path = Path(each)
        if path.exists() or not any(mark in str(each) for mark in "*?["):
            found.append(path)
            continue
        start = next(p for p in path.parents if not any(mark in str(p) for mark in "*?["))
        matches = sorted(start.glob(str(path.relative_to(start))))
        if not matches:
            raise DataError(f"no file matches {each}")
        found += matches
    if not found:
        raise DataError("data.path names no file")
    return list(dict.fromkeys(found))


def own_parts(
    tables: Sequence[AnyTable], fraction: float, seed: int
) -> tuple[AnyTable, AnyTable, str]:
    """Train and test rows: two tables, or parts of one; and a note on classes never tested.

    Raises:
        DataError: as `holdout`.
    """
    if len(tables) > 1:
        return tables[0], tables[1], ""
    train, test = holdout(tables[0], fraction, seed)
    single = int((np.unique(tables[0].labels, return_counts=True)[1] == 1).sum())
    what = "1 class has one row" if single == 1 else f"{single} classes have one row each"
    return train, test, f" ({what}, never tested)" if single else ""
