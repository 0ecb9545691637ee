"""Runs saved every few rounds, and continued from there.

A checkpoint is a folder `round-00012` of safetensors files, `run.json` and `manifest.json`, which
has the length and the SHA-256 of each. It is written under another name, synced to the disk and
then renamed, so that a checkpoint is whole or is not there, whenever the machine stops. The rounds'
records are in one file for all checkpoints, `records.jsonl`, which only grows: `run.json` says how
much of it there was, with its SHA-256.

Everything random in a run comes from its seed, the round and the client, so that no generator has a
state to save: what is saved is what was learned, what clients keep, and the records so far.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from sluiceway.core.signals import Stopped
from sluiceway.errors import BAD_INPUT, SluicewayError, line
from sluiceway.files import replacing

#: Of a checkpoint's files; a reader refuses any other.
LAYOUT = 1

#: Bytes of run.json and of manifest.json, at most.
JSON_LIMIT = 1 << 28

_NAME = re.compile(r"round-(\d{5,12})")


class CheckpointError(SluicewayError, ValueError):
    """A checkpoint that cannot be continued from; the message is one line."""

    exit_code = BAD_INPUT


class StorageError(SluicewayError, OSError):
    """The disk did not take what had to be saved; the message is one line."""


class PlainRecord(Protocol):
    """A record of a round."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        ...

    def score(self, metric: str) -> float | None:
        """The more the better; None where it was not evaluated."""
        ...


def rounds_without_gain(records: Sequence[PlainRecord], metric: str) -> int:
    """How many evaluations there were since the best one; 0 where the newest is better than all."""
    scores = [score for record in records if (score := record.score(metric)) is not None]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


def is_best(records: Sequence[PlainRecord], metric: str) -> bool:
    """Whether the newest round was evaluated, and better than all before it."""
    evaluated = bool(records) and records[-1].score(metric) is not None
    return evaluated and rounds_without_gain(records, metric) == 0


class RecordLog:
    """The records of rounds, one JSON object a line, in a file that only grows.

    Args:
        path: of the file. What is beyond the known part, as an interrupted write or rounds of a
            checkpoint that was damaged leave it, is overwritten by the next `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.bytes = 0
        self.digest = hashlib.sha256()

    def append(self, records: Sequence[PlainRecord]) -> dict[str, Any]:
        """Append those of the records that are not known yet, synced to the disk.

        Returns:
            What `read` needs to find them again.
        """
        lines = [json.dumps(record.as_dict()) + "\n" for record in records[self.count :]]
        new = "".join(lines).encode()
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(self.bytes)
            file.seek(self.bytes)
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        self.count, self.bytes = len(records), self.bytes + len(new)
        self.digest.update(new)
        return {"count": self.count, "bytes": self.bytes, "sha256": self.digest.hexdigest()}

    def read(self, known: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The records that `append` returned this for, from which on it is continued.

        Raises:
            ValueError, OSError: they are not there, or not as they were written.
        """
        size = known["bytes"]
        if type(size) is not int or not 0 <= size <= self.path.stat().st_size:
            raise ValueError(f"{self.path.name} has no {size} bytes")
        with self.path.open("rb") as file:
            content = file.read(size)
        digest = hashlib.sha256(content)
        if digest.hexdigest() != known["sha256"]:
            raise ValueError(f"{self.path.name} is not as it was written")
        records = [json.loads(one) for one in content.splitlines()]
        self.count, self.bytes, self.digest = len(records), len(content), digest
        return records


