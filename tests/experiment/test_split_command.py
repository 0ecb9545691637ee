"""Split runs by the command, on scikit-learn's digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sluiceway.cli import main
from sluiceway.split.methods import METHODS

pytest.importorskip("sklearn")

KEYS = {
    *("recipe", "method", "seed", "rounds", "accuracy", "best_accuracy", "accuracy_by_round"),
    *("bytes_up", "bytes_down", "seconds", "clients", "engine", "device", "versions"),
    *("accuracy_full", "accuracy_full_by_round", "kept_by_round", "channels"),
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_leaves_a_run_folder(split_recipe: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    assert main(["run", str(split_recipe), "--set", f"method.name={name}", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert summary["recipe"]["method"]["name"] == summary["method"] == name
    assert len(summary["accuracy_by_round"]) == summary["rounds"] == 4
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["bytes_up"] for line in lines) == summary["bytes_up"]
    assert [line["accuracy_full"] for line in lines] == summary["accuracy_full_by_round"]
    assert (out / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    "settings", [["run.form=sequential"], ["run.form=copies"], ["run.form=u", "model.tail=conv4"]]
)
def test_every_form_by_recipe(split_recipe: Path, tmp_path: Path, settings: list[str]) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    out = tmp_path / "out"
    named = ["--set", "method.name=acp-sl", "--set", "method.quantize=int8"]
    assert main(["run", str(split_recipe), *flags, *named, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["kept_by_round"][0] == summary["channels"] == 8
    assert summary["kept_by_round"][-1] < 8


def test_the_same_seed_is_the_same_run(split_recipe: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        out = tmp_path / name
        arguments = ["run", str(split_recipe), "--set", "method.name=acp-sl", "--out", str(out)]
        assert main(arguments) == 0
        found.append(json.loads((out / "summary.json").read_text()))
    for key in ("accuracy_by_round", "bytes_by_round", "masks_by_round", "scores_by_round"):
        assert found[0][key] == found[1][key]


def test_compare_split_methods(
    split_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    vary = ["--vary", "method.name=sl,acp-sl", "--seeds", "0,1"]
    assert main(["compare", str(split_recipe), *vary, "--out", str(out)]) == 0
    table = json.loads((out / "compare.json").read_text())
    plain, pruned = (entry["measures"]["bytes_up"]["mean"] for entry in table["variants"])
    assert pruned < plain
    assert "| acp-sl |" in capsys.readouterr().out
    assert (out / "report.html").exists()


def test_bad_input_of_a_split_run(
    split_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main([*arguments]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said.strip().splitlines()[-1]

    out = ["--out", str(tmp_path / "bad")]
    unknown = refused("run", str(split_recipe), *out, "--set", "model.cut=conv9")
    assert "'conv9' is no layer of the network; it can be cut at: conv1, conv2" in unknown
    assert "last layer" in refused("run", str(split_recipe), *out, "--set", "model.cut=head")
    assert "300 clients" in refused("run", str(split_recipe), *out, "--set", "data.clients=300")
    assert not (tmp_path / "bad").exists()


def test_inspect_lists_cut_points_with_their_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "conv4", "--width", "8", "--image", "1x28x28"]) == 0
    shown = capsys.readouterr().out
    assert "conv2" in shown
    assert "8x7x7" in shown
    assert f"{8 * 7 * 7 * 4:,}" in shown
    assert main(["inspect", "vgg11", "--image", "big"]) == 2
