"""The auxiliary load-balancing loss: by hand, against loops and autograd of the loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fedalign.loops import close, few, seeds
from torch import Tensor

from sluiceway.fedalign import load_balance


def loop(logits: Tensor, selected: Tensor, mask: Tensor | None) -> Tensor:
    rows = [t for t in range(len(logits)) if mask is None or bool(mask[t])]
    total = logits.new_zeros(())
    for e in range(logits.shape[1]):
        held = sum(selected[t].tolist().count(e) for t in rows)
        share = held / (selected.shape[1] * len(rows))
        p = torch.stack([logits[t, e].exp() / logits[t].exp().sum() for t in rows]).mean()
        total = total + share * p
    return logits.shape[1] * total


@few
@given(seeds, st.integers(1, 3), st.booleans())
def test_value_and_gradient_equal_the_loops(seed: int, k: int, masked: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 4, generator=g, dtype=torch.float64).requires_grad_()
    selected = torch.rand(7, 4, generator=g).topk(k).indices  # any choice, not the logits' alone
    mask = torch.rand(7, generator=g) > 0.5 if masked else None
    if mask is not None:
        mask[0] = True
    got, want = load_balance(logits, selected, mask), loop(logits, selected, mask)
    close(got, want)
    close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])


def test_by_hand() -> None:
    # Three of four tokens choose expert 0 with p = 3/4, one expert 1 with p = 3/4:
    # f = (3/4, 1/4), P = (5/8, 3/8), 2 (15/32 + 3/32) = 9/8.
    logits = torch.tensor([[3.0, 1.0]] * 3 + [[1.0, 3.0]]).log()
    close(load_balance(logits, logits.topk(1).indices), torch.tensor(9 / 8), 1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_uniform_is_one_and_one_expert_for_all_is_their_number(k: int) -> None:
    even = torch.stack([torch.arange(i, i + k) % 4 for i in range(8)])
    generator = torch.Generator().manual_seed(k)
    close(load_balance(torch.randn(8, 4, generator=generator), even), torch.tensor(1.0), 1e-6)
    close(load_balance(torch.zeros(8, 4), even[:1].expand(8, k)), torch.tensor(1.0), 1e-6)
    one = torch.tensor([100.0, 0.0, 0.0, 0.0]).expand(8, 4)
    close(load_balance(one, one.topk(k).indices), torch.tensor(4 / k), 1e-6)


def test_padding_counts_for_nothing_even_where_it_is_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator)
    padded = torch.cat([logits, torch.full((2, 3), torch.nan)]).requires_grad_()
    selected = torch.cat([logits.topk(2).indices, torch.zeros(2, 2, dtype=torch.int64)])
    loss = load_balance(padded, selected, torch.arange(6) < 4)
    close(loss, load_balance(logits, selected[:4]).item())
    loss.backward()
    assert padded.grad is not None
    assert padded.grad.isfinite().all()
    assert not padded.grad[4:].any()
    nothing = load_balance(padded, selected, torch.zeros(6, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0


def test_half_precision_is_computed_in_single() -> None:
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = load_balance(logits, logits.topk(2).indices)
    assert loss.dtype == torch.float32
    close(loss, load_balance(logits.double(), logits.topk(2).indices), 1e-5)
