"""Hysteresis: a channel is swapped only for a clearly better one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.channels import hysteresis, top

few = settings(max_examples=40, deadline=None)
numbers = st.floats(-100, 100).map(lambda x: round(x, 3))
inf = math.inf


def kept(mask: Tensor) -> list[int]:
    return torch.nonzero(mask).flatten().tolist()


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestHysteresis:
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
