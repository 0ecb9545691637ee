"""ACP's rules: by hand, against definitions by brute force, and invariants."""

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.channels import (
    budget,
    cumulative,
    fraction,
    hysteresis,
    rechoose,
    schedule,
    share_count,
    threshold,
    top,
)

few = settings(max_examples=40)
numbers = st.floats(-100, 100).map(lambda x: round(x, 3))
score_lists = st.lists(numbers, min_size=1, max_size=9)
inf = math.inf
Rule = Callable[[Tensor], Tensor]
rules = pytest.mark.parametrize(
    "rule",
    [
        partial(top, count=1),
        partial(fraction, share=0.4),
        partial(cumulative, tau=0.7),
        partial(threshold, kappa=0.5),
    ],
)


def kept(mask: Tensor) -> list[int]:
    return torch.nonzero(mask).flatten().tolist()


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestRules:
    def test_by_hand(self) -> None:
        scores = vector([1, 4, 2, 3])
        assert kept(top(scores, 2)) == [1, 3]
        assert kept(fraction(scores, 0.5)) == [1, 3]
        assert kept(fraction(scores, 0.74)) == [1, 3]
        assert kept(fraction(scores, 0.0)) == [1]
        assert kept(cumulative(scores, 0.4)) == [1]
        assert kept(cumulative(scores, 0.41)) == [1, 3]
        assert kept(cumulative(scores, 0.7)) == [1, 3]
        assert kept(threshold(scores, 0.0)) == [1, 3]
        assert kept(threshold(scores, 0.5)) == [1, 2, 3]
        assert kept(threshold(scores, -5.0)) == [1]

    @rules
    @pytest.mark.parametrize("channels", [5, 4000])
    def test_ties_go_to_the_lower_index(self, rule: Rule, channels: int) -> None:
        mask = kept(rule(torch.full((channels,), 0.1)))
        assert mask == list(range(len(mask)))

    def test_bounds_reached_but_for_rounding(self) -> None:
        for C in range(1, 60):
            for k in range(1, C + 1):
                assert len(kept(cumulative(torch.ones(C), 1.1 * k / C / 1.1))) == k
        for k in range(1, 60):
            assert len(kept(threshold(vector([1, 1 / k]), 1.0))) == 2

    def test_largest_floats(self) -> None:
        scores = vector([-1.7e308, 1.7e308, 1e308])
        assert kept(cumulative(scores, 0.5)) == [1]
        assert kept(cumulative(scores, 0.6)) == [1, 2]
        assert kept(threshold(scores, 0.0)) == [1, 2]
        previous = torch.tensor([False, False, True])
        assert kept(hysteresis(previous, scores, 1, 0.2)) == [1]
        assert kept(hysteresis(previous, scores, 1, 0.3)) == [2]

    @pytest.mark.parametrize("value", [0.1, 0.0, -7.3, 1e300])
    def test_equal_scores(self, value: float) -> None:
        scores = vector([value] * 7)
        assert len(kept(threshold(scores, 0.0))) == 7
        assert len(kept(cumulative(scores, 3 / 7))) == 3
        assert len(kept(cumulative(scores, 0.0))) == 1
        assert len(kept(cumulative(scores, 1.0))) == 7

    @given(score_lists, st.floats(0, 1))
    @few
    def test_cumulative_is_the_smallest_set(self, values: list[float], tau: float) -> None:
        low = min(min(values), 0)
        mass = [v - low for v in values]
        assume(sum(mass) > 0)
        kept_mass = sum(mass[c] for c in kept(cumulative(vector(values), tau)))
        size = len(kept(cumulative(vector(values), tau)))
        assert kept_mass >= tau * sum(mass) * (1 - 1e-8)
        assert all(sum(few) < tau * sum(mass) for few in combinations(mass, size - 1) if few)

    @given(score_lists, st.floats(-3, 3))
    @few
    def test_threshold_by_definition(self, values: list[float], kappa: float) -> None:
        mean = sum(values) / len(values)
        least = mean - kappa * math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        assume(all(abs(v - least) > 1e-6 for v in values))
        expected = [c for c, v in enumerate(values) if v >= least]
        assert kept(threshold(vector(values), kappa)) == (expected or [values.index(max(values))])

    @rules
    @given(values=score_lists, data=st.data())
    @few
    def test_channels_permute(self, rule: Rule, values: list[float], data: st.DataObject) -> None:
        values = list(dict.fromkeys(values))
        order = data.draw(st.permutations(range(len(values))))
        scores = vector(values)
        assert torch.equal(rule(scores[order]), rule(scores)[order])

    @rules
    @given(values=score_lists, scale=st.sampled_from([1e-300, 0.25, 1e6, 1e300]))
    @few
    def test_scale_does_not_matter(self, rule: Rule, values: list[float], scale: float) -> None:
        mask = rule(vector(values))
        assert mask.any()
        assert torch.equal(rule(vector(values) * scale), mask)

    @given(score_lists, st.data())
    @few
    def test_top_count_is_exact(self, values: list[float], data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(values)))
        mask = top(vector(values), count)
        assert mask.dtype == torch.bool
        assert sorted(vector(values)[mask].tolist()) == sorted(values)[-count:]

    def test_share_count(self) -> None:
        assert [share_count(s, 10) for s in (0.0, 0.1, 0.3, 0.7, 0.79, 1.0)] == [1, 1, 3, 7, 7, 10]
        assert all(share_count(k / C, C) == k for C in range(1, 70) for k in range(1, C + 1))

    def test_budget(self) -> None:
        scores = torch.arange(8.0)
        for available, count in {0: 1, 109: 1, 110: 1, 409: 3, 410: 4, 10**9: 8}.items():
            mask = budget(scores, available, lambda kept: 10 + 100 * kept)
            assert kept(mask) == list(range(8 - count, 8))

    @rules
    def test_bad_scores(self, rule: Rule) -> None:
        for bad in (math.nan, inf):
            with pytest.raises(ValueError, match="finite"):
                rule(torch.tensor([1.0, bad]))
        for shape in ((0,), (2, 2)):
            with pytest.raises(ValueError, match="scores: expected shape"):
                rule(torch.ones(shape))

    def test_bad_settings(self) -> None:
        scores = torch.ones(3)
        calls: list[tuple[str, Callable[[], object]]] = [
            ("count", lambda: top(scores, 0)),
            ("count", lambda: top(scores, 4)),
            ("share", lambda: fraction(scores, 1.1)),
            ("share", lambda: fraction(scores, math.nan)),
            ("tau", lambda: cumulative(scores, -0.1)),
            ("kappa", lambda: threshold(scores, math.nan)),
            ("channels", lambda: share_count(0.5, 0)),
        ]
        for name, call in calls:
            with pytest.raises(ValueError, match=f"^{name}: "):
                call()


