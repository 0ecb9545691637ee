"""Rows of the head by the examples of their class, against loops in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.test_aggregation import LAYOUT, TENSORS, several, update
from torch import Tensor

from sluiceway.core.aggregation import aggregate
from sluiceway.errors import InputError
from sluiceway.strategies import STRATEGIES, Strategy, Update, strategy

HEAD = ("head.weight", "head.bias")
few = settings(max_examples=15)


def combined(
    updates: list[Update], counts: list[list[int]], name: str = "fedavg", head: str = "counts"
) -> dict[str, Tensor]:
    made: Strategy = strategy(name, head=head)
    made.setup(TENSORS, replace(LAYOUT, head=HEAD), len(counts))
    made.label_counts = torch.tensor(counts)
    aggregate(made, updates)
    return made.tensors


def by_loop(updates: list[Update], counts: list[list[int]], name: str) -> Tensor:
    rows = []
    for k, old in enumerate(TENSORS[name].double()):
        held = [(counts[u.client][k], u.tensors[name][k].double()) for u in updates]
        total = sum(n for n, _ in held)
        rows.append(sum(n * row for n, row in held) / total if total else old)
    return torch.stack([torch.as_tensor(row) for row in rows])


COUNTS = [[4, 0, 6], [0, 0, 3], [20, 0, 5], [1, 0, 0]]


def test_each_row_is_averaged_over_those_who_hold_its_class() -> None:
    new, plain = combined(several(), COUNTS), combined(several(), COUNTS, head="examples")
    for name in HEAD:
        wanted = by_loop(several(), COUNTS, name)
        torch.testing.assert_close(new[name].double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(new[name][1], TENSORS[name][1])  # nobody holds class 1
    for name in set(new) - set(HEAD):
        assert torch.equal(new[name], plain[name])


@pytest.mark.parametrize("head", ["counts", "region"])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_method_takes_it(name: str, head: str) -> None:
    new, plain = (combined(several(), COUNTS, name, by) for by in (head, "examples"))
    assert not torch.equal(new["head.weight"], plain["head.weight"])
    others = set(new) - set(HEAD)
    assert all(torch.equal(new[other], plain[other]) for other in others)


@few
@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=4, max_size=4))
def test_the_order_of_clients_changes_nothing(counts: list[list[int]]) -> None:
    one, other = combined(several(), counts), combined(several()[::-1], counts)
    for name in HEAD:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
        wanted = by_loop(several(), counts, name)
        torch.testing.assert_close(one[name].double(), wanted, rtol=1e-4, atol=1e-5)


def test_one_client_alone_gets_its_rows_back() -> None:
    alone = update(1, 9)
    new = combined([alone], [[0, 0, 0], [2, 0, 7]])
    for name in HEAD:
        assert torch.equal(new[name][[0, 2]], alone.tensors[name][[0, 2]])
        assert torch.equal(new[name][1], TENSORS[name][1])


def test_by_region_it_is_the_least_squares_of_a_loop() -> None:
    new = combined(several(), COUNTS, head="region")

    def joined(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[HEAD[0]], tensors[HEAD[1]][:, None]], dim=1).double()

    moved, total = torch.zeros(()).double(), torch.zeros(()).double()
    for u in several():
        change = joined(u.tensors) - joined(TENSORS)
        moment = change.T @ change / change.square().sum()
        moment = u.examples * (0.9 * moment + 0.1 * moment.diagonal().diag())
        moved, total = moved + change @ moment, total + moment
    wanted = joined(TENSORS) + moved @ torch.linalg.inv(total)
    torch.testing.assert_close(joined(new), wanted, rtol=1e-3, atol=1e-4)


def test_by_region_one_client_alone_gets_its_head_back() -> None:
    alone = update(1, 9)
    new = combined([alone], [[0, 0, 0], [2, 0, 7]], head="region")
    assert all(torch.equal(new[name], alone.tensors[name]) for name in HEAD)


def test_fewer_classes_at_the_clients_than_rows() -> None:
    new = combined([update(0, 9)], [[9]])
    assert torch.equal(new["head.weight"][1:], TENSORS["head.weight"][1:])


@pytest.mark.parametrize("head", ["counts", "region"])
def test_a_model_without_a_linear_head_is_refused(head: str) -> None:
    with pytest.raises(InputError, match=rf"method\.head = '{head}' needs a model whose last"):
        strategy("fedavg", head=head).setup(TENSORS, LAYOUT, 4)
