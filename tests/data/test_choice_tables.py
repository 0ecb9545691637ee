from collections import Counter

import numpy as np
import pytest
from tests.data.pictures import label_counts

from sluiceway.data import ChoiceTable, DataError, holdout, limit, partition


def table(rows: int = 60, choices: int = 4) -> ChoiceTable:
    """Every text tells its row."""
    numbers = np.arange(rows)
    return ChoiceTable(
        [f"context {row}" for row in numbers],
        [tuple(f"ending {row} {i}" for i in range(choices)) for row in numbers],
        numbers % choices,
        {"subject": numbers % 3, "row": numbers},
    )


def test_take_follows_the_given_order() -> None:
    part = table().take([7, 2])
    assert len(part) == 2
    assert part.contexts == ["context 7", "context 2"]
    assert part.endings[1] == ("ending 2 0", "ending 2 1", "ending 2 2", "ending 2 3")
    assert part.labels.tolist() == [3, 2]
    assert part.groups["subject"].tolist() == [1, 2]


def test_no_rows() -> None:
    assert len(table().take([])) == 0


def test_limit_keeps_shares_of_labels() -> None:
    part = limit(table(), 12, seed=0)
    assert Counter(part.labels.tolist()) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert part.contexts == [f"context {row}" for row in part.groups["row"]]


def test_holdout_by_a_group_keeps_its_shares() -> None:
    whole = table(100)
    train, test = holdout(whole, 0.2, seed=0, by=whole.groups["subject"])
    assert Counter(test.groups["subject"].tolist()) == {0: 7, 1: 7, 2: 6}
    rows = np.concatenate([train.groups["row"], test.groups["row"]])
    assert sorted(rows) == list(range(100))
    other = holdout(whole, 0.2, seed=0)[1]
    assert Counter(other.labels.tolist()) == {0: 5, 1: 5, 2: 5, 3: 5}


def test_a_natural_partition_by_subject() -> None:
    whole = table(90)
    parts = partition(
        "natural", whole.labels, 5, seed=0, groups=whole.groups, column="subject", alpha=0.1
    )
    assert sorted(np.concatenate(parts)) == list(range(90))
    counts = label_counts(parts, whole.groups["subject"], 3)
    assert counts.sum(axis=0).tolist() == [30, 30, 30]
    # At such an alpha two clients of five hold most of a subject; dealt evenly they would hold 12.
    assert (np.sort(counts, axis=0)[-2:].sum(axis=0) > 20).all()


@pytest.mark.parametrize(
    ("contexts", "endings", "labels", "groups", "message"),
    [
        (["q"], [("a", "b"), ("a", "b")], [0], {}, "2 rows of endings for 1 contexts"),
        (["q", "r"], [("a", "b"), ("a",)], [0, 0], {}, "row 1 has 1 endings and row 0 has 2"),
        (["q"], [("a",)], [0], {}, "the rows have 1 endings each: they need 2 or more"),
        (["q"], [("a", "b")], [2], {}, r"labels are in 0\.\.2: they must be 0\.\.1"),
        (["q"], [("a", "b")], [-1], {}, r"labels are in -1\.\.0: they must be 0\.\.1"),
        (["q"], [("a", "b")], [0, 1], {}, r"'labels' has shape \[2\], but there are 1 contexts"),
        (["q"], [("a", "b")], [0], {"site": np.array([])}, r"'site' has shape \[0\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    contexts: list[str],
    endings: list[tuple[str, ...]],
    labels: list[int],
    groups: dict[str, np.ndarray],
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        ChoiceTable(contexts, endings, np.array(labels), groups)
