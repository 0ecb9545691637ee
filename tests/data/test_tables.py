from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sluiceway.data import DataError, TextTable, holdout, limit

label_lists = st.lists(st.integers(0, 5), min_size=1, max_size=120)


def table(labels: list[int]) -> TextTable:
    """Texts and groups tell the row number, so that a test sees which rows it got."""
    rows = np.arange(len(labels))
    return TextTable([f"text {row}" for row in rows], np.array(labels), {"row": rows})


@given(label_lists, st.integers(1, 150), st.integers(0, 2**32))
def test_limit_keeps_every_labels_share(labels: list[int], n: int, seed: int) -> None:
    whole = table(labels)
    part = limit(whole, n, seed)
    assert len(part) == min(n, len(labels))
    rows = part.groups["row"]
    assert (np.diff(rows) > 0).all()
    assert part.texts == [f"text {row}" for row in rows]
    assert part.labels.tolist() == [labels[row] for row in rows]
    kept, there = Counter(part.labels.tolist()), Counter(labels)
    for label, count in there.items():
        share = count * len(part) / len(labels)
        assert np.floor(share) <= kept[label] <= np.ceil(share)


def test_limit_rounds_by_largest_remainder() -> None:
    # Shares of 10 out of 50, 33, 17: 5, 3.3 and 1.7.
    part = limit(table([0] * 50 + [1] * 33 + [2] * 17), 10, seed=0)
    assert Counter(part.labels.tolist()) == {0: 5, 1: 3, 2: 2}


def test_limit_depends_on_the_seed_alone() -> None:
    whole = table([0, 1] * 50)
    first, again, other = (limit(whole, 10, seed).texts for seed in (1, 1, 2))
    assert first == again != other


def test_limit_refuses_no_rows() -> None:
    with pytest.raises(DataError, match="a limit of 0 rows leaves no data"):
        limit(table([0, 1]), 0, seed=0)


@given(label_lists, st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_holdout_parts_are_stratified_and_cover(
    labels: list[int], fraction: float, seed: int
) -> None:
    there = Counter(labels)
    spare = sum(there.values()) - len(there)
    assume(spare > 0)
    train, test = holdout(table(labels), fraction, seed)
    assert len(test) == min(max(1, round(fraction * len(labels))), spare)
    assert set(train.labels.tolist()) == set(labels)
    rows = np.concatenate([train.groups["row"], test.groups["row"]])
    assert sorted(rows) == list(range(len(labels)))


def test_holdout_keeps_shares() -> None:
    train, test = holdout(table([0] * 60 + [1] * 30 + [2] * 10), 0.2, seed=5)
    assert Counter(test.labels.tolist()) == {0: 12, 1: 6, 2: 2}
    assert len(train) == 80


def test_holdout_by_another_column_keeps_its_shares() -> None:
    by = np.array([7] * 50 + [3] * 50)
    train, test = holdout(table([0, 1] * 49 + [2, 3]), 0.1, seed=1, by=by)
    assert Counter(by[test.groups["row"]].tolist()) == {3: 5, 7: 5}
    assert len(train) == 90


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_holdout_refuses_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="must be between 0 and 1"):
        holdout(table([0, 0, 1, 1]), fraction, seed=0)


def test_holdout_refuses_single_rows() -> None:
    with pytest.raises(DataError, match="no test rows can be held out of 2 rows"):
        holdout(table([0, 1]), 0.5, seed=0)


def test_take_follows_the_given_order() -> None:
    part = table([3, 1, 2]).take([2, 0])
    assert part.texts == ["text 2", "text 0"]
    assert part.labels.tolist() == [2, 3]
    assert part.groups["row"].tolist() == [2, 0]


def test_columns_must_be_of_one_length() -> None:
    with pytest.raises(DataError, match=r"'site' has shape \[1\], but there are 2 texts"):
        TextTable(["a", "b"], np.array([0, 1]), {"site": np.array([0])})
