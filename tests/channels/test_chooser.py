"""ACP over a run: warm-up, schedule, few swaps, and a state that can be carried on."""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.channels import ChannelChooser, cumulative, fraction, rechoose, schedule, top

quarter = partial(fraction, share=0.25)


def chooser(**settings: Any) -> ChannelChooser:
    return ChannelChooser(**{"channels": 8, "rule": quarter, **settings})


def draws(seed: int, rounds: int) -> Tensor:
    return torch.rand(rounds, 8, generator=torch.Generator().manual_seed(seed)).double()


def run_round(chooser: ChannelChooser, scores: Tensor) -> list[Tensor]:
    return [chooser.choose(n, row) for n, row in enumerate(scores, 1)]


@pytest.mark.parametrize("every", [1, 2, 50])
def test_warm_up_then_schedule(every: int) -> None:
    masks = run_round(chooser(warmup=2, ramp_rounds=3, every=every), draws(0, 8))
    shares = [schedule(n, 2, 0.25, 3) for n in range(1, 9)]
    assert [int(mask.sum()) for mask in masks] == [int(8 * share) for share in shares]
    assert int(masks[-1].sum()) == 2


def test_without_memory_it_is_the_rule() -> None:
    scores = draws(1, 5)
    masks = run_round(chooser(warmup=0, ramp_rounds=0, growth=1, margin=0, decay=0), scores)
    assert all(torch.equal(m, quarter(row)) for m, row in zip(masks, scores, strict=True))


def test_scores_are_smoothed_from_the_warm_up_on() -> None:
    scores = draws(2, 3)
    mask = run_round(chooser(warmup=2, ramp_rounds=0, margin=0, decay=0.75), scores)[-1]
    smoothed = 0.75 * (0.75 * scores[0] + 0.25 * scores[1]) + 0.25 * scores[2]
    assert torch.equal(mask, top(smoothed, 2))


@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(1, 3))
@settings(max_examples=25)
def test_channels_return_only_in_a_choice(seed: int, every: int, growth: float) -> None:
    masks = run_round(chooser(every=every, growth=growth, margin=0.0), draws(seed, 20))
    for n, (before, after) in enumerate(itertools.pairwise(masks), 2):
        if not rechoose(n - 1, every, growth):
            assert not (after & ~before).any()
    assert int(masks[-1].sum()) == 2


def test_infinite_margin_only_shrinks() -> None:
    masks = run_round(chooser(margin=math.inf, decay=0.0), draws(3, 12))
    assert all(not (b & ~a).any() for a, b in itertools.pairwise(masks))


def test_rule_is_asked_only_in_a_choice() -> None:
    asked: list[int] = []

    def rule(scores: Tensor) -> Tensor:
        asked.append(1)
        return cumulative(scores, 0.5)

    run_round(chooser(rule=rule, warmup=1, ramp_rounds=2, every=3, growth=1.0), draws(4, 8))
    assert len(asked) == 3  # rounds 2, 5 and 8


def test_missed_choice_is_made_up_for() -> None:
    scores = draws(5, 2)
    late = chooser(warmup=1, ramp_rounds=0, every=50, margin=0, decay=0)
    late.choose(1, scores[0])
    assert torch.equal(late.choose(4, scores[1]), quarter(scores[1]))


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_carried_on_it_gives_the_same_masks(stop: int) -> None:
    scores, first, second = draws(6, 12), chooser(), chooser()
    whole = run_round(chooser(), scores)
    run_round(first, scores[:stop])
    second.load_state_dict(first.state_dict())
    rest = [second.choose(n + 1, scores[n]) for n in range(stop, 12)]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[stop:], strict=True))


def test_masks_are_copies() -> None:
    one = chooser(warmup=3)
    one.choose(1, torch.rand(8)).zero_()
    one.mask.zero_()
    assert one.mask.all()
    state = one.state_dict()
    one.choose(2, torch.rand(8))
    assert int(state["round"]) == 1
    state["smoothed"].fill_(math.nan)
    assert one.state_dict()["smoothed"].isfinite().all()


def test_errors_in_use_change_nothing() -> None:
    one = chooser(warmup=0)
    one.choose(2, torch.rand(8))
    before = one.state_dict()
    for n, scores in ((2, torch.rand(8)), (3, torch.rand(7)), (3, torch.full((8,), math.nan))):
        with pytest.raises(ValueError, match=r"^(round|scores): "):
            one.choose(n, scores)
    one.rule = torch.zeros_like
    with pytest.raises(ValueError, match="rule"):
        one.choose(3, torch.rand(8))
    for bad in ({}, {**before, "more": torch.ones(1)}, {**before, "mask": torch.ones(3)}):
        with pytest.raises(ValueError, match="expected"):
            one.load_state_dict(bad)
    after = one.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", 0),
        ("warmup", -1),
        ("ramp_rounds", -1),
        ("every", 0),
        ("growth", 0.5),
        ("margin", -1.0),
        ("decay", 1.0),
    ],
)
def test_bad_settings(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        chooser(**{name: value})
