"""LCIS scores: closed forms against loops over examples and over pairs, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.channels import (
    FISHER_FLOOR,
    ClassStatistics,
    between,
    distinct,
    fisher,
    merge_scores,
    similarity,
)

Score = Callable[[ClassStatistics], Tensor]

few = settings(max_examples=30)
seeds = st.integers(0, 10**6)
scorers = pytest.mark.parametrize("score", [fisher, between, distinct, similarity])


def make(seed: int, B: int = 11, C: int = 4, g: int = 3, K: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(B, C, g, generator=generator, dtype=torch.float64)
    z[torch.rand(B, C, generator=generator) < 0.2] = 0.0
    y = torch.randint(0, K, (B,), generator=generator)
    y[:3] = torch.tensor([0, 0, 1])  # a pair of both kinds
    return z + 0.5 * torch.nn.functional.one_hot(y, K)[:, :1, None] * z.abs(), y


def loop_scatter(z: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Between- and within-class scatter [C], example by example."""
    C = z.shape[1]
    B, W = torch.zeros(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    for c in range(C):
        overall = sum(v[b] * z[b, c] for b in range(len(y))) / v.sum()
        for k in set(y.tolist()):
            members = [b for b in range(len(y)) if y[b] == k]
            n_k = sum(v[b] for b in members)
            mean = sum(v[b] * z[b, c] for b in members) / n_k
            B[c] += n_k * ((mean - overall) ** 2).sum()
            W[c] += sum(v[b] * ((z[b, c] - mean) ** 2).sum() for b in members)
    return B, W


def loop_similarity(z: Tensor, y: Tensor, v: Tensor, centre: Tensor | None = None) -> Tensor:
    """Weighted mean cosine of same-class pairs minus that of different-class pairs, [C]."""
    if centre is not None:
        z = z - centre
    scores = []
    for c in range(z.shape[1]):
        sums, weights = [0.0, 0.0], [0.0, 0.0]
        for a in range(len(y)):
            for b in range(a):
                norms = float(z[a, c].norm() * z[b, c].norm())
                cosine = float(z[a, c] @ z[b, c]) / norms if norms > 0 else 0.0
                kind, weight = int(y[a] == y[b]), float(v[a] * v[b])
                sums[kind] += weight * cosine
                weights[kind] += weight
        scores.append(sums[1] / weights[1] - sums[0] / weights[0])
    return torch.tensor(scores, dtype=torch.float64)


class TestAgainstLoops:
    @given(seeds)
    @few
    def test_one_batch(self, seed: int) -> None:
        z, y = make(seed)
        stats, ones = ClassStatistics.of(z, y, 4), torch.ones(len(y), dtype=torch.float64)
        B, W = loop_scatter(z, y, ones)
        torch.testing.assert_close(fisher(stats), B / torch.maximum(W, FISHER_FLOOR * (B + W)))
        torch.testing.assert_close(between(stats), B / (len(y) * z.shape[2]))
        torch.testing.assert_close(similarity(stats), loop_similarity(z, y, ones))

    @given(seeds, st.floats(0, 1))
    @few
    def test_moving_average_is_weighted_examples(self, seed: int, decay: float) -> None:
        """Each example weighs decay ** (later batches that hold its class)."""
        z, y = make(seed, B=15)
        parts = [slice(0, 5), slice(5, 9), slice(9, 15)]
        running = ClassStatistics.of(z[parts[0]], y[parts[0]], 4)
        for part in parts[1:]:
            running = running.update(ClassStatistics.of(z[part], y[part], 4), decay)
        v = torch.ones(len(y), dtype=torch.float64)
        for i, part in enumerate(parts):
            for b in range(part.start, part.stop):
                v[b] = decay ** sum(int((y[later] == y[b]).any()) for later in parts[i + 1 :])
        B, W = loop_scatter(z, y, v)
        torch.testing.assert_close(between(running), B / (v.sum() * z.shape[2]))
        if decay > 1e-3:
            torch.testing.assert_close(fisher(running), B / torch.maximum(W, 1e-6 * (B + W)))
            torch.testing.assert_close(similarity(running), loop_similarity(z, y, v))

    @given(seeds)
    @few
    def test_centred_similarity(self, seed: int) -> None:
        z, y = make(seed)
        centre = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).double()
        stats = ClassStatistics.of(z, y, 4, centre)
        expected = loop_similarity(z, y, torch.ones(len(y)), centre)
        torch.testing.assert_close(similarity(stats), expected)

    def test_by_hand(self) -> None:
        """Two classes at 0, 2 and at 4, 6: means 1 and 5, B = 4 * 4, W = 4 * 1."""
        z = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(4, 1, 1)
        stats = ClassStatistics.of(z, torch.tensor([0, 0, 1, 1]), 2)
        assert fisher(stats).item() == pytest.approx(4.0)
        assert between(stats).item() == pytest.approx(4.0)

    def test_similarity_by_hand(self) -> None:
        """Class 0 along x, class 1 along y: same 1, different 0. The other channel: all along x."""
        x, y = [1.0, 0.0], [0.0, 1.0]
        z = torch.tensor([[x, x], [x, x], [y, x], [y, x]])
        stats = ClassStatistics.of(z * torch.tensor([1.0, 3, 2, 5]).view(4, 1, 1), _pairs(), 2)
        torch.testing.assert_close(similarity(stats), torch.tensor([1.0, 0.0]).double())


