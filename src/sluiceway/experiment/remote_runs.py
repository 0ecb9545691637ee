"""The server's side of a run whose clients are at sites."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sluiceway.core.checkpoints import Checkpoint, CheckpointError
from sluiceway.core.handshake import HandshakeError
from sluiceway.data import ImageData
from sluiceway.errors import InputError
from sluiceway.experiment.builders import (
    chosen_compressor,
    chosen_network,
    chosen_strategy,
    federated_model,
    plan_of,
)
from sluiceway.experiment.own_code import code_by_name, short_name
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Progress, Session
from sluiceway.experiment.summary import Outcome, image_input
from sluiceway.split.setup import SplitSettings
from sluiceway.split.training import torch_threads
from sluiceway.strategies import STRATEGIES
from sluiceway.transport.protocol import Transport
from sluiceway.transport.remote import federate_remote
from sluiceway.transport.remote_split import split_remote
from sluiceway.transport.tls import Endpoint


def serve_federated(
    recipe: Recipe,
    device: str,
    session: Session,
    progress: Progress,
    checkpoint: Checkpoint | None,
    transport: Transport,
) -> Outcome:
    """Fine-tune a language model across sites; of the recipe's data the test set is read here.

    Raises:
        InputError: there are more or fewer sites than the recipe has clients; the method would
            need their examples in one place.
    """
    sites = required_sites(recipe, transport)
    if recipe.method["name"] == "central":
        raise InputError("method central pools all examples, which a deployment never does")
    data, model, _, test, source = federated_model(recipe, session, progress.say)
    strategy, training = chosen_strategy(recipe)
    progress.say(
        f"model: {short_name(recipe.model.name)} from {source}, on {device}; sites: {sites}"
    )
    result = federate_remote(
        model,
        transport,
        facts_of(recipe, data.label_names, data if isinstance(data, ImageData) else None),
        test,
        strategy,
        plan_of(recipe),
        training,
        device=device,
        head_start=recipe.head_start,
        timeout=recipe.run.timeout,
        on_start=progress.on_start,
        on_round=progress.on_round,
        on_update=progress.on_update,
        checkpoint=checkpoint,
    )
    given = image_input(data) if isinstance(data, ImageData) else None
    return Outcome(result, data.source, data.label_names, given)


def serve_split(
    recipe: Recipe,
    device: str,
    session: Session,
    progress: Progress,
    checkpoint: Checkpoint | None,
    transport: Transport,
    endpoint: Endpoint | None,
) -> Outcome:
    """Train an image classifier that is cut between sites and this server.

    Raises:
        InputError: there are more or fewer sites than clients, or no endpoint.
    """
    sites = required_sites(recipe, transport)
    if endpoint is None:
        raise InputError(
            f"run.engine = {recipe.run.engine!r} carries no split run: it has no "
            "connection for a message a mini-batch; nvflare has"
        )
    pictures, train, test = session.images(recipe.data, progress.say)
    model = chosen_network(recipe, train.shape, len(pictures.label_names), progress.say)
    cut = recipe.model.cut
    progress.say(
        f"model: {short_name(recipe.model.name)} cut at {cut}, on {device}; sites: {sites}"
    )
    try:
        threads = recipe.run.threads if device == "cpu" else None
        with torch_threads(threads):
            result = split_remote(
                model,
                transport,
                endpoint,
                facts_of(recipe, pictures.label_names, pictures),
                test,
                split_settings(recipe, device),
                plan_of(recipe),
                timeout=recipe.run.timeout,
                on_start=progress.on_start,
                on_round=progress.on_round,
                checkpoint=checkpoint,
            )
    except (CheckpointError, HandshakeError):
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    given = image_input(pictures)
    return Outcome(result, pictures.source, pictures.label_names, given)


def split_settings(recipe: Recipe, device: str) -> SplitSettings:
    """The settings of a split run, on either side. Raises ValueError, InputError."""
    assert recipe.model.cut is not None
    return SplitSettings(
        recipe.model.cut,
        chosen_compressor(recipe),
        recipe.run.schedule,
        recipe.model.tail,
        STRATEGIES[recipe.run.client_aggregation](),
        recipe.training(),
        F.cross_entropy,
        torch.device(device),
        recipe.run.seed,
    )


def facts_of(
    recipe: Recipe, label_names: tuple[str, ...], pictures: ImageData | None = None
) -> dict[str, Any]:
    """The facts that a site gets when it joins; of images it learns the shape."""
    tables = code_by_name(recipe.resolved())
    if pictures is not None and recipe.data.path is not None:
        shape = "x".join(map(str, pictures.train.images.shape[1:]))
        tables["data"] = {**tables["data"], "image_shape": shape}
    return {"recipe": tables, "label_names": list(label_names)}


def required_sites(recipe: Recipe, transport: Transport) -> str:
    """The sites' names. Raises InputError unless there is one for each client."""
    if len(transport.sites) != recipe.data.clients:
        raise InputError(
            f"data.clients = {recipe.data.clients}, but there are {len(transport.sites)} sites"
        )
    return ", ".join(transport.sites)
