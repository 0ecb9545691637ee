"""Sites in this process, behind everything that crosses: facts as JSON text, messages as files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import trustme

from sluiceway.deploy.site import HomeSite, open_site
from sluiceway.transport.protocol import ClientHandler, Request, Response
from sluiceway.transport.tls import Credentials
from sluiceway.transport.worker_pool import TaskFailure, described


class Nearby:
    """A carrier to sites of this process; answers come in the reverse order.

    Attributes:
        away: sites that do not answer.
        asked: what was asked, of whom.
    """

    def __init__(self, sites: Mapping[str, ClientHandler], place: Path) -> None:
        self.sites: Sequence[str] = list(sites)
        self.homes = dict(sites)
        self.place = place
        self.away: set[int] = set()
        self.asked: list[tuple[str, int]] = []

    def ask(
        self, asks: Mapping[int, Request], folder: Path, timeout: float = 0
    ) -> Iterator[tuple[int, Response | TaskFailure]]:
        for number in reversed(list(asks)):
            self.asked.append((asks[number].what, number))
            if number in self.away:
                yield number, TaskFailure("it is away")
            else:
                yield number, self.one(number, asks[number], folder)

    def one(self, number: int, ask: Request, folder: Path) -> Response | TaskFailure:
        room = self.place / f"room-{number}"
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(parents=True)
        message = None if ask.message is None else Path(shutil.copy(ask.message, room / "in"))
        out = room / "out"
        out.mkdir()
        try:
            found = self.homes[self.sites[number]].answer(
                Request(ask.what, json.loads(json.dumps(ask.facts)), message), out
            )
        except Exception as error:
            return TaskFailure(described(error))
        if found.message is None:
            return Response(json.loads(json.dumps(found.facts)))
        back = folder / f"answer-{number}"
        shutil.copy(found.message, back)
        return Response(json.loads(json.dumps(found.facts)), back)


class Authority:
    """Issues certificates.

    Args:
        place: folder for their files.
    """

    def __init__(self, place: Path) -> None:
        self.ca = trustme.CA()
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        self.ca.cert_pem.write_to_path(place / "root.pem")

    def keys(self, name: str) -> Credentials:
        """Of a party with this common name, at this machine."""
        issued = self.ca.issue_cert("localhost", common_name=name)
        paths = self.place / f"{name}.pem", self.place / f"{name}.key"
        for blob, path in zip(
            (issued.cert_chain_pems[0], issued.private_key_pem), paths, strict=True
        ):
            blob.write_to_path(path)
        return Credentials(*paths, self.place / "root.pem")


def sharing(place: Path, count: int, authority: Authority | None = None) -> dict[str, HomeSite]:
    """Sites that share the recipe's own data, with a file and keys each."""
    sites = {}
    for number in range(count):
        folder = place / f"site-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "site.toml").write_text('device = "cpu"\n[data]\nshare = true\n')
        keys = authority.keys(f"site-{number}") if authority else None
        sites[f"site-{number}"] = open_site(folder / "site.toml", keys)
    return sites
