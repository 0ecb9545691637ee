"""What comes out of a run folder is the function that was measured."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from PIL import Image
from tests.experiment.conftest import Run
from torch import nn
from torch.utils.data import TensorDataset

import sluiceway
from sluiceway.cli import main
from sluiceway.core.batches import labels_of
from sluiceway.data import load_own
from sluiceway.errors import InputError
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.session import Session
from sluiceway.experiment.trained import TrainedModel


def accuracy(model: TrainedModel, tables: Path) -> float:
    """Of the model on its run's test set, through `examples` as a user's inputs would go."""
    recipe = load_recipe(tables)
    if recipe.run.kind == "split":
        data, _, test = Session().images(recipe.data, lambda line: None)
        inputs: object = data.test.images
    else:
        assert recipe.data.path is not None
        texts = load_own(recipe.data.path, test_fraction=0.2, seed=recipe.data.seed)
        test, inputs = texts.test, texts.test.texts
    found = model.predict(inputs).probabilities.argmax(1)
    return float((found == torch.as_tensor(labels_of(test))).sum()) / len(found)


FEDERATED = (
    (),
    ("model.lora=2",),
    ("model.lora=2", "method.lora=residual"),
    ("model.experts=0", "method.name=scaffold"),
    # A run's frozen layers are computed in float32, here in bfloat16: no text may be near a tie.
    ("method.name=fedmoe", "train.mixed=bfloat16", "model.head_start=random"),
)


@pytest.mark.parametrize("settings", FEDERATED, ids=",".join)
def test_text_model_has_the_reported_accuracy(
    run: Run, recipe: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    summary = run(recipe, "out", *settings)
    assert summary["accuracy"] > 0.4
    model = sluiceway.load(tmp_path / "out")
    assert model.round == 3
    assert accuracy(model, recipe) == summary["accuracy"]


SPLIT = (
    (),
    ("method.name=acp-sl", "method.share=0.5", "method.quantize=int4"),
    ("method.name=bottleneck", "method.quantize=int8"),
    ("method.name=topk", "run.schedule=copies"),
    ("run.schedule=u", "model.tail=conv4", "method.quantize=int4"),
)


@pytest.mark.parametrize("settings", SPLIT, ids=",".join)
def test_split_model_has_the_reported_accuracy(
    run: Run, split_recipe: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    summary = run(split_recipe, "out", *settings)
    assert summary["accuracy"] > 0.15
    assert accuracy(sluiceway.load(tmp_path / "out"), split_recipe) == summary["accuracy"]


def test_masks_by_client(run: Run, split_recipe: Path, tmp_path: Path) -> None:
    summary = run(
        split_recipe, "out", "method.name=acp-sl", "method.share=0.3", "method.masks=client"
    )
    model = sluiceway.load(tmp_path / "out")
    sizes = [sum(counts) for counts in summary["label_counts"]]
    found = []
    for client in range(3):
        model.use_mask_of(client)
        found.append(accuracy(model, split_recipe))
    mean = sum(size / sum(sizes) * one for size, one in zip(sizes, found, strict=True))
    assert mean == pytest.approx(summary["accuracy"], abs=1e-12)
    with pytest.raises(InputError, match="client 7 has no mask"):
        model.use_mask_of(7)


def test_the_best_round_is_kept(run: Run, recipe: Path, tmp_path: Path) -> None:
    summary = run(recipe, "out", "run.keep=best", "run.rounds=6", "train.lr=0.05")
    best = summary["accuracy_by_round"].index(summary["best_accuracy"]) + 1
    model = sluiceway.load(tmp_path / "out")
    assert model.round == best
    assert accuracy(model, recipe) == summary["best_accuracy"]
    assert accuracy(sluiceway.load(tmp_path / "out", "last"), recipe) == summary["accuracy"]


def test_patience_ends_a_run(run: Run, recipe: Path, tmp_path: Path) -> None:
    summary = run(recipe, "out", "run.rounds=30", "run.patience=2", "train.lr=0.05")
    scores = summary["accuracy_by_round"]
    best = scores.index(max(scores))
    assert summary["rounds"] == len(scores) == best + 3 < 30
    assert sluiceway.load(tmp_path / "out").round == len(scores)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(1, len(scores) + 1))


def test_predict_writes_labels_and_probabilities(
    run: Run, recipe: Path, csv_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe)
    out, file = tmp_path / "out", tmp_path / "new.csv"
    capsys.readouterr()
    assert main(["predict", str(out), str(csv_file)]) == 0
    said = capsys.readouterr()
    frame = pd.read_csv(io.StringIO(said.out))
    truth = pd.read_csv(csv_file)
    assert frame["input"].tolist() == truth["text"].tolist()
    right = (frame["predicted"] == truth["label"]).mean()
    assert right > 0.5
    assert f"accuracy {right:.4f}" in said.err
    each = frame[["p(topic0)", "p(topic1)", "p(topic2)"]]
    assert np.allclose(each.sum(1), 1)
    assert np.allclose(each.max(1), frame["probability"])
    truth[["text"]].to_json(file.with_suffix(".jsonl"), orient="records", lines=True)
    truth[["text"]].to_parquet(file.with_suffix(".parquet"))
    for given, kept in ((".jsonl", ".parquet"), (".parquet", ".jsonl")):
        to = tmp_path / f"found{kept}"
        paths = [str(out), str(file.with_suffix(given)), "--out", str(to)]
        assert main(["predict", *paths, "--device", "cpu"]) == 0
        read = pd.read_parquet(to) if kept == ".parquet" else pd.read_json(to, lines=True)
        assert read["predicted"].tolist() == frame["predicted"].tolist()
    assert "labels predicted" not in capsys.readouterr().err


def test_predict_takes_image_folders(
    run: Run, split_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(split_recipe, "out", "method.name=acp-sl", "method.share=0.5")
    data, _, _ = Session().images(load_recipe(split_recipe).data, lambda line: None)
    for row, (image, label) in enumerate(zip(data.test.images, data.test.labels, strict=True)):
        path = tmp_path / "new" / str(label) / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
    to = tmp_path / "found.csv"
    assert main(["predict", str(tmp_path / "out"), str(tmp_path / "new"), "--out", str(to)]) == 0
    assert f"accuracy {summary['accuracy']:.4f}" in capsys.readouterr().err
    frame = pd.read_csv(to)
    assert len(frame) == 100
    one = tmp_path / "new" / str(data.test.labels[0]) / "0.png"
    assert main(["predict", str(tmp_path / "out"), str(one)]) == 0
    assert str(one) in capsys.readouterr().out


def test_predict_says_what_is_wrong(
    run: Run, refused: Callable[..., str], recipe: Path, csv_file: Path, tmp_path: Path
) -> None:
    run(recipe)
    out, file = tmp_path / "out", tmp_path / "new.csv"
    file.write_text("title\nred fox\n")
    assert "no column 'text'" in refused("predict", out, file)
    file.write_text("text,label\nred fox,a\n,b\n")
    assert "row 2: column 'text' has no text" in refused("predict", out, file)
    assert "no nothere.csv" in refused("predict", out, "nothere.csv")
    assert ".csv, .jsonl, .parquet" in refused("predict", out, csv_file, "--out", "found.xml")
    assert "run.keep = 'best'" in refused("predict", out, csv_file, "--which", "best")
    assert "which = 'worst'" in refused("predict", out, csv_file, "--which", "worst")
    assert "client 0 has no mask" in refused("predict", out, csv_file, "--client", "0")
    assert "no run folder" in refused("predict", tmp_path, csv_file)
    (out / "summary.json").unlink()
    assert "--resume" in refused("predict", out, csv_file)


@pytest.mark.parametrize("method", ["acp-sl", "bottleneck", "topk"])
def test_split_train_returns_what_was_measured(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 6, generator=generator)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0)
    parts = [TensorDataset(inputs[i::3], labels[i::3]) for i in range(3)]
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    quantized = sluiceway.SPLIT_METHODS[method](quantize="int4", share=0.2)
    result = sluiceway.split_train(network, "1", parts[:2], parts[2], quantized, rounds=3)
    assert result.model is not None
    test_inputs, test_labels = parts[2].tensors
    right = (result.model(test_inputs).argmax(1) == test_labels).double().mean()
    assert float(right) == result.accuracy


def test_metrics_are_in_the_summary_and_decide(
    run: Run, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(recipe, "out", "run.metric=macro_f1", "run.keep=best", "run.rounds=5")
    assert f"macro_f1 {summary['macro_f1']:.4f}" in capsys.readouterr().out
    series = [one["macro_f1"] for one in summary["metrics_by_round"]]
    assert summary["metric_value"] == summary["macro_f1"] == series[-1]
    assert summary["metric_best"] == max(series)
    model = sluiceway.load(tmp_path / "out")
    assert model.round == series.index(max(series)) + 1
    texts = load_own(str(load_recipe(recipe).data.path), test_fraction=0.2, seed=0).test
    last = sluiceway.load(tmp_path / "out", "last").predict(texts.texts)
    guessed = last.probabilities.argmax(1).numpy()
    f1 = sklearn.metrics.f1_score(texts.labels, guessed, average="macro", zero_division=0)
    assert summary["macro_f1"] == pytest.approx(f1, abs=1e-12)
    matrix = sklearn.metrics.confusion_matrix(texts.labels, guessed, labels=range(3))
    assert summary["confusion"] == matrix.tolist()
    area = sklearn.metrics.roc_auc_score(texts.labels, last.probabilities, multi_class="ovr")
    assert summary["auc"] == pytest.approx(area, abs=1e-6)
    assert [row["label"] for row in summary["by_class"]] == summary["label_names"]
    known = [value for value in summary["accuracy_by_client"] if value is not None]
    assert summary["client_accuracy_worst"] == min(known)
    assert summary["client_accuracy_mean"] == pytest.approx(sum(known) / len(known))


def test_metrics_of_masks_by_client(run: Run, split_recipe: Path) -> None:
    summary = run(
        split_recipe, "out", "method.name=acp-sl", "method.share=0.3", "method.masks=client"
    )
    assert 0 < summary["macro_f1"] <= 1
    assert sum(map(sum, summary["confusion"])) == 300  # three clients' masks, 100 examples
    right = sum(row[i] for i, row in enumerate(summary["confusion"]))
    assert abs(right / 300 - summary["accuracy"]) < 0.2


def test_a_finished_run_has_its_metrics_after_resume(
    run: Run, recipe: Path, tmp_path: Path
) -> None:
    before = run(recipe)
    assert main(["run", str(recipe), "--out", str(tmp_path / "out"), "--resume"]) == 0
    after = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert after["confusion"] == before["confusion"]
    assert after["metrics_by_round"] == before["metrics_by_round"]
