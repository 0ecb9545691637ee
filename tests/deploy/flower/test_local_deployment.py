"""A real SuperLink with real SuperNodes, over TLS, each node with its key."""

from __future__ import annotations

import json
import os
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra [flower] is not installed")

from flwr.app import Context, RecordDict

from sluiceway.cli import main
from sluiceway.core.checkpoints import StorageError
from sluiceway.core.guards import RunFailed
from sluiceway.core.signals import Stopped
from sluiceway.deploy.flower import apps
from sluiceway.deploy.flower import local_deployment as trial
from sluiceway.deploy.flower.apps import DEFAULTS
from sluiceway.deploy.flower.certificates import new_node_key
from sluiceway.deploy.flower.deployment import Deployment, write_app
from sluiceway.deploy.flower.server import ENDS, ProgressLog, chosen
from sluiceway.deploy.site import open_site
from sluiceway.errors import InputError
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run

SMALL = ["run.rounds=2", "run.workers=2", "data.clients=2"]


def running(folder: Path) -> list[str]:
    """Command lines of processes that have anything to do with a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_one_command_gives_the_embedded_numbers(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And a SuperNode whose key is not registered is turned away meanwhile."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here, embedded = run(load_recipe(recipe, SMALL))
    turned_away = []

    def followed(flower: Deployment, *rest: Any) -> None:
        key, _ = new_node_key(flower.folder, "stranger")
        flower.start_node("stranger", {}, key)
        process = flower.processes.pop("stranger")
        follow(flower, *rest)
        assert process.wait(60) != 0
        turned_away.append(flower.log("stranger").read_text())

    follow = trial.followed
    monkeypatch.setattr(trial, "followed", followed)
    out = tmp_path / "out"
    words = [word for setting in SMALL for word in ("--set", setting)]
    assert main(["run", str(recipe), *words, "--engine", "flower", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["engine"] == "flower"
    assert summary.keys() == embedded.keys()
    assert summary["accuracy_by_round"] == here.accuracy_by_round
    for key in ("bytes_up", "bytes_down", "personal_accuracy", "label_counts", "refused", "failed"):
        assert summary[key] == embedded[key]
    assert (out / "report.html").exists()
    assert "round 2: accuracy" in capsys.readouterr().err
    assert "Failed to initialize the connection" in turned_away[0]
    assert not list(tmp_path.glob("sluiceway-*"))
    wait_until_gone(tmp_path)


def wait_until_gone(folder: Path) -> None:
    """No process has anything to do with a folder any more, within a moment."""
    deadline = time.monotonic() + 15
    while (left := running(folder)) and time.monotonic() < deadline:
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


def test_what_the_serverapp_tells_arrives(tmp_path: Path) -> None:
    """Half a line is left for later, and every outcome becomes its error."""
    path = tmp_path / "told"
    assert trial.new_lines(path, 0) == ([], 0)
    teller = ProgressLog(path)
    teller.tell("say", "hello")
    size = path.stat().st_size
    with path.open("a") as file:
        file.write('["up')
    assert trial.new_lines(path, 0) == ([("say", "hello")], size)
    for kind, error in {
        "input": InputError,
        "storage": StorageError,
        "failed": RunFailed,
        "error": RunFailed,
        "stopped": Stopped,
    }.items():
        with pytest.raises(error):
            trial.OUTCOMES[kind]("why")
    assert set(trial.OUTCOMES) == {*ENDS, "end", "error"}


def test_a_bad_run_configuration_is_one_line() -> None:
    for given, why in [
        ({}, "give recipe"),
        ({"recipe": "agnews"}, "give out"),
        ({"recipe": "agnews", "out": "x", "set": "run.rounds=0"}, "run.rounds"),
        ({"recipe": "split-quickstart", "out": "x"}, "federated runs only"),
    ]:
        with pytest.raises(InputError, match=why) as caught:
            chosen({**DEFAULTS, **given})
        assert "\n" not in str(caught.value)
    recipe, out = chosen({**DEFAULTS, "recipe": "agnews", "out": "x", "set": "run.rounds=3\n"})
    assert (recipe.run.rounds, recipe.run.engine, out) == (3, "flower", Path("x"))


def test_the_example_app_is_that_of_the_trial(tmp_path: Path) -> None:
    example = Path(__file__).parents[3] / "examples" / "flower" / "pyproject.toml"
    found = tomllib.loads(example.read_text())["tool"]["flwr"]["app"]
    write_app(tmp_path / "app", f"{trial.APPS}:server", f"{trial.APPS}:client", DEFAULTS)
    made = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert found["components"] == made["components"]
    assert found["config"] == {**made["config"], "recipe": "quickstart"}
    open_site(example.with_name("site.toml"))


def test_a_supernode_without_a_site_file() -> None:
    context = Context(1, 2, {}, RecordDict(), {}, 1)
    with pytest.raises(InputError, match="start the SuperNode with --node-config"):
        apps.site_file(context)
