"""A trained model taken out of its run folder: the function that was measured, ready to use."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sluiceway.channels import Basis
from sluiceway.core.batches import Batch, Examples
from sluiceway.core.evaluation import BATCH
from sluiceway.core.settings import Training
from sluiceway.core.waits import counted
from sluiceway.data import CHOICE_NAMES, ImageDataset, TextTable
from sluiceway.errors import InputError, first_line
from sluiceway.experiment.builders import (
    chosen_compressor,
    chosen_network,
    head_for,
    pretrained_of,
    usable_device,
)
from sluiceway.experiment.encoding import encoded
from sluiceway.experiment.models import Pretrained, assembled
from sluiceway.experiment.own_code import is_code
from sluiceway.experiment.own_model import own_language_model
from sluiceway.experiment.recipe import Recipe, recipe_from
from sluiceway.experiment.tables import anchored
from sluiceway.moe import repair, skip_padding
from sluiceway.split.deployed import DeployedNetwork
from sluiceway.split.setup import cut_model, tail_compressor

#: What makes a folder one that `sluiceway export` wrote.
EXPORTED = "sluiceway.json"
#: Which of a run's models.
WHICH = ("last", "best")


@dataclass(frozen=True)
class Predictions:
    """What a model says of N inputs.

    Attributes:
        probabilities: [N, C] float32 or wider, rows sum to 1: the softmax of the logits.
        label_names: the C classes.
    """

    probabilities: Tensor
    label_names: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The most probable class of each input."""
        return [self.label_names[index] for index in self.probabilities.argmax(1).tolist()]


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with what it needs to take texts or images.

    Attributes:
        model: from the inputs of training to logits [B, C], in evaluation mode. Of a split run
            both halves with mask and rounding between them.
        recipe: that it was trained by.
        label_names: the C classes.
        round: after which it was kept.
        pretrained: with the tokenizer; None for images.
        input: of images: `shape` (C, H, W), and by channel `mean` and `std` of pixels in 0..1.
        device: where it is.
    """

    model: nn.Module
    recipe: Recipe
    label_names: tuple[str, ...]
    round: int
    pretrained: Pretrained | None
    input: Mapping[str, Any] | None
    device: torch.device

    def predict(self, inputs: Sequence[str] | Any) -> Predictions:
        """Classes of texts or images.

        Inputs are run in the order given, in batches of 64, as the test set was.

        Args:
            inputs: N texts, or images uint8 [N, C, H, W] (an array or tensor, 0 is black).

        Raises:
            InputError: the model takes others.
            DataError: a text yields no token, or images have another type.
        """
        return Predictions(self.logits(self.examples(inputs)).softmax(1), self.label_names)

    def examples(self, inputs: Sequence[str] | Any) -> Examples:
        """The inputs as the model takes them, with labels 0. Raises as `predict`."""
        none = torch.zeros(len(inputs), dtype=torch.int64)
        if self.pretrained is None:
            assert self.input is not None
            given = self.input
            images: Any = inputs
            found = ImageDataset(images, none, given["mean"], given["std"])
            if list(found.shape) != given["shape"]:
                wanted = given["shape"]
                raise InputError(f"images are {list(found.shape)}; the model takes {wanted}")
            return found
        if isinstance(inputs, str) or not all(isinstance(text, str) for text in inputs):
            raise InputError("the model takes a list of texts")
        table, recipe = TextTable(list(inputs), none.numpy()), self.recipe
        return encoded(table, self.pretrained, recipe.model, recipe.data.max_tokens)

    @torch.no_grad()
    def logits(self, examples: Examples) -> Tensor:
        """Logits [N, C] on the CPU, in the precision of training."""
        self.model.eval()
        training, rows = self.recipe.training(), torch.arange(len(examples)).split(BATCH)
        assert isinstance(training, Training) or self.pretrained is None
        found = []
        for part in counted("prediction", rows, len(rows)):
            batch = Batch.of(examples, part, self.device)
            with (
                training.precision(self.device)
                if isinstance(training, Training)
                else contextlib.nullcontext()
            ):
                found.append(batch.run(self.model).cpu())
        return torch.cat(found)

    def use_mask_of(self, client: int) -> None:
        """Use a client's mask, where clients have masks of their own. Raises InputError."""
        known = [int(key) for key in getattr(self.model, "links", {})]
        if client not in known:
            names = ", ".join(map(str, known)) if min(known, default=-1) >= 0 else "none"
            raise InputError(f"client {client} has no mask of its own; those that have: {names}")
        assert isinstance(self.model, DeployedNetwork)
        self.model.client = client


