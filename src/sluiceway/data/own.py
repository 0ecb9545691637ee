"""A data set out of the user's own files."""

from collections.abc import Sequence
from pathlib import Path

from sluiceway.data.coding import Split, code_tables
from sluiceway.data.columns import read_columns
from sluiceway.data.tables import TextData, holdout


def load_own(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    test_path: str | Path | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    label_names: Sequence[str] | None = None,
) -> TextData:
    """Load labelled texts from a `.parquet`, `.csv` (with a header line) or `.jsonl` file.

    Labels are coded 0..C-1 in sorted order of the train file's labels (integers sort as numbers);
    `label_names` keeps the originals as strings. Every other column of integers or strings with at
    most 1000 distinct values becomes a group column for a natural partition.

    Args:
        path: the rows to train on.
        text_column: column of non-empty strings.
        label_column: column of strings or integers.
        test_path: the rows to evaluate on; without it they are held out of `path`.
        test_fraction: share held out, above 0 and below 1; used only without `test_path`.
        seed: decides which rows are held out, 0 or more.
        label_names: the names in the order of their codes, where others have settled them.

    Raises:
        DataError: unknown suffix; a file that is missing, unreadable or empty; a missing column
            (the line lists the columns there are); empty texts or labels (the line counts them);
            labels in the test file that the train file lacks; a fraction out of range.
    """
    path = Path(path)
    splits = [Split(read_columns(path), str(path))]
    if test_path is not None:
        splits.append(Split(read_columns(Path(test_path)), str(test_path)))
    tables, names = code_tables(splits, text_column, label_column, label_names)
    train, test = tables if test_path is not None else holdout(tables[0], test_fraction, seed)
    source = f"file {path}" if test_path is None else f"files {path} and {test_path}"
    return TextData(path.stem, source, train, test, names)
