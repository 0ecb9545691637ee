"""Merging the clients' scores: no client's scale dominates."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sluiceway.channels import merge_scores

How = Literal["scale", "rank"]

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10**6)


class TestMergeScores:
    @pytest.mark.parametrize("how", ["scale", "rank"])
    @given(seed=seeds, scale=st.floats(1e-200, 1e200))
    @few
    def test_scale_of_a_client_does_not_matter(self, how: How, seed: int, scale: float) -> None:
        scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).double()
        weights = torch.tensor([1.0, 2.0, 3.0])
        expected = merge_scores(scores, weights, how)
        scores[1] *= scale
        torch.testing.assert_close(merge_scores(scores, weights, how), expected)

    def test_scale_by_hand(self) -> None:
        scores = torch.tensor([[1.0, 3.0], [100.0, 0.0], [0.0, 0.0]])
        merged = merge_scores(scores, torch.tensor([2.0, 1.0, 1.0]))
        torch.testing.assert_close(merged, torch.tensor([(2 * 0.5 + 2) / 4, 2 * 1.5 / 4]).double())

    def test_largest_floats(self) -> None:
        scores = torch.tensor([[1.7e308, 1.7e308, 0]], dtype=torch.float64)
        merged = merge_scores(scores, torch.ones(1))
        torch.testing.assert_close(merged, torch.tensor([1.5, 1.5, 0]).double())

    def test_rank_by_hand(self) -> None:
        scores = torch.tensor([[5.0, -1.0, 5.0, 9.0]])
        merged = merge_scores(scores, torch.ones(1), "rank")
        torch.testing.assert_close(merged, torch.tensor([1.5, 0, 1.5, 3]).double() / 3)
        assert merge_scores(torch.ones(2, 1), torch.ones(2), "rank").item() == 0.5

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
        with pytest.raises(ValueError, match="how"):
            merge_scores(scores, torch.ones(2), "mean")  # type: ignore[arg-type]