def load(run: str | Path, which: str | None = None, *, device: str = "cpu") -> TrainedModel:
    """The trained model of a finished run, or of an exported folder.

    Args:
        run: its folder.
        which: "last" or "best", see `run.keep`; None is as `run.keep` says.
        device: where to put it.

    Raises:
        InputError: there is no finished run, or no such model in it; the pretrained model that it
            was made from cannot be loaded.
    """
    folder = Path(run)
    if (folder / EXPORTED).exists():
        return load_exported(folder, torch.device(usable_device(device)))
    recipe, summary = read_run(folder)
    which = which or recipe.run.keep
    if which not in WHICH:
        raise InputError(f"which = {which!r}; allowed: {', '.join(WHICH)}")
    path = folder / "model" / f"{which}.safetensors"
    if not path.exists():
        why = "; run.keep = 'best' keeps it" if which == "best" else ""
        raise InputError(f"{folder} has no {path.relative_to(folder)}{why}")
    place = torch.device(usable_device(device))
    names = tuple(summary["label_names"])
    split = recipe.run.kind == "split"
    try:
        tensors, round = read_model(path)
        pretrained = None
        if recipe.images:
            model = image_network(recipe, summary["input"], len(names), tensors)
        elif is_code(recipe.model.name):
            pretrained = own_language_model(recipe.model, len(names), recipe.run.seed)
            model = pretrained.backbone
        else:
            pretrained = pretrained_of(recipe.model)
            choices = recipe.data.name in CHOICE_NAMES
            head = head_for(names, choices, pretrained, recipe.model)
            model = assembled(pretrained, recipe.model, head, recipe.run.seed)
        take(model, tensors, whole=split)
    except (KeyError, TypeError, RuntimeError, OSError) as error:
        raise InputError(f"{path} does not fit its recipe ({first_line(error)})") from None
    model.requires_grad_(False).eval().to(place)
    return TrainedModel(model, recipe, names, round, pretrained, summary.get("input"), place)


def load_exported(folder: Path, place: torch.device) -> TrainedModel:
    """The model that `sluiceway export` wrote. Raises InputError."""
    pretrained = None
    try:
        tables = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
        recipe = recipe_from(anchored(tables, folder), code=True)
        facts = json.loads((folder / EXPORTED).read_text(encoding="utf-8"))
        names = tuple(facts["label_names"])
        if recipe.images:
            tensors = load_file(folder / "model.safetensors")
            model = image_network(recipe, facts["input"], len(names), tensors)
            model.load_state_dict(tensors)
        elif is_code(recipe.model.name):
            pretrained = own_language_model(recipe.model, len(names), recipe.run.seed)
            model = pretrained.backbone
            model.load_state_dict(load_file(folder / "model.safetensors"))
        else:
            pretrained, model = exported_transformer(folder, recipe, names)
    except Exception as error:
        raise InputError(f"{folder} cannot be loaded ({first_line(error)})") from None
    model.requires_grad_(False).eval().to(place)
    return TrainedModel(model, recipe, names, facts["round"], pretrained, facts["input"], place)


