"""Pretrained layers before the cut: from a run folder, a safetensors file or a shipped recipe.

A recipe that others begin with ("recipe:NAME") is run once, by the first run that needs it, and its
tensors are kept in the cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import sluiceway
from sluiceway.core.checkpoints import Checkpoint, CheckpointError
from sluiceway.data import cache_folder
from sluiceway.data.images import IMAGE_SETS
from sluiceway.errors import InputError, first_line, quoted
from sluiceway.experiment.recipe import Model, Recipe, load_recipe
from sluiceway.experiment.tables import shipped_recipes
from sluiceway.split.cut import cut
from sluiceway.strategies.base import unprefixed


def load_front(built: nn.Module, chosen: Model, shape: Sequence[int]) -> str:
    """Write the values that `model.pretrained` names into the layers before the cut.

    BatchNorm's counts of batches stay at zero: with its usual momentum nothing depends on them.

    Args:
        built: the network, a chain; its other layers stay as they are.
        chosen: [model].
        shape: (C, H, W) of the images that it will see.

    Returns:
        One line about where the values come from.

    Raises:
        InputError: there is no such folder or file, or what is there does not fit the network.
    """
    assert chosen.pretrained is not None
    assert chosen.cut is not None
    where = f"model.pretrained = {quoted(chosen.pretrained)}"
    first = recipe_of(chosen)
    path = Path(chosen.pretrained) if first is None else kept_tensors(first)
    try:
        front, _ = cut(built, chosen.cut)
    except ValueError as error:
        raise InputError(str(error)) from None
    try:
        if first is not None and not path.is_file():
            raise ValueError("it was not run on this machine yet; a run from here does so first")
        if (path / "recipe.toml").is_file():
            found, said = tensors_of_run(path, chosen, shape)
        else:
            found, said = tensors_of_file(path)
        fill(front, found)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{where}: {first_line(error)}") from None
    return said


def recipe_of(chosen: Model) -> Recipe | None:
    """The recipe that `model.pretrained` = "recipe:NAME" names; None if it names anything else.

    Raises:
        InputError: there is no such shipped recipe, or it is none of split learning from scratch.
    """
    kind, _, name = (chosen.pretrained or "").partition(":")
    return shipped_recipe(name) if kind == "recipe" else None


@functools.cache
def shipped_recipe(name: str) -> Recipe:
    """The recipe that others begin with, read once; raises as `recipe_of`."""
    where = f"model.pretrained = {quoted(f'recipe:{name}')}"
    if name not in shipped_recipes():
        raise InputError(f"{where}: expected one of {', '.join(shipped_recipes())} after recipe:")
    found = load_recipe(name)
    if found.run.kind != "split" or found.model.pretrained is not None:
        raise InputError(f"{where}: expected a recipe of split learning that starts from scratch")
    return found


def kept_tensors(recipe: Recipe) -> Path:
    """Where the tensors of a recipe that others begin with are kept: by all that it says."""
    said = f"{sluiceway.__version__} {torch.__version__} {recipe.model_dump_json()}"
    name = hashlib.sha256(said.encode()).hexdigest()[:16]
    return cache_folder() / "pretrained" / f"{name}.safetensors"


def tensors_of_run(
    folder: Path, chosen: Model, shape: Sequence[int]
) -> tuple[Mapping[str, Tensor], str]:
    """The network of an earlier split run by name: the model it kept, or its newest checkpoint.

    Raises:
        ValueError, CheckpointError: it is no split run of this network, it saw images of other
            channels, or it has no checkpoint.
    """
    tables: dict[str, Any] = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    model, data = tables.get("model", {}), tables.get("data", {})
    if tables.get("run", {}).get("kind") != "split":
        raise ValueError("that run is not of split learning")
    for key in ("name", "image_size" if chosen.name == "huggingface" else "width"):
        if model.get(key, 0) != (wanted := getattr(chosen, key)):
            raise ValueError(f"that run has model.{key} = {model.get(key)}, this one {wanted}")
    name = data.get("name")
    seen = IMAGE_SETS[name].shape if name in IMAGE_SETS else tuple(shape)
    if seen[0] != shape[0]:
        raise ValueError(
            f"that run trained on images of {seen[0]} channels ({name}), these have {shape[0]}"
        )
    kept = folder / "model" / f"{tables.get('run', {}).get('keep', 'last')}.safetensors"
    if kept.is_file():
        found, said = tensors_of_file(kept)
    else:
        saved = Checkpoint(folder / "checkpoints", resume=True).newest()
        if saved is None:
            raise CheckpointError("that run has no checkpoint")
        found, said = saved.tensors("layers"), f"{folder}, round {saved.round}"
    if seen != tuple(shape):
        sizes = (f"{height}x{width}" for _, height, width in (seen, shape))
        said += f"; it saw images of {next(sizes)}, these are {next(sizes)}"
    return found, said


def tensors_of_file(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """The tensors of a safetensors file, or of `model.safetensors` in a folder.

    Raises:
        ValueError, OSError, SafetensorError: there is none, or it cannot be read.
    """
    if (path / "config.json").is_file():
        raise ValueError("that is a model of Hugging Face, for model.name = 'huggingface'")
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            "expected the folder of a split run (with recipe.toml and checkpoints), a safetensors "
            "file, or a folder with model.safetensors"
        )
    found = load_file(file)
    # A run's own model has the parts' names in front.
    parts = [unprefixed(found, f"{part}.") for part in ("front", "back", "tail.1")]
    return {**found, **parts[0], **parts[1], **parts[2]}, str(file)


@torch.no_grad()
def load_tensors(built: nn.Module, place: str) -> str:
    """Write the tensors of a safetensors file into a model by name; its others stay as they are.

    Returns:
        One line about what was taken.

    Raises:
        InputError: no such file, it has no tensor of the model, or one of another shape.
    """
    where = f"model.pretrained = {quoted(place)}"
    try:
        found, said = tensors_of_file(Path(place))
        own = {n: t for n, t in built.state_dict().items() if n in found}
        if not own:
            wanted, there = next(iter(built.state_dict()), "none"), next(iter(found), "none")
            raise ValueError(f"it has no tensor of the model ({wanted}, ...) but {there}, ...")
        for name, tensor in own.items():
            if found[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} is {list(found[name].shape)} there, the model's {list(tensor.shape)}"
                )
            tensor.copy_(found[name])
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{where}: {first_line(error)}") from None
    return f"{said}, {len(own)} of {len(built.state_dict())} tensors"


@torch.no_grad()
def fill(front: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Copy float tensors into the layers by name. Raises ValueError for one that does not fit."""
    for name, own in front.state_dict().items():
        if not own.is_floating_point():
            continue
        if name not in found:
            raise ValueError(f"it has no tensor {name}, which the layers before the cut need")
        if found[name].shape != own.shape:
            raise ValueError(
                f"{name} is {list(found[name].shape)} there, this network needs {list(own.shape)}"
            )
        own.copy_(found[name])
