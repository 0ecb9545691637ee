"""What a run would be: sizes, traffic and work, without training and without writing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sluiceway.core.head_start import HeadSums, sums_length
from sluiceway.core.messages import broadcast_length, packed_length, update_parts
from sluiceway.core.settings import SplitTraining
from sluiceway.errors import InputError
from sluiceway.experiment.builders import (
    chosen_network,
    chosen_strategy,
    divided,
    federated_model,
    parts_of,
    plan_of,
)
from sluiceway.experiment.compare import PlannedRun, variant_name
from sluiceway.experiment.own_code import short_name
from sluiceway.experiment.pretrained import recipe_of
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.session import Progress, Session
from sluiceway.federated.client import prepare
from sluiceway.moe import BlockRouting
from sluiceway.split.cut import cut_points
from sluiceway.strategies import Central, Strategy, Update


def described(recipe: Recipe, session: Session, progress: Progress) -> list[str]:
    """Lines about a run that would be made: data, model, bytes and steps of a round.

    Raises:
        InputError, DataError, NoExpertsError: what the run would be refused for.
    """
    split = recipe.run.kind == "split"
    return list((split_lines if split else federated_lines)(recipe, session, progress))


def megabytes(count: float) -> str:
    """Bytes in MB, three digits."""
    return f"{count / 1e6:,.3g} MB" if count < 1e9 else f"{count / 1e6:,.0f} MB"


def clients_line(parts: Sequence[Any], taking_part: int, recipe: Recipe) -> str:
    """Who holds how much, and how many take part."""
    sizes = [len(part) for part in parts if len(part)]
    empty = len(parts) - len(sizes)
    return (
        f"clients: {len(parts)}{f', {empty} without examples' if empty else ''}, "
        f"{min(sizes):,} to {max(sizes):,} examples each; {taking_part} take part in each of "
        f"{recipe.run.rounds} rounds"
    )


def federated_lines(recipe: Recipe, session: Session, progress: Progress) -> Iterator[str]:
    """Of a federated run. What experts without a token save is not known before."""
    data, model, _, _, source = federated_model(recipe, session, progress.say)
    parts, _ = divided(recipe, data)
    strategy, training = chosen_strategy(recipe)
    prepare(model, strategy, len(parts))
    plan, held = plan_of(recipe), [i for i, part in enumerate(parts) if len(part)]
    try:
        plan.check(held)
    except ValueError as error:
        raise InputError(str(error)) from None
    count = plan.count(held)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    yield clients_line(parts, count, recipe)
    yield (
        f"model: {short_name(recipe.model.name)} from {source}, {total:,} parameters, "
        f"{trained:,} trained"
        + (f", {len(strategy.layout.blocks)} mixtures" if strategy.layout.blocks else "")
    )
    if isinstance(strategy, Central) or not strategy.trains_clients:
        yield f"method: {strategy.name}, nothing crosses in training"
        return
    down, up = broadcast_length(strategy.broadcast(1)), update_length(strategy)
    yield (
        f"method: {strategy.name}; a client's round: {megabytes(down)} down, at most "
        f"{megabytes(up)} up"
    )
    yield f"a round: {megabytes(count * down)} down, at most {megabytes(count * up)} up"
    rounds = recipe.run.rounds
    start = head_start_length(recipe, strategy) * len(held)
    yield (
        f"all rounds: {megabytes(rounds * count * down)} down, at most "
        f"{megabytes(rounds * count * up + start)} up"
    )
    steps = [training.steps(len(parts[i])) for i in held]
    examples = [training.passes(len(parts[i])) * len(parts[i]) for i in held]
    share = count / len(held)
    yield (
        f"work: about {share * sum(steps):,.0f} steps on {share * sum(examples):,.0f} examples a "
        f"round, {rounds * share * sum(steps):,.0f} steps in all"
    )


def update_length(strategy: Strategy) -> int:
    """Bytes of a client's update that sends all it may."""
    tensors = {piece.key: piece.of(strategy.tensors) for piece in strategy.shared_pieces}
    report = [
        BlockRouting(
            load=zeros,
            routing=zeros,
            margin=zeros,
            region=torch.zeros(len(zeros), block.hidden) if strategy.wants_regions() else None,
            tokens=0,
        )
        for block in strategy.layout.blocks
        for zeros in [torch.zeros(block.num_experts)]
    ]
    metrics = {"loss": 1.2345678901234567, "penalty": 1.2345678901234567}
    whole = Update(9999, 999, 99_999, tensors, report, strategy.client_extra() or {}, metrics)
    return packed_length(*update_parts(whole))


