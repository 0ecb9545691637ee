"""Functions of once a round name the argument whose shape does not fit."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sluiceway.fedalign import (
    DirectionGram,
    adaptive_strength,
    centred_regions,
    expert_weights,
    global_routing,
    region_similarity,
    region_weights,
    selection_threshold,
    semantic_weights,
)

Call = Callable[[Tensor, Tensor, Tensor], object]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda v, m, t: adaptive_strength(m, v[:2]), "r_g: expected shape [3], got [2]"),
        (lambda v, m, t: global_routing(v, v), "w: expected shape [N, E], got [3]"),
        (lambda v, m, t: global_routing(m[:0], m), "w: expected shape [N, E], got [0, 3]"),
        (lambda v, m, t: global_routing(m, m.T), "r: expected shape [2, 3], got [3, 2]"),
        (lambda v, m, t: centred_regions(t, m.T), "load: expected shape [2, 3], got [3, 2]"),
        (lambda v, m, t: centred_regions(m, m), "regions: expected shape [N, E, d], got [2, 3]"),
        (lambda v, m, t: region_similarity(t, v), "load: expected shape [2, 3], got [3]"),
        (lambda v, m, t: semantic_weights(t, m, t), "D: expected shape [3, 2, 2], got [2, 3, 4]"),
        (lambda v, m, t: DirectionGram(3).add(m), "updates: expected shape [3, P], got [2, 3]"),
        (lambda v, m, t: DirectionGram(0), "clients: expected at least 1, got 0"),
        (lambda v, m, t: DirectionGram(1, chunk=0), "chunk: expected at least 1, got 0"),
        (lambda v, m, t: selection_threshold(m, v > 0), "values: expected shape [N, 2], got"),
        (lambda v, m, t: region_weights(m @ m.T, m @ m.T, v > 0), "active: expected shape [2]"),
        (lambda v, m, t: expert_weights(m @ m.T, v), "load: expected shape [2], got [3]"),
    ],
)
def test_wrong_shapes_are_named(call: Call, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        call(torch.rand(3), torch.rand(2, 3), torch.rand(2, 3, 4))
