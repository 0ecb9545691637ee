"""The server's side of a run whose clients are elsewhere."""

from __future__ import annotations

from typing import Any

from sluiceway.engines.carrying import Carrier
from sluiceway.engines.remote import federate_remote
from sluiceway.experiment.errors import InputError
from sluiceway.experiment.kinds import Outcome, chosen_strategy, language_model
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Progress, Session
from sluiceway.federated.checkpoints import Checkpoint
from sluiceway.federated.rounds import Rounds


def serve_federated(
    recipe: Recipe,
    device: str,
    session: Session,
    progress: Progress,
    checkpoint: Checkpoint | None,
    carrier: Carrier,
) -> Outcome:
    """Fine-tune a language model across sites; of the recipe's data the test set is read here.

    Raises:
        InputError: there are more or fewer sites than the recipe has clients.
    """
    require_sites(recipe, carrier)
    data = session.data(recipe.data, progress.say)
    model, _, test, source = language_model(recipe, data, session)
    strategy, training = chosen_strategy(recipe)
    progress.say(
        f"model: {recipe.model.name} from {source}, on {device}; sites: {', '.join(carrier.sites)}"
    )
    result = federate_remote(
        model,
        carrier,
        facts_of(recipe, data.label_names),
        test,
        strategy,
        plan_of(recipe),
        training,
        device=device,
        timeout=recipe.run.timeout,
        on_start=progress.on_start,
        on_round=progress.on_round,
        on_update=progress.on_update,
        checkpoint=checkpoint,
    )
    return Outcome(result, data.source, data.label_names)


def plan_of(recipe: Recipe) -> Rounds:
    """How many rounds there are, and who takes part."""
    return Rounds(
        rounds=recipe.run.rounds,
        participation=recipe.run.participation,
        seed=recipe.run.seed,
        min_clients=recipe.run.min_clients,
        repeats=recipe.run.repeats,
    )


def facts_of(recipe: Recipe, label_names: tuple[str, ...]) -> dict[str, Any]:
    """What a site is told when it joins."""
    return {"recipe": recipe.resolved(), "label_names": list(label_names)}


def require_sites(recipe: Recipe, carrier: Carrier) -> None:
    """Raise InputError unless there is a site for each client."""
    if len(carrier.sites) != recipe.data.clients:
        raise InputError(
            f"data.clients = {recipe.data.clients}, but there are {len(carrier.sites)} sites"
        )