def head_start_length(recipe: Recipe, strategy: Strategy) -> int:
    """Bytes that a client sends once for the closed-form start of the head."""
    if recipe.head_start == "random" or not strategy.layout.head:
        return 0
    classes, features = strategy.tensors[strategy.layout.head[0]].shape
    size = features + 1
    sums = {"labels": torch.zeros(classes, size)}
    if recipe.head_start == "ridge":
        sums["gram"] = torch.zeros(size * (size + 1) // 2)
    return sums_length(HeadSums(0, sums))


def split_lines(recipe: Recipe, session: Session, progress: Progress) -> Iterator[str]:
    """Of a split run. What the method saves of the smashed data is not known before."""
    data, train, _ = session.images(recipe.data, progress.say)
    parts = parts_of(recipe, data)
    # What a recipe that comes first would give need not be there yet.
    filled = recipe_of(recipe.model) is None
    names = data.label_names
    model = chosen_network(recipe, train.shape, len(names), progress.say, filled=filled)
    points = {point.name: point for point in cut_points(model, torch.zeros(1, *train.shape))}
    cut, tail = recipe.model.cut, recipe.model.tail
    for name in filter(None, (cut, tail)):
        if name not in points:
            raise InputError(
                f"{name!r} is no layer of the network; it can be cut at {', '.join(points)}"
            )
    plan, held = plan_of(recipe), [i for i, part in enumerate(parts) if len(part)]
    count = plan.count(held)
    training = recipe.training()
    front = points[str(cut)]
    total = sum(p.numel() for p in model.parameters())
    yield clients_line(parts, count, recipe)
    yield (
        f"model: {short_name(recipe.model.name)}, {total:,} parameters, "
        f"{front.front_parameters:,} of them before the cut at {cut}, behind which an example is "
        f"{'x'.join(map(str, front.shape))}"
    )
    trains = not isinstance(training, SplitTraining) or training.front
    examples = training.local_epochs * sum(len(parts[i]) for i in held) * count / len(held)
    smashed = examples * front.bytes_per_example
    yield (
        f"method: {recipe.method['name']}; smashed data of a round in float32, all channels: "
        f"{megabytes(smashed)} up" + (" and as much of gradients down" if trains else "")
    )
    layers = 4 * count * front.front_parameters if trains else 0
    yield f"layers of the clients, a round: {megabytes(layers)} each way"
    batches = sum(-(-len(parts[i]) // training.batch_size) for i in held) * training.local_epochs
    share = count / len(held)
    yield (
        f"work: about {share * batches:,.0f} batches on {examples:,.0f} examples a round, "
        f"{recipe.run.rounds * share * batches:,.0f} batches in all"
    )


def compared(planned: Sequence[PlannedRun], progress: Progress) -> list[str]:
    """Lines about a comparison: each variant's runs, and what the first of them would be."""
    session, found = Session(), [f"{len(planned)} runs"]
    by_name: dict[str, list[tuple[int, Recipe]]] = {}
    for one in planned:
        by_name.setdefault(variant_name(one.values), []).append((one.seed, one.recipe))
    for variant, runs in by_name.items():
        seeds = ", ".join(str(seed) for seed, _ in runs)
        found.append(f"{variant}, seed{'s' if len(runs) > 1 else ''} {seeds}")
        found += [f"  {one}" for one in described(runs[0][1], session, progress)]
    return found
