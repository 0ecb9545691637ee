"""A server and two sites as processes, over mutual TLS: local numbers, whichever is killed."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.worlds import tiny_bert

pytest.importorskip("nvflare", reason="the extra nvflare is not installed")

import sluiceway
from sluiceway.deploy.nvflare.admin import AdminSession, opened
from sluiceway.deploy.nvflare.kits import Credentials, provision
from sluiceway.deploy.nvflare.local_deployment import START_TIMEOUT, Deployment
from sluiceway.deploy.nvflare.submit import JobSpec, start_job, submit
from sluiceway.deploy.site_file import write_site_file
from sluiceway.errors import InputError
from sluiceway.experiment.recipe import Recipe, load_recipe, recipe_from
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Session

pytestmark = [pytest.mark.engine, pytest.mark.slow]
SITES = ["north", "south"]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployed")
    files = {name: write_site_file(folder / "sites" / name, "cpu") for name in SITES}
    threads = {"OMP_NUM_THREADS": "1"}
    with Deployment(
        folder=folder / "kits", sites=files, runs=folder / "runs", environment=threads
    ) as found:
        yield found
    assert not found.running


@pytest.fixture
def tables(csv_file: Path, model_folder: Path) -> dict[str, Any]:
    return {
        "run": {"rounds": 4, "workers": 1, "device": "cpu", "timeout": 30.0},
        "data": {"path": str(csv_file), "clients": 2, "alpha": 0.5, "max_tokens": 12},
        "model": {"name": str(model_folder), "experts": 4, "head_start": "means"},
        "method": {"name": "fedalign-moe", "head": "counts"},
        "train": {"lr": 0.02, "local_epochs": 4},
    }


def recipe_of(tables: dict[str, Any], engine: str) -> Recipe:
    return recipe_from({**tables, "run": {**tables["run"], "engine": engine}})


def spec_of(recipe: Recipe, name: str, resume: bool = False) -> JobSpec:
    return JobSpec(recipe, name, SITES, resume, wait=START_TIMEOUT)


def until(happened: Callable[[], bool], seconds: float = START_TIMEOUT) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def last_heard(session: AdminSession, site: str) -> float:
    """When the server last heard of a site; one that was just killed still counts as connected."""
    clients = session.session.get_connected_client_list()
    return max((each.last_connect_time for each in clients if each.name == site), default=0.0)


def rounds_in(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_a_run_whose_server_was_killed_gives_the_local_numbers(
    deployment: Deployment, tables: dict[str, Any], tmp_path: Path
) -> None:
    _, local = run(recipe_of(tables, "local"))
    recipe = recipe_of(tables, "nvflare")
    with opened(deployment.admin, START_TIMEOUT) as session:
        start_job(session, spec_of(recipe, "killed"), tmp_path / "job", print)
    until(lambda: rounds_in(deployment.runs / "killed") >= 1)
    deployment.kill("server")
    assert not (deployment.runs / "killed" / "summary.json").exists()
    deployment.start_kit("server")
    lines: list[str] = []
    with opened(deployment.admin, START_TIMEOUT) as session:
        spec = spec_of(recipe, "killed", resume=True)
        submit(session, spec, tmp_path / "home", lines.append)
    summary = json.loads((tmp_path / "home" / "summary.json").read_text())
    for key in ("accuracy_by_round", "personal_accuracy", "bytes_up", "bytes_down", "label_counts"):
        assert summary[key] == json.loads(json.dumps(local[key])), key
    assert (summary["engine"], summary["failed_updates"]) == ("nvflare", 0)
    assert sluiceway.load(tmp_path / "home").round == len(summary["accuracy_by_round"])
    assert any(line.startswith("round 4:") for line in lines)


def test_a_site_that_was_killed_is_named_and_comes_back(
    deployment: Deployment, tables: dict[str, Any], tmp_path: Path
) -> None:
    tables["run"] |= {"rounds": 16, "timeout": 15.0}
    recipe = recipe_of(tables, "nvflare")
    folder = deployment.runs / "left"
    with opened(deployment.admin, START_TIMEOUT) as session:
        job = start_job(session, spec_of(recipe, "left"), tmp_path / "job", print)
        until(lambda: rounds_in(folder) >= 1)
        deployment.kill("south")
        deployment.start_kit("south")
        session.watch(job, print)
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    away = [record["round"] for record in rounds if record["failed"]]
    assert len(rounds) == 16
    assert away
    assert away[-1] < 16
    for record in rounds:
        assert list(record["failed"]) in ([], ["1"]), record
    assert json.loads((folder / "summary.json").read_text())["failed"][0]["client"] == 1


def test_a_split_run_gives_the_local_numbers_and_fifty_strangers_keep_nobody_out(
    deployment: Deployment, split_recipe: Path, tmp_path: Path
) -> None:
    """Strangers connect and say nothing; meanwhile a site begins anew, and the run is made."""
    settings = ["data.clients=2", "run.rounds=2", "method.name=acp-sl"]
    _, local = run(load_recipe(str(split_recipe), settings))
    recipe = load_recipe(str(split_recipe), [*settings, "run.engine=nvflare"])
    with opened(deployment.admin, START_TIMEOUT) as session:
        session.wait_for_sites(SITES, START_TIMEOUT, print)
    with contextlib.ExitStack() as stack:
        for number in range(50):
            stranger = stack.enter_context(socket.create_connection(deployment.admin.address, 10))
            if number % 2:
                stranger.sendall(b"\x16\x03\x01")  # the beginning of a TLS handshake, and no more
        deployment.kill("north")
        began = time.time()
        deployment.start_kit("north")
        with opened(deployment.admin, START_TIMEOUT) as session:
            until(lambda: last_heard(session, "north") > began)
            submit(session, spec_of(recipe, "split"), tmp_path / "home", print)
    summary = json.loads((tmp_path / "home" / "summary.json").read_text())
    model = sluiceway.load(tmp_path / "home")
    data, _, test = Session().images(recipe.data, lambda line: None)
    guessed = model.predict(data.test.images).probabilities.argmax(1)
    assert float((guessed == test.labels).double().mean()) == summary["accuracy"]
    for key in ("accuracy_by_round", "bytes_up", "bytes_down", "failed_updates"):
        assert summary[key] == local[key], key


def test_a_site_with_other_shapes_is_refused_in_one_line(
    deployment: Deployment, tables: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "wider"
    shutil.copytree(tables["model"]["name"], other)
    tiny_bert(width=24).save_pretrained(other)
    own = deployment.sites["south"]
    before = own.read_text()
    own.write_text(f'model = "{other}"\n{before}')
    spec = spec_of(recipe_of(tables, "nvflare"), "other")
    try:
        with (
            opened(deployment.admin, START_TIMEOUT) as session,
            pytest.raises(InputError) as refused,
        ):
            submit(session, spec, None, print)
    finally:
        own.write_text(before)
    assert re.fullmatch(r"site south: .*(shape|\[).*", str(refused.value))


def admitted(port: int, root: Path, keys: Credentials | None) -> bool:
    """Whether the server keeps a connection that is made as a site does."""
    context = ssl.create_default_context(cafile=str(root))
    context.set_alpn_protocols(["h2"])  # as gRPC's clients do
    if keys is not None:
        context.load_cert_chain(keys.certificate, keys.key)
    with (
        socket.create_connection(("localhost", port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.settimeout(2)
        try:
            return bool(secure.recv(1))
        except TimeoutError:
            return True
        except (ssl.SSLError, ConnectionError):
            return False


def test_other_certificates_are_rejected(deployment: Deployment, tmp_path: Path) -> None:
    kit = deployment.kits["north"]
    _, port = kit.address
    until(lambda: not socket.socket().connect_ex(("localhost", port)), START_TIMEOUT)
    root = kit.keys.root
    assert admitted(port, root, kit.keys)
    foreign = provision(tmp_path, "localhost", port, ["north"], "admin@sluiceway.local")
    stranger = next(kit for kit in foreign if kit.role == "site").keys
    assert not admitted(port, root, None)
    assert not admitted(port, root, stranger)
    with pytest.raises(ssl.SSLCertVerificationError):
        admitted(port, stranger.root, stranger)


def test_kits_hold_keys_that_only_their_owner_can_read(deployment: Deployment) -> None:
    for kit in deployment.kits.values():
        assert kit.folder.stat().st_mode & 0o077 == 0
        assert all(path.exists() for path in (kit.keys.certificate, kit.keys.key, kit.keys.root))


def test_recipes_are_given_to_the_server_whole(tables: dict[str, Any]) -> None:
    import tomli_w

    recipe = recipe_of(tables, "nvflare")
    given = recipe_from(tomllib.loads(tomli_w.dumps(recipe.resolved())))
    assert given.resolved() == recipe.resolved()
