"""Whole runs: equal to unsplit training, the mask that trains is judged, every byte is counted."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests.split.small import (
    ADAMW,
    SGD,
    Pictures,
    flat_normed,
    normed,
    plain,
    same,
    set_up,
    unsplit,
)
from torch import Tensor, nn
from torch.nn import functional

from sluiceway.federated.client import Optimisation
from sluiceway.federated.rounds import Record
from sluiceway.split import (
    ACPSL,
    FORMS,
    METHODS,
    Bottleneck,
    Compressor,
    L1Channels,
    Quantized,
    RandomChannels,
    SplitRecord,
    cut,
    split_train,
)
from sluiceway.split.choosing import ALL
from sluiceway.strategies import FedAdam, FedAvg, FedProx, Scaffold, Strategy

ROOT = Path(__file__).parents[2]
forms = pytest.mark.parametrize("form", FORMS)


def tail_of(form: str) -> str | None:
    return "conv4" if form == "u" else None


def clients() -> list[Pictures]:
    """Unequal clients: one holds a single example, one none."""
    return [Pictures(30, 1), Pictures(1, 2), Pictures(0, 3), Pictures(17, 4)]


def records(found: list[Record]) -> list[SplitRecord]:
    return [record for record in found if isinstance(record, SplitRecord)]


def numbers(found: list[Record]) -> list[dict[str, Any]]:
    return [record.as_dict() | {"seconds": 0} for record in found]


# -- equal to unsplit training -----------------------------------------------------------------


@forms
@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("network", [normed, plain])
def test_one_client_trains_the_unsplit_network(
    form: str, training: Optimisation, network: Callable[[], nn.Sequential]
) -> None:
    data, test = Pictures(37, 5), Pictures(40, 6)
    model = network()
    result = split_train(
        model, "conv1", [data], test, form=form, tail_at=tail_of(form), rounds=3, training=training
    )
    wanted = unsplit(network(), data, 3, training)
    assert same(model.state_dict(), wanted.state_dict())
    right = (wanted(test.tensors[0]).argmax(1) == test.labels).float().mean()
    last = records(result.records)[-1]
    assert last.accuracy == last.accuracy_full == pytest.approx(float(right))
    assert all(torch.equal(t, wanted.state_dict()[n]) for n, t in result.tensors.items())


@pytest.mark.parametrize("form", ["parallel", "u"])
def test_a_parallel_step_is_one_on_the_batches_together(form: str) -> None:
    sets = [Pictures(3, 1), Pictures(12, 2), Pictures(7, 3)]
    step = Optimisation(lr=0.1, batch_size=16, optimizer="sgd")
    model, wanted = plain(dropout=0), plain(dropout=0)
    split_train(
        model, "conv1", sets, sets[0], form=form, tail_at=tail_of(form), rounds=1, training=step
    )
    optimiser = step.optimiser(list(wanted.parameters()))
    images, labels = (torch.cat(parts) for parts in zip(*(s.tensors for s in sets), strict=True))
    functional.cross_entropy(wanted(images), labels).backward()
    optimiser.step()
    for (name, got), want in zip(model.named_parameters(), wanted.parameters(), strict=True):
        # Of the front it is the average of three: each gradient is that of its own mean loss.
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), name


def test_batch_norm_of_the_server_sees_all_batches_of_a_step_together() -> None:
    sets = [Pictures(3, 1), Pictures(12, 2), Pictures(7, 3)]
    model = normed()
    step = Optimisation(lr=0.1, batch_size=16, optimizer="sgd")
    split_train(model, "conv1", sets, sets[0], rounds=1, training=step)
    front, back = cut(normed(), "conv1")
    smashed = torch.cat([front.train()(s.tensors[0]) for s in sets])
    back.train()(smashed)
    for name, buffer in back.named_buffers():
        assert torch.allclose(model.get_buffer(name), buffer, rtol=1e-4, atol=1e-6), name


def test_copies_of_clients_alone_are_averaged() -> None:
    sets = [Pictures(30, 1), Pictures(10, 2)]
    model = normed()
    split_train(model, "conv1", sets, sets[0], form="copies", rounds=1, training=SGD)
    alone = []
    for number, data in enumerate(sets):
        only = normed()
        empty = [Pictures(0, 9)] * number
        split_train(only, "conv1", [*empty, data], data, rounds=1, training=SGD)
        alone.append(only.state_dict())
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            mean = 0.75 * alone[0][name] + 0.25 * alone[1][name]
            assert torch.allclose(value, mean, rtol=1e-4, atol=1e-6), name


def test_sequential_clients_hand_on_front_and_back() -> None:
    sets = [Pictures(30, 1), Pictures(10, 2)]
    step = Optimisation(lr=0.05, batch_size=8, optimizer="sgd")
    model = normed()
    split_train(model, "conv1", sets, sets[0], form="sequential", rounds=1, training=step)
    second = normed()
    split_train(second, "conv1", sets[:1], sets[0], rounds=1, training=step)
    split_train(second, "conv1", [Pictures(0, 1), sets[1]], sets[0], rounds=1, training=step)
    assert same(
        {n: p.detach() for n, p in model.named_parameters()},
        {n: p.detach() for n, p in second.named_parameters()},
    )


class Mask(nn.Module):
    """Channels that are dropped, as a layer of an unsplit network."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept.view(-1, 1, 1)


