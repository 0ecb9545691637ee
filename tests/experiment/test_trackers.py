"""Trackers offline: what they wrote is read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.experiment.conftest import Run
from tests.experiment.test_report import recipe_of, result_of

from sluiceway.core.round_loop import Record
from sluiceway.experiment import trackers
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run as run_recipe
from sluiceway.experiment.trackers import TRACKERS, Told, scalars


class Noted:
    """A tracker of one's own."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_start(self, recipe: Mapping[str, Any], out: Path) -> None:
        self.seen.append((recipe["method"]["name"], out.is_dir()))

    def on_round(self, record: Record) -> None:
        self.seen.append(record.round)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.seen.append(summary["accuracy"])


class Broken(Noted):
    def on_round(self, record: Record) -> None:
        raise OSError("no route")


def tell(name: str, out: Path) -> list[Record]:
    """Four made-up rounds."""
    tracker = TRACKERS[name][0]()
    records = result_of().records
    tracker.on_start(recipe_of().resolved(), out)
    for record in records:
        tracker.on_round(record)
    tracker.on_end({"rounds": 4, "best_accuracy": 0.7, "metric_best": None, "seconds": 6})
    return records


def test_numbers_of_a_round() -> None:
    found = scalars(result_of().records[1])
    assert found["accuracy"] == pytest.approx(0.6)
    assert (found["bytes_up"], found["rejected"], found["failed"]) == (2_000_000, 1, 0)
    assert found["client_accuracy_worst"] == 0.6
    assert "routing_overlap" not in found


def test_one_s_own_tracker_and_one_that_fails(recipe: Path, tmp_path: Path) -> None:
    own, broken, said = Noted(), Broken(), list[str]()
    short = load_recipe(recipe, ["run.rounds=2", "method.name=fedavg", "run.personal=0"])
    _, summary = run_recipe(short, tmp_path / "out", trackers=[own, broken])
    assert own.seen == [("fedavg", True), 1, 2, summary["accuracy"]]
    assert broken.seen == [("fedavg", True)]  # dropped after its first round
    told = Told({"broken": broken}, said.append)
    told("on_round", result_of().records[0])
    told("on_end", {})
    assert said == ["broken failed and gets no more of this run: no route"]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = tell("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(one.step, one.value) for one in events.Scalars("accuracy")]
    assert found == [(one.round, pytest.approx(one.accuracy)) for one in records]
    assert events.Scalars("run/best_accuracy")[0].value == pytest.approx(0.7)


@pytest.mark.slow
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    records = tell("mlflow", tmp_path)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sluiceway")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "accuracy")
    assert [(one.step, one.value) for one in history] == [(r.round, r.accuracy) for r in records]
    assert found.data.params["data.alpha"] == "0.1"
    assert found.info.status == "FINISHED"


@pytest.mark.slow
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    records = tell("wandb", tmp_path)
    # finish() does not wait until W&B's service has written its file; the end of a process does.
    wandb.teardown()
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    said = read_wandb(written)
    assert said["config"]["data.alpha"] == 0.1
    history = [(one["_step"], one["accuracy"]) for one in said["history"]]
    assert history == [(record.round, record.accuracy) for record in records]
    assert said["history"][1]["rejected"] == 1
    found = [said["summary"][f"run/{name}"] for name in ("best_accuracy", "seconds")]
    assert found == [0.7, 6]


def records_of(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: pieces with 7 bytes before them, in 32 KiB blocks.

    Before a piece are its checksum, its length and its kind: whole, first, middle or last.
    """
    at, record = 7, b""  # behind the file's own header
    while at + 7 <= len(content):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(path: Path) -> dict[str, Any]:
    """Configuration, rounds and summary of an offline file of Weights & Biases."""
    from wandb.proto.wandb_internal_pb2 import Record as Written

    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}}

    def values(items: Any) -> dict[str, Any]:
        names = [one.key or ".".join(one.nested_key) for one in items]
        return {n: json.loads(one.value_json) for n, one in zip(names, items, strict=True)}

    for data in records_of(path.read_bytes()):
        record = Written()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["config"] |= values(record.run.config.update)
        elif kind == "history":
            found["history"].append(values(record.history.item))
        elif kind == "summary":
            found["summary"] |= values(record.summary.update)
    return found


def test_a_recipe_names_them(
    recipe: Path,
    tmp_path: Path,
    run: Run,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorboard")
    run(recipe, "out", "run.rounds=1", 'run.track=["tensorboard"]')
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["recipe"]["run"]["track"] == ["tensorboard"]
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    where = ["--out", tmp_path / "none"]
    said = refused("run", recipe, "--set", 'run.track=["wandb"]', *where)
    assert (
        "run.track names wandb, which needs its extra: pip install -c constraints.txt -e '.[wandb]'"
        in said
    )
    assert not (tmp_path / "none").exists()
