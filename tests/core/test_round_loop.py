"""The loop: who takes part, what is refused, what is counted, what is continued."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor

from sluiceway.core.batches import labels_of
from sluiceway.core.evaluation import Evaluation
from sluiceway.core.guards import TooFewUpdates
from sluiceway.core.round_loop import Record, Rounds
from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import STRATEGIES, FedAvg, LocalContext
from sluiceway.transport.local import federate

TRAINING = Training(lr=0.02, batch_size=8)


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 1000), st.integers(1, 50))
def test_the_clients_of_a_round(count: int, share: float, seed: int, number: int) -> None:
    eligible = [3 * i + 1 for i in range(count)]
    plan = Rounds(rounds=50, participation=share, seed=seed)
    chosen = plan.chosen(number, eligible)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(eligible)
    assert len(chosen) == max(1, round(share * count))
    assert chosen == plan.chosen(number, eligible)


def test_partial_participation_and_clients_with_little_or_nothing(
    moe_model: TinyClassifier, text_clients: list[TinyText], text_test: TinyText
) -> None:
    seen: list[Record] = []
    result = federate(
        moe_model,
        text_clients,
        text_test,
        "fedalign-moe",
        rounds=4,
        participation=0.67,
        training=TRAINING,
        on_round=seen.append,
        device="cpu",
    )
    assert result.empty == [2]
    assert [len(r.clients) for r in result.records] == [2, 2, 2, 2]
    assert len({tuple(r.clients) for r in result.records}) > 1
    assert all(2 not in r.clients for r in result.records)
    assert seen == result.records
    trained = {c for r in result.records for c in r.clients}
    assert set(result.personal_accuracy) == trained
    by_client = result.records[-1].accuracy_by_client
    assert by_client[2] is None
    assert all(a is not None and 0 <= a <= 1 for i, a in enumerate(by_client) if i != 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_learns(name: str, text_test: TinyText) -> None:
    clients = [TinyText(40, 1), TinyText(40, 2), TinyText(3, 3)]
    parameters = {"lr": 0.03} if name == "fedadam" else {}
    result = federate(
        TinyClassifier(),
        clients,
        text_test,
        STRATEGIES[name](**parameters),
        rounds=8,
        training=TRAINING,
        device="cpu",
    )
    assert result.best_accuracy > 0.6  # three balanced classes
    assert result.bytes_up > 0
    assert result.bytes_down > 0
    assert result.rejected == 0


def test_the_model_ends_as_the_global_model(
    moe_model: TinyClassifier, text_clients: list[TinyText], text_test: TinyText
) -> None:
    result = federate(moe_model, text_clients, text_test, rounds=1, training=TRAINING, device="cpu")
    state = moe_model.state_dict()
    for name, tensor in result.tensors.items():
        assert torch.equal(state[name], tensor)
    with torch.no_grad():
        logits = moe_model.eval()(text_test.ids, text_test.mask)
    share = (logits.argmax(-1) == text_test.labels).float().mean()
    assert result.accuracy == pytest.approx(float(share))


class Poisoned(FedAvg):
    """Client 0's experts turn to NaN in round 2."""

    def finish_training(self, client: LocalContext) -> dict[str, Tensor]:
        if client.broadcast.round == 2 and len(client.state) == 0 and client.steps == 4:
            with torch.no_grad():
                next(p for n, p in client.params.items() if "experts" in n)[1].fill_(float("nan"))
        return {}


def test_an_update_with_nan_is_named_left_out_and_counted(
    moe_model: TinyClassifier, text_test: TinyText
) -> None:
    clients = [TinyText(32, 1), TinyText(16, 2)]  # 4 and 2 steps of 8
    result = federate(
        moe_model, clients, text_test, Poisoned(), rounds=3, training=TRAINING, device="cpu"
    )
    assert [list(r.rejected) for r in result.records] == [[], [0], []]
    assert "NaN or Inf in backbone" in result.records[1].rejected[0]
    assert result.rejected == 1
    assert all(bool(t.isfinite().all()) for t in result.tensors.values())


