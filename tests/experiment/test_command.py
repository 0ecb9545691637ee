"""The command as a user meets it, on a small model and small files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.experiment.conftest import Run
from transformers import AutoModel, BertConfig, LlamaConfig, PreTrainedConfig

from sluiceway import __version__
from sluiceway.cli import main
from sluiceway.core.round_loop import Rounds
from sluiceway.core.settings import Training
from sluiceway.experiment.methods import methods
from sluiceway.experiment.run import pooled_training
from sluiceway.split.methods import METHODS
from sluiceway.split.rounds import SplitLoop, SplitRecord
from sluiceway.strategies import BASELINES, STRATEGIES

KEYS = {
    *("recipe", "method", "seed", "rounds", "accuracy", "best_accuracy", "accuracy_by_round"),
    *("bytes_up", "bytes_down", "seconds", "clients", "engine", "device", "versions"),
    *("rejected", "rejected_updates", "refused", "refused_updates"),
}
SPLIT_KEYS = {"accuracy_full", "accuracy_full_by_round", "kept_by_round", "channels"}


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Path:
    """The recipe that `request.param` names: a file of one's own."""
    if request.param == "split_recipe":
        pytest.importorskip("sklearn")
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "name"),
    [
        *(("recipe", n) for n in sorted({**STRATEGIES, **BASELINES})),
        *(("split_recipe", n) for n in sorted(METHODS)),
    ],
    indirect=["own"],
)
def test_every_method_leaves_a_run_folder(own: Path, name: str, tmp_path: Path, run: Run) -> None:
    summary, out = run(own, "out", f"method.name={name}"), tmp_path / "out"
    split = summary["recipe"]["run"]["kind"] == "split"
    assert set(summary) >= KEYS | (SPLIT_KEYS if split else set())
    assert summary["method"] == summary["recipe"]["method"]["name"] == name
    assert summary["accuracy"] == summary["accuracy_by_round"][-1]
    assert len(summary["accuracy_by_round"]) == summary["rounds"] == (4 if split else 3)
    told = summary["engine"], summary["device"], summary["clients"]
    assert told == ("local", "cpu", 3 if split else 4)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["accuracy"] for line in lines] == summary["accuracy_by_round"]
    assert sum(line["bytes_up"] for line in lines) == summary["bytes_up"]
    if split:
        assert [line["accuracy_full"] for line in lines] == summary["accuracy_full_by_round"]
    assert (out / "report.html").stat().st_size > 10_000
    assert list((out / "checkpoints").iterdir())
    assert "method" in (out / "recipe.toml").read_text()


