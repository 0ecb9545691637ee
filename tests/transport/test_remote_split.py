"""Split training across sites: the numbers of the local engine, and connections that break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nearby import Authority, nearby

from sluiceway.core.guards import RunFailed
from sluiceway.deploy.site import open_site
from sluiceway.errors import InputError
from sluiceway.experiment.recipe import Recipe, load_recipe
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Progress
from sluiceway.split.client import SplitClient
from sluiceway.transport import remote_split
from sluiceway.transport.tls import Credentials

RECIPES = {
    "parallel": [],
    "copies": ["run.form=copies", "method.quantize=int8"],
    "sequential": ["run.form=sequential"],
    "u": ["run.form=u", "model.tail=conv4", "method.quantize=int8"],
    "acp-sl": ["method.name=acp-sl", "method.warmup=1", "method.ramp_rounds=1"],
    "eigenbasis": ["method.name=acp-sl", "method.basis=eigen", "method.quantize=dct"],
    "delta": ["method.name=acp-sl", "method.basis=eigen", "method.delta=true"],
    "recalibrated": ["method.name=acp-sl", "method.ratio=64", "train.recalibrate=1"],
    "learned basis": ["method.name=acp-sl", "method.basis=learned", "method.quantize=bits"],
    "rated first": ["method.name=acp-sl", "method.warmup=0", "method.ramp_rounds=0"],
    "own masks": ["method.name=acp-sl", "method.masks=client", "method.warmup=1"],
    "random": ["method.name=random", "method.warmup=1"],
    "feedback": ["method.name=topk", "method.error_feedback=true", "run.participation=0.7"],
    "scaffold": ["run.fronts=scaffold", "train.momentum=0.0"],
}


def small(split_recipe: Path, *more: str) -> Recipe:
    return load_recipe(split_recipe, ["run.rounds=3", *more])


@pytest.mark.parametrize(
    "kind", [k if k == "acp-sl" else pytest.param(k, marks=pytest.mark.slow) for k in RECIPES]
)
def test_sites_give_the_local_numbers(split_recipe: Path, tmp_path: Path, kind: str) -> None:
    chosen = small(split_recipe, *RECIPES[kind])
    here, _ = run(chosen)
    with nearby(tmp_path) as (transport, endpoint):
        there, summary = run(chosen, transport=transport, endpoint=endpoint)
    assert [r.as_dict() | {"seconds": 0} for r in there.records if kind != "own masks"] == [
        r.as_dict() | {"seconds": 0} for r in here.records if kind != "own masks"
    ]
    # With masks of their own the scores cross, for the server keeps the masks of all.
    assert there.accuracy_by_round == here.accuracy_by_round
    assert there.label_counts == here.label_counts
    assert not summary["refused"]
    for name, tensor in here.tensors.items():
        assert torch.equal(there.tensors[name], tensor)


class Broken(Exception):
    """Ends a run on the server."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["acp-sl", "feedback", "delta"])
def test_a_restarted_server_goes_on(
    split_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    chosen = small(split_recipe, *RECIPES[kind])
    whole, _ = run(chosen)
    out = tmp_path / "out"
    with nearby(tmp_path) as (transport, endpoint):
        with monkeypatch.context() as patch:
            received = remote_split.RemoteClient.receive

            def receive(client: remote_split.RemoteClient, name: Any, message: bytes) -> None:
                if name.round == 3 and name.batch == 1:
                    raise Broken
                received(client, name, message)

            patch.setattr(remote_split.RemoteClient, "receive", receive)
            with pytest.raises(Broken):
                run(chosen, out, transport=transport, endpoint=endpoint)
        again, _ = run(chosen, out, resume=True, transport=transport, endpoint=endpoint)
    assert again.accuracy_by_round == whole.accuracy_by_round
    for name, tensor in whole.tensors.items():
        assert torch.equal(again.tensors[name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["acp-sl", "delta"])
def test_a_site_that_is_gone_for_a_while(
    split_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It dies in round 2, is away in round 3, and is back in round 4, with what it kept."""
    chosen = load_recipe(split_recipe, ["run.rounds=4", *RECIPES[kind]])
    place = tmp_path
    with nearby(place) as (transport, endpoint):
        handlers = transport.handlers
        received = remote_split.RemoteClient.receive
        keys = handlers["site-1"].keys

        def receive(client: remote_split.RemoteClient, name: Any, message: bytes) -> None:
            if client.client_id == 1 and (name.round, name.batch) == (2, 1):
                handlers["site-1"].close()
            received(client, name, message)

        def back(record: Any) -> None:
            if record.round == 3:
                handlers["site-1"] = open_site(place / "site-1" / "site.toml", keys)
                handlers["site-1"].resume()

        monkeypatch.setattr(remote_split.RemoteClient, "receive", receive)
        monkeypatch.setattr(remote_split, "ROUND_WAIT", 1.0)
        found, _ = run(
            chosen, transport=transport, endpoint=endpoint, progress=Progress(on_round=back)
        )
        handlers["site-1"].close()
    assert [list(record.rejected) for record in found.records] == [[], [1], [1], []]
    assert "the connection is down" in found.records[1].rejected[1]
    assert "not connected to the server" in found.records[2].rejected[1]


def test_a_client_that_sends_nan_sits_out(
    split_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending = SplitClient.send

    def send(side: SplitClient, name: Any, batch: Any, rows: Any) -> bytes:
        if side.client_id == 2 and name.round == 2:
            with torch.no_grad():
                next(iter(side.params.values())).fill_(float("nan"))
        return sending(side, name, batch, rows)

    monkeypatch.setattr(SplitClient, "send", send)
    with nearby(tmp_path) as (transport, endpoint):
        found, _ = run(small(split_recipe), transport=transport, endpoint=endpoint)
    assert [list(record.rejected) for record in found.records] == [[], [2], []]
    assert "NaN or Inf" in found.records[1].rejected[2]


def test_a_site_with_a_strange_certificate_does_not_get_in(
    split_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_split, "FIRST_WAIT", 1.0)
    with nearby(tmp_path) as (transport, endpoint):
        strange = Authority(tmp_path / "strange").keys("site-1")
        own = transport.handlers["site-1"].keys
        assert own is not None
        # Its own root, so that it takes the server for good; the server must refuse it.
        transport.handlers["site-1"].keys = Credentials(strange.certificate, strange.key, own.root)
        with pytest.raises(RunFailed, match="site site-1: it is not connected to the server"):
            run(small(split_recipe), tmp_path / "out", transport=transport, endpoint=endpoint)
    assert not (tmp_path / "out").exists()


def test_other_layers_are_refused(
    split_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sluiceway.transport.split_site import SplitTrainer

    opening = SplitTrainer.open

    def other(trainer: SplitTrainer, facts: dict[str, Any], body: bytes) -> Any:
        found, rest = opening(trainer, facts, body)
        if trainer.number == 1:
            found["signature"] = found["signature"].replace("float32 [8]", "float32 [9]")
        return found, rest

    monkeypatch.setattr(SplitTrainer, "open", other)
    with (
        nearby(tmp_path) as (transport, endpoint),
        pytest.raises(ValueError, match=r"site site-1: .*float32 \[9\]"),
    ):
        run(small(split_recipe), transport=transport, endpoint=endpoint)


def test_no_endpoint_is_one_line(split_recipe: Path, tmp_path: Path) -> None:
    with (
        nearby(tmp_path) as (transport, _),
        pytest.raises(InputError, match="carries no split run"),
    ):
        run(small(split_recipe), transport=transport)
