"""From a recipe to what it names: partition, model, method, and how many rounds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sluiceway.core.device import chosen_device
from sluiceway.core.round_loop import Rounds
from sluiceway.core.settings import Training
from sluiceway.core.waits import announced
from sluiceway.data import (
    ChoiceData,
    ImageData,
    ImageDataset,
    TextData,
    TextDataset,
    local_tests,
    partition,
    word_tokens,
)
from sluiceway.data.augment import Augmentation
from sluiceway.data.images import IMAGE_SETS, ImageSet
from sluiceway.data.own_images import by_channel
from sluiceway.data.sources import ALIASES
from sluiceway.errors import InputError, first_line
from sluiceway.experiment.heads import Endings, TextClassifier, Words, is_encoder_decoder
from sluiceway.experiment.models import Pretrained, assembled, load_pretrained
from sluiceway.experiment.own_code import is_code
from sluiceway.experiment.own_metrics import metric_of
from sluiceway.experiment.own_model import own_language_model, own_network
from sluiceway.experiment.pretrained import load_front, load_tensors
from sluiceway.experiment.recipe import Data, Model, Recipe
from sluiceway.experiment.session import Say, Session
from sluiceway.experiment.vision import vision_network
from sluiceway.split.compress import Compressor
from sluiceway.split.networks import Conv4, resnet18, vgg11
from sluiceway.strategies import Strategy

#: Examples of either kind.
AnyDataset = TextDataset | ImageDataset


def parts_of(recipe: Recipe, found: TextData | ChoiceData | ImageData) -> Sequence[Any]:
    """Row numbers of each client. Raises DataError."""
    return partition(
        recipe.data.partition,
        found.train.labels,
        recipe.data.clients,
        recipe.run.seed,
        alpha=recipe.data.alpha,
        classes_per_client=recipe.data.classes_per_client,
        groups=None if isinstance(found, ImageData) else found.train.groups,
        column=recipe.data.group,
    )


def divided(
    recipe: Recipe, found: TextData | ChoiceData | ImageData
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Row numbers that each client trains on, and those of its own test part. Raises DataError."""
    held = found.train.labels, parts_of(recipe, found)
    return local_tests(*held, recipe.data.local_test, recipe.data.seed)


def federated_model(
    recipe: Recipe, session: Session, say: Say
) -> tuple[TextData | ChoiceData | ImageData, nn.Module, AnyDataset, AnyDataset, str]:
    """The data of a federated recipe, its model, train and test examples, and the model's source.

    Raises:
        InputError, DataError: there are no such data or model, or they do not fit.
    """
    if not recipe.images:
        texts = session.data(recipe.data, say)
        return texts, *language_model(recipe, texts, session)
    # Training in federated runs augments nothing.
    pictures, train, test = session.images(recipe.data, say, augment=False)
    model = chosen_network(recipe, train.shape, len(pictures.label_names), say)
    source = "own code" if is_code(recipe.model.name) else "Sluiceway"
    return pictures, model, train, test, source


def language_model(
    recipe: Recipe, data: TextData | ChoiceData, session: Session
) -> tuple[nn.Module, TextDataset, TextDataset, str]:
    """The model that a recipe trains, train and test examples as its tokens, and its source.

    Raises:
        InputError, DataError: there is no such model, or it does not fit the data.
    """
    chosen = recipe.model
    if is_code(chosen.name):
        loaded = own_language_model(chosen, len(data.label_names), recipe.run.seed)
        train, test = session.encoded(recipe.data, data, loaded, chosen)
        return loaded.backbone, train, test, loaded.source
    loaded = pretrained_of(chosen)
    train, test = session.encoded(recipe.data, data, loaded, chosen)
    head = head_for(data.label_names, isinstance(data, ChoiceData), loaded, chosen)
    with announced("building the model"):
        model = assembled(loaded, chosen, head, recipe.run.seed)
    return model, train, test, loaded.source


def pretrained_of(chosen: Model) -> Pretrained:
    """The transformer that a federated recipe begins with. Raises InputError."""
    return load_pretrained(
        chosen.name,
        language=chosen.answer == "likelihood",
        dtype=chosen.dtype,
        gguf=chosen.gguf,
    )


