"""Code and files that a recipe names: where they are looked for, and who may name them."""

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from PIL import Image

from sluiceway import load
from sluiceway.cli import main
from sluiceway.errors import InputError
from sluiceway.experiment import methods as listed
from sluiceway.experiment import own_metrics
from sluiceway.experiment.export import export
from sluiceway.experiment.listings import show_methods
from sluiceway.experiment.own_code import is_code, placed
from sluiceway.experiment.predict import agreement, read_inputs
from sluiceway.experiment.recipe import load_recipe, recipe_from
from sluiceway.experiment.run import run

NET = """
import torch
from torch import nn
import neighbour

class Net(nn.Module):
    def __init__(self, classes, shape):
        super().__init__()
        self.stem = nn.Conv2d(shape[0], neighbour.WIDE, 3, padding=1)
        self.more = nn.Conv2d(4, 4, 3, padding=1)
        self.narrow = nn.Conv2d(4, 4, 3, stride=2)
        self.head = nn.Linear(36, classes)

    def forward(self, x):
        x = self.stem(x)
        x = self.narrow(torch.relu(x + self.more(x)))
        return self.head(torch.flatten(x, 1))

def make(classes, shape):
    return Net(classes, shape)

def fails():
    raise RuntimeError("no such thing")

def wrong(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes + 1))

number = 3

def recall_of_c1(labels, probabilities):
    'Share of class 1 that is found.'
    return float((probabilities.argmax(1) == 1)[labels == 1].mean())

def auc(labels, probabilities):
    return 0.0
"""
OWN = """
from typing import ClassVar
from pydantic.dataclasses import dataclass
from sluiceway.strategies import FedAvg
from sluiceway.strategies.parameters import PARAMETERS
from sluiceway.split import Compressor

@dataclass(config=PARAMETERS, kw_only=True)
class Uniform(FedAvg):
    \"\"\"Every client counts alike.\"\"\"
    name: ClassVar[str] = "uniform"
    power: float = 0.0
    def weight(self, update, piece):
        return float(update.examples) ** self.power

@dataclass(config=PARAMETERS, kw_only=True)
class Plain(Compressor):
    \"\"\"Everything crosses.\"\"\"
    name: ClassVar[str] = "plain"

class Bare(FedAvg):
    pass
"""
RECIPE = """
[run]
rounds = 1
device = "cpu"
workers = 1
[data]
path = "pics"
test_path = "pics"
clients = 2
partition = "iid"
[model]
name = "net.py:make"
[method]
name = "own.py:Uniform"
power = 0.5
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with its own data, network and strategy, and another working folder."""
    home = tmp_path / "home"
    for number in range(12):
        file = home / "pics" / f"c{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 80 * (number % 3) + number).save(file)
    texts = {"net.py": NET, "own.py": OWN, "neighbour.py": "WIDE = 4", "r.toml": RECIPE}
    for name, text in texts.items():
        (home / name).write_text(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("net", "own", "neighbour"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return home


def same_after_export(folder: Path, pics: Path, accuracy: float) -> None:
    """The model of a run, and the same exported, predict what was reported."""
    export(load(folder), folder / "out")
    for model in (load(folder), load(folder / "out")):
        inputs = read_inputs(pics, model)
        said = agreement(inputs, model.predict(inputs.values))
        assert said is not None
        assert said.endswith(f"accuracy {accuracy:.4f}")


def test_own_data_network_and_strategy_federated(place: Path, tmp_path: Path) -> None:
    recipe = load_recipe(place / "r.toml")
    _, summary = run(recipe, tmp_path / "run")
    assert summary["method"] == "Uniform"
    assert summary["label_names"] == ["c0", "c1", "c2"]
    assert summary["data_source"] == "folder pics and folder pics"
    same_after_export(tmp_path / "run", place / "pics", summary["accuracy"])
    exported = (tmp_path / "run" / "out" / "recipe.toml").read_text()
    assert str(tmp_path) not in exported
    assert 'name = "net.py:make"' in exported


def test_own_network_and_compressor_split(place: Path, tmp_path: Path) -> None:
    text = RECIPE.replace('"own.py:Uniform"\npower = 0.5', '"own.py:Plain"\nquantize = "int8"')
    text = text.replace("workers = 1", 'kind = "split"\nschedule = "u"')
    text = text.replace('make"', 'make"\ncut = "narrow"\ntail = "head"')
    (place / "s.toml").write_text(text)
    with pytest.raises(InputError, match="'head' is the last layer"):
        run(load_recipe(place / "s.toml"))
    with pytest.raises(InputError, match=r"behind 'more' more crosses .*: stem also"):
        run(load_recipe(place / "s.toml", ["model.cut=more"]))
    recipe = load_recipe(place / "s.toml", ["model.cut=stem", "model.tail=narrow"])
    _, summary = run(recipe, tmp_path / "run")
    same_after_export(tmp_path / "run", place / "pics", summary["accuracy"])


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("model.name=nosuch.py:make", "there is no file .*nosuch.py"),
        ("model.name=HOME/net.py:fails", r"RuntimeError: no such thing \(net.py, line 23\)"),
        ("model.name=HOME/net.py:nothing", "net.py has no nothing"),
        ("model.name=HOME/net.py:number", "is int, not a function"),
        (
            "model.name=HOME/net.py:wrong",
            r"gives \[2, 4\] for two images; expected logits \[2, 3\]",
        ),
        ("model.name=nosuchmodule:make", "No module named 'nosuchmodule'"),
        ("method.name=HOME/own.py:Bare", "the class needs the decorator"),
        ("method.name=HOME/own.py:Plain", "expected a class derived from sluiceway's Strategy"),
        ("run.metric=f1", r"allowed: accuracy, .*, or a function of your own, \"file.py:name\""),
        ("run.metric=HOME/net.py:number", "run.metric = 'number' is 'int', not a function"),
        ("run.metric=HOME/net.py:auc", "is not called auc"),
        ("run.metric=HOME/net.py:fails", "metric fails: TypeError"),
        ("method.power=x", "method.power = 'x'"),
        ("method.name=sgd", r"allowed: fedavg, .*, or your own, \"file.py:Class\""),
        ("model.name=minilm", "images are for conv4"),
    ],
)
def test_faults_are_one_line(place: Path, setting: str, line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        run(load_recipe(place / "r.toml", [setting.replace("HOME", str(place))]))
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_run_is_said(place: Path) -> None:
    (place / "net.py").write_text("import nosuchmodule\n")
    with pytest.raises(InputError, match=r"No module named 'nosuchmodule' \(net.py, line 1\)"):
        run(load_recipe(place / "r.toml"))
    (place / "net.py").write_text("def make(classes):\n    return classes\n")
    with pytest.raises(InputError, match=r"'make' makes int; expected a torch.nn.Module"):
        run(load_recipe(place / "r.toml"))


def test_a_recipe_from_elsewhere_runs_no_code(place: Path) -> None:
    tables = load_recipe(place / "r.toml").resolved()
    (place / "net.py").write_text("raise SystemExit('run')")
    (place / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(InputError, match=r"model.name = 'make' is code of whoever wrote"):
        recipe_from(tables)
    tables["model"]["name"] = "conv4"
    with pytest.raises(InputError, match=r"method.name = 'Uniform' is code of whoever wrote"):
        recipe_from(tables)


@pytest.mark.parametrize("kind", ["federated", "split"])
def test_own_metric(kind: str, place: Path, tmp_path: Path) -> None:
    """In a federated and a split run: against the confusion matrix."""
    text = RECIPE.replace("rounds = 1", 'rounds = 2\nmetric = "net.py:recall_of_c1"\nkeep = "best"')
    if kind == "split":
        text = text.replace('"own.py:Uniform"\npower = 0.5', '"sl"')
        text = text.replace("workers = 1", 'kind = "split"')
        text = text.replace('make"', 'make"\ncut = "stem"')
    (place / "m.toml").write_text(text)
    result, summary = run(load_recipe(place / "m.toml"), tmp_path / "run")
    assert summary["metric"] == "recall_of_c1"
    row = result.confusion[1]
    assert summary["metric_value"] == pytest.approx(row[1] / sum(row))
    values = [record.metrics["recall_of_c1"] for record in result.records]
    assert summary["metric_best"] == max(values)
    tables = load_recipe(place / "m.toml").resolved()
    tables["model"]["name"], tables["method"] = "conv4", {"name": "fedavg"}
    with pytest.raises(InputError, match=r"run.metric = 'recall_of_c1' is code of whoever wrote"):
        recipe_from(tables)


def brought(points: Sequence[EntryPoint]) -> Callable[..., list[EntryPoint]]:
    """What `entry_points` says where packages bring these."""

    def found(group: str, name: str | None = None) -> list[EntryPoint]:
        return [p for p in points if p.group == group and name in (None, p.name)]

    return found


def test_metrics_of_packages(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(place))
    points = [
        EntryPoint("c1", "net:recall_of_c1", "sluiceway.metrics"),
        EntryPoint("broken", "net:nothing", "sluiceway.metrics"),
    ]

    monkeypatch.setattr(own_metrics, "entry_points", brought(points))
    _, summary = run(load_recipe(place / "r.toml", ["run.metric=c1"]))
    assert summary["metric"] == "c1"
    assert summary["metric_value"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    show_methods("metric")
    shown = " ".join(capsys.readouterr().out.split())
    assert "macro_f1 Mean F1 over the classes." in shown
    assert "c1 Share of class 1 that is found." in shown
    assert "broken Cannot be used: run.metric = 'broken': AttributeError" in shown


def test_methods_of_packages(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(place))
    points = [
        EntryPoint("alike", "own:Uniform", "sluiceway.strategies"),
        EntryPoint("broken", "own:Nothing", "sluiceway.strategies"),
    ]

    monkeypatch.setattr(listed, "entry_points", brought(points))
    made = listed.method_of({"name": "alike", "power": 2.0}, split=False)
    assert vars(made)["power"] == 2.0
    texts = {method.name: method.text for method in listed.found_methods()}
    assert texts["alike"].startswith("Every client counts alike.")
    assert texts["broken"].startswith("Cannot be used: method.name = 'broken': AttributeError")


def test_where_names_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "net.py").touch()
    base = tmp_path
    assert placed("data.path", ["a.csv", "/b/*.csv"], base) == [f"{base}/a.csv", "/b/*.csv"]
    assert placed("model.name", "pkg.net:make", base) == f"{base}/pkg/net.py:make"
    assert placed("model.name", "torch.nn:Linear", base) == "torch.nn:Linear"
    assert placed("model.name", "minilm", base) == "minilm"
    assert placed("model.pretrained", "pkg/net.py", base) == f"{base}/pkg/net.py"
    assert placed("model.pretrained", "org/name", base) == "org/name"
    assert placed("data.name", "a.csv", base) == "a.csv"
    assert is_code("a.py:b")
    assert is_code("m.n:f")
    assert not any(is_code(value) for value in ("cuda:1", "a:b c", "org/name", 3))


MIXTURE = """
from tests.worlds import TinyClassifier

def make():
    return TinyClassifier(), "tokenizer"
"""


def test_inspect_shows_cuts_and_mixtures_of_own_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "neighbour.py").write_text("WIDE = 4\n")
    (tmp_path / "texts.py").write_text(MIXTURE)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "net.py:make", "--image", "1x8x8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # stem 1*9*4 + 4, more and narrow 4*9*4 + 4 each, head 36*10 + 10
    assert lines[0] == "net.py:make: 706 parameters, 706 trained"
    assert [line.split() for line in lines[2:]] == [  # the skip is over the layer between
        ["stem", "4x8x8", "1,024", "40"],
        ["narrow", "4x3x3", "144", "336"],
    ]
    assert main(["inspect", "texts:make"]) == 0
    shown = capsys.readouterr().out
    assert "backbone.encoder.layer.1" in shown
    assert "across the wire" in shown
    assert "cut at" not in shown


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("none.py:make", "there is no file"),
        ("none.py", "'none.py': there is no file none.py; write none.py:make"),
        ("net.py", "'net.py': it needs the function's name; write net.py:make"),
        ("net.py:none", "net.py has no none"),
        ("net.py:fails", "no such thing"),
        ("net.py:number", "is int, not a function"),
        ("net.py:make --image 1x9", "--image 1x9: write 3x32x32"),
        ("net.py:make --image 3x30x30", "on images [3, 30, 30]: RuntimeError: mat1 and mat2"),
        ("net.py:make --experts 4", "--experts has no effect here: it needs a model of texts"),
    ],
)
def test_own_networks_that_cannot_be_inspected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    given: str,
    why: str,
) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "neighbour.py").write_text("WIDE = 4\n")
    monkeypatch.chdir(tmp_path)
    assert why in refused("inspect", *given.split())
