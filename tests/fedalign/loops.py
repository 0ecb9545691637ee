"""What the tests of the mathematics share."""

import math
from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

few = settings(max_examples=25)
seeds = st.integers(0, 10**6)
Numbers = Tensor | Sequence[float] | Sequence[Sequence[float]]


def close(got: Tensor, want: Numbers, tolerance: float = 1e-9) -> None:
    wanted = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def cos(a: list[float], b: list[float]) -> float:
    """The cosine; 0 with a vector of zeros."""
    scale = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else 0.0


def loop_weights(r: Tensor, r_g: Tensor, margin: Tensor) -> Tensor:
    """w_i(e) with the global routing in it, of [N, E], [E] and [N, E]."""
    clients, experts = r.shape
    w = torch.zeros(clients, experts, dtype=torch.float64)
    for e in range(experts):
        o = [r[i, e].item() * r_g[e].item() for i in range(clients)]
        s = [o[i] * margin[i, e].item() for i in range(clients)]
        if sum(s) == 0:
            s = o
        for i in range(clients):
            w[i, e] = s[i] / sum(s)
    return w