class TestSchedule:
    @given(st.integers(0, 5), st.floats(0, 1), st.integers(0, 9))
    @few
    def test_falls_from_all_to_the_final_share(self, warmup: int, final: float, ramp: int) -> None:
        shares = [schedule(r, warmup, final, ramp) for r in range(1, 20)]
        assert shares[:warmup] == [1.0] * warmup
        assert shares[warmup + ramp :] == [final] * (19 - warmup - ramp)
        assert all(a >= b for a, b in pairwise(shares))
        if final < 0.99:
            assert all(final < share < 1 for share in shares[warmup : warmup + ramp])

    def test_by_hand(self) -> None:
        assert [schedule(r, 1, 0.2, 1) for r in (1, 2, 3)] == pytest.approx([1, 0.6, 0.2])
        shares = [schedule(r, 0, 0.0, 2) for r in (1, 2, 3)]
        assert shares == pytest.approx([0.75, 0.25, 0])

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("round", (0, 1, 0.5, 1)),
            ("warmup", (1, -1, 0.5, 1)),
            ("final_share", (1, 1, 1.5, 1)),
            ("ramp_rounds", (1, 1, 0.5, -1)),
        ],
    )
    def test_errors(self, name: str, arguments: tuple[int, int, float, int]) -> None:
        with pytest.raises(ValueError, match=f"^{name}: "):
            schedule(*arguments)


class TestRechoose:
    @staticmethod
    def rounds(every: int, growth: float) -> list[int]:
        return [r for r in range(-3, 40) if rechoose(r, every, growth)]

    def test_by_hand(self) -> None:
        assert self.rounds(1, 1.0) == list(range(1, 40))
        assert self.rounds(5, 1.0) == [1, 6, 11, 16, 21, 26, 31, 36]
        assert self.rounds(1, 2.0) == [1, 2, 4, 8, 16, 32]
        assert self.rounds(2, 1.5) == [1, 3, 6, 10, 16, 26]

    @given(st.integers(1, 6), st.floats(1, 5))
    @few
    def test_gaps_never_shrink(self, every: int, growth: float) -> None:
        rounds = self.rounds(every, growth)
        gaps = [b - a for a, b in pairwise(rounds)]
        assert gaps == sorted(gaps)
        assert gaps[:1] == [every]

    def test_huge_growth(self) -> None:
        assert self.rounds(1, 1e308) == [1, 2]
        assert self.rounds(2, 1e308) == [1, 3]

    @pytest.mark.parametrize("arguments", [(1, 0, 1.0), (1, 1, 0.9), (1, 1, math.nan), (1, 1, inf)])
    def test_errors(self, arguments: tuple[int, int, float]) -> None:
        with pytest.raises(ValueError, match=r"^(every|growth): "):
            rechoose(*arguments)


