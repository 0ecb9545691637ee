"""Multiple-choice data sets by name, from the first source that has them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from sluiceway.data.choice_tables import ChoiceData, ChoiceTable
from sluiceway.data.coding import Split
from sluiceway.data.columns import read_columns
from sluiceway.data.errors import DataError
from sluiceway.data.hub import repo_paths
from sluiceway.data.places import data_folder, first_found
from sluiceway.data.tables import HOLDOUT_SEED, TEST_FRACTION, IntArray, holdout

_LETTERS = ("A", "B", "C", "D")
# How WikiHow's articles are marked up in HellaSwag; no other brackets are markup.
_TITLE = re.compile(r" \[title\]")
_TAG = re.compile(r"\[(?:header|title|step|substeps)\]")


@dataclass(frozen=True)
class _Known:
    """What is known of a data set before any file is read.

    Attributes:
        name: of the data set and of its folder.
        file: in that folder.
        repo: the hub's repository.
        repo_file: in that repository.
        context: column of the questions.
        endings: column of lists of texts.
        label: column of the right ending's number, an integer or its digits.
        group: name of the group column that the table gets.
        worded: the contexts and the groups of the rows, from their questions.
    """

    name: str
    file: str
    repo: str
    repo_file: str
    context: str
    endings: str
    label: str
    group: str
    worded: Callable[[Split, list[str]], tuple[list[str], list[str]]]


def load_choices(name: str) -> ChoiceData:
    """Load a multiple-choice data set by name; `ChoiceData.source` says where it came from.

    The first source that has it wins: `$SLUICEWAY_DATA/NAME/FILE`, then the Hugging Face cache, the
    Hugging Face hub. Every row has four endings; texts are stripped.

    | name | file | context | group | rows used |
    |---|---|---|---|---|
    | mmlu | test.parquet | "Question: ...\\nAnswer:" | subject | 11,134 / 2,783 |
    | hellaswag | validation.parquet | "Activity: ..." | activity | 8,015 / 2,004 |

    Neither comes with labelled rows to train on, so a fifth of the rows is held out with a fixed
    seed, every group keeping its share, and `source` says "80/20 split of our own". MMLU's rows are
    its test rows alone: its five dev rows a subject are meant as worked examples and stay unused.
    Rows with an empty text are left out, and so are rows that repeat an earlier one's context and
    right ending, which would put the same question on both sides of the split; `source` counts
    both. HellaSwag's [title], [step] and like markup is taken out and its activity leads the text,
    as its evaluation has it; some sources' texts come so already.

    Args:
        name: one of `CHOICE_NAMES`.

    Raises:
        DataError: an unknown name, a data set found nowhere (the line names every place looked at),
            or a source that has it but in an unreadable form.
    """
    known = _KNOWN.get(name)
    if known is None:
        raise DataError(
            f"there is no multiple-choice data set {name!r}: known are {', '.join(CHOICE_NAMES)}"
        )
    sources = [partial(_from_folder, known), partial(_from_hub, known)]
    source, split = first_found(known.name, known.name, sources, files=[known.file])
    table, notes = _table(known, split)
    train, test = holdout(table, TEST_FRACTION, HOLDOUT_SEED, by=table.groups[known.group])
    notes.append("80/20 split of our own")
    return ChoiceData(known.name, f"{source} ({'; '.join(notes)})", train, test, _LETTERS)


def _from_folder(known: _Known) -> tuple[str, Split]:
    path = data_folder(known.name) / known.file
    return f"SLUICEWAY_DATA/{known.name}", Split(read_columns(path), str(path))


def _from_hub(known: _Known) -> tuple[str, Split]:
    (path,) = repo_paths(known.repo, [known.repo_file])
    return f"hub {known.repo}", Split(read_columns(path), f"{known.repo} {path.name}")


def _table(known: _Known, split: Split) -> tuple[ChoiceTable, list[str]]:
    """All rows fit to use, and notes on those left out."""
    questions = _texts(split, known.context)
    contexts, groups = known.worded(split, questions)
    endings = _endings(split, known.endings)
    labels = _labels(split, known.label)
    full = [row for row, text in enumerate(questions) if text and all(endings[row])]
    # From the last row to the first, so that the first of each question is what remains.
    first = {(contexts[row], endings[row][labels[row]]): row for row in reversed(full)}
    kept = sorted(first.values())
    counts = {
        "rows with an empty text": len(questions) - len(full),
        "repeated rows": len(full) - len(kept),
    }
    notes = [f"{count} {what} left out" for what, count in counts.items() if count]
    _, codes = np.unique(np.array(groups), return_inverse=True)
    coded = {known.group: codes.astype(np.int64)}
    return ChoiceTable(contexts, endings, labels, coded).take(kept), notes


def _mmlu(split: Split, questions: list[str]) -> tuple[list[str], list[str]]:
    contexts = [f"Question: {question}\nAnswer:" for question in questions]
    return contexts, _texts(split, "subject")


def _hellaswag(split: Split, questions: list[str]) -> tuple[list[str], list[str]]:
    if "activity_label" not in split.columns:
        return questions, [question.partition(":")[0] for question in questions]
    activities = _texts(split, "activity_label")
    contexts = [
        text if text.startswith(f"{activity}:") else f"{activity}: {text}"
        for text, activity in zip(questions, activities, strict=True)
    ]
    return contexts, activities


def _texts(split: Split, column: str) -> list[str]:
    """A column of strings, cleaned; what is missing becomes empty."""
    return [
        _clean(value, split, column, row) for row, value in enumerate(split.column(column), start=1)
    ]


def _endings(split: Split, column: str) -> list[tuple[str, ...]]:
    endings: list[tuple[str, ...]] = []
    for row, value in enumerate(split.column(column), start=1):
        if not isinstance(value, list) or len(value) != len(_LETTERS):
            raise DataError(
                f"{split.where}: {column!r} is {str(value)[:60]} in row {row}: "
                f"it must be a list of {len(_LETTERS)} texts"
            )
        endings.append(tuple(_clean(text, split, column, row) for text in value))
    return endings


def _clean(value: object, split: Split, column: str, row: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{split.where}: {column!r} holds {type(value).__name__} in row {row}: "
            "texts must be strings"
        )
    text = value.strip()
    if _TAG.search(text):
        text = " ".join(_TAG.sub("", _TITLE.sub(". ", text)).split())
    return text


def _labels(split: Split, column: str) -> IntArray:
    codes = {str(code): code for code in range(len(_LETTERS))}
    labels = []
    for row, value in enumerate(split.column(column), start=1):
        if str(value) not in codes:
            raise DataError(
                f"{split.where}: {column!r} is {value!r} in row {row}: "
                f"it must be 0..{len(_LETTERS) - 1}"
            )
        labels.append(codes[str(value)])
    return np.array(labels, dtype=np.int64)


_KNOWN = {
    "mmlu": _Known(
        "mmlu",
        "test.parquet",
        "cais/mmlu",
        "all/test-00000-of-00001.parquet",
        context="question",
        endings="choices",
        label="answer",
        group="subject",
        worded=_mmlu,
    ),
    "hellaswag": _Known(
        "hellaswag",
        "validation.parquet",
        "Rowan/hellaswag",
        "data/validation-00000-of-00001.parquet",
        context="ctx",
        endings="endings",
        label="label",
        group="activity",
        worded=_hellaswag,
    ),
}

CHOICE_NAMES = tuple(_KNOWN)
"""The names `load_choices` knows."""
