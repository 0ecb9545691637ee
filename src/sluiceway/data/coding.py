"""From columns of values to tables: labels and groups become integers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sluiceway.data.columns import Columns
from sluiceway.data.errors import DataError
from sluiceway.data.tables import IntArray, TextTable

MAX_GROUPS = 1000
"""A column with more distinct values than this is no natural partition and is left out."""


@dataclass(frozen=True)
class Split:
    """Columns still to be coded, and what messages call the place they came from."""

    columns: Columns
    where: str

    def column(self, name: str) -> list[object]:
        """The values of a column.

        Raises:
            DataError: there is no such column; the line lists the columns there are.
        """
        if name not in self.columns:
            there = ", ".join(self.columns)
            raise DataError(f"{self.where} has no column {name!r}: the columns are {there}")
        return self.columns[name]


def code_tables(
    splits: Sequence[Split],
    text_column: str,
    label_column: str,
    label_names: Sequence[str] | None = None,
) -> tuple[list[TextTable], tuple[str, ...]]:
    """Code splits of one data set, all alike.

    Args:
        splits: the train split, then the others.
        text_column: column of non-empty strings.
        label_column: column of strings or integers without gaps.
        label_names: the names in the order of their codes; by default the sorted distinct labels of
            the train split (integers sort as numbers).

    Returns:
        A table for each split, and the label names. Every other column of integers or strings with
        at most `MAX_GROUPS` distinct values becomes a group column: integers stay as they are,
        anything else is coded over all splits together, a missing value as a group of its own.

    Raises:
        DataError: a column is missing or of another type, texts or labels are empty, or a split
            holds a label that `label_names` lacks.
    """
    texts = [_texts(split, text_column) for split in splits]
    labels = [_labels(split, label_column) for split in splits]
    names = tuple(label_names) if label_names is not None else _sorted_names(labels[0])
    groups = _groups(splits, {text_column, label_column})
    tables = [
        TextTable(texts[i], _codes(labels[i], names, split.where), groups[i])
        for i, split in enumerate(splits)
    ]
    return tables, names


def name_integers(split: Split, column: str, names: Sequence[str]) -> Split:
    """Replace the integers 0..len(names)-1 of a column by their names.

    Raises:
        DataError: a value is not such an integer, or there is no such column.
    """
    named: list[object] = []
    for row, value in enumerate(split.column(column), start=1):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise DataError(
                f"{split.where}: {column!r} is {value!r} in row {row}, "
                f"but the file names the labels 0..{len(names) - 1}"
            )
        named.append(names[value])
    return Split({**split.columns, column: named}, split.where)


def keep_rows(split: Split, keep: Sequence[bool]) -> Split:
    """The rows of a split whose entry in `keep` [N] is true."""
    kept = {
        name: [value for value, wanted in zip(values, keep, strict=True) if wanted]
        for name, values in split.columns.items()
    }
    return Split(kept, split.where)


def is_missing(value: object) -> bool:
    """Whether a value is none, not a number, or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _texts(split: Split, column: str) -> list[str]:
    values = _full_column(split, column)
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) != len(values):
        kinds = sorted({type(value).__name__ for value in values} - {"str"})
        raise DataError(
            f"{split.where}: column {column!r} holds {', '.join(kinds)}: texts must be strings"
        )
    return texts


def _labels(split: Split, column: str) -> list[str | int]:
    values = _full_column(split, column)
    labels = [value for value in values if isinstance(value, str | int)]
    if len(labels) != len(values):
        kinds = sorted({type(value).__name__ for value in values} - {"str", "int", "bool"})
        raise DataError(
            f"{split.where}: column {column!r} holds {', '.join(kinds)}: "
            "labels must be strings or integers"
        )
    return labels


def _full_column(split: Split, name: str) -> list[object]:
    values = split.column(name)
    missing = [row for row, value in enumerate(values, start=1) if is_missing(value)]
    if missing:
        raise DataError(
            f"{split.where}: {len(missing)} of {len(values)} rows have an empty {name!r} "
            f"(the first is row {missing[0]}): remove these rows or fill them in"
        )
    return values


def _sorted_names(labels: Sequence[str | int]) -> tuple[str, ...]:
    distinct = set(labels)
    numbers = [label for label in distinct if isinstance(label, int)]
    if len(numbers) == len(distinct):
        return tuple(str(number) for number in sorted(numbers))
    return tuple(sorted({str(label) for label in distinct}))


def _codes(labels: Sequence[str | int], names: Sequence[str], where: str) -> IntArray:
    code = {name: i for i, name in enumerate(names)}
    unknown = sorted({str(label) for label in labels} - code.keys())
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"{where} has {len(unknown)} labels that the train rows lack ({shown}): "
            f"every label must be one of the {len(names)} there"
        )
    return np.array([code[str(label)] for label in labels], dtype=np.int64)


def _groups(splits: Sequence[Split], taken: set[str]) -> list[dict[str, IntArray]]:
    coded: list[dict[str, IntArray]] = [{} for _ in splits]
    for name in dict.fromkeys(name for split in splits for name in split.columns):
        if name in taken:
            continue
        present = [i for i, split in enumerate(splits) if name in split.columns]
        code = _group_code([value for i in present for value in splits[i].columns[name]])
        for i in present if code else ():
            values = [code[value] for value in splits[i].columns[name]]
            coded[i][name] = np.array(values, dtype=np.int64)
    return coded


def _group_code(values: Sequence[object]) -> dict[object, int]:
    """An integer for every distinct value; empty where the column is no partition."""
    if not all(value is None or isinstance(value, str | int) for value in values):
        return {}
    distinct = set(values)
    if len(distinct) > MAX_GROUPS:
        return {}
    numbers = [value for value in distinct if isinstance(value, int)]
    if len(numbers) == len(distinct) and all(abs(number) < 2**63 for number in numbers):
        return {number: int(number) for number in numbers}
    ordered = sorted(distinct, key=lambda value: (value is not None, str(value), str(type(value))))
    return {value: i for i, value in enumerate(ordered)}