@pytest.mark.parametrize("method", ["acp-sl", "random", "taylor"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pruned_run_trains_the_network_with_the_mask_in_it(method: str, form: str) -> None:
    # BatchNorm behind the cut sees the masked tensor, and gradients are those behind the mask.
    data, test, model = Pictures(37, 5), Pictures(40, 6), normed()
    result = split_train(
        model,
        "conv1",
        [data],
        test,
        METHODS[method](share=0.3, ramp_rounds=1),  # type: ignore[call-arg]
        form=form,
        tail_at=tail_of(form),
        rounds=4,
        training=SGD,
    )
    masks = [torch.tensor(record.mask) for record in records(result.records)]
    assert [int(mask.sum()) for mask in masks] == [8, 5, 2, 2]
    front, back = cut(normed(), "conv1")
    layer = Mask()
    wanted = nn.Sequential(front, layer, back)
    kept = iter(masks)
    unsplit(wanted, data, 4, SGD, before=lambda n: setattr(layer, "kept", next(kept).float()))
    trained = {n.split(".", 1)[1]: v for n, v in wanted.state_dict().items()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name


# -- what is judged ----------------------------------------------------------------------------


def accuracy_of(model: nn.Module, test: Pictures) -> float:
    return float((model(test.tensors[0]).argmax(1) == test.labels).double().mean())


def masked(front: nn.Module, mask: Tensor, back: nn.Module) -> nn.Sequential:
    layer = Mask()
    layer.kept = mask.float()
    return nn.Sequential(front, layer, back).eval()


def test_the_mask_of_training_is_the_mask_of_evaluation() -> None:
    sets, test = [Pictures(60, 1), Pictures(20, 2)], Pictures(300, 6)
    built = set_up(normed(), "conv1", sets, L1Channels(share=0.25, ramp_rounds=0), test)
    for number in (1, 2, 3):
        record = built.play(number, [0, 1])
        assert record.mask == built.clients[0].mask.tolist()  # type: ignore[union-attr]
    mask = built.masks.mask(ALL)
    assert mask is not None
    assert int(mask.sum()) == record.kept == 2
    assert record.accuracy_full == accuracy_of(nn.Sequential(built.front, built.back), test)
    assert record.accuracy == accuracy_of(masked(built.front, mask, built.back), test)
    # With other masks the accuracy is another: it was none of them that was reported.
    others = [accuracy_of(masked(built.front, mask.roll(k), built.back), test) for k in (1, 2, 3)]
    assert record.accuracy not in others


def test_rounding_is_judged_and_the_full_accuracy_is_without() -> None:
    test, model = Pictures(300, 6), normed()
    method = Quantized(quantize="int4", quantize_gradient="int8")
    result = split_train(model, "conv1", [Pictures(60, 1)], test, method, rounds=2, training=SGD)
    last = records(result.records)[-1]
    front, back = cut(model, "conv1")
    with torch.no_grad():
        # Rounding has a scale for each batch: those of the evaluation, 64 examples each.
        parts = [
            back(method.open(method.up(front(x), (0, 0, 0))[0]).values)  # type: ignore[arg-type]
            for x in test.tensors[0].split(64)
        ]
    right = (torch.cat(parts).argmax(1) == test.labels).double().mean()
    assert last.accuracy == float(right)
    assert last.accuracy_full == accuracy_of(model, test)


def test_masks_of_their_own_are_judged_each_for_its_client() -> None:
    sets, test = [Pictures(60, 1), Pictures(20, 2)], Pictures(200, 6)
    method = ACPSL(share=0.25, ramp_rounds=0, masks="client", margin=0, every=1, growth=1)
    built = set_up(normed(), "conv1", sets, method, test)
    for number in (1, 2, 3):
        record = built.play(number, [0, 1])
    masks = [built.masks.mask(i) for i in (0, 1)]
    assert masks[0] is not None
    assert masks[1] is not None
    assert not torch.equal(masks[0], masks[1])
    found = [accuracy_of(masked(built.front, m, built.back), test) for m in masks if m is not None]
    assert record.accuracy == pytest.approx(0.75 * found[0] + 0.25 * found[1])
    assert record.mask is None
    assert record.scores is None


# -- bytes -------------------------------------------------------------------------------------


def between_rounds(model: dict[str, Tensor], part: dict[str, Tensor], facts: object) -> int:
    tensors = {f"model/{name}": tensor for name, tensor in model.items()} | part
    return len(save(tensors, {"sluiceway": json.dumps(facts, sort_keys=True)}))


@forms
@pytest.mark.parametrize("name", [name for name in METHODS if name != "bottleneck"])
def test_bytes_are_the_lengths_of_all_messages(name: str, form: str) -> None:
    model = normed()
    front, back = cut(model, "conv1")
    exchanged = {f"front.{n}": t for n, t in front.state_dict().items() if t.is_floating_point()}
    if form == "u":
        _, tail = cut(back, "conv4")
        exchanged |= {f"tail.{n}": t for n, t in tail.state_dict().items() if t.is_floating_point()}
    sets, method = [*clients()], METHODS[name]()
    sets[1] = Pictures(2, 5)  # one example alone would be left out in two of the forms
    result = split_train(
        model, "conv1", sets, sets[0], method, form=form, tail_at=tail_of(form), rounds=3
    )
    crossing = name in ("acp-sl", "l1", "std", "entropy", "taylor")
    for number, record in enumerate(records(result.records), 1):
        up = down = 0
        kept = int(record.kept) if record.mask is not None else None
        for client in (0, 1, 3):
            mask = {"mask/kept": torch.tensor(record.mask)} if crossing else {}
            scores = {"scores/channels": torch.zeros(8)} if crossing else {}
            down += between_rounds(exchanged, mask, {"version": 1, "round": number})
            size = len(sets[client])
            facts = {"version": 1, "round": number, "client": client, "examples": size}
            up += between_rounds(exchanged, scores, facts)
            up += method.bytes_up((size, 8, 3, 3), kept, label_bytes=form != "u")
            down += method.bytes_down((size, 8, 3, 3), kept)
            if form == "u":
                tail_link = Compressor(quantize=method.quantize)
                down += tail_link.bytes_up((size, 16, 1, 1))
                up += tail_link.bytes_down((size, 16, 1, 1))
        assert (record.bytes_up, record.bytes_down) == (up, down)


def test_warm_up_sends_everything_and_the_schedule_shrinks() -> None:
    method = ACPSL(share=0.25, warmup=2, ramp_rounds=3)
    result = split_train(normed(), "conv1", clients(), Pictures(9, 1), method, rounds=8)
    kept = [record.kept for record in records(result.records)]
    assert kept[:2] == [8, 8]
    assert all(a >= b for a, b in pairwise(kept))
    assert kept[2] < 8
    assert kept[5:] == [2, 2, 2]
    sent = [record.bytes_up for record in result.records]
    assert all(a >= b for a, b in pairwise(sent))


def test_methods_of_equal_settings_send_equal_bytes() -> None:
    sent = {}
    for name in ("acp-sl", "l1", "std", "entropy", "taylor", "random"):
        method = METHODS[name](share=0.25, quantize="int8")  # type: ignore[call-arg]
        result = split_train(normed(), "conv1", clients(), Pictures(9, 1), method, rounds=6)
        sent[name] = [(record.bytes_up, record.bytes_down) for record in result.records]
    fixed = sent.pop("random")
    assert len({tuple(found) for found in sent.values()}) == 1
    differences = {(a - c, b - d) for (a, b), (c, d) in zip(sent["l1"], fixed, strict=True)}
    # Three clients' scores up, and the mask down to each: the same in every round.
    assert len(differences) == 1
    up, down = differences.pop()
    assert 3 * 4 * 8 <= up <= 3 * (4 * 8 + 90)
    assert 3 * 8 <= down <= 3 * (8 + 90)


@forms
@pytest.mark.parametrize("masks", ["merged", "client"])
@pytest.mark.parametrize("fronts", [FedAvg, Scaffold])
@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_a_budget_holds_once_the_ramp_is_over(
    form: str, masks: Any, fronts: type[Strategy], participation: float
) -> None:
    if form == "sequential" and fronts is Scaffold:
        return
    sets = [Pictures(30, 1), Pictures(1, 2), Pictures(0, 3), Pictures(17, 4), Pictures(33, 5)]

    def run(method: ACPSL, rounds: int) -> list[Record]:
        return split_train(
            normed(),
            "conv1",
            sets,
            Pictures(9, 1),
            method,
            form=form,
            tail_at=tail_of(form),
            fronts=fronts(),
            rounds=rounds,
            participation=participation,
            training=SGD,
        ).records

    least, most = (
        max(r.bytes_up + r.bytes_down for r in run(ACPSL(share=share, ramp_rounds=0), 4)[1:])
        for share in (0.125, 1.0)
    )
    budget = (least + most) / 2e6
    found = run(ACPSL(rule="budget", budget_mb=budget, ramp_rounds=1, masks=masks), 8)
    sent = [r.bytes_up + r.bytes_down for r in found]
    rated = {client for record in found[:4] for client in record.clients}
    late = [n for n, r in enumerate(found) if masks == "client" and not rated >= {*r.clients}]
    assert all(n < 5 or n in late or nbytes <= budget * 1e6 for n, nbytes in enumerate(sent))
    if participation == 1:
        assert 2 <= records(found)[-1].kept < 8
        assert sent[-1] > 0.6 * budget * 1e6


def test_a_budget_below_one_channel_is_refused() -> None:
    method = L1Channels(rule="budget", budget_mb=1e-3)
    with pytest.raises(ValueError, match=r"method.budget_mb = 0.001: a round with one channel"):
        split_train(normed(), "conv1", clients(), Pictures(9, 1), method)


# -- who takes part ----------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_form_repeats_itself(name: str, form: str) -> None:
    def run() -> list[dict[str, Any]]:
        result = split_train(
            normed(),
            "conv1",
            clients(),
            Pictures(40, 9),
            name,
            form=form,
            tail_at=tail_of(form),
            rounds=3,
            participation=0.7,
            seed=3,
            training=ADAMW,
        )
        assert result.empty == [2]
        assert all(value.isfinite().all() for value in result.tensors.values())
        return numbers(result.records)

    first = run()
    assert first == run()
    assert [len(record["clients"]) for record in first] == [2, 2, 2]
    assert all(record["accuracy_by_client"][2] is None for record in first)
    assert all(record["train_loss"] > 0 for record in first)


def test_another_seed_gives_other_numbers() -> None:
    run = lambda seed: split_train(  # noqa: E731
        normed(), "conv1", clients(), Pictures(9, 1), rounds=1, seed=seed
    )
    assert not same(run(1).tensors, run(2).tensors)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    model, method = plain(), Bottleneck()
    before = torch.get_rng_state()
    split_train(model, "conv1", clients(), Pictures(9, 1), method, rounds=2)
    assert torch.equal(before, torch.get_rng_state())


def test_error_feedback_of_one_run_is_not_in_the_next() -> None:
    method = Quantized(quantize="int4", error_feedback=True)
    runs = [
        split_train(normed(), "conv1", clients(), Pictures(9, 1), method, rounds=2)
        for _ in range(2)
    ]
    assert numbers(runs[0].records) == numbers(runs[1].records)
    assert same(runs[0].tensors, runs[1].tensors)
    assert method.state_dict() == {}


@forms
def test_the_model_holds_the_global_network(form: str) -> None:
    model, test = normed(), Pictures(100, 9)
    result = split_train(
        model, "conv1", clients(), test, form=form, tail_at=tail_of(form), rounds=2, training=SGD
    )
    assert result.accuracy == accuracy_of(model, test)
    names = {n for n, t in model.state_dict().items() if t.is_floating_point()}
    assert result.tensors.keys() == names
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in result.tensors.items())


def test_layers_of_the_bottleneck_are_in_the_result() -> None:
    method = Bottleneck(share=0.25)
    result = split_train(normed(), "conv1", clients(), Pictures(9, 1), method, rounds=1)
    assert result.tensors["narrow.weight"].shape == (2, 8, 1, 1)
    last = records(result.records)[-1]
    assert (last.kept, last.channels) == (2, 8)


@pytest.mark.parametrize("form", ["parallel", "copies", "u"])
@pytest.mark.parametrize("fronts", [FedAvg, FedProx, Scaffold, FedAdam])
def test_fronts_are_averaged_by_a_strategy(form: str, fronts: type[Strategy]) -> None:
    def run(strategy: Strategy) -> dict[str, Tensor]:
        return split_train(
            normed(),
            "conv1",
            clients(),
            Pictures(9, 1),
            "acp-sl",
            form=form,
            tail_at=tail_of(form),
            fronts=strategy,
            rounds=3,
            participation=0.7,
            training=SGD,
        ).tensors

    plainly, found = run(FedAvg()), run(fronts())
    assert same(plainly, found) == (fronts is FedAvg)
    assert all(value.isfinite().all() for value in found.values())


def test_fedprox_holds_fronts_back() -> None:
    start = normed().state_dict()["conv1.conv.weight"]
    moved = []
    for mu in (0.0, 1.0):
        result = split_train(
            normed(), "conv1", clients(), Pictures(9, 1), fronts=FedProx(mu=mu), rounds=1,
            training=SGD,
        )  # fmt: skip
        moved.append(float((result.tensors["conv1.conv.weight"] - start).norm()))
    assert moved[1] < moved[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sl", "acp-sl", "random"])
def test_a_batch_of_one_that_batch_norm_cannot_train_on_is_left_out(name: str, form: str) -> None:
    # 9 and 17 leave one example over at batch size 8; client 2 has no more than one.
    sets = [Pictures(9, 1), Pictures(17, 2), Pictures(1, 3)]
    model = flat_normed()
    result = split_train(
        model, "lin1", sets, Pictures(20, 4), name, form=form, rounds=3, training=SGD,
        tail_at="lin2" if form == "u" else None,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert [len(record.clients) for record in result.records] == [3, 3, 3]


def test_only_a_step_that_would_fail_is_left_out() -> None:
    layers = flat_normed(front=False)
    sets = [Pictures(9, 1), Pictures(12, 2), Pictures(17, 3)]
    built = set_up(layers, "lin1", sets, Compressor(), training=Optimisation(batch_size=8, lr=0.01))
    built.play(1, [0, 1, 2])
    # All three send 8, then 1, 4 and 8; the last example of client 2 would be alone.
    assert built.clients[0].role.steps == built.clients[1].role.steps == 2
    assert built.clients[2].role.steps == 2
    assert layers.get_buffer("bn2.num_batches_tracked") == 2


def test_frozen_layers_stay_as_they_are() -> None:
    for frozen in ("conv1", "conv4"):
        model = normed()
        model.get_submodule(frozen).requires_grad_(False)
        before = {n: v.clone() for n, v in model.get_submodule(frozen).state_dict().items()}
        result = split_train(
            model, "conv1", clients(), Pictures(9, 1), "acp-sl", rounds=2, training=SGD
        )
        assert same(before, dict(model.get_submodule(frozen).state_dict()))
        assert not any(name.startswith(frozen) for name in result.tensors)


@pytest.mark.parametrize("form", ["parallel", "copies", "sequential"])
def test_optimisers_keep_their_state(form: str) -> None:
    built = set_up(
        normed(), "conv1", [Pictures(16, 1), Pictures(8, 2)], Compressor(), form=form,
        training=ADAMW,
    )  # fmt: skip
    for number, chosen in ((1, [0, 1]), (2, [0]), (3, [0, 1])):
        built.play(number, chosen)

    def steps(side: Any) -> int:
        return int(next(iter(side.optimiser.state.values()))["step"])

    assert [steps(client) for client in built.clients] == [6, 2]
    found = [steps(server) for server in built.servers.values()]
    assert found == {"copies": [6, 2], "parallel": [6], "sequential": [8]}[form]


def test_copies_begin_every_round_alike() -> None:
    built = set_up(
        normed(), "conv1", [Pictures(16, 1), Pictures(8, 2)], Compressor(), form="copies"
    )
    built.play(1, [0])
    states = [
        {n: p.detach() for n, p in server.back.named_parameters()}
        for server in built.servers.values()
    ]
    assert same(states[0], states[1])
    assert same(states[0], {n: p.detach() for n, p in built.back.named_parameters()})


def test_a_front_that_is_not_finite_is_left_out() -> None:
    sets = [Pictures(16, 1), Pictures(8, 2)]
    images = sets[1].tensors[0]
    images[3] = float("nan")
    result = split_train(
        normed(), "conv1", sets, Pictures(9, 1), form="copies", rounds=1, training=SGD
    )
    assert result.records[0].refused == {1: "NaN or Inf in front.conv1.conv.weight"}
    assert all(v.isfinite().all() for n, v in result.tensors.items() if n.startswith("conv1"))


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"form": "ring"}, "form 'ring' is not known; allowed: sequential, parallel, copies, u"),
        ({"form": "u"}, "needs a second cut"),
        ({"tail_at": "conv4"}, "needs a second cut"),
        ({"method": "zip"}, "method 'zip' is not known; allowed: sl, acp-sl, random"),
        ({"cut_at": "conv9"}, "it can be cut at: conv1, conv2, conv3, conv4"),
        ({"clients": [Pictures(0, 1)]}, "no client holds any example"),
        ({"clients": []}, "no client holds any example"),
        ({"form": "sequential", "fronts": Scaffold()}, "averages none"),
        ({"rounds": 0}, "rounds"),
        ({"participation": 0.0}, "participation"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], why: str) -> None:
    given = {"model": normed(), "cut_at": "conv1", "clients": clients(), "test": Pictures(9, 1)}
    with pytest.raises(ValueError, match=why):
        split_train(**given | changed)  # type: ignore[arg-type]


def test_a_network_of_another_precision_is_refused() -> None:
    sets = [Pictures(9, 1)]
    sets[0].tensors = (sets[0].tensors[0].double(), sets[0].labels)
    with pytest.raises(ValueError, match=r"expected torch.float32"):
        split_train(normed().double(), "conv1", sets, sets[0])


def test_random_channels_need_no_rating() -> None:
    built = set_up(normed(), "conv1", clients(), RandomChannels(share=0.25, ramp_rounds=0))
    before = built.masks.merged_scores()
    assert before is not None
    for number in (1, 2, 3):
        record = built.play(number, [0, 1, 3])
    assert torch.equal(before, built.masks.merged_scores())  # type: ignore[arg-type]
    assert record.mask == (before >= before.topk(2).values[-1]).tolist()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "own_split.py"))
    shown = capsys.readouterr().out
    assert re.search(r"^sl: 0\.\d+, .*MB\nacp-sl: 0\.\d+", shown, re.MULTILINE)
