"""Federated rounds across sites: the numbers of the local engine, and sites that fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.nearby import NearbyTransport, sharing

from sluiceway.core.guards import RunFailed, TooFewUpdates
from sluiceway.core.handshake import HandshakeError, ModelSignature
from sluiceway.core.messages import read_update, write_update
from sluiceway.deploy.site import open_site
from sluiceway.errors import InputError
from sluiceway.experiment.recipe import Recipe, load_recipe
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Progress
from sluiceway.transport.protocol import Request, Response, TaskFailure
from sluiceway.transport.remote import counts_of, in_order

PRIVACY = "method.privacy."
NOISE = [f"{PRIVACY}clip=0.3", f"{PRIVACY}noise=0.5", f"{PRIVACY}noise_seed=3"]


def small(recipe: Path, *more: str) -> Recipe:
    return load_recipe(recipe, ["run.rounds=3", "data.clients=3", *more])


def transport(place: Path, count: int = 3) -> NearbyTransport:
    return NearbyTransport(sharing(place, count), place)


@pytest.mark.parametrize(
    ("method", "participation", "more"),
    [
        ("fedalign-moe", 1.0, ["model.head_start=means"]),
        ("scaffold", 0.5, ["model.head_start=random"]),
        ("non-expert", 1.0, ["model.head_start=random"]),
        ("fedmoe", 0.5, ["model.head_start=ridge", "method.head=counts"]),
        ("class-means", 1.0, []),
        ("fedavg", 1.0, [f"{PRIVACY}name=gaussian", f"{PRIVACY}where=client", *NOISE]),
        ("fedavgm", 0.5, [f"{PRIVACY}name=gaussian", f"{PRIVACY}quantile=0.5", *NOISE]),
    ],
)
def test_sites_give_the_local_numbers(
    recipe: Path, tmp_path: Path, method: str, participation: float, more: list[str]
) -> None:
    share = f"run.participation={participation}"
    chosen = small(recipe, f"method.name={method}", share, *more)
    here, _ = run(chosen)
    there, summary = run(chosen, transport=transport(tmp_path / "sites"))
    assert there.accuracy_by_round == here.accuracy_by_round
    assert [r.loss for r in there.records] == [r.loss for r in here.records]
    assert there.personal_accuracy == here.personal_accuracy
    assert there.label_counts == here.label_counts
    assert (there.bytes_up, there.bytes_down) == (here.bytes_up, here.bytes_down)
    assert summary["clients"] == 3
    for name, tensor in here.tensors.items():
        assert torch.equal(there.tensors[name], tensor)


def test_sums_that_a_site_must_not_send_or_be_asked_for(recipe: Path, tmp_path: Path) -> None:
    class Odd(NearbyTransport):
        def one(self, number: int, request: Request, folder: Path) -> Response | TaskFailure:
            if request.what == "head-sums" and number == 1:
                request = Request("head-sums", {"kind": "all"})
            found = super().one(number, request, folder)
            if request.what == "head-sums" and number == 2:
                assert isinstance(found, Response)
                assert found.message is not None
                found.message.write_bytes(b"?" * 40)
            return found

    place = tmp_path / "sites"
    chosen = small(recipe, "model.head_start=means", "method.name=class-means", "run.rounds=1")
    found, _ = run(chosen, transport=Odd(sharing(place, 3), place))
    why = found.records[0].failed
    assert "asked for sums that this client cannot give" in why[1]
    assert "not a readable message" in why[2]
    assert len(why) == 2


def test_nothing_is_pooled_across_sites(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="central pools all examples"):
        run(small(recipe, "method.name=central"), transport=transport(tmp_path / "sites"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedalign-moe", "scaffold"])
def test_a_restarted_server_and_restarted_sites_go_on(
    recipe: Path, tmp_path: Path, method: str
) -> None:
    chosen = small(recipe, f"method.name={method}", "model.head_start=means", "method.head=counts")
    whole, _ = run(chosen)
    first = transport(tmp_path / "sites")

    class Broken(Exception):
        pass

    def stop(done: int, of: int) -> None:
        if first.requests.count(("train", 0)) == 2 and done == 2:
            raise Broken

    with pytest.raises(Broken):
        run(chosen, tmp_path / "out", transport=first, progress=Progress(on_update=stop))
    again, _ = run(chosen, tmp_path / "out", resume=True, transport=transport(tmp_path / "sites"))
    assert again.accuracy_by_round == whole.accuracy_by_round
    for name, tensor in whole.tensors.items():
        assert torch.equal(again.tensors[name], tensor)


@pytest.mark.slow
def test_a_site_that_was_restarted_between_rounds_goes_on(recipe: Path, tmp_path: Path) -> None:
    chosen = small(recipe, "method.name=scaffold")
    whole, _ = run(chosen)
    place = tmp_path / "sites"

    class Forgetful(NearbyTransport):
        def one(self, number: int, request: Request, folder: Path) -> Response | TaskFailure:
            name = self.sites[number]
            self.handlers[name] = open_site(place / name / "site.toml")
            return super().one(number, request, folder)

    found, _ = run(chosen, transport=Forgetful(sharing(place, 3), place))
    assert found.accuracy_by_round == whole.accuracy_by_round


def test_the_others_go_on_without_a_site_that_is_away(recipe: Path, tmp_path: Path) -> None:
    reach = transport(tmp_path / "sites")

    def leave(record: Any) -> None:
        reach.away = {1} if record.round == 1 else set()

    found, summary = run(small(recipe), transport=reach, progress=Progress(on_round=leave))
    assert [r.failed for r in found.records] == [{}, {1: "it is away"}, {}]
    assert summary["failed"] == [{"round": 2, "client": 1, "why": "it is away"}]


def test_all_sites_away(recipe: Path, tmp_path: Path) -> None:
    reach = transport(tmp_path / "sites")

    def all_leave(rounds: int) -> None:
        reach.away.update(range(3))

    random = small(recipe, "model.head_start=random")
    with pytest.raises(TooFewUpdates, match="it is away"):
        run(random, transport=reach, progress=Progress(begin=all_leave))
    reach.away.clear()
    with pytest.raises(RunFailed, match=r"no client gave sums .* it is away"):
        run(small(recipe), transport=reach, progress=Progress(begin=all_leave))


class Spoiling(NearbyTransport):
    """The second site's updates are changed on the way."""

    def __init__(self, place: Path, spoil: Any) -> None:
        super().__init__(sharing(place, 3), place)
        self.spoil = spoil

    def one(self, number: int, request: Request, folder: Path) -> Response | TaskFailure:
        found = super().one(number, request, folder)
        if request.what == "train" and number == 1:
            assert isinstance(found, Response)
            assert found.message is not None
            self.spoil(found.message)
        return found


