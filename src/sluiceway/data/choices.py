"""Multiple-choice data sets by name, from the first source that has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sluiceway.data.columns import Columns, read_columns
from sluiceway.data.errors import DataError
from sluiceway.data.sources import Folder, Hub, first_found, known_name
from sluiceway.data.tables import (
    HOLDOUT_SEED,
    TEST_FRACTION,
    ChoiceData,
    ChoiceTable,
    IntArray,
    holdout,
)

_LETTERS = ("A", "B", "C", "D")
# How WikiHow's articles are marked up in HellaSwag; no other brackets are markup.
_TITLE = re.compile(r" \[title\]")
_TAG = re.compile(r"\[(?:header|title|step|substeps)\]")


def _mmlu(columns: Columns, questions: list[str]) -> tuple[list[str], list[str]]:
    contexts = [f"Question: {question}\nAnswer:" for question in questions]
    return contexts, _texts(columns, "subject")


def _hellaswag(columns: Columns, questions: list[str]) -> tuple[list[str], list[str]]:
    if "activity_label" not in columns.values:
        return questions, [question.partition(":")[0] for question in questions]
    activities = _texts(columns, "activity_label")
    contexts = [
        text if text.startswith(f"{activity}:") else f"{activity}: {text}"
        for text, activity in zip(questions, activities, strict=True)
    ]
    return contexts, activities


@dataclass(frozen=True)
class ChoiceSet:
    """Where a multiple-choice data set lies, and what its columns are called.

    Attributes:
        folder: in `$SLUICEWAY_DATA`, of one file.
        hub: its repository, of one file.
        context: column of the questions.
        endings: column of lists of texts.
        label: column of the right ending's number, an integer or its digits.
        group: name of the group column that the table gets.
        prompts: the contexts and the groups of the rows, from their questions.
    """

    folder: Folder
    hub: Hub
    context: str
    endings: str
    label: str
    group: str
    prompts: Callable[[Columns, list[str]], tuple[list[str], list[str]]]


CHOICE_SETS = {
    "mmlu": ChoiceSet(
        Folder("mmlu", ("test.parquet",)),
        Hub("cais/mmlu", ("all/test-00000-of-00001.parquet",)),
        context="question",
        endings="choices",
        label="answer",
        group="subject",
        prompts=_mmlu,
    ),
    "hellaswag": ChoiceSet(
        Folder("hellaswag", ("validation.parquet",)),
        Hub("Rowan/hellaswag", ("data/validation-00000-of-00001.parquet",)),
        context="ctx",
        endings="endings",
        label="label",
        group="activity",
        prompts=_hellaswag,
    ),
}

#: The names `load_choices` knows.
CHOICE_NAMES = tuple(CHOICE_SETS)


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
    known = CHOICE_SETS[known_name(name, CHOICE_NAMES, "multiple-choice")]
    source, (path,) = first_found(name, known.folder, known.hub)
    where = f"{known.hub.repo} {path.name}" if source is known.hub else None
    table, notes = _table(known, read_columns(path, where=where))
    train, test = holdout(table, TEST_FRACTION, HOLDOUT_SEED, by=table.groups[known.group])
    notes.append("80/20 split of our own")
    return ChoiceData(name, f"{source.title} ({'; '.join(notes)})", train, test, _LETTERS)


def _table(known: ChoiceSet, columns: Columns) -> tuple[ChoiceTable, list[str]]:
    """All rows fit to use, and notes on those left out."""
    questions = _texts(columns, known.context)
    contexts, groups = known.prompts(columns, questions)
    endings = _endings(columns, known.endings)
    labels = _labels(columns, known.label)
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


def _texts(columns: Columns, name: str) -> list[str]:
    """A column of strings, cleaned; what is missing becomes empty."""
    return [_clean(text, columns, name, row) for row, text in enumerate(columns[name], start=1)]


def _endings(columns: Columns, name: str) -> list[tuple[str, ...]]:
    endings: list[tuple[str, ...]] = []
    for row, texts in enumerate(columns[name], start=1):
        if not isinstance(texts, list) or len(texts) != len(_LETTERS):
            raise DataError(
                f"{columns.where}: {name!r} is {str(texts)[:60]} in row {row}: "
                f"it must be a list of {len(_LETTERS)} texts"
            )
        endings.append(tuple(_clean(text, columns, name, row) for text in texts))
    return endings


def _clean(value: object, columns: Columns, name: str, row: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{columns.where}: {name!r} holds {type(value).__name__} in row {row}: "
            "texts must be strings"
        )
    text = value.strip()
    if _TAG.search(text):
        text = " ".join(_TAG.sub("", _TITLE.sub(". ", text)).split())
    return text


def _labels(columns: Columns, name: str) -> IntArray:
    codes = {str(code): code for code in range(len(_LETTERS))}
    for row, value in enumerate(columns[name], start=1):
        if str(value) not in codes:
            raise DataError(
                f"{columns.where}: {name!r} is {value!r} in row {row}: "
                f"it must be 0..{len(_LETTERS) - 1}"
            )
    return np.array([codes[str(value)] for value in columns[name]], dtype=np.int64)
