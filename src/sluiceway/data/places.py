"""The places where a data set may lie, and the search through them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sluiceway.data.errors import Absent, DataError, first_line
from sluiceway.data.wheels import wheel_members

Found = TypeVar("Found")


@dataclass(frozen=True)
class WheelFiles:
    """Files that a package's wheel carries, by their paths inside it."""

    package: str
    version: str
    members: tuple[str, ...]

    @property
    def source(self) -> str:
        """How messages call the wheel."""
        return f"wheel {self.package} {self.version}"

    def paths(self) -> list[Path]:
        """The files on this machine, in order. Raises `Absent` where they are not to be had."""
        try:
            return wheel_members(self.package, self.version, self.members)
        except DataError as error:
            raise Absent(f"the {self.source} ({first_line(error)})") from error


TRAIN_AND_TEST = ("train.parquet", "test.parquet")
"""The files of a data set that comes with a test part."""


def data_files(folder: str) -> tuple[Path, Path]:
    """The paths of `TRAIN_AND_TEST` in `$SLUICEWAY_DATA/folder`; raises as `data_folder`."""
    path = data_folder(folder)
    train, test = (path / name for name in TRAIN_AND_TEST)
    return train, test


def data_folder(folder: str) -> Path:
    """`$SLUICEWAY_DATA/folder`.

    Raises:
        Absent: the variable is not set or there is no such folder; its files are not looked at.
    """
    root = os.environ.get("SLUICEWAY_DATA")
    if not root:
        raise Absent("SLUICEWAY_DATA (not set)")
    path = Path(root).expanduser() / folder
    if not path.is_dir():
        raise Absent(f"SLUICEWAY_DATA (no folder {path})")
    return path


def first_found(
    name: str,
    folder: str,
    sources: Sequence[Callable[[], Found]],
    files: Sequence[str] = TRAIN_AND_TEST,
) -> Found:
    """What the first source returns that does not raise `Absent`.

    Args:
        name: the data set, for the message.
        folder: its folder below `$SLUICEWAY_DATA`, for the message.
        sources: in the order of their preference.
        files: what that folder would have to hold, for the message.

    Raises:
        DataError: all are absent (the line names every place looked at), or a source has the data
            set in an unreadable form.
    """
    absences: list[str] = []
    for source in sources:
        try:
            return source()
        except Absent as absence:
            absences.append(str(absence))
    wanted = " and ".join(f"{folder}/{file}" for file in files)
    raise DataError(
        f"data set {name!r} was found nowhere; looked in {', '.join(absences)}; "
        f"set SLUICEWAY_DATA to a folder that holds {wanted}"
    )