def _pairs() -> Tensor:
    return torch.tensor([0, 0, 1, 1])


class TestInvariants:
    @scorers
    @given(seed=seeds)
    @few
    def test_order_of_channels_and_examples(self, score: Score, seed: int) -> None:
        z, y = make(seed)
        generator = torch.Generator().manual_seed(seed)
        channels = torch.randperm(4, generator=generator)
        examples = torch.randperm(len(y), generator=generator)
        expected = score(ClassStatistics.of(z, y, 4))
        moved = score(ClassStatistics.of(z[examples][:, channels], y[examples], 4))
        torch.testing.assert_close(moved, expected[channels])

    @pytest.mark.parametrize("score", [fisher, similarity])
    @given(seed=seeds, scale=st.floats(1e-20, 1e20))
    @few
    def test_scale_of_a_channel(self, score: Score, seed: int, scale: float) -> None:
        z, y = make(seed)
        expected = score(ClassStatistics.of(z, y, 4))
        z[:, 1] *= scale
        torch.testing.assert_close(score(ClassStatistics.of(z, y, 4)), expected)

    @given(seed=seeds, shift=st.floats(-1e3, 1e3))
    @few
    def test_fisher_ignores_shifts(self, seed: int, shift: float) -> None:
        z, y = make(seed)
        expected = fisher(ClassStatistics.of(z, y, 4))
        moved = fisher(ClassStatistics.of(z + shift, y, 4))
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-8)

    @scorers
    @given(seed=seeds, cut=st.integers(0, 11))
    @few
    def test_batches_add_up(self, score: Score, seed: int, cut: int) -> None:
        z, y = make(seed)
        whole = score(ClassStatistics.of(z, y, 4))
        parts = [ClassStatistics.of(z[s], y[s], 4) for s in (slice(0, cut), slice(cut, None))]
        torch.testing.assert_close(score(parts[0].update(parts[1], decay=1.0)), whole)

    @scorers
    @given(seed=seeds)
    @few
    def test_names_of_classes_do_not_matter(self, score: Score, seed: int) -> None:
        z, y = make(seed)
        names = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        renamed = score(ClassStatistics.of(z, names[y], 9))
        torch.testing.assert_close(renamed, score(ClassStatistics.of(z, y, 4)))


class TestDegenerate:
    @scorers
    def test_one_class_is_unknown(self, score: Score) -> None:
        z, _ = make(0)
        stats = ClassStatistics.of(z, torch.zeros(len(z), dtype=torch.int64), 4)
        torch.testing.assert_close(score(stats), torch.zeros(4).double(), atol=1e-12, rtol=0)

    @pytest.mark.parametrize("score", [fisher, similarity])
    def test_one_example_per_class_is_unknown(self, score: Score) -> None:
        z, y = make(1)[0][:4], torch.arange(4)
        stats = ClassStatistics.of(z, y, 4)
        assert score(stats).eq(0).all()
        # A pair whose weight is rounding alone is no pair.
        for decay in (0.0, 3e-16):
            assert score(ClassStatistics.of(-z, y, 4).update(stats, decay)).eq(0).all()

    def test_perfect_separation_is_the_largest_score(self) -> None:
        z = torch.tensor([1.0, 1.0, 3.0, 3.0]).view(4, 1, 1)
        score = fisher(ClassStatistics.of(z, _pairs(), 2))
        assert score.item() == pytest.approx(1 / FISHER_FLOOR)

    @scorers
    @pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -3e30])
    def test_constant_channel_is_worthless(self, score: Score, value: float) -> None:
        z, y = torch.full((7, 2, 3), value), torch.tensor([0, 0, 1, 1, 1, 2, 2])
        zero = torch.zeros(2).double()
        torch.testing.assert_close(score(ClassStatistics.of(z, y, 3)), zero, atol=1e-9, rtol=0)

    @pytest.mark.parametrize("score", [fisher, between])
    def test_rounding_of_sums_is_no_scatter(self, score: Score) -> None:
        for B in range(3, 40):
            z, y = torch.full((B, 1, 1), 1000.1, dtype=torch.float64), torch.arange(B) % 3
            y[-1] = 0
            assert score(ClassStatistics.of(z, y, 3)).item() == 0

    def test_rounding_of_the_centre_is_no_direction(self) -> None:
        z = torch.full((4, 1, 2), 0.1)
        z[:2] = z[:2].nextafter(torch.tensor(1.0))
        stats = ClassStatistics.of(z, _pairs(), 2, z.double().mean(0))
        assert stats.unit_sums.eq(0).all()

    @scorers
    @given(seed=seeds, B=st.integers(0, 5), K=st.integers(1, 3), power=st.integers(-45, 38))
    @few
    def test_always_finite(self, score: Score, seed: int, B: int, K: int, power: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(B, 3, 2, generator=generator) * 10.0**power
        odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-45, 3e38, 1.0])
        pick = torch.randint(0, 14, z.shape, generator=generator)
        z = torch.where(pick < 7, odd[pick.clamp(max=6)], z)
        y = torch.randint(-1, K, (B,), generator=generator)
        stats = ClassStatistics.of(z, y, K)
        for some in (stats, stats.update(stats, 0.5), ClassStatistics.of(z, y, K, stats.mean)):
            scores = score(some)
            assert scores.shape == (3,)
            assert scores.dtype == torch.float64
            assert scores.isfinite().all()

    def test_zero_vectors_count_as_pairs_without_likeness(self) -> None:
        z = torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 1]]).unsqueeze(1)
        score = similarity(ClassStatistics.of(z, _pairs(), 2))
        assert score.item() == pytest.approx((0 + 1) / 2)


