"""Differential privacy: its accounting against known values, its noise against loops, its runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import norm as normal
from tests.core.test_checkpoints import Ended, require_equal
from tests.strategies.test_aggregation import LAYOUT, TENSORS, several
from tests.worlds import TinyClassifier, TinyText
from torch import nn

from sluiceway.core.aggregation import aggregate
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.privacy import arrange_privacy, spent
from sluiceway.core.round_loop import Record, Result
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.federated.client import prepare
from sluiceway.strategies import STRATEGIES, FedAvg, Gaussian, Median, Momentum, Strategy, Update
from sluiceway.strategies.privacy import (
    gaussian_delta,
    gaussian_epsilon,
    next_clip,
    noise_for,
    split_noise,
)
from sluiceway.transport.local import federate

TRAINING = Training(lr=0.02, batch_size=8)


# -- what it costs -----------------------------------------------------------------------------


def test_delta_by_hand() -> None:
    # Phi(-1/2) - e Phi(-3/2) = 0.308538 - 2.718282 x 0.066807
    assert gaussian_delta(1.0, 1.0) == pytest.approx(0.126937, abs=1e-6)
    # The total variation of N(0, 1) and N(2, 1) is 2 Phi(1) - 1.
    assert gaussian_delta(2.0, 0.0) == pytest.approx(2 * normal.cdf(1) - 1)
    assert gaussian_delta(0.0, 1.0) == 0


@pytest.mark.parametrize(("mu", "epsilon"), [(0.3, 0.5), (1.0, 2.0), (3.0, 4.0)])
def test_delta_is_the_integral_over_what_is_told(mu: float, epsilon: float) -> None:
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    one, other = (torch.exp(-((x - at) ** 2) / 2) / math.sqrt(2 * math.pi) for at in (mu, 0.0))
    integral = (one - math.exp(epsilon) * other).clamp_min(0).sum() * (x[1] - x[0])
    assert gaussian_delta(mu, epsilon) == pytest.approx(float(integral), rel=1e-6)


def test_known_epsilon() -> None:
    # For delta 1e-5 the analytic mechanism needs 3.730 at epsilon 1, where the classical formula
    # sqrt(2 ln(1.25 / delta)) has 4.845.
    assert noise_for(1.0, 1, 1e-5) == pytest.approx(3.7306, abs=1e-3)
    assert noise_for(1.0, 1, 1e-5) < math.sqrt(2 * math.log(1.25e5))


@given(st.floats(0.1, 50), st.integers(1, 500), st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_noise_for_an_epsilon_costs_it(epsilon: float, releases: int, delta: float) -> None:
    noise = noise_for(epsilon, releases, delta)
    assert gaussian_epsilon(noise, releases, delta) == pytest.approx(epsilon, rel=1e-5)
    assert gaussian_epsilon(noise * 1.1, releases, delta) < epsilon
    assert gaussian_epsilon(noise, releases + 1, delta) > epsilon
    # k releases with noise z are one with noise z / sqrt k.
    assert noise == pytest.approx(math.sqrt(releases) * noise_for(epsilon, 1, delta))


@pytest.mark.parametrize(
    ("noise", "releases", "prv", "rdp"),
    [(1.0, 1, 4.3784, 4.7285), (5.0, 10, 2.5955, 2.8137), (20.0, 100, 1.9942, 2.1657)],
)
def test_epsilon_as_others_account_for_it(
    noise: float, releases: int, prv: float, rdp: float
) -> None:
    """Opacus 1.6.0 at delta 1e-5: PRVAccountant with eps_error 0.001, RDPAccountant."""
    ours = gaussian_epsilon(noise, releases, 1e-5)
    assert prv - 2e-3 < ours < prv < rdp


def test_noise_of_the_count_is_part_of_the_whole() -> None:
    z = split_noise(2.0, 5.0)
    # mu^2 of both releases: 1 / z^2 of the sum, and (1/2)^2 / 5^2 of the count.
    assert 1 / z**2 + 0.25 / 25 == pytest.approx(1 / 4)


def test_the_limit_follows_its_quantile() -> None:
    assert next_clip(2.0, 0.5, 0.5, 0.2) == 2.0
    assert next_clip(2.0, 1.0, 0.5, 0.2) == pytest.approx(2 * math.exp(-0.1))
    assert next_clip(2.0, -3.0, 0.5, 0.2) == pytest.approx(2 * math.exp(0.1))
    limit, norms = 0.01, torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 1
    for _ in range(200):
        limit = next_clip(limit, float((norms <= limit).float().mean()), 0.5, 0.2)
    assert limit == pytest.approx(1.5, abs=0.05)


# -- what is added -----------------------------------------------------------------------------


def private(**given: object) -> FedAvg:
    made = FedAvg().with_privacy(Gaussian(**({"clip": 0.5, "noise": 1.0} | given)))
    made.setup(TENSORS, LAYOUT, 5)
    made.privacy.setup(3)
    return made


def norm_of(update: Update) -> float:
    pieces = {piece.key: piece.of(TENSORS) for piece in LAYOUT.pieces(TENSORS)}
    squares = [((v - pieces[k]).double() ** 2).sum() for k, v in update.tensors.items()]
    return float(torch.stack(squares).sum().sqrt())


def test_the_server_adds_noise_to_the_plain_mean_of_clipped_changes() -> None:
    updates = several()
    made = private(noise_seed=3)
    aggregate(made, updates, 2)
    wanted = {}
    for piece in LAYOUT.pieces(TENSORS):
        old = piece.of(TENSORS).double()
        total = torch.zeros_like(old)
        for one in updates:
            if piece.key in one.tensors:
                total += min(1, 0.5 / norm_of(one)) * (one.tensors[piece.key] - old)
        wanted[piece.key] = old + total / len(updates)
    left = {p.key: p.of(made.tensors) - wanted[p.key] for p in LAYOUT.pieces(TENSORS)}
    noise = torch.cat([value.flatten() for value in left.values()])
    assert len(noise) > 2000
    assert float(noise.std()) == pytest.approx(1.0 * 0.5 / 4, rel=0.05)
    assert abs(float(noise.mean())) < 0.01
    # Nothing is drawn twice.
    assert len(noise.unique()) > 0.999 * len(noise)


@given(st.integers(0, 3), st.floats(0.01, 100))
@settings(max_examples=10)
def test_one_client_moves_the_mean_by_no_more_than_its_share(which: int, scale: float) -> None:
    """The sensitivity: a client's part replaced by nothing, noise aside."""
    updates = several()
    old = {piece.key: piece.of(TENSORS) for piece in LAYOUT.pieces(TENSORS)}
    worst = {k: old[k] + scale * (v - old[k]) for k, v in updates[which].tensors.items()}
    both = []
    for tensors in (worst, dict(old)):
        made = private(noise_seed=3)
        changed = [*updates]
        changed[which] = replace(updates[which], tensors=tensors, examples=1)
        aggregate(made, changed)
        both.append(torch.cat([p.of(made.tensors).flatten() for p in LAYOUT.pieces(TENSORS)]))
    assert float((both[0] - both[1]).double().norm()) <= 0.5 / 4 + 1e-4