def test_when_all_updates_are_refused_the_run_ends_and_the_model_stays(
    moe_model: TinyClassifier, text_test: TinyText
) -> None:
    for strategy in ("fedavg", "fedalign-moe", "fedadam"):
        poisoned = Training(lr=1e30, optimizer="sgd", local_epochs=2, max_grad_norm=0.0)
        before = {n: p.detach().clone() for n, p in moe_model.named_parameters()}
        with pytest.raises(TooFewUpdates, match="0 of 1 updates could be used"):
            federate(
                moe_model,
                [TinyText(16, 1)],
                text_test,
                strategy,
                rounds=1,
                training=poisoned,
                device="cpu",
            )
        for name, param in moe_model.named_parameters():
            assert torch.equal(param, before[name]), strategy


def parts() -> Iterator[Evaluation]:
    yield Evaluation(torch.tensor([1, 0, 2]), torch.tensor([2, 0, 4]), 1.5)
    yield Evaluation(torch.tensor([3]), torch.tensor([4]), 0.5)


def test_evaluations_add_up_and_are_read_by_a_clients_mix() -> None:
    found = sum(parts(), start=Evaluation.nothing())
    assert found.correct.tolist() == [4, 0, 2]
    assert found.accuracy == 0.6
    assert found.mean_loss == 0.2
    # class 0: 4 / 6, class 2: 2 / 4; class 1 was never tested
    assert found.weighted_accuracy(torch.tensor([3, 5, 1])) == pytest.approx((3 * 4 / 6 + 0.5) / 4)


def test_fedalign_with_every_switch_off_trains_as_fedavg_bit_for_bit() -> None:
    off = {"align": False, "consistency": False, "adaptive": False, "semantic": False}
    made = [
        federate(
            TinyClassifier(),
            [TinyText(20, 1), TinyText(9, 2)],
            TinyText(40, 9),
            strategy,
            rounds=3,
            training=TRAINING,
            device="cpu",
        )
        for strategy in (STRATEGIES["fedalign-moe"](**off), STRATEGIES["fedavg"]())
    ]
    assert made[0].accuracy_by_round == made[1].accuracy_by_round
    for key, tensor in made[0].tensors.items():
        assert torch.equal(made[1].tensors[key], tensor), key


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedmoe", "usage", "fedalign-moe"])
@pytest.mark.parametrize("gate", ["consistency", "average"])
def test_one_client_alone_ends_with_its_own_weights(name: str, gate: str) -> None:
    """The same client trained without any server, round after round."""
    parameters = {"gate": gate} if name == "fedalign-moe" else {}
    parameters |= {"hold": 0.0} if name == "fedmoe" else {}
    data, strategy = TinyText(20, 1), STRATEGIES[name](**parameters)
    result = federate(
        TinyClassifier(), [data], data, strategy, rounds=1, training=TRAINING, device="cpu"
    )
    alone, unaggregated = TinyClassifier(), STRATEGIES[name](**parameters)
    prepare(alone, unaggregated, 1)
    worker = Worker(alone, [data], data, unaggregated, TRAINING)
    update = worker.train(0, unaggregated.broadcast(1), {}, personal=False)
    for piece in strategy.pieces:
        if piece.key in update.tensors:
            assert torch.equal(piece.of(result.tensors), update.tensors[piece.key]), piece.key
        else:  # an expert without a token
            assert torch.equal(piece.of(result.tensors), piece.of(unaggregated.tensors))


def test_accuracy_by_client_is_that_of_each_client() -> None:
    generator = torch.Generator().manual_seed(0)
    total = torch.tensor([4, 6, 0, 9])
    found = Evaluation(torch.tensor([3, 1, 0, 9]), total, 1.0)
    counts = torch.randint(0, 4, (50, 5), generator=generator)
    counts[7], counts[8] = 0, torch.tensor([0, 0, 3, 0, 0])
    several = found.accuracy_by_client(counts)
    assert several[7] is None
    assert several[8] is not None
    assert math.isnan(several[8])  # none of its labels was tested
    for row, value in zip(counts, several, strict=True):
        if value is not None and not math.isnan(value):
            shares = [int(n) * (y < 4 and int(total[y]) > 0) for y, n in enumerate(row)]
            right = sum(
                n * int(found.correct[y]) / int(total[y]) for y, n in enumerate(shares) if n
            )
            assert value == pytest.approx(right / sum(shares))


class Unlabelled:
    """A data set without `labels` that counts how often an example is read."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        return torch.zeros(2), index % 3


def test_labels_are_read_once() -> None:
    examples = Unlabelled()
    assert labels_of(examples).tolist() == labels_of(examples).tolist() == [0, 1, 2] * 10
    assert examples.read == 30
    assert labels_of([(torch.zeros(1), 4)]).tolist() == [4]
