import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sluiceway.data import (
    ChoiceTable,
    DataError,
    ImageData,
    ImageTable,
    TextTable,
    coarse_labels,
    holdout,
    limit,
    local_tests,
    of_classes,
)
from sluiceway.data.augment import Augmentation
from sluiceway.data.tables import Table

label_lists = st.lists(st.integers(0, 5), min_size=1, max_size=120)


def texts(labels: list[int]) -> TextTable:
    """Texts and groups tell the row number, so that a test sees which rows it got."""
    rows = np.arange(len(labels))
    return TextTable([f"text {row}" for row in rows], np.array(labels), {"row": rows})


def questions(labels: list[int]) -> ChoiceTable:
    rows = np.arange(len(labels))
    endings = [tuple(f"ending {row} {i}" for i in range(6)) for row in rows]
    return ChoiceTable([f"text {row}" for row in rows], endings, np.array(labels), {"row": rows})


def images(labels: list[int]) -> ImageTable:
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return ImageTable(np.tile(pixels, (1, 1, 2, 2)), np.array(labels))


def rows_of(table: Table) -> list[int]:
    if isinstance(table, ImageTable):
        return table.images[:, 0, 0, 0].tolist()
    assert isinstance(table, TextTable | ChoiceTable)
    rows = table.groups["row"].tolist()
    told = table.texts if isinstance(table, TextTable) else table.contexts
    assert told == [f"text {row}" for row in rows]
    if isinstance(table, ChoiceTable):
        assert [endings[2] for endings in table.endings] == [f"ending {row} 2" for row in rows]
    return rows


kinds = pytest.mark.parametrize("table", [texts, questions, images])


@given(label_lists, st.integers(1, 150), st.integers(0, 2**32))
def test_limit_keeps_every_labels_share(labels: list[int], n: int, seed: int) -> None:
    part = limit(texts(labels), n, seed)
    assert len(part) == min(n, len(labels))
    rows = rows_of(part)
    assert rows == sorted(set(rows))
    assert part.labels.tolist() == [labels[row] for row in rows]
    kept, there = Counter(part.labels.tolist()), Counter(labels)
    for label, count in there.items():
        share = count * len(part) / len(labels)
        assert np.floor(share) <= kept[label] <= np.ceil(share)


@kinds
def test_limit_rounds_by_largest_remainder_and_the_seed_decides(table: type) -> None:
    # Shares of 10 out of 50, 33, 17: 5, 3.3 and 1.7.
    whole = table([0] * 50 + [1] * 33 + [2] * 17)
    first, again, other = (limit(whole, 10, seed) for seed in (1, 1, 2))
    assert Counter(first.labels.tolist()) == {0: 5, 1: 3, 2: 2}
    assert rows_of(first) == rows_of(again) != rows_of(other)


@given(label_lists, st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_holdout_parts_are_stratified_and_cover(
    labels: list[int], fraction: float, seed: int
) -> None:
    spare = len(labels) - len(set(labels))
    assume(spare > 0)
    train, test = holdout(texts(labels), fraction, seed)
    assert len(test) == min(max(1, round(fraction * len(labels))), spare)
    assert set(train.labels.tolist()) == set(labels)
    assert sorted(rows_of(train) + rows_of(test)) == list(range(len(labels)))


@kinds
def test_holdout_keeps_shares(table: type) -> None:
    train, test = holdout(table([0] * 60 + [1] * 30 + [2] * 10), 0.2, seed=5)
    assert Counter(test.labels.tolist()) == {0: 12, 1: 6, 2: 2}
    assert sorted(rows_of(train) + rows_of(test)) == list(range(100))


def test_holdout_by_another_column_keeps_its_shares() -> None:
    by = np.array([7] * 50 + [3] * 50)
    train, test = holdout(texts([0, 1] * 49 + [2, 3]), 0.1, seed=1, by=by)
    assert Counter(by[rows_of(test)].tolist()) == {3: 5, 7: 5}
    assert len(train) == 90


@kinds
def test_take_follows_the_given_order(table: type) -> None:
    whole = table([3, 1, 2])
    part = whole.take([2, 0])
    assert (rows_of(part), part.labels.tolist()) == ([2, 0], [2, 3])
    assert len(whole.take([])) == 0


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan")])
def test_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="must be between 0 and 1"):
        holdout(texts([0, 0, 1, 1]), fraction, seed=0)


def test_too_few_rows() -> None:
    with pytest.raises(DataError, match="no test rows can be held out of 2 rows"):
        holdout(texts([0, 1]), 0.5, seed=0)
    with pytest.raises(DataError, match="a limit of 0 rows leaves no data"):
        limit(texts([0, 1]), 0, seed=0)


