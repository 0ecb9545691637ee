"""What is not fit to be averaged is refused, named and counted, and the round goes on."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor

from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.evaluation import Evaluation
from sluiceway.core.guards import Failure, TooFewUpdates, fault
from sluiceway.core.round_loop import Loop, Result, Rounds
from sluiceway.core.settings import Training
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.summary import Outcome, summarise
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import Broadcast, FedAlignMoE, FedAvg, Scaffold, Strategy, Update
from sluiceway.transport.local import federate

TRAINING = Training(lr=0.02, batch_size=8)


def made(strategy: Strategy) -> tuple[Strategy, Update]:
    """A strategy that is set up, and an honest client's update for round 1."""
    model = TinyClassifier()
    prepare(model, strategy, 3)
    worker = Worker(model, [TinyText(16, 1)], TinyText(8, 2), strategy, TRAINING)
    update = worker.train(0, strategy.broadcast(1), {}, personal=False)
    tensors = {key: value.clone() for key, value in update.tensors.items()}
    return strategy, replace(update, tensors=tensors)


def first_expert(update: Update) -> str:
    return next(key for key in update.tensors if "experts" in key)


def changed(update: Update, key: str, value: Tensor) -> Update:
    return replace(update, tensors={**update.tensors, key: value})


def without(update: Update, key: str) -> Update:
    return replace(update, tensors={k: v for k, v in update.tensors.items() if k != key})


def report(update: Update, **parts: Tensor) -> Update:
    return replace(update, routing=[replace(update.routing[0], **parts)])


