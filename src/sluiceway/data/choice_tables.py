"""Multiple-choice questions in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sluiceway.data.errors import DataError
from sluiceway.data.tables import IntArray


@dataclass(frozen=True, eq=False)
class ChoiceTable:
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
        rows = len(self.contexts)
        if len(self.endings) != rows:
            raise DataError(
                f"there are {len(self.endings)} rows of endings for {rows} contexts: "
                "every context needs its own"
            )
        for name, column in {"labels": self.labels, **self.groups}.items():
            if column.shape != (rows,):
                raise DataError(
                    f"column {name!r} has shape {list(column.shape)}, "
                    f"but there are {rows} contexts: every column needs one value a context"
                )
        choices = endings_per_row(self.endings)
        low, high = int(self.labels.min(initial=0)), int(self.labels.max(initial=0))
        if rows and not 0 <= low <= high < choices:
            raise DataError(f"labels are in {low}..{high}: they must be 0..{choices - 1}")

    def __len__(self) -> int:
        return len(self.contexts)

    def take(self, indices: Sequence[int] | IntArray) -> "ChoiceTable":
        """The rows at `indices` (integers in 0..N-1), in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        return ChoiceTable(
            contexts=[self.contexts[row] for row in rows],
            endings=[self.endings[row] for row in rows],
            labels=self.labels[rows],
            groups={name: column[rows] for name, column in self.groups.items()},
        )


@dataclass(frozen=True, eq=False)
class ChoiceData:
    """A multiple-choice data set.

    Attributes:
        name: the data set's name.
        source: where it came from, as part of a sentence:
            "SLUICEWAY_DATA/mmlu (80/20 split of our own)".
        train: the rows to train on.
        test: the rows to evaluate on.
        label_names: the C names; label i of both tables is `label_names[i]`.
    """

    name: str
    source: str
    train: ChoiceTable
    test: ChoiceTable
    label_names: tuple[str, ...]


def endings_per_row(endings: Sequence[Sequence[str]]) -> int:
    """C, the number of endings that every row has; 0 where there are no rows.

    Raises:
        DataError: rows differ in C, or it is below 2.
    """
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