def exported_transformer(
    folder: Path, recipe: Recipe, names: Sequence[str]
) -> tuple[Pretrained, nn.Module]:
    """A model of texts of an exported folder, and the same with its scoring module."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, logging

    from sluiceway.experiment import classifier
    from sluiceway.moe import saved

    saved.register()
    classifier.register()
    logging.disable_progress_bar()
    if recipe.model.answer == "head":
        made: Any = classifier.Classifier.from_pretrained(folder)
    elif (folder / "upcycled.py").exists():
        made = saved.UpcycledModel.from_pretrained(folder)
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
        made = kind.from_pretrained(folder)
    if (folder / "adapter").is_dir():
        from peft import PeftModel

        PeftModel.from_pretrained(made, str(folder / "adapter"))  # puts its layers into it
    repair(made)
    backbone = made.answer.backbone if recipe.model.answer == "head" else made
    backbone.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pretrained = Pretrained(backbone, tokenizer, f"folder {folder}", backbone.config.hidden_size)
    if recipe.model.answer == "head":
        model: nn.Module = made.answer
    else:
        choices = recipe.data.name in CHOICE_NAMES
        model = head_for(names, choices, pretrained, recipe.model)(backbone)
    if recipe.model.skip_padding:
        skip_padding(model)
    return pretrained, model


def read_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and summary of a finished run. Raises InputError."""
    if not (folder / "recipe.toml").exists():
        raise InputError(f"{folder} is no run folder: it has no recipe.toml")
    if not (folder / "summary.json").exists():
        raise InputError(f"the run in {folder} has not ended; run it with --out {folder} --resume")
    try:
        tables = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
        recipe = recipe_from(tables, code=True)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        summary["label_names"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} cannot be read ({first_line(error)})") from None
    return recipe, summary


def read_model(path: Path) -> tuple[dict[str, Tensor], int]:
    """A model's tensors, and the round after which they were kept. Raises InputError."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, int(  # noqa: SIM118
                file.metadata()["round"]
            )
    except Exception as error:
        raise InputError(f"{path} cannot be read ({first_line(error)})") from None


def image_network(
    recipe: Recipe, given: Mapping[str, Any], classes: int, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The network of a recipe for images, whose values are to be loaded; see `split_network`."""
    if recipe.run.kind == "split":
        return split_network(recipe, given, classes, tensors)
    return chosen_network(recipe, given["shape"], classes, filled=False)


def split_network(
    recipe: Recipe, given: Mapping[str, Any], classes: int, tensors: Mapping[str, Tensor]
) -> DeployedNetwork:
    """The whole network of a split recipe, as it is deployed; its values are to be loaded.

    Args:
        recipe: of the run.
        given: what it takes, see `TrainedModel.input`.
        classes: C.
        tensors: its values; of them the masks, or the basis, that there are.
    """
    assert recipe.model.cut is not None
    network = chosen_network(recipe, given["shape"], classes, filled=False)
    method = chosen_compressor(recipe)
    example = Batch(torch.zeros(1, *given["shape"]), torch.zeros(1, dtype=torch.int64))
    model = cut_model(network, recipe.model.cut, recipe.model.tail, example, method)
    links = {name: tensor for name, tensor in tensors.items() if name.startswith("links.")}
    masks = {int(n.split(".")[1]): mask for n, mask in links.items() if n.endswith(".mask")}
    parts = {n.split(".")[2]: part for n, part in links.items() if not n.endswith(".mask")}
    basis = Basis(**parts) if parts else None
    return DeployedNetwork(model, method, tail_compressor(method), masks or {-1: None}, basis)


@torch.no_grad()
def take(model: nn.Module, tensors: Mapping[str, Tensor], *, whole: bool) -> None:
    """Write the values into the model; all of its state if `whole`.

    Raises:
        KeyError, RuntimeError: a name or a shape is not the model's.
    """
    if whole:
        model.load_state_dict(dict(tensors))
        return
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in tensors.items():
        if held[name].shape != value.shape:
            raise RuntimeError(f"{name}: {list(value.shape)} for {list(held[name].shape)}")
        held[name].copy_(value)