def head_for(
    label_names: Sequence[str], choices: bool, loaded: Pretrained, model: Model
) -> Callable[[nn.Module], nn.Module]:
    """What puts the scoring module around the loaded model.

    Args:
        label_names: the classes, or endings.
        choices: questions with endings, not texts with labels.

    Raises:
        DataError, InputError: the model cannot answer so.
    """
    if model.answer == "head":
        outputs = 1 if choices else len(label_names)
        return lambda body: TextClassifier(body, loaded.hidden, outputs)
    if choices:
        return Endings
    words = model.words or [name.replace("_", " ") for name in label_names]
    if len(words) != len(label_names):
        raise InputError(
            f"model.words has {len(words)} words for {len(label_names)} classes: "
            f"{', '.join(label_names)}"
        )
    before = model.prompt.rpartition("}")[2].strip() or "text"
    if is_encoder_decoder(loaded.backbone):
        before = "text"  # the decoder begins with the word
    ids = word_tokens(words, loaded.tokenizer, before)
    return lambda body: Words(body, ids)


def network(
    name: str, width: int, shape: Sequence[int], *, classes: int, seed: int
) -> nn.Sequential:
    """A network for images of shape (C, H, W), its values from the seed.

    Args:
        name: one of `recipe.NETWORKS`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "conv4":
            return Conv4(shape[0], classes, width)
        make = resnet18 if name == "resnet18" else vgg11
        return make(width, shape[0], classes)


def chosen_network(
    recipe: Recipe,
    shape: Sequence[int],
    classes: int,
    say: Say = lambda line: None,
    *,
    filled: bool = True,
) -> nn.Module:
    """The network of a recipe, for images of shape (C, H, W).

    Args:
        say: told where pretrained layers come from.
        filled: False where all values come later, so that a run that this one begins with need not
            exist any more.

    Raises:
        InputError: pretrained layers that are not there, or do not fit.
    """
    chosen = recipe.model
    place, seed = chosen.pretrained, recipe.run.seed
    built: nn.Module
    if is_code(chosen.name):
        built = own_network(chosen, classes, shape, seed, filled=filled)
        if place is not None and filled:
            say(f"pretrained: {load_tensors(built, place)}")
        place = None
    elif chosen.name == "huggingface":
        data = image_set(recipe.data, shape)
        side = chosen.image_size
        built, said = vision_network(str(place), data, classes, side=side, seed=seed)
        say(f"pretrained: {said}")
    else:
        built = network(chosen.name, chosen.width, shape, classes=classes, seed=seed)
    own = chosen.name != "huggingface" or (Path(str(place)) / "recipe.toml").is_file()
    if place is not None and own and filled:
        say(f"pretrained up to {chosen.cut}: {load_front(built, chosen, shape)}")
    if chosen.channels_last:
        built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return built


def image_set(data: Data, shape: Sequence[int]) -> ImageSet:
    """What is known of the images of [data] besides their shape (C, H, W)."""
    if data.name is not None:
        return IMAGE_SETS[ALIASES.get(data.name, data.name)]
    channels, height, width = shape
    mean, std = (by_channel(values, channels) for values in (data.mean, data.std))
    return ImageSet((), (channels, height, width), mean, std, Augmentation(0, False), ())


def chosen_strategy(recipe: Recipe) -> tuple[Strategy, Training]:
    """What a federated recipe's [method] and [train] say. Raises InputError."""
    strategy, training = recipe.built(), recipe.training()
    assert isinstance(strategy, Strategy)
    assert isinstance(training, Training)
    return strategy, training


def chosen_compressor(recipe: Recipe) -> Compressor:
    """What a split recipe's [method] says. Raises InputError."""
    method = recipe.built()
    assert isinstance(method, Compressor)
    return method


def plan_of(recipe: Recipe) -> Rounds:
    """How many rounds there are, and who takes part."""
    return Rounds(
        rounds=recipe.run.rounds,
        participation=recipe.run.participation,
        seed=recipe.run.seed,
        min_clients=recipe.run.min_clients,
        max_retries=recipe.run.max_retries,
        max_step=recipe.run.max_step,
        leave_one_out=recipe.run.leave_one_out,
        evaluate_every=recipe.run.evaluate_every,
        patience=recipe.run.patience,
        metric=metric_of(recipe.run.metric),
    )


def worker_count(recipe: Recipe, device: str) -> int:
    """How many worker processes train clients: on GPUs at most one each."""
    if recipe.run.stacked > 1:
        return 1
    if device != "cpu":
        visible = torch.cuda.device_count() if device == "cuda" else 1
        return min(recipe.run.workers or visible, visible, recipe.data.clients)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(recipe.run.workers or cores or 1, recipe.data.clients)


def usable_device(name: str) -> str:
    """The device that a recipe names. Raises InputError if this machine does not have it."""
    try:
        device = chosen_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = first_line(error)
        raise InputError(f"run.device = {name!r} cannot be used here: {why}") from None
    return device