def test_a_client_adds_noise_to_all_that_it_sends() -> None:
    made = private(where="client", noise_seed=3)
    old = {piece.key: piece.of(TENSORS) for piece in LAYOUT.pieces(TENSORS)}
    update = replace(several()[0], metrics={"loss": 1.0})
    sent = made.privacy.sent(update, old, LAYOUT.blocks, {})
    assert sent.examples == 1
    assert not sent.metrics
    assert float(sent.routing[0].load.std()) == float(sent.routing[0].routing.std()) == 0
    share = min(1, 0.5 / norm_of(update))
    noise = torch.cat(
        [
            (
                sent.tensors[k].double() - old[k] - share * (update.tensors[k].double() - old[k])
            ).flatten()
            for k in update.tensors
        ]
    )
    assert float(noise.std()) == pytest.approx(2 * 1.0 * 0.5, rel=0.05)
    again = made.privacy.sent(update, old, LAYOUT.blocks, {})
    assert all(torch.equal(again.tensors[k], v) for k, v in sent.tensors.items())
    other = made.privacy.sent(replace(update, client=1), old, LAYOUT.blocks, {})
    assert not any(torch.equal(other.tensors[k], v) for k, v in sent.tensors.items())


def test_secrets_differ_and_a_clients_own_stays_with_it() -> None:
    old = {piece.key: piece.of(TENSORS) for piece in LAYOUT.pieces(TENSORS)}
    sent, states = [], ({}, {}, {})
    for state in states:
        made = private(where="client")
        sent.append(made.privacy.sent(several()[0], old, LAYOUT.blocks, state).tensors)
    assert not torch.equal(sent[0]["head.bias"], sent[1]["head.bias"])
    again = private(where="client").privacy.sent(several()[0], old, LAYOUT.blocks, states[0])
    assert torch.equal(again.tensors["head.bias"], sent[0]["head.bias"])
    # A site's own key stands above the number in a recipe.
    made = private(where="client", noise_seed=3)
    made.privacy.key = b"its own"
    own = made.privacy.sent(several()[0], old, LAYOUT.blocks, {}).tensors["head.bias"]
    made = private(where="client", noise_seed=3)
    other = made.privacy.sent(several()[0], old, LAYOUT.blocks, {}).tensors["head.bias"]
    assert not torch.equal(own, other)


def test_head_sums_by_hand() -> None:
    sums = torch.tensor([[3.0, 0, 7], [0, 4, 9]])
    made = private(noise=1e-3)
    share = made.privacy.head_share(sums)
    assert torch.allclose(share, torch.tensor([[0.6, 0, 0], [0, 0.8, 0]]).double())
    assert torch.equal(made.privacy.head_sent(sums, 0), sums)
    total = made.privacy.head_total(share, 2.0)
    assert torch.allclose(total, torch.tensor([[2.0, 0, 1], [0, 2, 1]]).double(), atol=0.02)
    far = private(noise=10.0, where="client").privacy
    drawn = torch.stack([far.head_sent(sums, client)[:, :-1] for client in range(500)])
    assert float(drawn.std()) == pytest.approx(20, rel=0.05)