@dataclass(frozen=True)
class Snapshot:
    """A run as it is after a round.

    Attributes:
        round: from 1.
        tensors: named tensors by the name of their file, without its ending.
        facts: what goes into run.json.
        folders: copied as they are, by name; their files are replaced and never changed in place.
        records: of the rounds in order, at least up to this one.
        model: the tensors of the model that was measured, for those who use it.
    """

    round: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]
    folders: Mapping[str, Path] = field(default_factory=dict)
    records: Sequence[PlainRecord] = ()
    model: Mapping[str, Tensor] = field(default_factory=dict)

    def cloned(self) -> Snapshot:
        """The same, with tensors that nobody else can change."""
        tensors = {
            file: {name: tensor.clone() for name, tensor in held.items()}
            for file, held in self.tensors.items()
        }
        return replace(self, tensors=tensors)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found whole.

    Attributes:
        folder: where it lies.
        round: after which it was saved.
        facts: content of run.json.
        records: of the rounds up to it, as they were written.
    """

    folder: Path
    round: int
    facts: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]] = ()

    def tensors(self, file: str) -> dict[str, Tensor]:
        """The named tensors of a file; none if there is no such file. Raises CheckpointError."""
        path = self.folder / f"{file}.safetensors"
        if not path.exists():
            return {}
        try:
            found: dict[str, Tensor] = load_file(path)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {path} cannot be read ({line(str(error))})"
            ) from error
        return found


@dataclass
class Checkpoint:
    """Saves a run into a folder, and continues it from the newest whole checkpoint there.

    Attributes:
        folder: holds a folder for each checkpoint; only the newest `keep` stay.
        resume: continue from what is there; otherwise it is replaced.
        every: rounds between checkpoints, >= 1. The last round is saved always, and so is the last
            whole one when a run is stopped between steps.
        keep: >= 1; with 2 or more a damaged newest one is survived.
        say: told of damaged checkpoints.
        models: folder for the models to be used, `last.safetensors` at the end of the run and, if
            `best`, `best.safetensors` of the first of the best rounds; None for none.
        best: keep the best round's model.
        metric: what "best" means, see `Record.score`.
    """

    folder: Path
    resume: bool = False
    every: int = 1
    keep: int = 2
    say: Callable[[str], None] = lambda line: None
    models: Path | None = None
    best: bool = False
    metric: str = "accuracy"
    _unsaved: Snapshot | None = field(default=None, init=False, repr=False)
    _files: dict[tuple[int, int, int, int], str] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self.log = RecordLog(self.folder / "records.jsonl")
        self._replaces = not self.resume
        self._begun = False

    def found(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        if not self.folder.is_dir():
            return []
        numbered = [(m, p) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name))]
        return [path for _, path in sorted((int(m[1]), path) for m, path in numbered)]

    def newest(self) -> Saved | None:
        """The newest whole checkpoint, if this run is to be continued and there is any.

        Raises:
            CheckpointError: there are some and all are damaged.
        """
        found = self.found() if self.resume else []
        faults = []
        for path in reversed(found):
            try:
                return opened(path, self.log)
            except CheckpointError as error:
                faults.append(error)
                if path != found[0]:
                    self.say(f"{error}; the one before it is used")
        if faults:
            raise CheckpointError(f"{faults[0]}, and no other is whole; --force begins anew")
        return None

    def after(self, snapshot: Snapshot, *, ends: bool) -> None:
        """Save the run after a round, or note it until it is due.

        Args:
            snapshot: the run as it is.
            ends: this was the last round.

        Raises:
            StorageError: it cannot be written; earlier checkpoints are as they were. Or the folder
                was deleted since the one before.
        """
        self.require_there()
        if self.best and is_best(snapshot.records, self.metric):
            self.save_model("best", snapshot)
        if ends:
            self.save_model("last", snapshot)
        if ends or snapshot.round % self.every == 0:
            self._unsaved = None
            self.write(snapshot)
        else:
            self._unsaved = snapshot.cloned()

    def require_there(self) -> None:
        """Make the folder the first time; StorageError if it cannot, or if it was deleted since."""
        if self._begun and not self.folder.is_dir():
            raise StorageError(f"{self.folder} was deleted while the run went on")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {self.folder}: {error.strerror}") from error
        self._begun = True

    def save_model(self, name: str, snapshot: Snapshot) -> None:
        """Write the model of a round. Raises StorageError."""
        if self.models is None:
            return
        path = self.models / f"{name}.safetensors"
        try:
            with replacing(path) as draft:
                save_file(unshared(snapshot.model), draft, {"round": str(snapshot.round)})
        except Exception as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise StorageError(f"cannot save the model to {path}: {why}") from error

    @contextlib.contextmanager
    def guarding(self) -> Iterator[None]:
        """What is noted is saved if the run inside fails, or is stopped between two steps."""
        try:
            yield
        except (Exception, Stopped):
            if self._unsaved is not None:
                self.write(self._unsaved)
                self._unsaved = None
            raise

    def write(self, snapshot: Snapshot) -> None:
        """Write one checkpoint. Raises StorageError."""
        self.require_there()
        made = self.folder / f".new-{snapshot.round:05d}"
        final = self.folder / f"round-{snapshot.round:05d}"
        try:
            for unfinished in [*self.folder.glob(".new-*"), *self.folder.glob(".old-*")]:
                shutil.rmtree(unfinished)
            self.fill(made, snapshot)
            for older in self.found() if self._replaces else [final]:
                remove(older)
            self._replaces = False
            os.replace(made, final)
            sync(self.folder)
            for old in self.found()[: -self.keep]:
                remove(old)
        except Exception as error:
            shutil.rmtree(made, ignore_errors=True)
            left = self.found()
            rest = f"; {left[-1].name} is intact, --resume continues from it" if left else ""
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise StorageError(
                f"cannot save round {snapshot.round} to {final}: {why}{rest}"
            ) from error

    def fill(self, folder: Path, snapshot: Snapshot) -> None:
        """Write the files of a checkpoint into a new folder, synced to the disk."""
        folder.mkdir()
        for name, tensors in snapshot.tensors.items():
            save_file(unshared(tensors), folder / f"{name}.safetensors")
        for name, source in snapshot.folders.items():
            shutil.copytree(source, folder / name, copy_function=copy_of_file)
        facts = {**snapshot.facts, "records": self.log.append(snapshot.records[: snapshot.round])}
        (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        known, self._files = self._files, {}
        described = {}
        for path in files:
            found = path.stat()
            key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if key not in known:  # one that earlier checkpoints have is on the disk already
                sync(path)
            self._files[key] = known.get(key) or checksum(path)
            name = path.relative_to(folder).as_posix()
            described[name] = {"bytes": found.st_size, "sha256": self._files[key]}
        manifest = {"layout": LAYOUT, "round": snapshot.round, "files": described}
        made = folder / "manifest.json"
        made.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [made, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
            sync(path)


def copy_of_file(source: str, target: str) -> None:
    """The same file under another name where the disk can do that, else a copy.

    Files of a snapshot's folders are replaced and never changed, so one file may serve every
    checkpoint that a client sat out.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous, and those that lie in the same memory, as tied ones, copied."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        contiguous = tensor.contiguous()
        found[name] = contiguous.clone() if place in seen else contiguous
        seen.add(place)
    return found


