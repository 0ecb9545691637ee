"""Methods that choose channels: what rates them, and which scores lead to which masks."""

from __future__ import annotations

import pytest
import torch
from tests.split.small import Pictures, normed, records, set_up, train
from torch import Tensor

from sluiceway import channels
from sluiceway.channels import ClassStatistics
from sluiceway.split import (
    ACPSL,
    METHODS,
    BatchId,
    ChannelChoice,
    ICSChannels,
    L1Channels,
    RandomChannels,
    RedrawnChannels,
    TaylorChannels,
)
from sluiceway.split.mask_selector import ALL, MaskSelector
from sluiceway.split.scorers import ChannelScorer

CHOICES = [
    ACPSL(preset="paper") if cls is ACPSL else cls()
    for cls in METHODS.values()
    if issubclass(cls, ChannelChoice)
]


def masks(
    method: ChannelChoice | None, sizes: tuple[int, ...] = (30, 10), seed: int = 0
) -> MaskSelector:
    return MaskSelector(method, 8, sizes, lambda kept: kept, seed)


def activations(seed: int, size: int = 12) -> Tensor:
    return torch.randn(size, 8, 3, 3, generator=torch.Generator().manual_seed(seed)).relu()


def shown(scorer: ChannelScorer, batches: int) -> None:
    for seed in range(batches):
        A = activations(seed)
        scorer.watch(A, torch.arange(12) % 3)
        scorer.watch_gradient(A, activations(seed + 50))


# -- scorers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CHOICES, ids=lambda m: m.name)
def test_scorers_rate_every_channel_once_they_saw_a_batch(method: ChannelChoice) -> None:
    scorer = method.scorer(8, 3, seed=4)
    assert (scorer.scores() is None) == (method.name != "random")
    shown(scorer, 2)
    scores = scorer.scores()
    assert scores is not None
    assert scores.shape == (8,)
    assert bool(scores.isfinite().all())


@pytest.mark.parametrize("name", ["l1", "std", "entropy"])
def test_rivals_rate_by_the_mean_over_a_rounds_batches(name: str) -> None:
    method = METHODS[name]()
    assert isinstance(method, ChannelChoice)
    scorer, score = method.scorer(8, 3, 0), getattr(channels, name)
    shown(scorer, 2)
    mean = (score(activations(0)) + score(activations(1))) / 2
    assert torch.allclose(scorer.scores(), mean)  # type: ignore[arg-type]
    assert scorer.scores() is None  # a round is over, and nothing was seen since
    shown(scorer, 1)
    assert torch.equal(scorer.scores(), score(activations(0)))  # type: ignore[arg-type]


def test_taylor_takes_each_batch_with_its_own_gradient() -> None:
    scorer = TaylorChannels().scorer(8, 3, 0)
    first, second = activations(1), activations(2, size=5)
    scorer.watch(first, torch.zeros(12).long())
    scorer.watch(second, torch.zeros(5).long())
    scorer.watch_gradient(first, activations(3))
    scorer.watch_gradient(second, activations(4, size=5))
    wanted = channels.taylor(first, activations(3)) + channels.taylor(second, activations(4, 5))
    assert torch.allclose(scorer.scores(), wanted / 2)  # type: ignore[arg-type]


def test_label_aware_scores_outlive_a_round_and_batches_of_one_class() -> None:
    scorer, labels = ACPSL(memory=1.0).scorer(8, 3, 0), torch.arange(12) % 3
    for label in range(3):
        one = labels == label
        scorer.watch(activations(1)[one], labels[one])
        scorer.scores()
    whole = ClassStatistics.of(channels.pooled(activations(1)), labels, 3)
    assert torch.allclose(scorer.scores(), channels.fisher(whole))  # type: ignore[arg-type]


def test_similarity_is_from_the_mean_in_the_first_batch_too() -> None:
    A, labels = activations(1) + 100, torch.arange(12) % 3
    scorer = ACPSL(score="similarity", memory=0).scorer(8, 3, 0)
    scorer.watch(A, labels)
    first = scorer.scores()
    scorer.watch(A, labels)
    assert torch.allclose(first, scorer.scores(), atol=1e-4)  # type: ignore[arg-type]
    assert float(first.abs().max()) > 0.01  # type: ignore[union-attr]


# -- from scores to masks ----------------------------------------------------------------------


def test_a_method_without_a_choice_has_no_masks() -> None:
    none = masks(None)
    none.rate(0, torch.rand(8))
    none.choose(1, [0, 1])
    assert none.mask(0) is None
    assert none.mask(ALL) is None
    assert none.merged_scores() is None
    assert not none.crossing


