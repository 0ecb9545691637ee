"""Runs that end early are continued to the very numbers of one that does not."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from tests.worlds import TinyClassifier, TinyText, slow
from torch import Tensor

from sluiceway.core import round_loop
from sluiceway.core.checkpoints import (
    Checkpoint,
    CheckpointError,
    Snapshot,
    StorageError,
    checksum,
)
from sluiceway.core.round_loop import Record, Result
from sluiceway.core.settings import Training
from sluiceway.strategies import STRATEGIES, Strategy
from sluiceway.transport.local import federate

TRAINING = Training(lr=0.02, batch_size=8)


class Ended(Exception):
    pass


def history(
    strategy: Strategy | str,
    checkpoint: Checkpoint | None,
    rounds: int,
    stop: int | None = None,
    clients: int = 3,
) -> Result:
    def maybe_stop(record: Record) -> None:
        if record.round == stop:
            raise Ended

    return federate(
        TinyClassifier(),
        [TinyText(size, i + 1) for i, size in enumerate((20, 9, 14, 8, 8)[:clients])],
        TinyText(40, 9),
        strategy,
        rounds=rounds,
        participation=0.7,
        training=TRAINING,
        checkpoint=checkpoint,
        on_round=maybe_stop,
        device="cpu",
    )


def begun(strategy: str, checkpoint: Checkpoint, rounds: int, stop: int) -> None:
    """A run that ends early."""
    with pytest.raises(Ended):
        history(strategy, checkpoint, rounds, stop)


def require_equal(one: Result, other: Result, **apart: int) -> None:
    """Equal but for the time it took, and what is put in its place."""
    apart["seconds"] = 0
    lines = [[r.as_dict() | apart for r in result.records] for result in (one, other)]
    assert json.dumps(lines[0]) == json.dumps(lines[1])
    assert one.personal_accuracy == other.personal_accuracy
    assert one.tensors.keys() == other.tensors.keys()
    for key, tensor in one.tensors.items():
        assert torch.equal(other.tensors[key], tensor), key


@pytest.mark.parametrize("every", [2, *slow(1, 5)])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_resumed_run_is_the_uninterrupted_one(name: str, every: int, tmp_path: Path) -> None:
    begun(name, Checkpoint(tmp_path, every=every), 5, stop=3)
    again = history(name, Checkpoint(tmp_path, resume=True, every=every), 5)
    require_equal(history(name, None, 5), again)
    assert Checkpoint(tmp_path).found()[-1].name == "round-00005"


def test_a_finished_run_is_extended(tmp_path: Path) -> None:
    history("scaffold", Checkpoint(tmp_path), 3)
    longer = history("scaffold", Checkpoint(tmp_path, resume=True), 5)
    # The last message of a client tells its personal accuracy, and some now came to be the last.
    require_equal(history("scaffold", None, 5), longer, bytes_up=0)


def test_every_k_rounds_and_the_last_n_stay(tmp_path: Path) -> None:
    history("fedavg", Checkpoint(tmp_path, every=2, keep=2), 7)
    assert [p.name for p in Checkpoint(tmp_path).found()] == ["round-00006", "round-00007"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "manifest", "empty manifest", "round"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(harm: str, tmp_path: Path) -> None:
    begun("fedalign-moe", Checkpoint(tmp_path), 4, stop=3)
    newest = tmp_path / "round-00003"
    damage(newest, harm)
    said: list[str] = []
    again = history("fedalign-moe", Checkpoint(tmp_path, resume=True, say=said.append), 4)
    assert len(said) == 1
    assert str(newest) in said[0]
    assert "is damaged" in said[0]
    assert "the one before it is used" in said[0]
    require_equal(history("fedalign-moe", None, 4), again)


def damage(folder: Path, harm: str) -> None:
    path = folder / "strategy.safetensors"
    manifest = folder / "manifest.json"
    whole = path.read_bytes()
    if harm == "cut":
        path.write_bytes(whole[:100])
    if harm == "flip":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
    if harm == "gone":
        (folder / "run.json").unlink()
    if harm == "manifest":
        manifest.write_text(manifest.read_text()[:50])
    if harm == "empty manifest":
        manifest.write_text("{}")
    if harm == "round":
        manifest.write_text(manifest.read_text().replace('"round": 3', '"round": 4'))


def test_without_a_whole_checkpoint_a_run_is_not_begun_anew(tmp_path: Path) -> None:
    history("fedavg", Checkpoint(tmp_path), 2)
    for folder in Checkpoint(tmp_path).found():
        damage(folder, "cut")
    with pytest.raises(CheckpointError, match=r"round-00002 is damaged .* no other is whole"):
        history("fedavg", Checkpoint(tmp_path, resume=True), 3)


@pytest.mark.parametrize("usual", [7, [1], {"norm": 3}, {"norm": ["x"]}, None])
def test_facts_of_another_form_are_refused(usual: object, tmp_path: Path) -> None:
    history("fedavg", Checkpoint(tmp_path), 2)
    for folder in Checkpoint(tmp_path).found():
        facts = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(facts | {"usual": usual}))
        manifest = json.loads((folder / "manifest.json").read_text())
        path = folder / "run.json"
        manifest["files"]["run.json"] = {"bytes": path.stat().st_size, "sha256": checksum(path)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"run\.json is not ours"):
        history("fedavg", Checkpoint(tmp_path, resume=True), 3)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    history("fedavg", Checkpoint(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"head.weight .* as torch.float32 \[3, 16\]"):
        federate(
            TinyClassifier(classes=4),
            [TinyText(20, 1, classes=4)],
            TinyText(9, 2, classes=4),
            rounds=2,
            checkpoint=Checkpoint(tmp_path, resume=True),
            device="cpu",
        )


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    begun("fedavg", Checkpoint(tmp_path), 4, stop=2)
    half = tmp_path / ".new-00003"
    half.mkdir()
    (half / "strategy.safetensors").write_bytes(b"half")
    require_equal(
        history("fedavg", None, 4), history("fedavg", Checkpoint(tmp_path, resume=True), 4)
    )
    assert not half.exists()


def test_the_newest_is_by_its_number_whatever_the_clock_says(tmp_path: Path) -> None:
    history("fedavg", Checkpoint(tmp_path, keep=9), 3)
    for age, folder in enumerate(Checkpoint(tmp_path).found()):
        os.utime(folder, (10**9 - age, 10**9 - age))
    again = history("fedavg", Checkpoint(tmp_path, resume=True, keep=9), 3)
    assert len(again.records) == 3
    saved = Checkpoint(tmp_path, resume=True).newest()
    assert saved is not None
    assert saved.round == 3


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.write(Snapshot(1, {"a": {"x": torch.ones(3)}}, {"n": 1}))
    broken = Snapshot(2, {"a": {"x": torch.ones(3)}}, {"n": 2}, {"clients": tmp_path / "nowhere"})
    with pytest.raises(StorageError, match=r"cannot save round 2 to .*round-00001 is intact"):
        checkpoint.write(broken)
    saved = Checkpoint(tmp_path, resume=True).newest()
    assert saved is not None
    assert (saved.round, saved.facts) == (1, {"n": 1})
    assert torch.equal(saved.tensors("a")["x"], torch.ones(3))
    assert not list(tmp_path.glob(".*"))


def test_tied_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    tensors: dict[str, Tensor] = {"x": x, "same": x, "turned": x.T, "part": x[1]}
    Checkpoint(tmp_path).write(Snapshot(1, {"a": tensors}, {}))
    saved = Checkpoint(tmp_path, resume=True).newest()
    assert saved is not None
    for name, tensor in tensors.items():
        assert torch.equal(saved.tensors("a")[name], tensor), name


def test_records_are_in_one_file_that_grows(tmp_path: Path) -> None:
    result = history("fedavg", Checkpoint(tmp_path, keep=9, every=2), 5)
    log = tmp_path / "records.jsonl"
    rows = [json.loads(row) for row in log.read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5]
    assert [len(row["accuracy_by_client"]) for row in rows] == [3] * 5
    assert [len(record.accuracy_by_client) for record in result.records] == [3] * 5


def test_with_many_clients_what_each_got_is_kept_of_the_newest_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_loop, "MANY", 3)
    begun("fedavg", Checkpoint(tmp_path, every=2), 7, stop=5)
    result = history("fedavg", Checkpoint(tmp_path, every=2, resume=True), 7)
    rows = [json.loads(row) for row in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [len(row["accuracy_by_client"]) for row in rows] == [3] * 7
    assert [len(record.accuracy_by_client) for record in result.records] == [0] * 5 + [3] * 2
    sizes = [(folder / "run.json").stat().st_size for folder in Checkpoint(tmp_path).found()]
    assert max(sizes) - min(sizes) < 150  # no record is in it


def test_records_of_damaged_checkpoints_are_written_again(tmp_path: Path) -> None:
    begun("scaffold", Checkpoint(tmp_path, keep=9), 5, stop=4)
    for number in (3, 4):
        damage(tmp_path / f"round-{number:05d}", "cut")
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(b'{"round": 5, "accur')  # a write that was cut off
    again = history("scaffold", Checkpoint(tmp_path, resume=True, keep=9), 5)
    require_equal(history("scaffold", None, 5), again)
    rows = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(row)["round"] for row in rows] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_damaged_records_are_said(harm: str, tmp_path: Path) -> None:
    history("fedavg", Checkpoint(tmp_path), 2)
    log = tmp_path / "records.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-9] if harm == "cut" else b"[" + whole[1:])
    if harm == "gone":
        log.unlink()
    checkpoint = Checkpoint(tmp_path, resume=True)
    if harm == "cut":  # those of the round before are whole
        saved = checkpoint.newest()
        assert saved is not None
        assert (saved.round, len(saved.records)) == (1, 1)
        return
    with pytest.raises(CheckpointError, match=r"damaged \(.*records\.jsonl"):
        checkpoint.newest()


def test_a_checkpoint_of_version_0_1_is_continued(tmp_path: Path) -> None:
    """Its records are in run.json."""
    begun("fedavg", Checkpoint(tmp_path), 4, stop=2)
    folder, log = tmp_path / "round-00002", tmp_path / "records.jsonl"
    facts, manifest = (json.loads((folder / f"{n}.json").read_text()) for n in ("run", "manifest"))
    older = {"rejected": "refused", "retries": "repeats"}
    facts["records"] = [
        {older.get(key, key): value for key, value in json.loads(row).items()}
        for row in log.read_text().splitlines()
    ]
    (folder / "run.json").write_text(json.dumps(facts))
    written = (folder / "run.json").read_bytes()
    digest = hashlib.sha256(written).hexdigest()
    manifest["files"]["run.json"] = {"bytes": len(written), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    log.unlink()
    again = history("fedavg", Checkpoint(tmp_path, resume=True), 4)
    require_equal(history("fedavg", None, 4), again)
    assert len(log.read_text().splitlines()) == 4


def test_a_new_run_replaces_a_longer_one(tmp_path: Path) -> None:
    history("fedavg", Checkpoint(tmp_path), 4)
    begun("fedprox", Checkpoint(tmp_path), 3, stop=1)
    assert [path.name for path in Checkpoint(tmp_path).found()] == ["round-00001"]
    again = history("fedprox", Checkpoint(tmp_path, resume=True), 3)
    require_equal(history("fedprox", None, 3), again)


def test_what_a_client_keeps_is_written_only_when_it_changes(tmp_path: Path) -> None:
    def inodes(number: int) -> dict[str, int]:
        folder = tmp_path / f"round-{number:05d}" / "clients"
        return {path.name: path.stat().st_ino for path in folder.iterdir()}

    result = history("scaffold", Checkpoint(tmp_path, keep=9), 4)
    for record in result.records[1:]:
        before, now = inodes(record.round - 1), inodes(record.round)
        for name, inode in before.items():
            assert (now[name] == inode) == (int(name) not in record.clients)
