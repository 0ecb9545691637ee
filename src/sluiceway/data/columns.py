"""Columns of values from parquet, CSV and JSON files, coded as tables of labelled texts."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
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
#: Half of a pair, which JSON can escape and no encoding can write.
_SURROGATE = re.compile("[\ud800-\udfff]")

Values = dict[str, list[object]]

#: Endings of tables; all but parquet may be gzipped, as ".csv.gz".
TABLES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
#: Delimiters of a csv whose header line has no comma.
_DELIMITERS = (";", "\t", "|")


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
    path: Path,
    only: Sequence[str] | None = None,
    where: str | None = None,
    encoding: str = "utf-8",
) -> Columns:
    """Read a `.parquet`, `.csv`, `.tsv`, `.jsonl` or `.json` file, gzipped where it ends in `.gz`.

    A CSV column whose every value is an integer becomes integers; an empty CSV field is missing. A
    csv without a comma in its header line may be delimited by semicolons, tabs or bars. A `.json`
    file is a list of objects, or an object of columns.

    Args:
        path: the file.
        only: the columns wanted, all when None; columns that are not there are left out.
        where: what messages about the columns call the file, its path by default.
        encoding: of all but parquet.

    Returns:
        The columns, at least one row long.

    Raises:
        DataError: unknown suffix, no such file, unreadable, or no rows.
    """
    form = form_of(path)
    if form not in TABLES:
        raise DataError(
            f"{path} has the suffix {path.suffix!r}: it must be one of {', '.join(TABLES)}"
        )
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        values = _read_parquet(path) if form == ".parquet" else _read_text(path, form, encoding)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} cannot be read as {encoding}: {error.reason} at byte {error.start}; "
            "data.encoding says how it is written, such as latin-1 or utf-16"
        ) from None
    except (OSError, EOFError, zlib.error, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    if not values or not len(next(iter(values.values()))):
        raise DataError(f"{path} has no rows")
    if only is not None:
        values = {name: values[name] for name in only if name in values}
    return Columns(values, where or str(path))


def form_of(path: Path) -> str:
    """The ending of a table without `.gz`, in lower case."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def read_all(paths: Sequence[Path], encoding: str = "utf-8") -> Columns:
    """The rows of several tables, one after another; a column that one lacks is missing there.

    Raises:
        DataError: as `read_columns`.
    """
    parts = [read_columns(path, encoding=encoding) for path in paths]
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(chain.from_iterable(part.values for part in parts))
    sizes = [len(next(iter(part.values.values()))) for part in parts]
    values: Values = {
        name: [
            value
            for part, size in zip(parts, sizes, strict=True)
            for value in part.values.get(name, [None] * size)
        ]
        for name in names
    }
    return Columns(values, title_of(paths))


