"""The run folder: what is in it, and who may write there."""

from __future__ import annotations

import contextlib
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Self

import tomli_w
from filelock import FileLock, Timeout

from sluiceway.core.checkpoints import StorageError
from sluiceway.core.round_loop import Record, Result
from sluiceway.errors import InputError, quoted
from sluiceway.experiment.recipe import Recipe, recipe_from
from sluiceway.experiment.tables import flattened
from sluiceway.files import write_atomically

#: Seconds to wait for a folder: a run that was just killed may need a moment to be gone.
PATIENCE = 1

#: Keys of [run] that do not change the numbers of a finished round.
FREE = (
    "rounds",
    "workers",
    "feature_memory_mb",
    "feature_disk_mb",
    "checkpoint_every",
    "checkpoint_keep",
    "patience",
    "track",
)


@dataclass
class RunDirectory:
    """A run folder: recipe.toml, metrics.jsonl, summary.json, checkpoints/.

    Used as a context, in which no other run can use the folder. Nothing is written before `open`,
    so that a run that is refused leaves nothing behind.

    Attributes:
        out: the folder.
        recipe: of this run.
        resume: continue what is there.
        force: replace what is there.

    Raises:
        InputError: another run uses the folder; it holds a run and neither `resume` nor `force` was
            asked; it is to be continued and holds another recipe's run, or more rounds.
        StorageError: it cannot be written.
    """

    out: Path
    recipe: Recipe
    resume: bool = False
    force: bool = False
    _lock: FileLock | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> Self:
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out} is not a folder")
        written = self.out / "recipe.toml"
        if written.exists():
            self.hold()
        if written.exists() and not self.force:
            if not self.resume:
                raise self.refused(
                    f"{self.out} already holds a run; give --resume, --force or another --out"
                )
            self.require_same(written)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def hold(self) -> None:
        """Keep other runs out, until the context ends or the process does."""
        lock = FileLock(self.out / ".lock")
        try:
            with self.writing():
                lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise InputError(f"another run is writing to {self.out}; give another --out") from None
        self._lock = lock

    def require_same(self, written: Path) -> None:
        """Check that the run in the folder is one that this recipe continues."""
        try:
            old = recipe_from(tomllib.loads(written.read_text(encoding="utf-8")), code=True)
        except (ValueError, OSError) as error:
            raise self.refused(f"{written} cannot be read ({error}); --force begins anew") from None
        if old.run.rounds > self.recipe.run.rounds:
            raise self.refused(
                f"{self.out} holds a run of {old.run.rounds} rounds; run.rounds = "
                f"{self.recipe.run.rounds} is less"
            )
        if other := first_difference(deciding(old), deciding(self.recipe)):
            raise self.refused(f"{self.out} holds a run of another recipe: {other}; see {written}")

    def refused(self, why: str) -> InputError:
        """The error, with the folder free again."""
        self.__exit__()
        return InputError(why)

    def open(self) -> None:
        """Make the folder, with the resolved recipe in it."""
        with self.writing():
            self.out.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self.hold()
        with self.writing():
            if self.force:
                clear_folder(self.out)
            write_atomically(self.out / "recipe.toml", tomli_w.dumps(self.recipe.resolved()))
            end_last_line(self.out / "metrics.jsonl")

    def add(self, record: Record) -> None:
        """Append a round to metrics.jsonl."""
        self.require_there()
        with self.writing(), (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(strict_json(record.as_dict()) + "\n")

    def finish(self, result: Result, summary: dict[str, Any]) -> None:
        """Write the summary, and rewrite metrics.jsonl.

        A round that was stopped between its checkpoint and its line left a line too few.
        """
        self.require_there()
        lines = "".join(strict_json(record.as_dict()) + "\n" for record in result.records)
        with self.writing():
            write_atomically(self.out / "metrics.jsonl", lines)
            write_json(self.out / "summary.json", summary)

    def require_there(self) -> None:
        """Raise StorageError if somebody has deleted the folder since it was opened."""
        if not (self.out / "recipe.toml").is_file():
            raise StorageError(f"{self.out} was deleted while the run went on, and what it held")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Something that writes is done inside. Raises StorageError."""
        try:
            yield
        except Timeout:
            raise
        except OSError as error:
            at = error.filename or self.out
            why = error.strerror or error
            raise StorageError(
                f"cannot write to {at}: {why}; what was saved before is intact, --resume continues"
            ) from error


def deciding(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides the numbers of a round."""
    tables = recipe.resolved()
    run = {key: value for key, value in tables["run"].items() if key not in FREE}
    return {k: v for k, v in tables.items() if k not in ("description", "compare")} | {"run": run}


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first key in which two recipes differ, in words; "" if they do not."""
    one, other = flattened(there), flattened(here)
    for key in [*one, *other]:
        if one.get(key) != other.get(key):
            values = [quoted(of[key]) if key in of else "not set" for of in (one, other)]
            return f"{key} is {values[0]} there and {values[1]} here"
    return "" if there == here else "other tables"


def clear_folder(out: Path) -> None:
    """Remove what a run left in its folder, and nothing else."""
    for name in ("recipe.toml", "metrics.jsonl", "summary.json", "report.html", "mlflow.db"):
        (out / name).unlink(missing_ok=True)
    for name in ("checkpoints", "model", "tensorboard", "wandb"):
        shutil.rmtree(out / name, ignore_errors=True)


def end_last_line(path: Path) -> None:
    """Cut off a last line that was not written to its end."""
    if path.is_file():
        whole = path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:
            path.write_bytes(kept)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is never seen half written; infinite numbers and NaN are null."""
    write_atomically(path, strict_json(content, indent=1))


def strict_json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: infinite numbers and NaN, which it has not, are null."""

    def known(value: Any) -> Any:
        if isinstance(value, float):
            return value if isfinite(value) else None
        if isinstance(value, dict):
            return {key: known(one) for key, one in value.items()}
        return [known(one) for one in value] if isinstance(value, list | tuple) else value

    return json.dumps(known(content), indent=indent, allow_nan=False)