FAULTS: dict[str, tuple[Callable[[Update], Update], str]] = {
    "stale": (lambda u: replace(u, round=0), "stale: it answers round 0, this is round 1"),
    "early": (lambda u: replace(u, round=2), "stale: it answers round 2, this is round 1"),
    "stranger": (lambda u: replace(u, client=7), "it was not asked in this round"),
    "none": (lambda u: replace(u, examples=0), "0 examples"),
    "negative": (lambda u: replace(u, examples=-4), "-4 examples"),
    "missing": (lambda u: without(u, "head.bias"), "head.bias is missing"),
    "missing expert": (lambda u: without(u, first_expert(u)), "is missing"),
    "unknown": (lambda u: changed(u, "other", torch.ones(2)), "other was not to be sent"),
    "shape": (
        lambda u: changed(u, "head.bias", torch.ones(1)),
        "head.bias has shape [1], expected [3]",
    ),
    "type": (
        lambda u: changed(u, "head.bias", u.tensors["head.bias"].double()),
        "head.bias is float64, expected float32",
    ),
    "integers": (
        lambda u: changed(u, "head.bias", torch.ones(3, dtype=torch.int64)),
        "head.bias is int64, expected float32",
    ),
    "nan": (
        lambda u: changed(u, "head.bias", torch.tensor([1.0, float("nan"), 0.0])),
        "NaN or Inf in head.bias",
    ),
    "inf": (
        lambda u: changed(u, "head.bias", torch.tensor([1.0, -float("inf"), 0.0])),
        "NaN or Inf in head.bias",
    ),
    "no routing": (lambda u: replace(u, routing=[]), "routing of 0 blocks, expected 1"),
    "experts": (lambda u: report(u, load=torch.ones(3)), "load [3], expected [4]"),
    "negative load": (
        lambda u: report(u, load=u.routing[0].load - 1000),
        "a number below zero (load) in the routing report of block 0",
    ),
    "more examples than at joining": (lambda u: replace(u, examples=17), "it joined with 16"),
    "countless examples": (
        lambda u: replace(u, examples=2**63 - 1),
        "9223372036854775807 examples; it joined with 16",
    ),
    "load": (
        lambda u: report(u, load=u.routing[0].load + 1e12),
        "tokens, expected at most 2 x",
    ),
    "tokens": (
        lambda u: replace(u, routing=[replace(u.routing[0], tokens=1 << 53)]),
        "9007199254740992 tokens",
    ),
    "routing sum": (
        lambda u: report(u, routing=u.routing[0].routing * 2),
        "routing adds up to 2, expected 1",
    ),
    "margin": (
        lambda u: report(u, margin=u.routing[0].margin + 1.5),
        ", expected 0 to 1 in the routing report of block 0",
    ),
    "accuracy": (
        lambda u: replace(u, metrics={"personal_accuracy": 99.0}),
        "personal_accuracy is 99.0; expected 0 to 1",
    ),
    "loss": (lambda u: replace(u, metrics={"loss": float("inf")}), "loss is inf"),
    "a metric of a long name": (
        lambda u: replace(u, metrics={"\x1b[31m" + "x" * 10**6: float("nan")}),
        "\\x1b[31mxxx",
    ),
    "metrics": (
        lambda u: replace(u, metrics={f"{i}": 0.0 for i in range(65)}),
        "65 metrics, expected at most 64",
    ),
    "escape codes in a name": (
        lambda u: changed(u, "\x1b[2J" + "x" * 10**6, torch.ones(2)),
        "\\x1b[2Jxxx",
    ),
    "escape codes in an extra": (
        lambda u: replace(u, extra={"\x1b[2J\n": torch.tensor([float("nan")])}),
        "NaN or Inf in \\x1b[2J\\n",
    ),
    "squares beyond float32": (
        lambda u: changed(u, "head.bias", torch.full((3,), 1e20)),
        "values that are too large: their norm is not finite",
    ),
    "nan routing": (
        lambda u: report(u, routing=u.routing[0].routing * float("nan")),
        "NaN or Inf (routing) in the routing report of block 0",
    ),
    "region": (lambda u: report(u, region=torch.ones(4, 16)), "region that was not asked for"),
    "nan extra": (
        lambda u: replace(u, extra={"x": torch.tensor([float("nan")])}),
        "NaN or Inf in x",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name: str) -> None:
    strategy, update = made(FedAvg())
    assert fault(update, strategy, 1, [0, 1], examples=[16, 16]) is None
    spoil, why = FAULTS[name]
    found = fault(spoil(update), strategy, 1, [0, 1], examples=[16, 16])
    assert found is not None
    assert why in found
    assert found.isprintable()
    assert len(found) < 300


@pytest.mark.parametrize(
    ("region", "why"),
    [
        (None, "no region"),
        (torch.ones(3, 16), r"region [3, 16], expected [4, 16]"),
        (torch.ones(4, 9), r"region [4, 9], expected [4, 16]"),
        (torch.full((4, 16), float("nan")), "NaN or Inf (region)"),
    ],
)
def test_a_report_has_the_regions_that_the_strategy_wants(region: Tensor | None, why: str) -> None:
    strategy, update = made(FedAlignMoE(experts="semantic"))
    assert fault(update, strategy, 1, [0]) is None
    spoiled = replace(update, routing=[replace(update.routing[0], region=region)])
    assert fault(spoiled, strategy, 1, [0]) == f"{why} in the routing report of block 0"


def test_a_second_update_is_refused() -> None:
    strategy, update = made(FedAvg())
    assert fault(update, strategy, 1, [0, 1], used=[0]) == "a second update in the same round"


def test_what_a_strategy_declares_beside_the_model_is_held_to_it() -> None:
    strategy, update = made(Scaffold())
    assert fault(update, strategy, 1, [0]) is None
    name = "control/head.bias"
    for value, why in (
        (torch.ones(2), f"{name} has shape [2], expected [3]"),
        (torch.ones(3).double(), f"{name} is float64, expected float32"),
    ):
        assert fault(replace(update, extra={name: value}), strategy, 1, [0]) == why
    strange = replace(update, extra={"control/other": torch.ones(3)})
    assert fault(strange, strategy, 1, [0]) == "control/other was not to be sent"


# -- a server whose clients misbehave on the wire ------------------------------------------------


@dataclass
class Script:
    """An engine that sends back what the test says, from honest updates of real clients.

    `turns[i]` makes the answers of the i-th time that a round is played.
    """

    worker: Worker
    turns: Sequence[Callable[[list[Update]], list[Update | Failure]]]
    played: int = 0
    settled: list[list[int]] = field(default_factory=list)

    def train(
        self, broadcast: Broadcast, clients: Sequence[int], personal: set[int], *, keep: bool
    ) -> Iterator[Update | Failure]:
        honest = []
        for number in clients:
            update = self.worker.train(number, broadcast, {}, personal=False)
            honest.append(copy.deepcopy(replace(update, nbytes=100)))
        self.played += 1
        yield from self.turns[self.played - 1](honest)

    def commit(self, clients: Sequence[int]) -> None:
        self.settled.append(list(clients))

    def broadcast_bytes(self) -> int:
        return 10

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Evaluation:
        return self.worker.evaluate(tensors, range(8))


def scripted(
    turns: Sequence[Callable[[list[Update]], list[Update | Failure]]],
    plan: Rounds,
    strategy: Strategy | None = None,
) -> tuple[Loop, Script]:
    model, strategy = TinyClassifier(), strategy or FedAvg()
    prepare(model, strategy, 3)
    sets = [TinyText(8, 1), TinyText(8, 2), TinyText(8, 3)]
    script = Script(Worker(model, sets, TinyText(8, 4), strategy, TRAINING), turns)
    counts = torch.tensor([[3, 3, 2]] * 3)
    return Loop(strategy, script, plan, counts), script


def test_duplicates_stale_and_strange_answers_do_not_count() -> None:
    def answers(honest: list[Update]) -> list[Update | Failure]:
        one, two, three = honest
        return [one, one, replace(two, round=9), Failure(2, "unreadable", nbytes=7), three]

    loop, script = scripted([answers], Rounds(rounds=1))
    (record,) = loop.run().records
    assert record.rejected == {
        0: "a second update in the same round",
        1: "stale: it answers round 9, this is round 1",
    }
    assert record.failed == {2: "unreadable"}
    assert record.bytes_up == 4 * 100 + 7
    assert script.settled == [[0, 2]]


def test_a_round_with_too_few_is_played_again_and_leaves_no_trace() -> None:
    def lost(honest: list[Update]) -> list[Update | Failure]:
        return [honest[0], Failure(1, "gone"), Failure(2, "gone")]

    plan = Rounds(rounds=1, min_clients=2, max_retries=2)
    loop, script = scripted([lost, lost, lambda honest: [*honest]], plan)
    (record,) = loop.run().records
    assert record.retries == 2
    assert record.failed == {1: "gone", 2: "gone"}
    assert (record.bytes_up, record.bytes_down) == (5 * 100, 3 * 3 * 10)
    assert script.settled == [[0, 1, 2]]
    clean, _ = scripted([lambda honest: [*honest]], Rounds(rounds=1))
    clean.run()
    for name, tensor in clean.strategy.tensors.items():
        assert torch.equal(loop.strategy.tensors[name], tensor), name


def test_the_run_ends_when_it_stays_below_min_clients() -> None:
    def lost(honest: list[Update]) -> list[Update | Failure]:
        return [honest[0], Failure(1, "gone"), replace(honest[2], examples=-1)]

    loop, _ = scripted([lost, lost], Rounds(rounds=1, min_clients=2))
    before = {name: tensor.clone() for name, tensor in loop.strategy.tensors.items()}
    wanted = r"round 1: 1 of 3 updates could be used, run.min_clients = 2 \(client 1: gone, and 1"
    with pytest.raises(TooFewUpdates, match=wanted):
        loop.run()
    for name, tensor in before.items():
        assert torch.equal(loop.strategy.tensors[name], tensor), name


def test_more_clients_are_wanted_than_there_are() -> None:
    loop, _ = scripted([], Rounds(rounds=1, min_clients=4))
    with pytest.raises(ValueError, match=r"run.min_clients = 4: 3 clients take part in a round"):
        loop.run()


def test_a_repeated_round_draws_clients_anew() -> None:
    plan = Rounds(rounds=5, participation=0.3, seed=3)
    drawn = {tuple(plan.chosen(2, range(20), repeat)) for repeat in range(5)}
    assert len(drawn) > 1


# -- lies that are numbers like any other ----------------------------------------------------------


def scaled(update: Update, factor: float, strategy: Strategy) -> Update:
    """Its change times a factor."""
    old = {piece.key: piece.of(strategy.tensors) for piece in strategy.shared_pieces}
    tensors = {key: old[key] + factor * (v - old[key]) for key, v in update.tensors.items()}
    return replace(update, tensors=tensors)


@pytest.mark.parametrize("factor", [-100.0, 1e15])
@pytest.mark.parametrize("lying", [1, 3])
def test_a_change_beyond_the_usual_is_left_out_in_any_round(factor: float, lying: int) -> None:
    """In round 1, where nothing is usual yet, the round is combined again without it."""

    def honestly(honest: list[Update]) -> list[Update | Failure]:
        return [*honest]

    def lies(honest: list[Update]) -> list[Update | Failure]:
        return [scaled(honest[0], factor, loop.strategy), *honest[1:]]

    turns = [honestly] * 3
    turns[lying - 1 : lying] = [lies, honestly] if lying == 1 else [lies]
    loop, script = scripted(turns, Rounds(rounds=3))
    records = loop.run().records
    assert [list(record.rejected) for record in records] == [
        [0] if record.round == lying else [] for record in records
    ]
    assert "the norm of its change" in records[lying - 1].rejected[0]
    assert [record.retries for record in records] == [int(lying == 1), 0, 0]
    assert script.settled[lying - 1] == [1, 2]
    without, _ = scripted(
        [lambda honest: honest[1:] if without_round() == lying else [*honest]] * 3,
        Rounds(rounds=3),
    )

    def without_round() -> int:
        return len(without.result.records) + 1

    without.run()
    for name, tensor in without.strategy.tensors.items():
        assert torch.equal(loop.strategy.tensors[name], tensor), name


def test_without_a_limit_every_finite_change_counts() -> None:
    loop, _ = scripted(
        [lambda honest: [scaled(honest[0], -100, loop.strategy), *honest[1:]]],
        Rounds(rounds=1, max_step=0),
    )
    assert loop.run().records[0].rejected == {}


def test_what_all_clients_do_is_no_outlier() -> None:
    """A learning rate that is too high is the run's own fault, and clients are not blamed."""

    def grown(honest: list[Update]) -> list[Update | Failure]:
        return [scaled(update, 1000, loop.strategy) for update in honest]

    loop, _ = scripted(
        [lambda honest: [*honest], grown, lambda honest: [*honest]], Rounds(rounds=2)
    )
    records = loop.run().records
    assert [record.rejected for record in records] == [{}, {}]
    assert records[1].retries == 1  # it was held back first


class Blasting(FedAvg):
    """In round 2 the server's step is a thousand times the mean change if client 1 takes part."""

    def accumulate(self, update: Update) -> None:
        super().accumulate(update)
        self.blast = getattr(self, "blast", False) or update.client == 1

    def step(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        found, self.blast = self.blast and self.number == 2, False
        old = self.tensors
        return {n: old[n] + 1000 * (t - old[n]) for n, t in mean.items()} if found else mean

    def begin(self, number: int, updates: Sequence[Update] = ()) -> None:
        super().begin(number, updates)
        self.number, self.blast = number, False


def test_a_step_beyond_the_usual_is_rolled_back_and_made_without_who_may_have_caused_it() -> None:
    honest = [lambda honest: [*honest]] * 3
    loop, script = scripted(honest, Rounds(rounds=2), Blasting())
    before: list[dict[str, Tensor]] = []
    loop.on_round = lambda record: before.append(dict(loop.strategy.tensors))
    records = loop.run().records
    assert 1 in records[1].rejected
    why = next(iter(records[1].rejected.values()))
    assert "with it the norm of the model's step is" in why
    assert 1 not in script.settled[1]
    steps = [(before[1][n] - before[0][n]).norm() for n in before[0]]
    assert float(torch.stack(steps).norm()) < 10


def test_what_is_usual_is_continued_after_a_resume(tmp_path: Path) -> None:
    sets, test = [TinyText(16, seed) for seed in (1, 2)], TinyText(8, 4)
    for rounds in (1, 2):
        federate(
            TinyClassifier(),
            sets,
            test,
            rounds=rounds,
            training=TRAINING,
            device="cpu",
            checkpoint=Checkpoint(tmp_path, resume=rounds == 2),
        )
    saved = Checkpoint(tmp_path, resume=True).newest()
    assert saved is not None
    assert [len(saved.facts["usual"][name]) for name in ("change", "step")] == [4, 2]


# -- clients that fail in real processes ----------------------------------------------------------


class Raising(TinyText):
    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        raise OSError("the scanner is offline")


class Dying(TinyText):
    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Slow(TinyText):
    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        time.sleep(600)
        raise AssertionError


@dataclass
class Diverging(FedAvg):
    """The client with 17 examples sends NaN."""

    def finish_training(self, client):  # type: ignore[no-untyped-def]
        if client.steps == 3:
            with torch.no_grad():
                client.params["head.bias"].fill_(float("nan"))
        return {}


def ten_clients() -> list[TinyText]:
    """Three fail, each in its way, one diverges, one hangs, and five train."""
    bad = [Raising(8, 1), Dying(8, 2), Raising(8, 3), TinyText(17, 4), Slow(8, 5)]
    return [*bad, *(TinyText(8, seed) for seed in range(10, 15))]


def test_a_run_goes_on_without_those_who_fail() -> None:
    result: Result = federate(
        TinyClassifier(),
        ten_clients(),
        TinyText(40, 9),
        Diverging(),
        rounds=3,
        training=TRAINING,
        workers=3,
        timeout=4,
        device="cpu",
    )
    for record in result.records:
        assert record.clients == list(range(10))
        assert record.failed == {
            0: "OSError: the scanner is offline",
            1: "its process ended by signal 9",
            2: "OSError: the scanner is offline",
            4: "no update within 4 s",
        }
        assert list(record.rejected) == [3]
        assert record.retries == 0
    assert (result.failed, result.rejected) == (12, 3)
    outcome = Outcome(result, "here", ["one", "two", "three"])
    summary = json.loads(json.dumps(summarise(load_recipe("quickstart"), outcome, "cpu", 1.0)))
    assert (summary["failed_updates"], summary["refused_updates"]) == (12, 3)
    assert summary["failed"][1] == {
        "round": 1,
        "client": 1,
        "why": "its process ended by signal 9",
    }
    assert [one["client"] for one in summary["refused"]] == [3, 3, 3]
    assert summary["repeated_rounds"] == 0
    alone = federate(
        TinyClassifier(),
        [*(TinyText(0, 0) for _ in range(5)), *ten_clients()[5:]],
        TinyText(40, 9),
        FedAvg(),
        rounds=3,
        training=TRAINING,
        device="cpu",
    )
    assert alone.accuracy_by_round == result.accuracy_by_round
    for name, tensor in alone.tensors.items():
        assert torch.equal(result.tensors[name], tensor), name


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_clients_that_all_fail_is_told(workers: int) -> None:
    with pytest.raises(
        TooFewUpdates, match="OSError: the scanner is offline, and 1 more"
    ) as caught:
        federate(
            TinyClassifier(),
            [Raising(8, 1), Raising(8, 2)],
            TinyText(8, 3),
            rounds=2,
            training=TRAINING,
            workers=workers,
            device="cpu",
        )
    assert isinstance(caught.value.__cause__, OSError)
