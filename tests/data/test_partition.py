import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.helpers import label_counts

from sluiceway.data import DataError, partition
from sluiceway.data.partition import Parts, dirichlet, iid, natural, pathological
from sluiceway.data.tables import IntArray

LABELS = np.repeat(np.arange(10), 100)

label_arrays = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(
    lambda values: np.array(values, dtype=np.int64)
)
seeds = st.integers(0, 2**32)


def assert_cover(parts: Parts, rows: int, clients: int) -> None:
    assert len(parts) == clients
    assert all(part.dtype == np.int64 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(rows))


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, IntArray, int, int, float, int]:
    """(kind, labels, clients, seed, alpha, classes_per_client) that every partition accepts."""
    labels = draw(label_arrays)
    distinct = len(np.unique(labels))
    clients = draw(st.integers(1, len(labels)))
    classes = draw(st.integers(-(-distinct // clients), distinct))
    alpha = draw(st.sampled_from([5e-324, 1e-300, 1e-5, 0.01, 0.1, 1.0, 100.0, 1e308]))
    kind = draw(st.sampled_from(["iid", "dirichlet", "pathological", "natural"]))
    return kind, labels, clients, draw(seeds), alpha, classes


@settings(max_examples=300)
@given(requests(), st.booleans())
def test_every_partition_is_a_disjoint_cover_that_the_seed_alone_decides(
    request: tuple[str, IntArray, int, int, float, int], skewed: bool
) -> None:
    kind, labels, clients, seed, alpha, classes = request

    def deal() -> Parts:
        return partition(
            kind,
            labels,
            clients,
            seed,
            alpha=alpha if skewed or kind == "dirichlet" else None,
            classes_per_client=classes,
            groups={"site": labels},
        )

    first = deal()
    assert_cover(first, len(labels), clients)
    np.random.seed(seed % 1000)  # noqa: NPY002  the global state must not matter
    for one, other in zip(first, deal(), strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=300)
@given(requests())
def test_pathological_clients_hold_few_labels(
    request: tuple[str, IntArray, int, int, float, int],
) -> None:
    _, labels, clients, seed, _, classes = request
    counts = label_counts(pathological(labels, clients, classes, seed), labels, 7)
    assert ((counts > 0).sum(axis=1) <= classes).all()


def test_pathological_clients_hold_exactly_k_labels_where_rows_abound() -> None:
    counts = label_counts(pathological(LABELS, 20, 2, seed=0), LABELS, 10)
    assert ((counts > 0).sum(axis=1) == 2).all()
    assert set(counts.sum(axis=1)) == {50}


@given(label_arrays, st.integers(1, 20), seeds)
def test_iid_sizes_differ_by_one_at_most(labels: IntArray, clients: int, seed: int) -> None:
    clients = min(clients, len(labels))
    sizes = [len(part) for part in iid(labels, clients, seed)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("deal", [iid, lambda *a: dirichlet(*a[:2], 1.0, a[2])])
def test_another_seed_deals_other_rows(deal: type) -> None:
    one, other = deal(LABELS, 5, 0), deal(LABELS, 5, 1)
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_dirichlet_lets_clients_come_out_empty() -> None:
    parts = dirichlet(LABELS, 50, 0.01, seed=0)
    assert_cover(parts, len(LABELS), 50)
    assert min(len(part) for part in parts) == 0


@pytest.mark.parametrize("alpha", [5e-324, 1e-300])
def test_dirichlet_with_a_vanishing_alpha_gives_every_label_one_owner(alpha: float) -> None:
    counts = label_counts(dirichlet(LABELS, 4, alpha, seed=3), LABELS, 10)
    assert ((counts > 0).sum(axis=0) == 1).all()
    assert (counts.sum(axis=1) > 0).sum() > 1


def test_dirichlet_with_a_huge_alpha_shares_evenly() -> None:
    counts = label_counts(dirichlet(LABELS, 4, 1e308, seed=3), LABELS, 10)
    assert (counts == 25).all()


def test_dirichlet_shares_have_the_variance_of_the_distribution() -> None:
    # A share of Dir(alpha * 1_K) has mean 1/K and variance (K - 1) / (K^2 (K alpha + 1)).
    clients, alpha = 4, 0.5
    labels = np.repeat(np.arange(400), 200)
    shares = label_counts(dirichlet(labels, clients, alpha, seed=0), labels, 400) / 200
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    np.testing.assert_allclose(shares.mean(axis=1), np.full(4, 0.25), atol=0.04)
    np.testing.assert_allclose(shares.var(), expected, rtol=0.1)


def test_natural_deals_whole_groups_largest_first() -> None:
    groups = np.repeat([7, 3, 9, 1], [10, 40, 20, 30])
    parts = natural(groups, 2, seed=0)
    assert [sorted(set(groups[part])) for part in parts] == [[3, 9], [1, 7]]


def test_natural_splits_groups_evenly_between_more_clients() -> None:
    groups = np.repeat([0, 1], [60, 30])
    parts = natural(groups, 5, seed=0)
    assert [(set(groups[part]), len(part)) for part in parts] == [
        ({0}, 20),
        ({1}, 15),
        ({0}, 20),
        ({1}, 15),
        ({0}, 20),
    ]


def test_natural_with_alpha_is_dirichlet_over_groups() -> None:
    groups = np.repeat(np.arange(5), 20)
    for one, other in zip(natural(groups, 3, 0.5, 1), dirichlet(groups, 3, 0.5, 1), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("kind", "clients", "settings", "line"),
    [
        ("iid", 0, {}, "the number of clients is 0: it must be 1 or more"),
        ("iid", 1001, {}, r"1001 clients for 1000 examples: clients must be 1\.\.1000"),
        ("dirichlet", 5, {}, "needs alpha, a number above 0"),
        ("dirichlet", 5, {"alpha": 0.0}, r"alpha is 0\.0: it must be a finite number above 0"),
        ("dirichlet", 5, {"alpha": -1.0}, "alpha is -1"),
        ("dirichlet", 5, {"alpha": float("nan")}, "alpha is nan"),
        ("dirichlet", 5, {"alpha": float("inf")}, "alpha is inf"),
        ("dirichlet", 1001, {"alpha": 1.0}, "1001 clients"),
        ("pathological", 5, {}, "needs classes_per_client"),
        ("pathological", 5, {"classes_per_client": 0}, r"is 0: it must be 1\.\.10"),
        ("pathological", 5, {"classes_per_client": 11}, r"is 11: it must be 1\.\.10"),
        ("pathological", 4, {"classes_per_client": 2}, "must be 10 or more"),
        ("natural", 5, {}, "needs a column: the data has no such columns"),
        (
            "natural",
            5,
            {"groups": {"site": LABELS, "year": LABELS}, "column": "sight"},
            "finds no column 'sight': the columns are site, year",
        ),
        (
            "natural",
            5,
            {"groups": {"site": LABELS, "year": LABELS}},
            "needs a column: the columns are site, year",
        ),
        ("natural", 5, {"groups": {"site": LABELS}, "alpha": 0.0}, "alpha is 0"),
        ("natural", 1001, {"groups": {"site": LABELS}}, "1001 clients"),
        ("even", 5, {}, "no partition 'even': it must be one of iid, dirichlet, path"),
    ],
)
def test_impossible_requests(
    kind: str, clients: int, settings: dict[str, object], line: str
) -> None:
    with pytest.raises(DataError, match=line) as caught:
        partition(kind, LABELS, clients, 0, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_partition_that_would_take_hours_is_refused() -> None:
    labels = np.repeat(np.arange(120), 1000)
    with pytest.raises(DataError, match=r"100000 clients with 120 of 120 labels .* most 1000000"):
        partition("pathological", labels, 100_000, 0, classes_per_client=120)
    each = {"row": np.arange(120_000)}
    with pytest.raises(DataError, match="clients for 120000 labels or groups: their product"):
        partition("natural", labels, 1000, 0, alpha=0.1, groups=each)
    assert_cover(partition("dirichlet", labels, 100_000, 0, alpha=0.1), 120_000, 100_000)
    assert_cover(partition("natural", labels, 100_000, 0, groups=each), 120_000, 100_000)