def title_of(paths: Sequence[Path]) -> str:
    """Files by their names, without their folders, as part of a sentence."""
    names = ", ".join(path.name for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    return f"file {names}" if len(paths) == 1 else f"{len(paths)} files ({names})"


def without_gaps(columns: Columns, text: str, label: str) -> tuple[Columns, str]:
    """The rows that have a text (or image) and a label, and a note on the others, "" if none.

    Whole numbers that a gap had made floats become integers again. A label NaN is a gap.

    Raises:
        DataError: a column is not there, or no row has both.
    """
    texts, labels = columns[text], columns[label]
    labels = [int(v) if isinstance(v, float) and v.is_integer() else v for v in labels]
    full = [
        not (is_missing(value) or is_missing(mark) or str(mark).strip().lower() == "nan")
        for value, mark in zip(texts, labels, strict=True)
    ]
    if not any(full):
        raise DataError(f"{columns.where}: no row has both {text!r} and {label!r}")
    gaps = len(full) - sum(full)
    note = f"{gaps} of {len(full)} rows without {text} or {label} left out" if gaps else ""
    return columns.having(label, labels).rows(full), note


def of_labels(columns: Columns, label: str, classes: Collection[str] | None) -> tuple[Columns, str]:
    """The rows of some classes, all where None, and a note on the others, "" if none.

    Raises:
        DataError: no row is of these classes.
    """
    if classes is None:
        return columns, ""
    kept = [str(each) in classes for each in columns[label]]
    if not any(kept):
        raise DataError(
            f"{columns.where}: no row has one of the {len(classes)} classes that are taken "
            f"({_shown(sorted(classes))})"
        )
    others = len(kept) - sum(kept)
    note = f"{others} of {len(kept)} rows of other classes left out" if others else ""
    return columns.rows(kept), note


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
    codes, names = code_labels(splits, label_column, label_names)
    groups = _groups(splits, {text_column, label_column})
    return [TextTable(*columns) for columns in zip(texts, codes, groups, strict=True)], names


def code_labels(
    splits: Sequence[Columns], column: str, label_names: Sequence[str] | None = None
) -> tuple[list[IntArray], tuple[str, ...]]:
    """The labels of each split as codes, and their names; see `code_tables`. Raises DataError."""
    rule = "labels must be strings or integers"
    labels = [_full_column(split, column, str | int, rule) for split in splits]
    names = _sorted_names(labels[0]) if label_names is None else tuple(label_names)
    codes = [_codes(each, names, split.where) for each, split in zip(labels, splits, strict=True)]
    return codes, names


def _read_parquet(path: Path) -> Values:
    with pq.ParquetFile(path) as file:  # pq.read_table would import pandas
        return dict(file.read().to_pydict())


def _read_text(path: Path, form: str, encoding: str) -> Values:
    """The values of a csv, tsv, jsonl or json file. Raises what opening and parsing raise."""
    try:
        if codecs.lookup(encoding).name == "utf-8":
            encoding = "utf-8-sig"  # a mark at the beginning is no text
    except LookupError:
        raise DataError(f"data.encoding = {encoding!r} is not known; utf-8, latin-1, ...") from None
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding=encoding, newline="") as file:
        if form == ".jsonl":
            return _read_jsonl(path, file)
        if form == ".json":
            return _read_json(path, file)
        return _read_csv(path, file, "\t" if form == ".tsv" else None)


def _read_csv(path: Path, file: Any, delimiter: str | None) -> Values:
    import pandas as pd

    if delimiter is None:
        header = file.readline()
        file.seek(0)
        others = [mark for mark in _DELIMITERS if mark in header]
        delimiter = others[0] if others and "," not in header else ","
    try:
        # As strings and with no "missing" words: a text "null" or a label "NA" is a value.
        frame = pd.read_csv(file, sep=delimiter, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} is empty: it needs a header line and rows") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"{path} has rows with more fields than its header line: quote the commas")
    return {str(name): _csv_values(frame[name].tolist()) for name in frame.columns}


def _csv_values(values: list[object]) -> list[object]:
    filled = [value for value in values if isinstance(value, str) and value]
    kind = int if all(_INTEGER.fullmatch(value) for value in filled) else str
    return [kind(value) if isinstance(value, str) and value else None for value in values]


def _read_jsonl(path: Path, lines: Any) -> Values:
    rows: list[dict[str, object]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = first_line(error)
            raise DataError(f"line {number} of {path} is not JSON: {why}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"line {number} of {path} holds {type(row).__name__}: it must be an object"
            )
        rows.append(row)
    return _of_rows(rows)


def _read_json(path: Path, file: Any) -> Values:
    try:
        found = json.load(file)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {first_line(error)}") from error
    if isinstance(found, list) and all(isinstance(row, dict) for row in found):
        return _of_rows(found)
    if isinstance(found, dict) and all(isinstance(column, list) for column in found.values()):
        if len({len(column) for column in found.values()}) > 1:
            raise DataError(f"{path}: its columns differ in length")
        return found
    raise DataError(f"{path} must hold a list of objects, or an object of columns (lists)")


def _of_rows(rows: Sequence[dict[str, object]]) -> Values:
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
    for row, value in enumerate(values, start=1):
        if isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
            raise DataError(f"{columns.where}: {name!r} has half a character in row {row}")
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
        raise DataError(
            f"{where} has {len(unknown)} labels that the train rows lack ({_shown(unknown)}): "
            f"every label must be one of the {len(names)} there"
        )
    return np.array([code[str(label)] for label in labels], dtype=np.int64)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


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
