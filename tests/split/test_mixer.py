"""The mixer: a basis in which smashed data cross, in every schedule, to the bit and to the byte."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.split.small import (
    Pictures,
    clients,
    local,
    normed,
    numbers,
    plain,
    records,
    same,
    set_up,
    train,
)
from tests.split.test_encoded import also_through_bytes
from torch import Tensor

from sluiceway.channels import eigenbasis, moments_size
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.round_loop import Result
from sluiceway.core.settings import Optimisation
from sluiceway.split import ACPSL, SCHEDULES, Compressor
from sluiceway.split.messages import read_initial_scores
from sluiceway.split.rounds import SplitLoop

bases = pytest.mark.parametrize("basis", ["eigen", "label", "gradient", "learned"])
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def mixer(basis: Any = "eigen", **changed: Any) -> ACPSL:
    return ACPSL(basis=basis, **{"warmup": 0, "quantize": "dct", "ratio": 8.0} | changed)


def measure(loop: SplitLoop) -> None:
    """Have clients measure, as before the first round."""
    assert loop.mixer is not None
    for client in local(loop):
        if client.size:
            found = read_initial_scores(client.rate(), client.client_id, loop.measures)
            assert found is not None
            loop.mixer.rate(client.client_id, found)


@pytest.mark.parametrize("basis", ["eigen", "label", "gradient"])
@schedules
def test_unrounded_a_step_is_that_of_channels(basis: str, schedule: str) -> None:
    """Of a rotation the layers see nothing, in training and evaluation, but its own rounding."""
    sets, once = (
        [Pictures(8, 1), Pictures(8, 2)],
        Optimisation(lr=0.1, batch_size=8, optimizer="sgd"),
    )
    settings: dict[str, Any] = {"schedule": schedule, "training": once, "rounds": 1}
    turned = train(mixer(basis, quantize="none"), sets, **settings)
    straight = train("sl", sets, **settings)
    (one,), (other,) = records(turned.records), records(straight.records)
    assert one.loss == pytest.approx(other.loss, rel=0.01)
    assert one.train_loss == pytest.approx(other.train_loss, rel=0.01)
    start = {name: value.detach() for name, value in normed().named_parameters()}
    for name, before in start.items():
        step, expected = (found.tensors[name] - before for found in (turned, straight))
        assert float((step - expected).norm()) <= 0.05 * float(expected.norm()) + 1e-6, name


def test_the_learned_basis_starts_without_a_change() -> None:
    for model, at in ((normed(), "conv1"), (plain(0.0), "conv1")):
        sets = [Pictures(30, 1), Pictures(17, 4)]
        loop = set_up(model, at, sets, mixer("learned", quantize="none"))
        x = Pictures(12, 9).tensors[0]
        parts = [loop.model.front.eval(), loop.model.back.eval()]

        def output(x: Tensor = x, parts: Any = parts) -> Tensor:
            out: Tensor = parts[1](parts[0](x))
            return out

        before = output()
        assert loop.mixer is not None
        measure(loop)
        loop.choose_basis(1, loop.mixer)
        assert not torch.equal(
            loop.model.front.get_parameter("mix.weight").flatten(1), torch.eye(8)
        )
        torch.testing.assert_close(output(), before, atol=1e-4, rtol=1e-4)
        weight = loop.model.front.get_parameter("mix.weight")
        assert not torch.equal(weight.flatten(1), torch.eye(8))
        assert torch.equal(loop.strategy.tensors["front.mix.weight"], weight)


def test_the_basis_is_that_of_all_clients_data() -> None:
    sets = clients()
    loop = set_up(normed(), "conv1", sets, mixer())
    assert loop.mixer is not None
    measure(loop)
    loop.choose_basis(1, loop.mixer)
    assert loop.mixer.basis is not None
    front = loop.model.front.train()
    # Batch norm sees the same batches.
    seen = [part for s in sets if len(s) for part in s.tensors[0].split(8)[::4]]
    A = torch.cat([front(part) for part in seen]).detach()
    covariance = torch.cov(A.flatten(2).transpose(0, 1).flatten(1).double(), correction=0)
    _, variances = eigenbasis(covariance)
    U = loop.mixer.basis.rotation.double()  # rounded to float16
    torch.testing.assert_close(U @ torch.diag(variances) @ U.T, covariance, atol=5e-3, rtol=5e-3)


@bases
@schedules
def test_a_run_is_the_same_through_bytes(
    basis: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Result:
        method = mixer(
            basis, quantize="bits" if basis == "label" else "dct", warmup=basis == "eigen"
        )
        return train(method, schedule=schedule, test=Pictures(40, 99))

    found = also_through_bytes(run, monkeypatch)
    assert all(not record.rejected for record in found.records)


@bases
@pytest.mark.parametrize("schedule", ["copies", "u"])
def test_a_run_that_ends_early_is_continued_to_the_same_numbers(
    basis: str, schedule: str, tmp_path: Any
) -> None:
    settings: dict[str, Any] = {"schedule": schedule, "participation": 0.7}
    whole = train(mixer(basis, every=2), rounds=4, **settings)
    train(mixer(basis, every=2), rounds=2, checkpoint=Checkpoint(tmp_path), **settings)
    again = train(mixer(basis, every=2), rounds=4, checkpoint=Checkpoint(tmp_path), **settings)
    assert numbers(again.records) == numbers(whole.records)
    assert same(again.tensors, whole.tensors)


def test_far_fewer_bytes_cross() -> None:
    sets = [Pictures(64, 1), Pictures(64, 2)]
    sent = [train(m, sets, rounds=2).records[1] for m in (Compressor(), mixer(ratio=4.0), mixer())]
    assert all(b.bytes_down < a.bytes_down for a, b in pairwise(sent))


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="one for all clients"):
        mixer(masks="client")
    with pytest.raises(ValueError, match="error_feedback"):
        mixer(error_feedback=True)


def test_components_that_tell_classes_apart_have_less_error() -> None:
    sets = [Pictures(64, 1), Pictures(64, 2)]
    plain_, labelled = (set_up(normed(), "conv1", sets, mixer(label_bits=n)) for n in (0.0, 8.0))
    for loop in (plain_, labelled):
        assert loop.mixer is not None
        measure(loop)
        loop.choose_basis(1, loop.mixer)
    basis = labelled.basis
    assert basis is not None
    assert plain_.basis is not None
    assert torch.equal(plain_.basis.weight, torch.ones(8))
    assert torch.equal(plain_.basis.rotation, basis.rotation)
    assert float(basis.weight.max()) > 1.5
    assert all(not record.rejected for record in train(mixer(label_bits=2.0), sets).records)
    with pytest.raises(ValueError, match="label_bits"):
        ACPSL(basis="channels", label_bits=1.0)


def test_moments_cross_only_before_a_basis_is_estimated() -> None:
    sets, method = [Pictures(64, 1), Pictures(64, 2)], mixer(every=3, growth=1.0, ratio=64.0)
    sent = [record.bytes_up for record in train(method, sets, rounds=6).records]
    moments = 4 * len(sets) * moments_size(8, 1)
    # Bases of rounds 1, 4, 7: measured before the first round, in round 3 and in round 6.
    for number in (2, 5):
        assert sent[number] > max(sent[1], sent[4]) + 0.8 * moments
    assert sent[0] > sent[1] + 0.8 * moments
