"""Layers before the cut that were trained before: from a run folder, or from a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.nearby import nearby

from sluiceway.core.guards import RunFailed
from sluiceway.core.handshake import HandshakeError
from sluiceway.errors import InputError
from sluiceway.experiment import dry_run
from sluiceway.experiment.builders import chosen_network
from sluiceway.experiment.pretrained import kept_tensors, recipe_of
from sluiceway.experiment.recipe import load_recipe, recipe_from
from sluiceway.experiment.run import run as run_here
from sluiceway.experiment.session import Progress, Session
from sluiceway.experiment.trained import load

FIRST = ["data.classes=[0,1,2,3,4]", "data.clients=1", "data.partition=iid", "run.rounds=2"]
SECOND = ["data.classes=[9,5,6,7,8]", "run.rounds=2"]


@pytest.fixture
def first(split_recipe: Path, tmp_path: Path) -> Path:
    """The folder of a run on the digits 0 to 4."""
    run_here(load_recipe(split_recipe, FIRST), tmp_path / "first")
    return tmp_path / "first"


def front_of(recipe: Path, *settings: str) -> dict[str, torch.Tensor]:
    """The layers before the cut as a run has them at its start, but for counts of batches."""
    built = chosen_network(load_recipe(recipe, [*SECOND, *settings]), (1, 8, 8), 5)
    layers = {n: t for n, t in built.state_dict().items() if n.startswith(("conv1.", "conv2."))}
    return {name: tensor for name, tensor in layers.items() if tensor.is_floating_point()}


@pytest.mark.parametrize("front", ["true", "false"])
def test_a_run_begins_with_the_layers_of_another(
    first: Path, split_recipe: Path, tmp_path: Path, front: str
) -> None:
    settings = [*SECOND, f"model.pretrained={first}", f"train.front={front}"]
    known = load_file(first / "checkpoints" / "round-00002" / "layers.safetensors")
    found = front_of(split_recipe, f"model.pretrained={first}")
    assert found
    assert all(torch.equal(tensor, known[name]) for name, tensor in found.items())
    _, summary = run_here(load_recipe(split_recipe, settings), tmp_path / "second")
    assert summary["label_names"] == ["9", "5", "6", "7", "8"]
    after = load_file(tmp_path / "second" / "checkpoints" / "round-00002" / "layers.safetensors")
    assert front == "true" or all(torch.equal(after[name], found[name]) for name in found)
    assert (summary["bytes_down"] < summary["bytes_up"] / 20) == (front == "false")
    shutil.rmtree(first)  # a trained model is whole without what it began with
    known = load(tmp_path / "second").model.state_dict()
    assert all(torch.equal(known[f"front.{name}"], after[name]) for name in found)


@pytest.mark.slow
def test_a_shipped_recipe_is_run_first_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICEWAY_CACHE", str(tmp_path / "cache"))
    short = ["run.rounds=1", "data.limit=100", "data.test_limit=200", "run.device=cpu"]
    recipe = load_recipe("split-quickstart", short)
    before = dry_run.described(recipe, Session(), Progress())
    assert any("9,632 of them before the cut" in line for line in before)
    with pytest.raises(InputError, match="was not run on this machine yet"):
        chosen_network(recipe, (1, 28, 28), 5)
    _, summary = run_here(recipe, tmp_path / "run")
    first = recipe_of(recipe.model)
    assert first is not None
    kept = kept_tensors(first)
    found, made = load_file(kept), kept.stat().st_mtime_ns
    layers = load_file(tmp_path / "run" / "checkpoints" / "round-00001" / "layers.safetensors")
    front = [n for n in layers if n.startswith(("conv1.", "conv2.")) and "num_batches" not in n]
    assert len(front) == 10  # weights of two convolutions, and four tensors of each BatchNorm
    assert all(torch.equal(layers[name], found[name]) for name in front)
    again = run_here(recipe, None)[1]
    assert again["accuracy"] == summary["accuracy"]
    assert kept.stat().st_mtime_ns == made


def test_what_comes_first_is_a_recipe_from_scratch(split_recipe: Path) -> None:
    for name, why in (("nothing", "expected one of"), ("agnews", "of split learning")):
        recipe = load_recipe(split_recipe, [*SECOND, f"model.pretrained=recipe:{name}"])
        with pytest.raises(InputError, match=why):
            run_here(recipe)
    again = load_recipe(split_recipe, [*SECOND, "model.pretrained=recipe:split-quickstart"])
    with pytest.raises(InputError, match="from scratch"):
        run_here(again)


def test_a_federated_run_has_no_layers_before_a_cut() -> None:
    tables = {
        "data": {"name": "digits", "partition": "iid"},
        "model": {"name": "conv4", "pretrained": "recipe:mnist-pretrain"},
    }
    with pytest.raises(InputError, match="before a cut, which a federated run has none of"):
        recipe_from(tables)


def test_of_other_layers_nothing_is_taken(first: Path, split_recipe: Path) -> None:
    recipe = load_recipe(split_recipe, [*SECOND, f"model.pretrained={first}"])
    built = chosen_network(recipe, (1, 8, 8), 5)
    scratch = chosen_network(load_recipe(split_recipe, SECOND), (1, 8, 8), 5)
    assert torch.equal(built.conv3.conv.weight, scratch.conv3.conv.weight)
    assert not torch.equal(built.conv2.conv.weight, scratch.conv2.conv.weight)


def test_files_with_the_same_names_do_as_well(
    first: Path, split_recipe: Path, tmp_path: Path
) -> None:
    wanted = front_of(split_recipe, f"model.pretrained={first}")
    folder = tmp_path / "saved"
    folder.mkdir()
    save_file(wanted, folder / "model.safetensors")
    for place in (folder, folder / "model.safetensors"):
        found = front_of(split_recipe, f"model.pretrained={place}")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_does_not_fit_is_one_line(
    first: Path, split_recipe: Path, tmp_path: Path, refused: Callable[..., str], recipe: Path
) -> None:
    def why(*settings: str) -> str:
        flags = [part for setting in settings for part in ("--set", setting)]
        said = refused("run", split_recipe, "--out", tmp_path / "bad", *flags)
        assert not (tmp_path / "bad").exists()
        return said

    here = f"model.pretrained={first}"
    assert "model.width = 8, this one 16" in why(here, "model.width=16")
    assert "model.name = conv4, this one vgg11" in why(here, "model.name=vgg11")
    assert "expected the folder of a split run" in why(f"model.pretrained={tmp_path / 'no'}")
    assert "it can be cut at" in why(here, "model.cut=conv9")
    save_file({"conv1.conv.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.safetensors")
    said = why(f"model.pretrained={tmp_path / 'other.safetensors'}")
    assert "conv1.conv.weight is [8, 3, 3, 3] there, this network needs [8, 1, 3, 3]" in said
    (tmp_path / "torn.safetensors").write_bytes(b"abc")
    assert "model.pretrained" in why(f"model.pretrained={tmp_path / 'torn.safetensors'}")
    text = (first / "recipe.toml").read_text().replace('"digits"', '"cifar10"')
    (first / "recipe.toml").write_text(text)
    assert "images of 3 channels (cifar10), these have 1" in why(here)
    (first / "recipe.toml").write_text("[run]\nkind = 'federated'\n")
    assert "not of split learning" in why(here)
    assert "data.classes" in why("data.classes=[1]")
    assert "train.front" in refused("run", recipe, "--set", "train.front=false")


@pytest.mark.parametrize("front", ["true", "false"])
def test_sites_give_the_local_numbers(
    first: Path, split_recipe: Path, tmp_path: Path, front: str
) -> None:
    settings = [*SECOND, f"model.pretrained={first}", f"train.front={front}", "method.name=acp-sl"]
    chosen = load_recipe(split_recipe, settings)
    here, _ = run_here(chosen)
    with nearby(tmp_path) as (transport, endpoint):
        there, _ = run_here(chosen, transport=transport, endpoint=endpoint)
    assert [r.as_dict() | {"seconds": 0} for r in there.records] == [
        r.as_dict() | {"seconds": 0} for r in here.records
    ]
    assert all(torch.equal(there.tensors[n], tensor) for n, tensor in here.tensors.items())


def test_a_site_with_other_frozen_layers_is_refused(
    first: Path, split_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*SECOND, f"model.pretrained={first}", "train.front=false"]

    def network(*given: object, filled: bool = True) -> torch.nn.Module:
        return chosen_network(load_recipe(split_recipe, SECOND), (1, 8, 8), 5)

    monkeypatch.setattr("sluiceway.deploy.split_site.chosen_network", network)
    with (
        nearby(tmp_path) as (transport, endpoint),
        pytest.raises((HandshakeError, RunFailed), match=r"conv1\.conv\.weight"),
    ):
        run_here(load_recipe(split_recipe, settings), transport=transport, endpoint=endpoint)


@pytest.mark.slow
@pytest.mark.skipif("SLUICEWAY_DATA" not in os.environ, reason="needs CIFAR-10")
def test_the_shipped_pair_of_recipes(tmp_path: Path) -> None:
    small = ["data.limit=300", "data.test_limit=200", "run.rounds=1", "run.device=cpu"]
    run_here(load_recipe("cifar10-pretrain", small), tmp_path / "one")
    chosen = load_recipe("cifar10-pretrained", [*small, f"model.pretrained={tmp_path / 'one'}"])
    _, summary = run_here(chosen, tmp_path / "two")
    assert summary["label_names"] == ["dog", "frog", "horse", "ship", "truck"]
    assert summary["bytes_down"] < summary["bytes_up"] / 20
