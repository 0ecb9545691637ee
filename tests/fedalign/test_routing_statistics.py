"""What a client measures: routing_statistics against loops written from the definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fedalign.loops import close, few, seeds
from torch import Tensor

from sluiceway.fedalign import routing_statistics


def loop_statistics(logits: Tensor, selected: Tensor, mask: Tensor | None) -> list[list[float]]:
    experts = logits.shape[1]
    load, routing, margin, first_count = ([0.0] * experts for _ in range(4))
    for t in range(logits.shape[0]):
        if mask is not None and not mask[t]:
            continue
        p = logits[t].double().softmax(0).tolist()
        for e in selected[t].tolist():
            load[e] += 1
        for e in range(experts):
            routing[e] += p[e]
        first = p.index(max(p))
        others = [p[e] for e in range(experts) if e != first]
        margin[first] += p[first] - max(others, default=0.0)
        first_count[first] += 1
    return [load, routing, margin, first_count]


def case(
    seed: int, tokens: int, experts: int, k: int, masked: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, experts, generator=g)
    selected = torch.rand(tokens, experts, generator=g).topk(min(k, experts)).indices
    return logits, selected, torch.rand(tokens, generator=g) > 0.4 if masked else None


Case = tuple[Tensor, Tensor, Tensor | None]
cases = st.builds(
    case, seeds, st.integers(0, 12), st.integers(1, 7), st.integers(1, 4), st.booleans()
)


def test_by_hand() -> None:
    # The probabilities are the softmax of their logarithms. The third is far from the second, so a
    # margin with it (or with the mean of the rest) would show.
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.7, 0.1, 0.2]])
    selected = torch.tensor([[0, 1], [1, 2], [0, 2]])
    load, routing, margin, first = routing_statistics(p.log(), selected)
    close(load, [2, 2, 2], 1e-5)
    close(routing, [1.5, 0.9, 0.6], 1e-5)
    close(margin, [0.3 + 0.5, 0.2, 0.0], 1e-5)
    close(first, [2, 1, 0], 1e-5)


def test_first_choice_is_the_arg_max_whatever_was_selected() -> None:
    p = torch.tensor([[0.6, 0.3, 0.1]])
    load, _, margin, first = routing_statistics(p.log(), torch.tensor([[2, 1]]))
    close(load, [0, 1, 1], 1e-5)
    close(margin, [0.3, 0, 0], 1e-5)
    close(first, [1, 0, 0], 1e-5)


@few
@given(cases, st.integers(0, 12))
def test_equals_the_loops_and_batches_add_up(given_case: Case, cut: int) -> None:
    logits, selected, mask = given_case
    halves = [
        routing_statistics(logits[at], selected[at], None if mask is None else mask[at])
        for at in (slice(cut), slice(cut, None))
    ]
    wanted = loop_statistics(logits, selected, mask)
    for got, one, two, want in zip(routing_statistics(*given_case), *halves, wanted, strict=True):
        close(got, want, 1e-5)
        close(one + two, want, 1e-5)


@few
@given(seeds, st.integers(2, 7))
def test_permuting_experts_permutes_the_results(seed: int, experts: int) -> None:
    logits, selected, mask = case(seed, 9, experts, 2, True)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    moved = routing_statistics(logits[:, order], order.argsort()[selected], mask)
    for got, original in zip(moved, routing_statistics(logits, selected, mask), strict=True):
        close(got, original[order].double(), 1e-5)


def test_padding_changes_nothing_even_if_it_is_nan() -> None:
    logits, selected, _ = case(3, 10, 5, 2, False)
    mask = torch.tensor([True] * 6 + [False] * 4)
    logits[6:8] = float("nan")
    logits[8] = float("inf")
    logits[9] = 1e30
    for got, want in zip(
        routing_statistics(logits, selected, mask),
        routing_statistics(logits[:6], selected[:6]),
        strict=True,
    ):
        close(got, want.double(), 1e-6)


def test_one_expert_has_margin_one() -> None:
    got = routing_statistics(torch.randn(4, 1), torch.zeros(4, 1, dtype=torch.long))
    for value in got:
        close(value, [4.0], 1e-5)


@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_counted_gives_zeros(tokens: int) -> None:
    logits, selected, _ = case(0, tokens, 4, 2, False)
    for value in routing_statistics(logits, selected, torch.zeros(tokens, dtype=torch.bool)):
        assert torch.equal(value, torch.zeros(4))


def test_a_tie_has_no_margin_and_one_first_choice() -> None:
    _, _, margin, first = routing_statistics(torch.zeros(5, 3), torch.zeros(5, 1).long())
    close(margin, [0, 0, 0], 1e-5)
    assert first.sum() == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_are_float32_without_graph(dtype: torch.dtype) -> None:
    logits, selected, mask = case(1, 8, 4, 2, True)
    logits = logits.to(dtype).requires_grad_()
    got = routing_statistics(logits, selected, mask)
    for value, want in zip(got, loop_statistics(logits.detach(), selected, mask), strict=True):
        assert value.dtype == torch.float32
        assert not value.requires_grad
        close(value, want, 1e-5)


def test_counts_stay_exact_under_autocast() -> None:
    # bfloat16 cannot count beyond 256.
    logits = torch.tensor([[2.0, 0.0, 1.0]]).expand(1001, 3)
    selected = torch.tensor([[0, 2]]).expand(1001, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        load, routing, _, first = routing_statistics(logits, selected)
    close(load, [1001, 0, 1001], 1e-5)
    close(first, [1001, 0, 0], 1e-5)
    assert routing.sum().item() == pytest.approx(1001, abs=1e-2)
