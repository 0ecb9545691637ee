"""Columns of values from parquet, CSV and JSON-lines files, coded as tables of labelled texts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sluiceway.data.errors import DataError
from sluiceway.data.tables import IntArray, TextTable
from sluiceway.errors import first_line

#: A column with more distinct values than this is no natural partition and is left out.
MAX_GROUPS = 1000
# "007" and "+7" stay strings: as integers they could not be written back as they were.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")

Values = dict[str, list[object]]


@dataclass(frozen=True)
class Columns:
    """Values by column name, all of one length, None where a value is missing.

    Attributes:
        values: the columns.
        where: what messages call the place they came from.
    """

    values: Values
    where: str

    def __getitem__(self, name: str) -> list[object]:
        """A column. Raises DataError where there is none; the line lists the columns there are."""
        if name not in self.values:
            there = ", ".join(self.values)
            raise DataError(f"{self.where} has no column {name!r}: the columns are {there}")
        return self.values[name]

    def having(self, name: str, values: list[object]) -> Columns:
        """The same with one column added or replaced."""
        return replace(self, values={**self.values, name: values})

    def rows(self, keep: Sequence[bool]) -> Columns:
        """The rows whose entry in `keep` [N] is true."""
        kept = {
            name: [value for value, wanted in zip(values, keep, strict=True) if wanted]
            for name, values in self.values.items()
        }
        return replace(self, values=kept)


def read_columns(
    path: Path, only: Sequence[str] | None = None, where: str | None = None
) -> Columns:
    """Read a `.parquet`, `.csv` or `.jsonl` file.

    A CSV column whose every value is an integer becomes integers; an empty CSV field is missing.

    Args:
        path: the file.
        only: the columns wanted, all when None; columns that are not there are left out.
        where: what messages about the columns call the file, its path by default.

    Returns:
        The columns, at least one row long.

    Raises:
        DataError: unknown suffix, no such file, unreadable, or no rows.
    """
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} has the suffix {path.suffix!r}: it must be one of {', '.join(readers)}"
        )
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        values = reader(path)
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    if not values or not len(next(iter(values.values()))):
        raise DataError(f"{path} has no rows")
    if only is not None:
        values = {name: values[name] for name in only if name in values}
    return Columns(values, where or str(path))


def class_names(path: Path, column: str) -> tuple[str, ...] | None:
    """The label names that a parquet file's Hugging Face ClassLabel metadata gives a column.

    Returns:
        The names in the order of their integers, or None where the file states none.

    Raises:
        DataError: the file cannot be read.
    """
    if path.suffix.lower() != ".parquet":
        return None
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names)


def name_integers(columns: Columns, column: str, names: Sequence[str]) -> Columns:
    """Replace the integers 0..len(names)-1 of a column by their names.

    Raises:
        DataError: a value is not such an integer, or there is no such column.
    """
    named: list[object] = []
    for row, value in enumerate(columns[column], start=1):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise DataError(
                f"{columns.where}: {column!r} is {value!r} in row {row}, "
                f"but the file names the labels 0..{len(names) - 1}"
            )
        named.append(names[value])
    return columns.having(column, named)


def is_missing(value: object) -> bool:
    """Whether a value is None, not a number, or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def code_tables(
    splits: Sequence[Columns],
    text_column: str,
    label_column: str,
    label_names: Sequence[str] | None = None,
) -> tuple[list[TextTable], tuple[str, ...]]:
    """Code the splits of one data set, all alike.

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
    texts: list[list[str]] = [
        _full_column(split, text_column, str, "texts must be strings") for split in splits
    ]
    labels = [
        _full_column(split, label_column, str | int, "labels must be strings or integers")
        for split in splits
    ]
    names = _sorted_names(labels[0]) if label_names is None else tuple(label_names)
    groups = _groups(splits, {text_column, label_column})
    tables = [
        TextTable(texts[i], _codes(labels[i], names, split.where), groups[i])
        for i, split in enumerate(splits)
    ]
    return tables, names


def _read_parquet(path: Path) -> Values:
    with pq.ParquetFile(path) as file:  # pq.read_table would import pandas
        return dict(file.read().to_pydict())


def _read_csv(path: Path) -> Values:
    import pandas as pd

    try:
        # As strings and with no "missing" words: a text "null" or a label "NA" is a value.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} is empty: it needs a header line and rows") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"{path} has rows with more fields than its header line: quote the commas")
    return {str(name): _csv_values(frame[name].tolist()) for name in frame.columns}


def _csv_values(values: list[object]) -> list[object]:
    filled = [value for value in values if isinstance(value, str) and value]
    kind = int if all(_INTEGER.fullmatch(value) for value in filled) else str
    return [kind(value) if isinstance(value, str) and value else None for value in values]


def _read_jsonl(path: Path) -> Values:
    rows: list[dict[str, object]] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"line {number} of {path} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"line {number} of {path} holds {type(row).__name__}: it must be an object"
                )
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _full_column(columns: Columns, name: str, kind: Any, rule: str) -> list[Any]:
    values = columns[name]
    missing = [row for row, value in enumerate(values, start=1) if is_missing(value)]
    if missing:
        raise DataError(
            f"{columns.where}: {len(missing)} of {len(values)} rows have an empty {name!r} "
            f"(the first is row {missing[0]}): remove these rows or fill them in"
        )
    others = sorted({type(value).__name__ for value in values if not isinstance(value, kind)})
    if others:
        raise DataError(f"{columns.where}: column {name!r} holds {', '.join(others)}: {rule}")
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


def _groups(splits: Sequence[Columns], taken: set[str]) -> list[dict[str, IntArray]]:
    coded: list[dict[str, IntArray]] = [{} for _ in splits]
    for name in dict.fromkeys(name for split in splits for name in split.values):
        if name in taken:
            continue
        present = [i for i, split in enumerate(splits) if name in split.values]
        code = _group_code([value for i in present for value in splits[i][name]])
        for i in present if code else ():
            coded[i][name] = np.array([code[value] for value in splits[i][name]], dtype=np.int64)
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
