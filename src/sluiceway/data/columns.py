"""Reading columns of values from parquet, CSV and JSON-lines files."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sluiceway.data.errors import DataError, first_line

Columns = dict[str, list[object]]
"""Values by column name, all of one length; None where a value is missing."""

# "007" and "+7" stay strings: as integers they could not be written back as they were.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def read_columns(path: Path, only: Sequence[str] | None = None) -> Columns:
    """Read a `.parquet`, `.csv` or `.jsonl` file.

    A CSV column whose every value is an integer becomes integers; an empty CSV field is missing.

    Args:
        path: the file.
        only: the columns wanted, all when None; columns that are not there are left out.

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
        columns = reader(path)
    except (OSError, UnicodeDecodeError, pa.ArrowException, pd.errors.ParserError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{path} has no rows")
    return columns if only is None else {key: columns[key] for key in only if key in columns}


def class_names(path: Path, column: str) -> tuple[str, ...] | None:
    """The label names that the parquet file's Hugging Face ClassLabel metadata gives a column.

    Returns:
        The names in the order of their integers, or None where the file states none.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names)


def _read_parquet(path: Path) -> Columns:
    return dict(pq.read_table(path, partitioning=None).to_pydict())


def _read_csv(path: Path) -> Columns:
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
    if all(_INTEGER.fullmatch(value) for value in filled):
        return [int(value) if isinstance(value, str) and value else None for value in values]
    return [value if isinstance(value, str) and value else None for value in values]


def _read_jsonl(path: Path) -> Columns:
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
