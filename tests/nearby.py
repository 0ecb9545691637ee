"""Sites in this process, behind everything that crosses: facts as JSON text, messages as files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from sluiceway.deploy.site import Site, open_site
from sluiceway.errors import described
from sluiceway.transport.protocol import ClientHandler, Request, Response, TaskFailure
from sluiceway.transport.tls import Credentials, Endpoint


class NearbyTransport:
    """A transport to sites of this process; responses come in the reverse order.

    Attributes:
        away: clients that do not answer.
        requests: name and client of each request.
    """

    def __init__(self, sites: Mapping[str, ClientHandler], place: Path) -> None:
        self.sites: Sequence[str] = list(sites)
        self.handlers = dict(sites)
        self.place = place
        self.away: set[int] = set()
        self.requests: list[tuple[str, int]] = []

    def send(
        self, requests: Mapping[int, Request], folder: Path, timeout: float = 0
    ) -> Iterator[tuple[int, Response | TaskFailure]]:
        for number in reversed(list(requests)):
            self.requests.append((requests[number].what, number))
            if number in self.away:
                yield number, TaskFailure("it is away")
            else:
                yield number, self.one(number, requests[number], folder)

    def one(self, number: int, request: Request, folder: Path) -> Response | TaskFailure:
        room = self.place / f"room-{number}"
        shutil.rmtree(room, ignore_errors=True)
        out = room / "out"
        out.mkdir(parents=True)
        message = None
        if request.message is not None:
            message = Path(shutil.copy(request.message, room / "in"))
        facts = json.loads(json.dumps(request.facts))
        try:
            found = self.handlers[self.sites[number]].handle(
                Request(request.what, facts, message), out
            )
        except Exception as error:
            return TaskFailure(described(error))
        facts = json.loads(json.dumps(found.facts))
        if found.message is None:
            return Response(facts)
        return Response(facts, Path(shutil.copy(found.message, folder / f"response-{number}")))


class Authority:
    """Issues certificates.

    Args:
        place: folder for their files.
    """

    def __init__(self, place: Path) -> None:
        self.ca = pytest.importorskip("trustme").CA()
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        self.ca.cert_pem.write_to_path(place / "root.pem")

    def keys(self, name: str) -> Credentials:
        """Credentials for this common name, at this machine."""
        issued = self.ca.issue_cert("localhost", common_name=name)
        certificate, key = self.place / f"{name}.pem", self.place / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return Credentials(certificate, key, self.place / "root.pem")


def sharing(place: Path, count: int, authority: Authority | None = None) -> dict[str, Site]:
    """Sites that share the recipe's own data, with a file and keys each."""
    sites = {}
    for number in range(count):
        folder = place / f"site-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "site.toml").write_text(
            'device = "cpu"\nrecipe_files = ["/"]\n[data]\nshare = true\n'
        )
        keys = authority.keys(f"site-{number}") if authority else None
        sites[f"site-{number}"] = open_site(folder / "site.toml", keys)
    return sites


@contextmanager
def nearby(place: Path, count: int = 3) -> Iterator[tuple[NearbyTransport, Endpoint]]:
    """Sites with keys, the transport that reaches them, and the server's endpoint."""
    authority = Authority(place / "keys")
    sites = sharing(place, count, authority)
    try:
        yield NearbyTransport(sites, place), Endpoint(authority.keys("server"), "localhost")
    finally:
        for site in sites.values():
            site.close()
