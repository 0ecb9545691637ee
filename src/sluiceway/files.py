"""Temporary folders that outlive no run, not even one that was killed, and whole files."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

PREFIX = "sluiceway-"

Named = TypeVar("Named", str, str | Path)


def listed(paths: Named | Sequence[Named] | None) -> list[Named]:
    """One path or several, as a list; None is none."""
    if paths is None:
        return []
    return [paths] if isinstance(paths, str | Path) else list(paths)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder for this process, removed at the end; those of killed runs are removed first.

    The process that uses a folder holds the lock next to it, from before the folder exists; the
    system releases the lock however the process ends.
    """
    room = Path(tempfile.gettempdir())
    for left in room.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if left.is_dir():
                remove_if_unused(left)
    folder = room / f"{PREFIX}{uuid.uuid4().hex}"
    with FileLock(lock_of(folder)):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock_of(folder).unlink(missing_ok=True)


def remove_if_unused(folder: Path) -> None:
    """Remove a folder whose lock nobody holds."""
    with contextlib.suppress(Timeout), FileLock(lock_of(folder), timeout=0):
        shutil.rmtree(folder, ignore_errors=True)
        lock_of(folder).unlink(missing_ok=True)


def lock_of(folder: Path) -> Path:
    """The lock file next to a folder."""
    return folder.with_name(f"{folder.name}.lock")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, which replaces `path` at the end of the block; removed if it raises.

    So that a reader sees the old file or the new one, and never half of one. Several processes may
    do so at once: each has a draft of its own, and the last to finish wins.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a text file through `replacing`; `mode` as of `open`."""
    with replacing(path) as draft:
        draft.touch(mode)
        draft.write_text(text, encoding="utf-8")