@pytest.mark.parametrize("kind", ["merged", "client"])
def test_nothing_is_chosen_before_it_was_rated(kind: str) -> None:
    found = masks(L1Channels(share=0.25, ramp_rounds=0, masks=kind))  # type: ignore[arg-type]
    for number in (1, 2, 3):
        found.choose(number, [0])
        assert bool(found.mask(0).all())  # type: ignore[union-attr]
    found.rate(0, torch.arange(8.0))
    found.choose(4, [0])
    assert found.mask(0).nonzero().flatten().tolist() == [6, 7]  # type: ignore[union-attr]


def test_the_first_scores_are_not_blended_with_nothing() -> None:
    # Smoothing begins with the first rating: had round 1 counted as zeros, the third round's
    # scores would outweigh the second's by three to one and channel 1 would win.
    found = masks(L1Channels(share=0.125, ramp_rounds=0, margin=0, growth=1), (1,))
    found.choose(1, [0])
    found.rate(0, torch.tensor([4.0, 0, 0, 0, 0, 0, 0, 0]))
    found.choose(2, [0])
    found.rate(0, torch.tensor([0.0, 3.0, 1.0, 0, 0, 0, 0, 0]))
    found.choose(3, [0])
    assert found.mask(0).nonzero().flatten().tolist() == [0]  # type: ignore[union-attr]


def test_a_client_that_comes_late_sends_all_and_then_what_it_rated() -> None:
    found = masks(L1Channels(share=0.25, masks="client"))
    for number in range(1, 9):
        found.choose(number, [0])
        found.rate(0, torch.arange(8.0))
    assert int(found.mask(0).sum()) == 2  # type: ignore[union-attr]
    found.choose(9, [0, 1])
    assert bool(found.mask(1).all())  # type: ignore[union-attr]
    found.rate(1, torch.arange(8.0).flip(0))
    found.choose(12, [1])
    assert found.mask(1).nonzero().flatten().tolist() == [0, 1]  # type: ignore[union-attr]
    assert found.mask(0).nonzero().flatten().tolist() == [6, 7]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["merged", "client"])
def test_scores_that_say_nothing_are_ranked_by_chance(kind: str) -> None:
    chosen = set()
    for seed in range(6):
        method = ACPSL(share=0.25, ramp_rounds=0, margin=0, masks=kind)  # type: ignore[arg-type]
        found = masks(method, seed=seed)
        for number in (1, 2, 3):
            found.choose(number, [0])
            found.rate(0, torch.zeros(8))
        mask = found.mask(0)
        assert mask is not None
        chosen.add(tuple(mask.nonzero().flatten().tolist()))
        # They give way at once to scores that say something, however small.
        found.rate(0, torch.arange(8.0) * 1e-3)
        found.choose(40, [0])
        assert found.mask(0).nonzero().flatten().tolist() == [6, 7]  # type: ignore[union-attr]
    assert len(chosen) > 3


def test_clients_of_one_class_each_are_pruned_all_the_same() -> None:
    sets = []
    for label in range(3):
        pictures = Pictures(20, label)
        pictures.labels.fill_(label)
        sets.append(pictures)
    result = train(ACPSL(share=0.25), sets, rounds=7)
    kept = [record.kept for record in records(result.records)]
    assert kept[0] == 8
    assert kept[-1] == 2
    assert records(result.records)[-1].scores == [0] * 8


def test_merged_scores_are_the_newest_of_all_weighted_by_examples() -> None:
    sets, method = [Pictures(30, 1), Pictures(10, 2), Pictures(0, 3)], ACPSL(preset="paper")
    built = set_up(normed(), "conv1", sets, method)
    built.run_round(1, [0, 1])
    first = dict(built.masks.scores)
    record = built.run_round(2, [1])
    newest = built.masks.scores
    assert torch.equal(newest[0], first[0])
    assert not torch.equal(newest[1], first[1])
    wanted = channels.merge_scores(torch.stack([newest[0], newest[1]]), torch.tensor([30.0, 10.0]))
    assert record.scores == wanted.tolist()


