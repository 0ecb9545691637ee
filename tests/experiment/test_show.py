"""`show`, `--dry-run`, keys without effect, and what is said during waits."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.experiment.conftest import Run

from sluiceway.cli import main
from sluiceway.core import waits
from sluiceway.core.round_loop import Record
from sluiceway.experiment import progress
from sluiceway.experiment.compare import folder_names
from sluiceway.experiment.recipe import load_recipe, recipe_from
from sluiceway.experiment.tables import method_label, shipped_recipes

#: Makes a recipe of texts one of images.
IMAGES = "--set data.name=digits --set model.name=conv4 --set method.name=fedavg"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_show_reads_back_as_the_same_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name]) == 0
    resolved = load_recipe(name).resolved()
    assert recipe_from(tomllib.loads(capsys.readouterr().out)).resolved() == resolved


def test_show_says_where_values_come_from(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["method.preset=paper", "data.alpha=3", "method.robust.name=median"]
    flags = [part for one in given for part in ("--set", one)]
    assert main(["show", str(recipe), *flags, "--device", "cpu"]) == 0
    lines = {
        line.split(" = ")[0]: line.split("# ")[1]
        for line in capsys.readouterr().out.splitlines()
        if "# " in line
    }
    expected = {
        "rounds": "recipe",
        "alpha": "--set",
        "device": "--set",
        "participation": "default",
        "weights": "preset paper",
        "beta": "default",
        "preset": "--set",
        "lr": "recipe",
        "batch_size": "default",
    }
    assert expected.items() <= lines.items()


@pytest.mark.parametrize(
    ("own", "command", "said"),
    [
        ("split_recipe", "--set run.workers=2", "run.workers = 2 has no effect here: it needs run"),
        ("split_recipe", "--set run.timeout=9", "run.timeout = 9.0 has no effect here: it needs"),
        ("recipe", "--set model.width=64", "model.width = 64 has no effect here"),
        ("recipe", "--set data.group=site", "it needs data.partition = 'natural'"),
        ("recipe", "--set train.momentum=0.9", "it needs train.optimizer = 'sgd'"),
        ("recipe", f"{IMAGES} --set model.lora=4", "model.lora = 4 has no effect here: it needs a"),
        ("recipe", f"{IMAGES} --set data.max_tokens=9", "has no effect here: it needs texts"),
        ("split_recipe", "--set data.local_test=0.2", "there is none with run.kind = 'split'"),
        ("recipe", "--set data.local_test=0.2 --set run.personal=0", "none with run.personal = 0"),
        ("recipe", "--set model.lora_gate=true", "it needs model.lora above 0"),
    ],
)
def test_keys_without_effect_are_refused_by_name(
    own: str, command: str, said: str, request: pytest.FixtureRequest, refused: Callable[..., str]
) -> None:
    assert said in refused("run", request.getfixturevalue(own), *command.split())


def test_a_key_varied_in_vain_is_refused_and_one_that_some_variant_uses_is_not(
    split_recipe: Path, recipe: Path, refused: Callable[..., str]
) -> None:
    said = refused("compare", split_recipe, "--vary", "run.workers=1,2")
    assert "run.workers = 1 has no effect here" in said
    both = ["--vary", "data.partition=pathological,iid", "--vary", "data.classes_per_client=1,2"]
    assert main(["compare", str(recipe), *both, "--dry-run"]) == 0


def test_a_file_may_keep_keys_for_variants_but_not_those_of_another_kind(recipe: Path) -> None:
    text = recipe.read_text()
    recipe.write_text(text.replace("experts = 4", "experts = 0\nlora_alpha = 4.0"))
    load_recipe(recipe, ["method.name=fedavg"])
    recipe.write_text(text.replace("experts = 4", "experts = 4\nwidth = 64"))
    with pytest.raises(ValueError, match=r"model\.width = 64 has no effect here"):
        load_recipe(recipe)


@pytest.mark.parametrize("own", ["recipe", "split_recipe"])
def test_a_dry_run_writes_nothing_and_foretells_the_bytes(
    own: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run: Run,
) -> None:
    path = request.getfixturevalue(own)
    out = tmp_path / "dry"
    assert main(["run", str(path), "--dry-run", "--out", str(out), "--set", "run.rounds=1"]) == 0
    shown = capsys.readouterr().out
    assert not out.exists()
    summary = run(path, "real", "run.rounds=1")
    up, down = (
        [
            float(line.split(" MB " + way)[0].split()[-1])
            for line in shown.splitlines()
            if f" MB {way}" in line
        ]
        for way in ("up", "down")
    )
    if own == "recipe":
        assert max(down) == pytest.approx(summary["bytes_down"] / 1e6, rel=0.006)
        assert summary["bytes_up"] / 1e6 <= max(up) * 1.006
        assert max(up) < 1.2 * summary["bytes_up"] / 1e6
    else:  # smashed data, then the layers each way
        layers = float(shown.split("layers of the clients, a round: ")[1].split()[0])
        actual = summary["bytes_up"] / 1e6  # with headers, of batches of a few kilobytes
        assert 0.8 * actual < up[0] + layers < actual


def test_a_dry_run_of_federated_images(
    split_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = load_recipe(split_recipe).data.name
    path = tmp_path / "federated.toml"
    path.write_text(
        f'[data]\nname = "{name}"\nclients = 3\nalpha = 1.0\nlimit = 60\ntest_limit = 20\n'
        '[model]\nname = "conv4"\nwidth = 8\n[method]\nname = "fedavg"\n[run]\nrounds = 2\n'
    )
    assert main(["run", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "model: conv4 from Sluiceway" in shown
    assert "on 60 examples a round" in shown


def test_a_dry_comparison_names_each_variant(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    varied = ["--vary", "method.name=fedavg,usage", "--seeds", "0,3", "--dry-run"]
    assert main(["compare", str(recipe), *varied]) == 0
    shown = capsys.readouterr().out
    assert "4 runs\nfedavg, seeds 0, 3\n  clients: 4" in shown
    assert "\nusage, seeds 0, 3\n" in shown


def test_folders_of_variants_need_no_quotes(tmp_path: Path) -> None:
    names = ["fedavg", "data.alpha=0.1, acp-sl", "model.name=a/b", "model.name=a b", "../x"]
    found = folder_names(names, tmp_path)
    assert list(found.values()) == [
        "fedavg",
        "data.alpha=0.1_acp-sl",
        "model.name=a_b",
        "model.name=a_b-2",
        "x",
    ]
    (tmp_path / "data.alpha=0.1, acp-sl").mkdir()  # of an earlier release
    assert folder_names(names, tmp_path)[names[1]] == "data.alpha=0.1, acp-sl"


def test_a_method_is_called_with_its_rule_and_optimiser() -> None:
    assert method_label({"name": "fedavg", "robust": {"name": "median"}}) == "fedavg + median"
    assert method_label({"name": "fedmoe", "robust": {"name": "none"}}) == "fedmoe"
    both = {"name": "fedmoe", "server": {"name": "adam"}, "robust": {"name": "krum"}}
    assert method_label(both) == "fedmoe + krum + adam"


def test_files_given_in_a_recipe_s_place_are_named(
    csv_file: Path,
    recipe: Path,
    run: Run,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "is data, not a recipe: name it in a recipe's [data]" in refused("run", csv_file)
    run(recipe, "out", "run.rounds=1")
    assert "after 1 round, " in capsys.readouterr().out
    assert "out is a run folder; its recipe is" in refused("show", tmp_path / "out")
    again = ["run", recipe, "--out", tmp_path / "out", "--resume", "--set", "data.alpha=0.7"]
    assert "data.alpha is 0.5 there and 0.7 here" in refused(*again)


def test_waits_are_told_of_ever_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(waits.time, "monotonic", lambda: float(next(clock)))
    told: list[tuple[str, int, int]] = []
    with waits.listening(lambda *said: told.append(said)):
        assert list(waits.counted("frozen layers", range(20), 20)) == list(range(20))
        assert list(waits.counted("short", range(1), 1)) == [0]
    assert told == [("frozen layers", n, 20) for n in (1, 3, 7, 15, 20)]
    assert list(waits.counted("nobody listens", "ab", 2)) == ["a", "b"]


def test_what_cannot_be_counted_is_told_of_after_two_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waits, "PATIENCE", 0.05)
    told: list[tuple[str, int, int]] = []
    with waits.listening(lambda *said: told.append(said)):
        with waits.announced("loading"):
            time.sleep(0.2)
        with waits.announced("short"):
            pass
        with contextlib.suppress(ValueError), waits.announced("failing"):
            time.sleep(0.2)
            raise ValueError
    assert told == [(what, n, 1) for what in ("loading", "failing") for n in (0, 1)]


def test_plain_progress_of_a_slow_run_stays_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred rounds of forty seconds: every client of every round waits and says so."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

    def lines_of(rounds: int, seconds: float) -> list[str]:
        with progress.plain() as told:
            told.begin(rounds)
            for number in range(1, rounds + 1):
                for client in range(10):
                    told.on_update(client, 10)
                    for _ in waits.counted("training of a client, steps", range(8), 8):
                        clock[0] += seconds / 80
                told.on_round(Record(number, 0.5, 1.0, 1.0, 10, 10, seconds, [0], {}, []))
        return capsys.readouterr().err.splitlines()

    slow = lines_of(100, 40.0)
    assert sum(one.startswith("round ") and ":" in one and "loss" in one for one in slow) == 100
    assert len([one for one in slow if "loss" not in one]) <= 2 * (6 + 100 * 40 / 60)
    quick = lines_of(1000, 0.1)
    assert quick[0].startswith("round 1:")
    assert quick[-1].startswith("round 1000:")
    assert len(quick) <= 100 / 2 + 2


def test_every_option_says_its_default_and_needs_no_torch() -> None:
    code = """
import sys, typer, click
from sluiceway.cli import app
def walk(command, path):
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from walk(inner, [*path, name])
    else:
        yield path, command
for path, command in walk(typer.main.get_command(app), []):
    for option in command.params:
        if type(option).__name__.endswith("Option") and not option.is_flag and not option.required:
            context = click.Context(command)
            said = option.get_help_record(context)
            if "default:" not in said[1]:
                print(" ".join(path), said)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_seconds_go_on_after_a_resume(
    recipe: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as slow:
        clock = itertools.count(0, 100)
        slow.setattr(time, "perf_counter", lambda: float(next(clock)))
        run(recipe, "out", "run.rounds=1")
    again = ["run", recipe, "--out", tmp_path / "out", "--resume", "--set", "run.rounds=2"]
    assert main([*map(str, again)]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["seconds"] >= summary["round_seconds"] >= 100
