"""Data sets from the Hugging Face hub, or from its cache on this machine."""

import http.client
import logging
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download

from sluiceway.data.errors import Absent, first_line

PROBE_SECONDS = 3.0
"""How long the hub may take to answer before it counts as unreachable."""


@dataclass(frozen=True)
class HubFiles:
    """Where a data set lies on the hub.

    Attributes:
        repo: the data set repository.
        train: the train rows' file in it.
        test: the test rows' file in it.
        label_column: column of label names, or of integers that the file's metadata names.
        revision: branch of the repository.
        dropped_label: rows with this label name are left out.
    """

    repo: str
    train: str
    test: str
    label_column: str = "label"
    revision: str = "main"
    dropped_label: str | None = None


class HubAbsent(Absent):
    """The files are neither in the cache nor to be had from the hub; says which of it and why."""


def hub_paths(files: HubFiles) -> tuple[Path, Path]:
    """The (train, test) files on this machine; raises as `repo_paths`."""
    train, test = repo_paths(files.repo, (files.train, files.test), files.revision)
    return train, test


def repo_paths(repo: str, names: Sequence[str], revision: str = "main") -> list[Path]:
    """Files of a data set repository on this machine: from the cache, else downloaded into it.

    The network is touched only where a short probe answers: huggingface_hub itself retries for some
    twenty seconds on a machine without a network.

    Args:
        repo: the data set repository.
        names: the files' paths in it.
        revision: branch of the repository.

    Raises:
        HubAbsent: not cached, and the hub is off (HF_HUB_OFFLINE), does not answer or refuses.
    """
    try:
        return _fetch(repo, names, revision, cached=True)
    except OSError:
        not_cached = f"the Hugging Face cache (no {repo})"
    if _offline():
        raise HubAbsent(f"{not_cached}, the hub (HF_HUB_OFFLINE is set)")
    if not _answers(constants.ENDPOINT):
        raise HubAbsent(f"{not_cached}, the hub ({constants.ENDPOINT} does not answer)")
    try:
        with _quiet_retries():
            return _fetch(repo, names, revision, cached=False)
    except Exception as error:  # the transport's errors differ between releases of the hub client
        # The client wraps a refusal in advice about the cache; the refusal itself is the cause.
        why = first_line(error.__cause__ or error)
        raise HubAbsent(f"{not_cached}, the hub ({repo}: {why})") from error


def _fetch(repo: str, names: Sequence[str], revision: str, cached: bool) -> list[Path]:
    def fetch(name: str) -> Path:
        path = hf_hub_download(
            repo,
            name,
            repo_type="dataset",
            revision=revision,
            local_files_only=cached,
        )
        return Path(str(path))

    return [fetch(name) for name in names]


def _offline() -> bool:
    # huggingface_hub reads the variable once, on import; a value set later counts here too.
    late = os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    return constants.HF_HUB_OFFLINE or late


def _answers(url: str) -> bool:
    """Whether a server answers at `url`, with whatever status, within `PROBE_SECONDS`."""
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def probe() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            answers.put(True)
        except (OSError, ValueError, http.client.HTTPException):
            answers.put(False)
        else:
            answers.put(True)

    # In a thread: the request's own timeout does not bound a name look-up that hangs.
    threading.Thread(target=probe, daemon=True).start()
    try:
        return answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        return False


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """Keep the hub client's retry warnings off stderr: our own line says what came of it."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