PIXELS = np.zeros((1, 1, 2, 2), np.uint8)


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        (TextTable, (["a", "b"], [0, 1], {"site": np.array([0])}), r"'site' has shape \[1\]"),
        (ChoiceTable, (["q"], [("a", "b")] * 2, [0]), "2 rows of endings for 1 contexts"),
        (ChoiceTable, (["q", "r"], [("a", "b"), ("a",)], [0, 0]), "row 1 has 1 endings and row 0"),
        (ChoiceTable, (["q"], [("a",)], [0]), "the rows have 1 endings each: they need 2 or more"),
        (ChoiceTable, (["q"], [("a", "b")], [2]), r"labels are in 0\.\.2: they must be 0\.\.1"),
        (ChoiceTable, (["q"], [("a", "b")], [-1]), r"labels are in -1\.\.0: they must be"),
        (
            ChoiceTable,
            (["q"], [("a", "b")], [0, 1]),
            r"'labels' has shape \[2\]",
        ),
        (ImageTable, (PIXELS[0], [0]), "images are uint8"),
        (ImageTable, (PIXELS * 1.0, [0]), "images are float64"),
        (ImageTable, (PIXELS, [0, 0]), r"must be int64 \[1\]"),
        (ImageTable, (PIXELS, [0.0]), "labels are float64"),
    ],
)
def test_columns_that_do_not_fit(kind: type, columns: tuple, message: str) -> None:
    at = 1 if kind is not ChoiceTable else 2
    given_ = [np.array(column) if i == at else column for i, column in enumerate(columns)]
    with pytest.raises(DataError, match=message):
        kind(*given_)


def pictures(train: list[int], test: list[int]) -> ImageData:
    names = tuple("abcdef")
    return ImageData(
        "made", "nowhere", images(train), images(test), names, (0.5,), (0.5,), Augmentation()
    )


@given(label_lists, label_lists, st.permutations(range(6)), st.integers(2, 6))
def test_classes_keep_their_rows_and_names(
    train: list[int], test: list[int], order: list[int], count: int
) -> None:
    chosen = order[:count]
    found = of_classes(pictures(train, test), chosen)
    assert found.label_names == tuple("abcdef"[label] for label in chosen)
    for labels, part in ((train, found.train), (test, found.test)):
        rows = [row for row, label in enumerate(labels) if label in chosen]
        assert rows_of(part) == rows
        assert [chosen[label] for label in part.labels] == [labels[row] for row in rows]


@pytest.mark.parametrize("classes", [(0, 6), (-1, 2), (1, 1)])
def test_classes_that_are_not_there_are_refused(classes: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expected different labels of made, 0\.\.5"):
        of_classes(pictures([0, 1], [1]), classes)


@given(st.lists(label_lists, max_size=4), st.floats(0.01, 0.99), st.integers(0, 9))
def test_local_tests_are_held_out_of_each_client_alone(
    held: list[list[int]], fraction: float, seed: int
) -> None:
    labels = np.array([0, *(label for one in held for label in one)])
    ends = np.cumsum([1, *map(len, held)])
    parts = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    train, test = local_tests(labels, parts, fraction, seed)
    for part, kept, out in zip(parts, train, test, strict=True):
        assert sorted([*kept, *out]) == part.tolist()
        assert set(labels[kept]) == set(labels[part])
        spare = len(part) - len(set(labels[part]))
        assert len(out) == min(spare, max(1, round(fraction * len(part))))
        (alone,), (own,) = local_tests(labels, [part], fraction, seed)
        assert (alone.tolist(), own.tolist()) == (kept.tolist(), out.tolist())
    whole, none = local_tests(labels, parts, 0.0, seed)
    assert [part.tolist() for part in whole] == [part.tolist() for part in parts]
    assert not any(map(len, none))


@given(label_lists, st.integers(2, 6), st.integers(0, 9))
def test_merged_labels_are_a_function_of_the_labels(
    labels: list[int], classes: int, seed: int
) -> None:
    found = coarse_labels(pictures(labels, list(range(6))), classes, seed)
    of = found.test.labels
    assert found.train.labels.tolist() == [of[label] for label in labels]
    sizes = np.bincount(of, minlength=classes)
    assert len(sizes) == len(found.label_names) == classes
    assert sizes.min() == 6 // classes
    assert sizes.max() == -(-6 // classes)


@pytest.mark.parametrize("classes", [1, 7])
def test_labels_that_cannot_be_merged_are_refused(classes: int) -> None:
    with pytest.raises(DataError, match=r"made has 6 labels; expected 2\.\.6"):
        coarse_labels(pictures([0, 1], [1]), classes, 0)