class TestHysteresis:
    """A channel is swapped only for a clearly better one."""

    def test_by_hand(self) -> None:
        previous = torch.tensor([True, True, False, False])
        scores = vector([1.0, 2.0, 1.3, 1.1])
        assert kept(hysteresis(previous, scores, 2, 0.0)) == [1, 2]
        assert kept(hysteresis(previous, scores, 2, 0.29)) == [1, 2]
        assert kept(hysteresis(previous, scores, 2, 0.31)) == [0, 1]
        assert kept(hysteresis(previous, scores, 1, 0.0)) == [1]
        assert kept(hysteresis(previous, scores, 3, inf)) == [0, 1, 2]

    def test_negative_scores_are_shifted(self) -> None:
        """After the shift 0, 1, 3, and 3 exceeds 1 by 200 %."""
        previous, scores = torch.tensor([False, True, False]), vector([-2.0, -1.0, 1.0])
        assert kept(hysteresis(previous, scores, 1, 1.9)) == [2]
        assert kept(hysteresis(previous, scores, 1, 2.1)) == [1]

    def test_ties_stay(self) -> None:
        previous = torch.tensor([False, False, True, True])
        assert kept(hysteresis(previous, torch.ones(4), 2, 0.0)) == [2, 3]
        assert kept(hysteresis(previous, torch.ones(4), 1, 0.0)) == [2]
        assert kept(hysteresis(previous, torch.ones(4), 3, 0.0)) == [0, 2, 3]
        assert kept(hysteresis(previous, torch.zeros(4), 2, 0.5)) == [2, 3]

    @staticmethod
    def draw(data: st.DataObject, distinct: bool = True) -> tuple[Tensor, Tensor, int]:
        values = data.draw(st.lists(numbers, min_size=1, max_size=9, unique=distinct))
        flags = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
        count = data.draw(st.integers(1, len(values)))
        return torch.tensor(flags), vector(values), count

    @given(st.data())
    @few
    def test_no_margin_is_top(self, data: st.DataObject) -> None:
        previous, scores, count = self.draw(data)
        assert torch.equal(hysteresis(previous, scores, count, 0.0), top(scores, count))

    @given(st.data())
    @few
    def test_infinite_margin_never_swaps(self, data: st.DataObject) -> None:
        previous, scores, count = self.draw(data)
        mask = hysteresis(previous, scores, count, inf)
        before, after = set(kept(previous)), set(kept(mask))
        assert before <= after or after <= before
        if after < before:
            assert min(scores[c] for c in after) > max(scores[c] for c in before - after)

    @given(st.data(), st.floats(0, 3))
    @few
    def test_what_holds_after(self, data: st.DataObject, margin: float) -> None:
        """The count is exact, and no channel outside clearly beats one that was kept before."""
        previous, scores, count = self.draw(data, distinct=False)
        mask = hysteresis(previous, scores, count, margin)
        assert int(mask.sum()) == count
        shift = scores - min(float(scores.min()), 0.0)
        outside = shift[~mask].max() if (~mask).any() else torch.tensor(-inf)
        assert outside <= (1 + margin) * shift[mask].min() + 1e-9
        came = mask & ~previous
        if int(previous.sum()) >= count and came.any():
            gone = previous & ~mask
            assert shift[came].min() > (1 + margin) * shift[gone].min() - 1e-9

    @given(st.data(), st.floats(0, 3))
    @few
    def test_second_time_changes_nothing(self, data: st.DataObject, margin: float) -> None:
        previous, scores, count = self.draw(data, distinct=False)
        mask = hysteresis(previous, scores, count, margin)
        assert torch.equal(hysteresis(mask, scores, count, margin), mask)

    @given(st.data(), st.floats(0, 3))
    @few
    def test_channels_permute(self, data: st.DataObject, margin: float) -> None:
        previous, scores, count = self.draw(data)
        order = data.draw(st.permutations(range(len(scores))))
        moved = hysteresis(previous[order], scores[order], count, margin)
        assert torch.equal(moved, hysteresis(previous, scores, count, margin)[order])

    @pytest.mark.parametrize(
        ("name", "previous", "count", "margin"),
        [
            ("previous", torch.ones(2, dtype=torch.bool), 1, 0.0),
            ("count", torch.ones(3, dtype=torch.bool), 0, 0.0),
            ("margin", torch.ones(3, dtype=torch.bool), 1, -0.1),
            ("margin", torch.ones(3, dtype=torch.bool), 1, math.nan),
        ],
    )
    def test_errors(self, name: str, previous: Tensor, count: int, margin: float) -> None:
        with pytest.raises(ValueError, match=f"^{name}: "):
            hysteresis(previous, torch.ones(3), count, margin)