def opened(folder: Path, log: RecordLog) -> Saved:
    """A checkpoint whose files are all as its manifest says. Raises CheckpointError."""
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest["layout"] != LAYOUT:
            raise ValueError(f"layout {manifest['layout']}, this version reads {LAYOUT}")
        if f"round-{manifest['round']:05d}" != folder.name:
            raise ValueError(f"its manifest is of round {manifest['round']}")
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        if lacking := sorted(set(manifest["files"]) - present):
            raise ValueError(f"{lacking[0]} is missing")
        for name, fact in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != fact["bytes"]:
                raise ValueError(f"{name} has {size} bytes, not {fact['bytes']}")
            if checksum(folder / name) != fact["sha256"]:
                raise ValueError(f"{name} has another checksum than when it was written")
        facts = read_json(folder / "run.json")
        known = facts.pop("records")
        # Version 0.1 had the records themselves here.
        records = known if isinstance(known, list) else log.read(known)
        return Saved(folder, manifest["round"], facts, records)
    except KeyError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged (no {error})") from error
    except Exception as error:
        raise CheckpointError(f"checkpoint {folder} is damaged ({line(str(error))})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most `JSON_LIMIT` bytes. Raises ValueError, OSError."""
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path.name} has more than {JSON_LIMIT} bytes")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(folder: Path) -> None:
    """Remove a checkpoint, under another name first so that no half of it can be taken for one."""
    if folder.exists():
        away = folder.with_name(folder.name.replace("round-", ".old-"))
        os.replace(folder, away)
        shutil.rmtree(away)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_same(state: Mapping[str, Tensor], like: Mapping[str, Tensor], what: str) -> None:
    """Check that a saved state has the tensors that this run has.

    Args:
        state: as saved; may have more.
        like: names, shapes and types that it must have.
        what: whose state it is, for the message.

    Raises:
        CheckpointError: one is missing or has another shape or type.
    """
    for name, tensor in like.items():
        found = state.get(name)
        if found is None:
            raise CheckpointError(f"the checkpoint has no {name} of {what}")
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise CheckpointError(
                f"the checkpoint has {name} of {what} as {found.dtype} {list(found.shape)}, "
                f"this run as {tensor.dtype} {list(tensor.shape)}"
            )