# -- whole runs --------------------------------------------------------------------------------


def run(made: Strategy, checkpoint: Checkpoint | None = None, **more: object) -> Result:
    clients = [TinyText(size, i + 1) for i, size in enumerate((20, 9, 0, 14))]
    return federate(
        TinyClassifier(),
        clients,
        TinyText(40, 9),
        made,
        **({"rounds": 3, "training": TRAINING, "device": "cpu", "head_start": "means"} | more),
        checkpoint=checkpoint,
    )


@pytest.mark.parametrize("where", ["server", "client"])
def test_resume_and_workers_give_the_same_numbers(where: str, tmp_path: Path) -> None:
    def made() -> Strategy:
        quantile = 0.5 if where == "server" else None
        given = {"clip": 0.3, "epsilon": 50, "quantile": quantile, "noise_seed": 7}
        return FedAvg().with_privacy(Gaussian(where=where, **given)).with_server(Momentum())

    def stop(record: Record) -> None:
        if record.round == 2:
            raise Ended

    whole = run(made())
    with pytest.raises(Ended):
        run(made(), Checkpoint(tmp_path), on_round=stop)
    require_equal(whole, run(made(), Checkpoint(tmp_path, resume=True)))
    require_equal(whole, run(made(), workers=2, threads=1))
    epsilon = [record.report["epsilon"] for record in whole.records]
    assert epsilon == sorted(epsilon)
    assert epsilon[-1] == pytest.approx(50, rel=1e-4)
    assert whole.privacy["releases"] == 4
    assert whole.label_counts == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1]]
    assert not whole.personal_accuracy
    assert all(math.isnan(record.train_loss) for record in whole.records)
    if where == "server":
        assert whole.records[0].report["clip"] != whole.records[1].report["clip"]


@pytest.mark.parametrize("where", ["server", "client"])
def test_without_a_number_noise_is_secret_and_resume_continues_it(
    where: str, tmp_path: Path
) -> None:
    def made() -> Strategy:
        return FedAvg().with_privacy(Gaussian(clip=0.3, noise=1.0, where=where))

    def stop(record: Record) -> None:
        if record.round == 2:
            raise Ended

    one, other = run(made()), run(made())
    assert not torch.equal(one.tensors["head.bias"], other.tensors["head.bias"])
    with pytest.raises(Ended):
        run(made(), Checkpoint(tmp_path), on_round=stop)
    first = run(made(), Checkpoint(tmp_path, resume=True))
    assert first.privacy["releases"] == 4


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("where", ["server", "client"])
def test_every_strategy_is_private_or_refused_by_name(name: str, where: str) -> None:
    made = STRATEGIES[name]().with_privacy(Gaussian(clip=1, noise=1, where=where))
    model = TinyClassifier()
    prepare(model, made, 3)
    private = {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "non-expert", "frozen-gate"}
    if name in private:
        arrange_privacy(made, model, 2, "means")
    else:
        with pytest.raises(InputError, match=rf"method\.privacy: method {name} "):
            arrange_privacy(made, model, 2, "means")


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("made", "head_start", "said"),
    [
        (FedAvg(), "ridge", "second moments"),
        (FedAvg().with_rules(Median()), "random", "several clients at once"),
        (FedAvg(lora="residual"), "random", "sums alone"),
        (FedAvg(head="counts"), "random", "counts of classes"),
    ],
)
def test_what_would_cross_without_noise_is_refused(
    made: Strategy, head_start: str, said: str
) -> None:
    model = TinyClassifier()
    made.with_privacy(Gaussian(clip=1, noise=1))
    prepare(model, made, 3)
    with pytest.raises(InputError, match=said):
        arrange_privacy(made, model, 2, head_start)


def test_statistics_of_batches_are_refused() -> None:
    model = Normed()
    made = FedAvg().with_privacy(Gaussian(clip=1, noise=1))
    prepare(model, made, 3)
    with pytest.raises(InputError, match=r"norm\.running_\w+ is a statistic"):
        arrange_privacy(made, model, 2, "random")


def test_what_was_spent_is_of_the_client_that_took_part_most() -> None:
    mechanism = Gaussian(clip=1, noise=5, where="client")
    mechanism.setup(9)
    rounds = [([0, 1], 0), ([1, 2], 1), ([1], 0)]
    assert spent(mechanism, rounds, "means")["releases"] == 3 + 1 + 1


@pytest.mark.parametrize(
    "given", [{}, {"noise": 1, "epsilon": 1}, {"noise": 1, "where": "client", "quantile": 0.5}]
)
def test_settings_that_cannot_be(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Gaussian(clip=1, **given)
