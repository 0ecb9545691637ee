"""A real SuperLink with real SuperNodes, over TLS, each node with its key."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra [flower] is not installed")

from flwr.app import Context, RecordDict

from sluiceway.cli import main
from sluiceway.core.guards import RunFailed
from sluiceway.core.signals import Stopped
from sluiceway.deploy.flower import apps, local_deployment
from sluiceway.deploy.flower.apps import DEFAULTS
from sluiceway.deploy.flower.certificates import new_node_key
from sluiceway.deploy.flower.deployment import Deployment, write_app
from sluiceway.deploy.flower.server import ProgressLog, recipe_and_folder
from sluiceway.deploy.outcome import raise_outcome
from sluiceway.deploy.site import open_site
from sluiceway.errors import InputError
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run

SMALL = ["run.rounds=2", "run.workers=2", "data.clients=2", "model.head_start=ridge"]


def running(folder: Path) -> list[str]:
    """Command lines of processes whose environment names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def status_for(user: int, port: int) -> int:
    """What the SuperLink's port answers a user who asks for its runs, as root can try."""
    connection = http.client.HTTPSConnection(
        "127.0.0.1", port, context=ssl._create_unverified_context()
    )
    os.seteuid(user)
    try:
        connection.connect()
    finally:
        os.seteuid(os.getuid())
    connection.request("POST", "/v1/control/list-runs", headers={"X-Forwarded-For": "127.0.0.1"})
    return connection.getresponse().status


@pytest.mark.engine
@pytest.mark.slow
def test_one_command_gives_the_local_numbers(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And a SuperNode whose key is not registered is rejected meanwhile, and so are other users."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here, local = run(load_recipe(recipe, SMALL))
    rejected = []
    plain = local_deployment.follow

    def follow(flower: Deployment, *rest: Any) -> None:
        key, _ = new_node_key(flower.folder, "stranger")
        flower.start_node("stranger", {}, key)
        process = flower.running.pop("stranger")
        assert status_for(os.getuid(), flower.port) != 403
        if os.getuid() == 0:
            assert status_for(65534, flower.port) == 403
        plain(flower, *rest)
        assert process.wait(60) != 0
        rejected.append(flower.logs["stranger"].read_text())

    monkeypatch.setattr(local_deployment, "follow", follow)
    out = tmp_path / "out"
    words = [word for setting in SMALL for word in ("--set", setting)]
    assert main(["run", str(recipe), *words, "--engine", "flower", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["engine"] == "flower"
    assert summary.keys() == local.keys()
    assert summary["accuracy_by_round"] == here.accuracy_by_round
    for key in ("bytes_up", "bytes_down", "personal_accuracy", "label_counts", "refused", "failed"):
        assert summary[key] == local[key]
    assert (out / "report.html").exists()
    assert "round 2: accuracy" in capsys.readouterr().err
    assert "Failed to initialize the connection" in rejected[0]
    assert not list(tmp_path.glob("sluiceway-*"))
    deadline = time.monotonic() + 15
    while (left := running(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_split_training_is_refused(split_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(split_recipe), "--engine", "flower"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "run.engine = 'flower' carries federated runs only" in said


def test_other_ways_to_run_are_refused(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"run\.engine = 'flower' is for `sluiceway run`"):
        run(load_recipe(recipe, ["run.engine=flower"]))


def test_progress_and_outcome_of_the_serverapp(tmp_path: Path) -> None:
    """Half a line is left for later, and every outcome becomes its error."""
    path = tmp_path / "progress"
    assert local_deployment.new_lines(path, 0) == ([], 0)
    ProgressLog(path).write("say", "hello")
    size = path.stat().st_size
    with path.open("a") as file:
        file.write('["up')
    assert local_deployment.new_lines(path, 0) == ([("say", "hello")], size)
    raise_outcome(0, "")
    for code, error in {1: RunFailed, 2: InputError, 130: Stopped}.items():
        with pytest.raises(error, match=None if code == 130 else "^why$"):
            raise_outcome(code, "why")


def test_a_bad_run_configuration_is_one_line() -> None:
    for given, why in [
        ({}, "give recipe"),
        ({"recipe": "agnews"}, "give out"),
        ({"recipe": "agnews", "out": "x", "set": "run.rounds=0"}, "run.rounds"),
        ({"recipe": "split-quickstart", "out": "x"}, "federated runs only"),
    ]:
        with pytest.raises(InputError, match=why) as caught:
            recipe_and_folder({**DEFAULTS, **given})
        assert "\n" not in str(caught.value)
    given = {**DEFAULTS, "recipe": "agnews", "out": "x", "set": "run.rounds=3\ndata.clients=2\n"}
    recipe, out = recipe_and_folder(given)
    assert (recipe.run.rounds, recipe.data.clients) == (3, 2)
    assert (recipe.run.engine, out) == ("flower", Path("x"))


def test_the_example_app_is_that_of_a_local_deployment(tmp_path: Path) -> None:
    example = Path(__file__).parents[3] / "examples" / "flower" / "pyproject.toml"
    found = tomllib.loads(example.read_text())["tool"]["flwr"]["app"]
    module = local_deployment.APPS
    write_app(tmp_path / "app", f"{module}:server", f"{module}:client", DEFAULTS)
    made = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert found["components"] == made["components"]
    assert found["config"] == {**made["config"], "recipe": "quickstart"}
    open_site(example.with_name("site.toml"))


def test_a_supernode_without_a_site_file() -> None:
    context = Context(1, 2, {}, RecordDict(), {}, 1)
    with pytest.raises(InputError, match="start the SuperNode with --node-config"):
        apps.site_file(context)