def test_random_channels_are_fixed_and_each_clients_own_where_masks_are() -> None:
    sets = [Pictures(20, 1), Pictures(20, 2)]
    chosen = {}
    for kind in ("merged", "client"):
        method = RandomChannels(share=0.5, ramp_rounds=0, masks=kind)  # type: ignore[arg-type]
        built = set_up(normed(), "conv1", sets, method)
        found = []
        for number in range(1, 6):
            built.run_round(number, [0] if number < 4 else [0, 1])
            found.append([built.masks.mask(i) for i in (0, 1)])
        assert bool(found[0][0].all())  # type: ignore[union-attr]
        assert all(torch.equal(found[1][0], later[0]) for later in found[1:])  # type: ignore[arg-type]
        # Known from the beginning: a client that comes late needs no rating.
        assert int(found[3][1].sum()) == 4  # type: ignore[union-attr]
        chosen[kind] = found[-1]
    assert torch.equal(*chosen["merged"])  # type: ignore[arg-type]
    assert not torch.equal(*chosen["client"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"share": 0.0},
        {"share": 1.5},
        {"tau": 2},
        {"kappa": float("nan")},
        {"warmup": -1},
        {"budget_mb": 0},
        {"growth": float("inf")},
        {"rule": "luck"},
        {"masks": "none"},
        {"shares": 1},
    ],
    ids=lambda given: next(iter(given)),
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        L1Channels(**settings)  # type: ignore[arg-type]


def test_gradients_rate_nothing_before_the_first_round() -> None:
    with pytest.raises(ValueError, match="warmup"):
        TaylorChannels(warmup=0)


@pytest.mark.parametrize(
    ("budget", "kept"), [(8, 8), (7.9, 7), (3, 3), (1.2, 1)], ids=lambda value: str(value)
)
def test_a_budget_pays_for_as_many_as_fit(budget: float, kept: int) -> None:
    method = L1Channels(rule="budget", budget_mb=budget / 1e6, ramp_rounds=0)
    found = masks(method)
    found.rate(0, torch.arange(8.0))
    found.choose(2, [0])
    assert found.mask(0).nonzero().flatten().tolist() == list(range(8 - kept, 8))  # type: ignore[union-attr]


def test_redrawn_channels_are_others_in_each_batch_and_the_same_on_both_sides() -> None:
    method, A = RedrawnChannels(share=0.25), activations(1)
    drawn = [method.select(A, BatchId(1, 2, n), None, True).rows().tolist() for n in range(20)]
    assert len({str(rows) for rows in drawn}) > 5
    assert all(len(rows[0]) == 2 for rows in drawn)
    assert method.select(A, BatchId(1, 2, 3), None, True).rows().tolist() == drawn[3]
    # In evaluation by what crosses.
    seen = [method.select(activations(n), BatchId(0, 0, 0), None, False).rows() for n in range(9)]
    assert len({str(rows) for rows in seen}) > 3
    again = method.select(activations(0), BatchId(5, 5, 5), None, False).rows()
    assert again.tolist() == seen[0].tolist()
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8)
    assert int(counts.max()) < 20


@pytest.mark.parametrize("schedule", ["parallel", "copies", "sequential"])
def test_the_server_rates_channels_that_do_not_cross_too(schedule: str) -> None:
    sets = [Pictures(30, 1), Pictures(10, 2)]
    built = set_up(normed(), "conv1", sets, ICSChannels(share=0.25), schedule=schedule)
    for number in range(1, 7):
        record = built.run_round(number, [0, 1])
    assert record.kept == 2
    assert record.scores is not None
    assert all(score > 0 for score in record.scores)
    if schedule != "copies":  # there each server rates by itself, and scores are merged
        assert sum(record.scores) == pytest.approx(1)
    assert all(scorer is None for scorer in (built.setup.scorer(0), built.setup.scorer(1)))


def test_the_server_needs_labels_to_rate_by_class() -> None:
    with pytest.raises(ValueError, match="needs the labels"):
        train("ics", schedule="u")
    with pytest.raises(ValueError, match="for all clients"):
        ICSChannels(masks="client")


def test_what_acp_sl_sends_where_the_recipe_says_little() -> None:
    default, paper = ACPSL(), ACPSL(preset="paper")
    assert (default.basis, default.quantize) == ("eigen", "dct")
    assert (paper.basis, paper.quantize) == ("channels", "none")
    # Keys of masks mean masks; what is given wins.
    assert ACPSL(share=0.5).basis == ACPSL(masks="client").basis == "channels"
    assert ACPSL(error_feedback=True).basis == "channels"
    assert ACPSL(preset="paper", quantize="int4").quantize == "int4"
    assert ACPSL(basis="eigen", share=0.5).basis == "eigen"