class TestDistinct:
    """Channels that say the same thing count once."""

    @few
    @given(seeds)
    def test_is_what_least_squares_leaves(self, seed: int) -> None:
        z, y = make(seed, B=20, C=5)
        stats = ClassStatistics.of(z, y, 4)
        patterns = []
        for c in range(5):
            overall = z[:, c].mean(0)
            rows = [
                (y == k).sum().sqrt() * (z[y == k, c].mean(0) - overall)
                for k in range(4)
                if (y == k).any()
            ]
            patterns.append(torch.cat(rows) / math.sqrt(20 * 3))
        found, taken = distinct(stats), []
        for _ in range(5):
            left = {}
            for c in set(range(5)) - set(taken):
                rest = patterns[c]
                if taken:
                    basis = torch.stack([patterns[t] for t in taken], 1)
                    rest = (
                        rest - basis @ torch.linalg.lstsq(basis, rest.unsqueeze(1)).solution[:, 0]
                    )
                left[c] = float(rest.square().sum())
            best = max(left, key=lambda c: left[c])
            assert float(found[best]) == pytest.approx(left[best], rel=1e-6, abs=1e-12)
            taken.append(best)

    def test_a_copy_and_a_sum_of_others_have_nothing_of_their_own(self) -> None:
        z, y = make(3, B=30, C=3, K=3)
        z = torch.cat([z, 2 * z[:, :1], z[:, 1:2] + z[:, 2:3]], 1)
        found = distinct(ClassStatistics.of(z, y, 3))
        assert sorted(found.tolist())[:2] == pytest.approx([0, 0], abs=1e-12)
        assert float(found[0]) == pytest.approx(0, abs=1e-12)  # its double was taken first

    @few
    @given(seeds)
    def test_never_above_the_scatter_and_the_best_has_all_of_it(self, seed: int) -> None:
        stats = ClassStatistics.of(*make(seed), 4)
        found, scatter = distinct(stats), between(stats)
        assert bool((found <= scatter).all())
        assert float(found.max()) == pytest.approx(float(scatter.max()))


class TestMergeScores:
    """No client's scale dominates."""

    @given(seed=seeds, scale=st.floats(1e-200, 1e200))
    @few
    def test_scale_of_a_client_does_not_matter(self, seed: int, scale: float) -> None:
        scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).double()
        weights = torch.tensor([1.0, 2.0, 3.0])
        expected = merge_scores(scores, weights)
        scores[1] *= scale
        torch.testing.assert_close(merge_scores(scores, weights), expected)

    def test_scale_by_hand(self) -> None:
        scores = torch.tensor([[1.0, 3.0], [100.0, 0.0], [0.0, 0.0]])
        merged = merge_scores(scores, torch.tensor([2.0, 1.0, 1.0]))
        torch.testing.assert_close(merged, torch.tensor([(2 * 0.5 + 2) / 4, 2 * 1.5 / 4]).double())

    def test_largest_floats(self) -> None:
        scores = torch.tensor([[1.7e308, 1.7e308, 0]], dtype=torch.float64)
        merged = merge_scores(scores, torch.ones(1))
        torch.testing.assert_close(merged, torch.tensor([1.5, 1.5, 0]).double())

    def test_client_without_weight_is_not_heard(self) -> None:
        scores = torch.tensor([[1.0, 2.0], [9.0, 1.0]])
        alone = merge_scores(scores[:1], torch.ones(1))
        torch.testing.assert_close(merge_scores(scores, torch.tensor([4.0, 0.0])), alone)

    def test_errors(self) -> None:
        scores = torch.ones(2, 3)
        for weights in (torch.zeros(2), torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan])):
            with pytest.raises(ValueError, match="weights"):
                merge_scores(scores, weights)
        with pytest.raises(ValueError, match="weights"):
            merge_scores(scores, torch.ones(3))
        with pytest.raises(ValueError, match="finite"):
            merge_scores(scores * math.nan, torch.ones(2))