def test_a_split_run_has_the_threads_of_its_recipe(
    split_recipe: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    seen, run_round = set[int](), SplitLoop.run_round

    def noted(*given: Any) -> SplitRecord:
        seen.add(torch.get_num_threads())
        return run_round(*given)

    monkeypatch.setattr(SplitLoop, "run_round", noted)
    before = torch.get_num_threads()
    run(split_recipe, "out", "run.threads=3")
    assert (seen, torch.get_num_threads()) == ({3}, before)


@pytest.mark.parametrize("own", ["split_recipe"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [["run.schedule=sequential"], ["run.form=copies"], ["run.schedule=u", "model.tail=conv4"]],
)
def test_every_schedule_drops_channels(own: Path, settings: list[str], run: Run) -> None:
    paper = ["method.name=acp-sl", "method.preset=paper", "method.quantize=int8"]
    summary = run(own, "out", *settings, *paper)
    assert summary["kept_by_round"][0] == summary["channels"] == 8
    assert summary["kept_by_round"][-1] < 8
    # Known of every site, U-shaped too, as docs/deploy.md says: whoever submits reads them.
    assert sum(map(sum, summary["label_counts"])) == 240


@pytest.mark.parametrize("own", ["split_recipe"], indirect=True)
def test_the_same_seed_is_the_same_run(own: Path, run: Run) -> None:
    found = [run(own, name, "method.name=acp-sl") for name in ("one", "two")]
    for key in ("accuracy_by_round", "bytes_by_round", "masks_by_round", "scores_by_round"):
        assert found[0][key] == found[1][key]


@pytest.mark.slow
def test_a_folder_with_a_run_is_continued_or_replaced_only_when_asked(
    recipe: Path, tmp_path: Path, run: Run, refused: Callable[..., str]
) -> None:
    one, out = run(recipe), tmp_path / "out"
    again = ["run", recipe, "--out", out]
    assert "already holds a run; give --resume, --force or another --out" in refused(*again)
    (out / "summary.json").unlink()  # as after a kill before the summary
    assert main([*map(str, again), "--resume"]) == 0
    two = json.loads((out / "summary.json").read_text())
    for key in ("accuracy_by_round", "bytes_up", "bytes_down", "personal_accuracy"):
        assert one[key] == two[key]
    other = [*again, "--set", "run.seed=1"]
    said = "holds a run of another recipe: run.seed is 0 there and 1 here; see"
    assert said in refused(*other, "--resume")
    assert main([*map(str, other), "--force"]) == 0


@pytest.mark.slow
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


@pytest.mark.slow
def test_compare_with_and_without_a_robust_rule(recipe: Path, tmp_path: Path, run: Run) -> None:
    out, vary = tmp_path / "compared", "method.robust.name=none,median,norm-clipping"
    assert main(["compare", str(recipe), "--vary", vary, "--out", str(out)]) == 0
    variants = json.loads((out / "compare.json").read_text())["variants"]
    assert [v["name"] for v in variants] == [
        f"method.robust.name={name}" for name in ("none", "median", "norm-clipping")
    ]
    assert {v["runs"]["0"]["method"] for v in variants} == {"fedalign-moe"}
    plain = run(recipe)
    for key in ("accuracy_by_round", "bytes_up", "bytes_down"):
        assert plain[key] == variants[0]["runs"]["0"][key]


@pytest.mark.slow
@pytest.mark.parametrize("own", ["split_recipe"], indirect=True)
def test_compare_split_methods(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    vary = ["--vary", "method.name=sl,acp-sl", "--seeds", "0,1"]
    assert main(["compare", str(own), *vary, "--out", str(out)]) == 0
    table = json.loads((out / "compare.json").read_text())
    plain, pruned = (entry["measures"]["bytes_up"]["mean"] for entry in table["variants"])
    assert pruned < plain
    assert "| acp-sl |" in capsys.readouterr().out
    assert (out / "report.html").exists()


def test_central_takes_the_clients_steps_on_their_examples(recipe: Path, run: Run) -> None:
    settings = ["train.batch_size=8", "model.head_start=means", "run.rounds=1"]
    federated = run(recipe, "federated", "method.name=fedavg", *settings)
    central = run(recipe, "central", "method.name=central", *settings, "run.stacked=4")
    start = run(recipe, "start", "method.name=class-means", *settings)
    held = np.asarray(federated["label_counts"])
    assert central["label_counts"] == [held.sum(0).tolist()]
    assert central["bytes_up"] < federated["bytes_up"]
    assert start["accuracy"] is not None
    assert start["mean_personal_accuracy"] is None
    clients = [range(n) for n in held.sum(1)]
    for share in (1.0, 0.5):
        plan = Rounds(participation=share)
        training = pooled_training(Training(batch_size=8, local_epochs=2), plan, clients)
        steps = share * sum(2 * math.ceil(len(part) / 8) for part in clients)
        assert training.steps(10**6) == training.steps(1) == round(steps)


@pytest.mark.parametrize(
    ("own", "setting", "line"),
    [
        ("recipe", "run.epochs=3", "unknown key run.epochs; allowed in [run]: kind"),
        ("recipe", "data.alpha=0", "data.alpha = 0: must be greater than 0 (Concentration of"),
        ("recipe", "data.clients=1000", "1000 clients for 120 examples"),
        ("recipe", "model.experts=0", "method fedalign-moe needs a mixture-of-experts model"),
        ("recipe", "data.label_column=topic", "'topic'"),
        ("recipe", "model.top_k=9", "top_k"),
        ("recipe", "model.name=.", "no model could be loaded"),
        ("recipe", "data.path=nosuch.csv", "nosuch.csv"),
        ("recipe", "run.device=tpu", "run.device = 'tpu' cannot be used here"),
        (
            "recipe",
            "method.name=central run.engine=nvflare",
            "method.name = 'central' pools all examples, which run.engine = 'nvflare' never does",
        ),
        (
            "recipe",
            "method.name=class-means model.head_start=random",
            "method class-means trains nothing: it needs model.head_start = 'means' or 'ridge'",
        ),
        (
            "recipe",
            "model.head_start=means model.answer=likelihood",
            "model.head_start = 'means' is for federated runs in which a head scores classes",
        ),
        ("split_recipe", "model.head_start=ridge", "model.head_start = 'ridge' is for federated"),
        ("recipe", "run.stacked=-1", "run.stacked = -1: must be greater than or equal to 0"),
        ("split_recipe", "run.stacked=4", "run.stacked = 4 cannot be used with run.kind = 'split'"),
        ("split_recipe", "model.cut=conv9", "'conv9' is no layer of the network; it can be cut at"),
        ("split_recipe", "model.cut=head", "last layer"),
        ("split_recipe", "data.clients=300", "300 clients"),
    ],
    indirect=["own"],
)
def test_a_bad_recipe_is_one_line_and_leaves_no_folder(
    own: Path, setting: str, line: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    given = [part for one in setting.split(" ") for part in ("--set", one)]
    assert line in refused("run", own, "--out", tmp_path / "bad", *given)
    assert not (tmp_path / "bad").exists()


def test_bad_names_and_folders_are_one_line(
    recipe: Path,
    csv_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SLUICEWAY_DATA", str(tmp_path))
    nowhere = refused("run", "agnews", "--out", tmp_path / "bad")
    assert "SLUICEWAY_DATA" in nowhere
    assert "hub" in nowhere
    assert "no recipe 'nosuch'" in refused("run", "nosuch")
    assert "--seeds a,b" in refused("compare", recipe, "--seeds", "a,b")
    assert "cannot vary 'x'" in refused("compare", recipe, "--vary", "x")
    assert "summary.json" in refused("report", tmp_path)
    assert "is data, not a recipe" in refused("run", csv_file)
    for name, why in (("./nosuch", "no such folder"), (csv_file, "is a file; a model is a folder")):
        assert f"model.name = '{name}': {why}" in refused("inspect", name)
    assert "There is no folder 'nosuch' either." in refused("inspect", "nosuch")
    assert "--image big" in refused("inspect", "vgg11", "--image", "big")


@pytest.mark.parametrize("family", [BertConfig, LlamaConfig])
def test_a_model_without_a_tokenizer_is_said(
    family: type[PreTrainedConfig], recipe: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """For a BERT transformers would make a tokenizer without words, and train on [UNK] alone."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = family(vocab_size=60, num_hidden_layers=1, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "bare")
    given = ["--set", f"model.name={tmp_path / 'bare'}", "--out", tmp_path / "bad"]
    said = f"there is a {config.model_type} model and no tokenizer; save"
    assert said in refused("run", recipe, *given)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "sluiceway: Missing command."),
        ("run", "sluiceway run: Missing argument 'RECIPE'."),
        ("run x --sett a", "sluiceway run: No such option '--sett'. Did you mean '--set'?"),
        ("run -v x", "sluiceway run: No such option '-v'. See `sluiceway run --help`."),
        ("inspect x --width w", "sluiceway inspect: Invalid value for '--width': 'w' is not a"),
        ("deploy nvflare submit x", "sluiceway deploy nvflare submit: Missing option '--kit'"),
        ("keys nosuch", "sluiceway: 'nosuch' is no table or method; allowed: run, data, model"),
        ("methods nosuch", "sluiceway: 'nosuch' is no kind of method; allowed: federated, split"),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
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
    given = ["-v", "recipes", "inspect -h", "run --help", "compare -h", "deploy nvflare -h"]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.stdout.startswith(f"sluiceway {__version__}\n")
    assert done.stdout.endswith(f"{[0] * len(given)} []\n")
    for flag in ("--set KEY=VALUE", "--out DIR", "--resume", "--force", "--seeds 0,1,2"):
        assert flag in done.stdout
    assert "[default: 3x32x32]" in done.stdout
    assert "`sluiceway keys`" in done.stdout
    for name in ("quickstart", "agnews", "banking77", "clinc150-domains"):
        assert f"\n{name} " in done.stdout


def test_a_mistyped_recipe_or_key_is_said_without_torch() -> None:
    code = (
        "import sys; from sluiceway.cli import main; "
        "codes = [main(a.split()) for a in sys.argv[1:]]; "
        "print(codes, [m for m in ('torch', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    given = [
        "run nosuch",
        "run agnews --set run.round=2",
        "compare mmlu --set data.alpha=-1",
        "run agnews --set method.mu=2",
        "run split-quickstart --set train.lrr=2",
    ]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.stdout == f"{[2] * len(given)} []\n"
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [
        " no recipe 'nosuch'",
        " unknown key run.round; allowed in [run]",
        " data.alpha = -1",
        " unknown key method.mu; allowed in [method]",
        " unknown key train.lrr; allowed in [train]",
    ]


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
    command = [sys.executable, "-m", "sluiceway"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked)
    assert set(done.stdout.split()) == offered


def test_inspect_shows_routers_experts_and_traffic(
    model_folder: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    assert main(["inspect", str(model_folder), "--experts", "4"]) == 0
    shown = capsys.readouterr().out
    assert "router.weight [4, 16]" in shown
    assert "experts.up_proj [4, 32, 16]" in shown
    assert "across the wire" in shown
    # up 32 * 16 + 32, down 16 * 32 + 16, times four experts of four bytes, and the router
    assert f"{(4 * (2 * 512 + 48) + 4 * 16) * 4 / 1e6:.1f} MB" in shown
    assert "--experts 8 shows a dense model" in refused("inspect", model_folder)


def test_inspect_shows_what_adapters_make_of_the_traffic(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(model_folder), "--experts", "4", "--lora", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    lines = {words[0]: words[1:] for line in shown if (words := line.split())}
    # of rank 2 and 4 experts, up and down: A 2 * (16 + 32), B 2 * (32 + 16); a router of 4 * 16
    a, b, router, base = (4 * n for n in (4 * 2 * 48, 4 * 2 * 48, 64, 4 * 2 * 512))
    traffic = {"frozen-a": (b, a + b), "residual": (a + b, a + b + base), "average": (a + b, a + b)}
    for name, both in traffic.items():
        assert lines[name] == [f"{(n + router) / 1e6:.2f}" for n in both]


def test_inspect_lists_cut_points_with_their_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "conv4", "--width", "8", "--image", "1x28x28"]) == 0
    shown = capsys.readouterr().out
    assert "conv2" in shown
    assert "8x7x7" in shown
    assert f"{8 * 7 * 7 * 4:,}" in shown


@pytest.mark.parametrize("own", ["recipe"], indirect=True)
def test_evaluation_every_k_rounds_and_no_personal_models(
    own: Path, tmp_path: Path, run: Run
) -> None:
    whole = run(own, "whole", "run.rounds=5")
    some = run(own, "some", "run.rounds=5", "run.evaluate_every=2", "run.personal=0")
    every = whole["accuracy_by_round"]
    assert some["accuracy_by_round"] == [None, every[1], None, every[3], every[4]]
    assert some["best_accuracy"] == max(every[1], every[3], every[4])
    assert some["accuracy_by_client"] == whole["accuracy_by_client"]
    assert (some["personal_accuracy"], some["mean_personal_accuracy"]) == ({}, None)
    assert (tmp_path / "some" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "needs"),
    [
        ("run quickstart --dry-run --force", "--force has no effect here: it needs no --dry-run"),
        ("run quickstart --resume --force", "--resume has no effect here: it needs no --force"),
        ("inspect conv4 --experts 2", "--experts has no effect here: it needs a model of texts"),
        ("inspect conv4 --device cpu", "--device has no effect here: it needs --inversion"),
        ("inspect minilm --width 8", "--width has no effect here: it needs a network for images"),
        ("inspect minilm --top-k 1", "--top-k has no effect here: it needs --experts above 0"),
        ("inspect runs/a --inversion --lora 2", "--lora has no effect here: it needs no"),
        ("inspect net.py:make --width 8", "--width has no effect here: it needs a network by name"),
        (
            "deploy nvflare submit quickstart --kit kits/admin --set run.engine=flower",
            "run.engine has no effect here: what is submitted runs over nvflare",
        ),
        ("deploy nvflare submit quickstart --kit kits/admin --engine flower", "No such option"),
    ],
)
def test_options_without_effect_are_refused(
    refused: Callable[..., str], arguments: str, needs: str
) -> None:
    assert needs in refused(*arguments.split())
