"""The folder for what is downloaded or decoded once, and files in it that are never half there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """Where downloads lie: $SLUICEWAY_CACHE, $XDG_CACHE_HOME/sluiceway or ~/.cache/sluiceway."""
    own = os.environ.get("SLUICEWAY_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "sluiceway"


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `target` when the block ends, or nothing if it raises.

    Several processes may do so at once: each writes a file of its own, the last to finish wins.

    Raises:
        OSError: the folder cannot be made or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as draft:
        try:
            yield draft
            draft.close()
            os.replace(draft.name, target)
        except BaseException:
            Path(draft.name).unlink(missing_ok=True)
            raise
