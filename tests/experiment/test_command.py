"""The command as a user meets it, on a small model and a small file of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sluiceway import __version__
from sluiceway.cli import main
from sluiceway.experiment.methods import methods
from sluiceway.strategies import STRATEGIES

KEYS = {
    *("recipe", "method", "seed", "rounds", "accuracy", "best_accuracy", "accuracy_by_round"),
    *("bytes_up", "bytes_down", "seconds", "clients", "engine", "device", "versions"),
}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_run_leaves_a_run_folder(recipe: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    assert main(["run", str(recipe), "--set", f"method.name={name}", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert summary["method"] == name
    assert summary["recipe"]["method"]["name"] == name
    assert summary["accuracy"] == summary["accuracy_by_round"][-1]
    assert len(summary["accuracy_by_round"]) == summary["rounds"] == 3
    assert (summary["engine"], summary["device"], summary["clients"]) == ("local", "cpu", 4)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["accuracy"] for line in lines] == summary["accuracy_by_round"]
    assert sum(line["bytes_up"] for line in lines) == summary["bytes_up"]
    assert (out / "report.html").stat().st_size > 10_000
    assert list((out / "checkpoints").iterdir())
    assert "method" in (out / "recipe.toml").read_text()


def test_a_stopped_run_is_continued_to_the_same_numbers(recipe: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(["run", str(recipe), "--out", str(whole)]) == 0
    assert main(["run", str(recipe), "--out", str(part)]) == 0
    (part / "summary.json").unlink()  # as after a kill before the summary
    assert main(["run", str(recipe), "--out", str(part), "--resume"]) == 0
    one, two = (json.loads((f / "summary.json").read_text()) for f in (whole, part))
    for key in ("accuracy_by_round", "bytes_up", "bytes_down", "personal_accuracy"):
        assert one[key] == two[key]


def test_a_folder_with_a_run_is_not_overwritten(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["run", str(recipe), "--out", out]) == 0
    assert main(["run", str(recipe), "--out", out]) == 2
    assert "already holds a run; give --resume, --force or another --out" in capsys.readouterr().err
    other = ["run", str(recipe), "--out", out, "--set", "run.seed=1"]
    assert main([*other, "--resume"]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err
    assert main([*other, "--force"]) == 0


def test_compare_pairs_by_seed_and_keeps_what_is_done(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", str(recipe), "--vary", "method.name=fedavg,usage", "--out", str(out)]
    assert main([*arguments, "--seeds", "0,1"]) == 0
    printed = capsys.readouterr().out
    table = json.loads((out / "compare.json").read_text())
    first, second = table["variants"]
    assert (first["name"], second["name"]) == ("fedavg", "usage")
    gaps = [second["runs"][s]["accuracy"] - first["runs"][s]["accuracy"] for s in ("0", "1")]
    assert second["against_first"]["accuracy"]["mean"] == pytest.approx(sum(gaps) / 2)
    # t(0.975, 1) = 12.7062, s / sqrt(2) = |difference| / 2
    half = 12.7062 * abs(gaps[0] - gaps[1]) / 2
    assert second["against_first"]["accuracy"]["half"] == pytest.approx(half, rel=1e-4)
    assert "| usage |" in printed
    assert (out / "report.html").exists()
    seconds = second["runs"]["0"]["seconds"]
    assert main([*arguments, "--seeds", "0,1,2"]) == 0
    again = json.loads((out / "compare.json").read_text())["variants"][1]["runs"]
    assert again["0"]["seconds"] == seconds  # not run a second time
    assert set(again) == {"0", "1", "2"}


def test_compare_with_and_without_a_robust_rule(recipe: Path, tmp_path: Path) -> None:
    out, vary = tmp_path / "out", "method.robust.name=none,median,norm-clipping"
    assert main(["compare", str(recipe), "--vary", vary, "--out", str(out)]) == 0
    variants = json.loads((out / "compare.json").read_text())["variants"]
    assert [v["name"] for v in variants] == [
        f"method.robust.name={name}" for name in ("none", "median", "norm-clipping")
    ]
    assert {v["runs"]["0"]["method"] for v in variants} == {"fedalign-moe"}
    plain = tmp_path / "plain"
    assert main(["run", str(recipe), "--out", str(plain)]) == 0
    found = json.loads((plain / "summary.json").read_text())
    for key in ("accuracy_by_round", "bytes_up", "bytes_down"):
        assert found[key] == variants[0]["runs"]["0"][key]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command says."""
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if line.startswith("sluiceway:")]) == 1
    assert "Traceback" not in "\n".join(said)
    return said[-1]


