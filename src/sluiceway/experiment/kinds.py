"""The two kinds of run: from a recipe to a result on the embedded engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sluiceway.core.checkpoints import Checkpoint, CheckpointError
from sluiceway.core.round_loop import Result, Rounds
from sluiceway.core.settings import Training
from sluiceway.data import ChoiceData, ImageData, TextData, TextDataset, partition
from sluiceway.errors import InputError
from sluiceway.experiment.models import assembled, load_pretrained
from sluiceway.experiment.readings import answer_of
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Progress, Session
from sluiceway.split.compress import Compressor
from sluiceway.split.networks import Conv4, resnet18, vgg11
from sluiceway.split.training import SplitRecord, split_train
from sluiceway.strategies import STRATEGIES, Strategy
from sluiceway.transport.local import federate


@dataclass(frozen=True)
class Outcome:
    """A result, what it was trained on, and what the summary says beside the usual."""

    result: Result
    source: str
    label_names: Sequence[str]
    more: dict[str, Any] = field(default_factory=dict)


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


def run_federated(
    recipe: Recipe,
    device: str,
    session: Session,
    progress: Progress,
    checkpoint: Checkpoint | None,
) -> Outcome:
    """Fine-tune a language model or a classifier of texts across clients."""
    data = session.data(recipe.data, progress.say)
    parts = parts_of(recipe, data)
    model, train, test, source = language_model(recipe, data, session)
    workers = worker_count(recipe, device)
    progress.say(
        f"model: {recipe.model.name} from {source}, on {device}, "
        f"{workers} worker{'s' if workers > 1 else ''}"
    )
    strategy, training = chosen_strategy(recipe)
    check_rounds(recipe, parts)
    if recipe.run.timeout and device != "cpu":
        raise InputError(
            f"run.timeout = {recipe.run.timeout:g} needs the CPU; this runs on {device}"
        )
    result = federate(
        model,
        [train.subset(part) for part in parts],
        test,
        strategy,
        rounds=recipe.run.rounds,
        participation=recipe.run.participation,
        seed=recipe.run.seed,
        min_clients=recipe.run.min_clients,
        repeats=recipe.run.max_retries,
        timeout=recipe.run.timeout,
        training=training,
        device=device,
        workers=workers,
        threads=recipe.run.threads if device == "cpu" else None,
        features=session.feature_cache(recipe.run.feature_memory_mb),
        on_start=progress.on_start,
        on_round=progress.on_round,
        on_update=progress.on_update,
        checkpoint=checkpoint,
    )
    return Outcome(result, data.source, data.label_names)


def language_model(
    recipe: Recipe, data: TextData | ChoiceData, session: Session
) -> tuple[nn.Module, TextDataset, TextDataset, str]:
    """The model that a recipe trains, train and test examples as its tokens, and its source."""
    chosen = recipe.model
    loaded = load_pretrained(
        chosen.name,
        language=chosen.answer == "likelihood",
        dtype=chosen.dtype,
        gguf=chosen.gguf,
    )
    train, test = session.encoded(recipe.data, data, loaded, chosen)
    model = assembled(loaded, chosen, answer_of(data, loaded, chosen), recipe.run.seed)
    return model, train, test, loaded.source


def chosen_strategy(recipe: Recipe) -> tuple[Strategy, Training]:
    """What a federated recipe's [method] and [train] say. Raises InputError."""
    strategy, training = recipe.built(), recipe.training()
    assert isinstance(strategy, Strategy)
    assert isinstance(training, Training)
    return strategy, training


def plan_of(recipe: Recipe) -> Rounds:
    """How many rounds there are, and who takes part."""
    return Rounds(
        rounds=recipe.run.rounds,
        participation=recipe.run.participation,
        seed=recipe.run.seed,
        min_clients=recipe.run.min_clients,
        repeats=recipe.run.max_retries,
    )


def check_rounds(recipe: Recipe, parts: Sequence[Sequence[Any]]) -> None:
    """Raise InputError if too few clients hold examples."""
    try:
        plan_of(recipe).check([number for number, part in enumerate(parts) if len(part)])
    except ValueError as error:
        raise InputError(str(error)) from None


def worker_count(recipe: Recipe, device: str) -> int:
    """How many processes play clients."""
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(recipe.run.workers or cores or 1, recipe.data.clients)


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


def run_split(
    recipe: Recipe,
    device: str,
    session: Session,
    progress: Progress,
    checkpoint: Checkpoint | None,
) -> Outcome:
    """Train an image classifier that is cut between clients and a server."""
    pictures, train, test = session.images(recipe.data, progress.say)
    parts = parts_of(recipe, pictures)
    model = chosen_network(recipe, train.shape, len(pictures.label_names))
    method = chosen_compressor(recipe)
    assert recipe.model.cut is not None
    progress.say(f"model: {recipe.model.name} cut at {recipe.model.cut}, on {device}")
    try:
        result = split_train(
            model,
            recipe.model.cut,
            [train.subset(part) for part in parts],
            test,
            method,
            schedule=recipe.run.schedule,
            tail_at=recipe.model.tail,
            client_aggregation=STRATEGIES[recipe.run.client_aggregation](),
            rounds=recipe.run.rounds,
            participation=recipe.run.participation,
            seed=recipe.run.seed,
            training=recipe.training(),
            device=device,
            on_start=progress.on_start,
            on_round=progress.on_round,
            checkpoint=checkpoint,
            min_clients=recipe.run.min_clients,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    return Outcome(result, pictures.source, pictures.label_names, split_facts(result))


def chosen_network(recipe: Recipe, shape: Sequence[int], classes: int) -> nn.Sequential:
    """The network of a split recipe, for images of shape (C, H, W)."""
    chosen = recipe.model
    return network(chosen.name, chosen.width, shape, classes=classes, seed=recipe.run.seed)


def chosen_compressor(recipe: Recipe) -> Compressor:
    """What a split recipe's [method] says. Raises InputError."""
    method = recipe.built()
    assert isinstance(method, Compressor)
    return method


def split_facts(result: Result) -> dict[str, Any]:
    """What a split run's summary has beside the usual."""
    records = [record for record in result.records if isinstance(record, SplitRecord)]
    return {
        "accuracy_full": records[-1].accuracy_full,
        "accuracy_full_by_round": [record.accuracy_full for record in records],
        "kept_by_round": [record.kept for record in records],
        "channels": records[-1].channels,
        "scores_by_round": [record.scores for record in records],
        "masks_by_round": [record.mask for record in records],
    }