def poison(path: Path) -> None:
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    name = next(n for n in tensors if n.startswith("model/"))
    tensors[name] = tensors[name].fill_(float("nan"))
    save_file(tensors, path, metadata=metadata)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("spoil", "where"), [(poison, "rejected"), (cut, "failed")])
def test_a_spoiled_update_is_left_out(recipe: Path, tmp_path: Path, spoil: Any, where: str) -> None:
    found, _ = run(small(recipe), transport=Spoiling(tmp_path / "sites", spoil))
    for record in found.records:
        assert list(getattr(record, where)) == [1]


@pytest.mark.parametrize(
    ("lie", "where", "why"),
    [
        ({"client": 0}, "failed", "it calls itself client 0"),
        ({"client": 2}, "failed", "it calls itself client 2"),
        ({"round": 9}, "rejected", "round 9"),
    ],
)
def test_an_answer_in_the_name_of_another_is_told_of_who_sent_it(
    recipe: Path, tmp_path: Path, lie: dict[str, int], where: str, why: str
) -> None:
    def forge(path: Path) -> None:
        write_update(path, replace(read_update(path), **lie))

    found, _ = run(small(recipe), transport=Spoiling(tmp_path / "sites", forge))
    for record in found.records:
        left_out = getattr(record, where)
        assert list(left_out) == [1]
        assert why in left_out[1]
        assert not record.as_dict()["rejected" if where == "failed" else "failed"]


def test_a_site_with_other_shapes_is_refused(recipe: Path, tmp_path: Path) -> None:
    class Older(NearbyTransport):
        def one(self, number: int, request: Request, folder: Path) -> Response | TaskFailure:
            found = super().one(number, request, folder)
            assert isinstance(found, Response)
            if number != 2:
                return found
            card = ModelSignature.from_json(found.facts["signature"])
            name = next(iter(card.tensors))
            other = ModelSignature(
                {**card.tensors, name: "float32 [3]"}, {**card.versions, "peft": "0.1"}
            )
            return Response({**found.facts, "signature": other.to_json()})

    place = tmp_path / "sites"
    with pytest.raises(HandshakeError, match=r"site site-2: .*float32 \[3\].*peft 0\.1"):
        run(small(recipe), tmp_path / "out", transport=Older(sharing(place, 3), place))
    assert not (tmp_path / "out").exists()


def test_a_site_that_cannot_join_is_named(recipe: Path, tmp_path: Path) -> None:
    reach = transport(tmp_path / "sites")
    place = tmp_path / "sites" / "site-1"
    (place / "site.toml").write_text('recipe_files = ["/"]\n[data]\npath = "none.csv"\n')
    (place / "none.csv").touch()
    reach.handlers["site-1"] = open_site(place / "site.toml")
    (place / "none.csv").unlink()  # after it was looked for
    with pytest.raises(RunFailed, match=r"site site-1 did not join: .*none\.csv"):
        run(small(recipe), transport=reach)


@pytest.mark.parametrize("said", [None, "12", [1.5], [-1], [True], [10**13], [0] * 4])
def test_impossible_label_counts(said: Any) -> None:
    with pytest.raises(HandshakeError, match="site x: its label counts"):
        counts_of(Response({"label_counts": said}), "x", classes=3)


def test_nobody_joins_with_classes_that_the_model_has_not(recipe: Path, tmp_path: Path) -> None:
    class Claiming(NearbyTransport):
        def one(self, number: int, request: Request, folder: Path) -> Response | TaskFailure:
            found = super().one(number, request, folder)
            if request.what != "join" or number != 1:
                return found
            assert isinstance(found, Response)
            return Response({**found.facts, "label_counts": [1] * 10**6})

    place = tmp_path / "sites"
    with pytest.raises(HandshakeError, match=r"counts are 1000000; expected .* at most 3"):
        run(small(recipe), transport=Claiming(sharing(place, 3), place))


def test_answers_in_order() -> None:
    def coming() -> Iterator[tuple[int, Response | TaskFailure]]:
        yield 7, TaskFailure("a")
        yield 2, TaskFailure("b")

    found = list(in_order(coming(), [2, 5, 7]))
    assert found == [(2, TaskFailure("b")), (5, TaskFailure("no answer")), (7, TaskFailure("a"))]