def test_bad_input_is_one_line_and_exit_code_2(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*settings: str) -> str:
        flags = [part for setting in settings for part in ("--set", setting)]
        return refused(["run", str(recipe), "--out", str(tmp_path / "bad"), *flags], capsys)

    assert "unknown key run.epochs; allowed in [run]: kind" in run("run.epochs=3")
    assert "data.alpha = 0: must be greater than 0" in run("data.alpha=0")
    assert "1000 clients for 120 examples" in run("data.clients=1000")
    assert "method fedalign-moe needs a mixture-of-experts model" in run("model.experts=0")
    assert "'topic'" in run("data.label_column=topic")
    assert "top_k" in run("model.top_k=9")
    assert "no model could be loaded" in run(f"model.name={tmp_path}")
    assert "nosuch.csv" in run("data.path=nosuch.csv")
    assert "run.device = 'tpu' cannot be used here" in run("run.device=tpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SLUICEWAY_DATA", str(tmp_path))
    nowhere = refused(["run", "agnews", "--out", str(tmp_path / "bad")], capsys)
    assert "SLUICEWAY_DATA" in nowhere
    assert "hub" in nowhere
    assert "no recipe 'nosuch'" in refused(["run", "nosuch"], capsys)
    assert "--seeds a,b" in refused(["compare", str(recipe), "--seeds", "a,b"], capsys)
    assert "cannot vary 'x'" in refused(["compare", str(recipe), "--vary", "x"], capsys)
    assert "summary.json" in refused(["report", str(tmp_path)], capsys)


def test_a_refused_recipe_leaves_no_folder(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "none"
    for setting in ("data.alpha=0", "model.experts=0", "data.clients=1000"):
        assert main(["run", str(recipe), "--out", str(out), "--set", setting]) == 2
        assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "sluiceway: Missing command."),
        (["run"], "sluiceway run: Missing argument 'RECIPE'."),
        (
            ["run", "x", "--sett", "a"],
            "sluiceway run: No such option '--sett'. Did you mean '--set'?",
        ),
        (
            ["inspect", "x", "--width", "w"],
            "sluiceway inspect: Invalid value for '--width': 'w' is",
        ),
        (
            ["deploy", "nvflare", "submit", "x"],
            "sluiceway deploy nvflare submit: Missing option '--k",
        ),
        (
            ["keys", "nosuch"],
            "sluiceway: 'nosuch' is no table or method; allowed: run, data, model",
        ),
        (
            ["methods", "nosuch"],
            "sluiceway: 'nosuch' is no kind of method; allowed: federated, split",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith(said)


def test_help_lists_flags_with_defaults_and_needs_no_torch() -> None:
    code = (
        "import sys; from sluiceway.cli import main; "
        "codes = [main(a.split()) for a in sys.argv[1:]]; "
        "print(codes, [m for m in ('torch', 'rich') if m in sys.modules])"
    )
    given = ["--version", "recipes", "inspect -h", "run --help", "compare -h", "deploy nvflare -h"]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.stdout.startswith(f"sluiceway {__version__}\n")
    assert done.stdout.endswith(f"{[0] * len(given)} []\n")
    for flag in ("--set KEY=VALUE", "--out DIR", "--resume", "--force", "--seeds 0,1,2"):
        assert flag in done.stdout
    assert "[default: 3x32x32]" in done.stdout
    assert "`sluiceway keys`" in done.stdout


def test_methods_and_keys_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == main(["methods", "robust"]) == 0
    shown = capsys.readouterr().out
    for method in methods():
        assert f"  {method.name} " in shown
        assert shown.count(method.text[:40]) == (2 if method.kind == "robust" else 1)
    assert main(["keys"]) == main(["keys", "fedprox"]) == main(["keys", "median"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "run.rounds Rounds to train." in shown
    assert "(integer, >= 1, <= 99,999; default 10)" in shown
    assert "method.mu Strength of the proximal term" in shown
    assert "median has no parameters" in shown


@pytest.mark.parametrize(
    ("typed", "offered"), [("sluiceway ru", {"run"}), ("sluiceway run quick", {"quickstart"})]
)
def test_the_shell_completes_commands_and_recipes(typed: str, offered: set[str]) -> None:
    asked = {
        "_SLUICEWAY_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-m", "sluiceway.cli"],
        capture_output=True,
        text=True,
        env=os.environ | asked,
    )
    assert set(done.stdout.split()) == offered


def test_inspect_shows_routers_experts_and_traffic(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(model_folder), "--experts", "4"]) == 0
    shown = capsys.readouterr().out
    assert "router.weight [4, 16]" in shown
    assert "experts.up_proj [4, 32, 16]" in shown
    assert "across the wire" in shown
    # up 32 * 16 + 32, down 16 * 32 + 16, times four experts of four bytes, and the router
    assert f"{(4 * (2 * 512 + 48) + 4 * 16) * 4 / 1e6:.1f} MB" in shown
    assert "--experts 8 shows a dense model" in refused(["inspect", str(model_folder)], capsys)


def test_inspect_shows_what_adapters_make_of_the_traffic(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(model_folder), "--experts", "4", "--lora", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    lines = {words[0]: words[1:] for line in shown if (words := line.split())}
    # of rank 2 and 4 experts, up and down: A 2 * (16 + 32), B 2 * (32 + 16); a router of 4 * 16
    a, b, router, base = (4 * n for n in (4 * 2 * 48, 4 * 2 * 48, 64, 4 * 2 * 512))
    for name, up, down in (
        ("frozen-a", b, a + b),
        ("residual", a + b, a + b + base),
        ("average", a + b, a + b),
    ):
        assert lines[name] == [f"{(n + router) / 1e6:.2f}" for n in (up, down)]


def test_recipes_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in ("quickstart", "agnews", "banking77", "clinc150-domains"):
        assert name in listed
