"""One run of a recipe: load, partition, train, and leave a run folder behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from sluiceway.core.checkpoints import Checkpoint, CheckpointError
from sluiceway.core.round_loop import Record, Result, Rounds
from sluiceway.core.settings import Training
from sluiceway.core.waits import announced
from sluiceway.data import ImageData, TextDataset
from sluiceway.errors import InputError
from sluiceway.experiment.builders import (
    chosen_compressor,
    chosen_network,
    chosen_strategy,
    divided,
    federated_model,
    parts_of,
    plan_of,
    usable_device,
    worker_count,
)
from sluiceway.experiment.own_code import short_name
from sluiceway.experiment.own_metrics import metric_of
from sluiceway.experiment.pretrained import kept_tensors, recipe_of
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.remote_runs import serve_federated, serve_split
from sluiceway.experiment.run_directory import RunDirectory
from sluiceway.experiment.session import Progress, Session
from sluiceway.experiment.summary import Outcome, image_input, summarise
from sluiceway.experiment.trackers import Told, Tracker, chosen_trackers
from sluiceway.files import replacing
from sluiceway.split.training import split_train
from sluiceway.strategies import STRATEGIES, Central
from sluiceway.transport.local import federate
from sluiceway.transport.protocol import Transport
from sluiceway.transport.tls import Endpoint


def run(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    session: Session | None = None,
    progress: Progress | None = None,
    transport: Transport | None = None,
    endpoint: Endpoint | None = None,
    trackers: Sequence[Tracker] = (),
) -> tuple[Result, dict[str, Any]]:
    """Run a recipe on this machine, or across sites.

    Args:
        recipe: checked.
        out: the run folder; None writes nothing.
        resume: continue what is in `out`.
        force: replace what is in `out`.
        session: shares data and frozen layers' outputs between runs.
        progress: what to tell meanwhile.
        transport: reaches the sites that are the clients; None trains them here.
        endpoint: where sites connect to in a split run.
        trackers: told of the run besides those that `run.track` names, where `out` is given.

    Returns:
        The result, and the summary that is in `summary.json`.

    Raises:
        InputError, DataError, NoExpertsError, CheckpointError: bad input, one line each.
        StorageError, RunFailed: the run cannot go on, one line each.
        Stopped: see `graceful_stop`.
    """
    session = session or Session()
    progress = progress or Progress()
    if transport is None and recipe.run.engine != "local":
        raise InputError(
            f"run.engine = {recipe.run.engine!r} is for `sluiceway run`; here it must be 'local'"
        )
    named: dict[str, Tracker] = dict(chosen_trackers(recipe.run.track))
    told_too = Told(named | {type(one).__name__: one for one in trackers}, progress.say)
    device = usable_device(recipe.run.device)
    pretrain(recipe, session, progress)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunDirectory(out, recipe, resume, force)) if out else None

        def on_start() -> None:
            progress.begin(recipe.run.rounds)
            if folder:
                folder.open()
                told_too("on_start", recipe.resolved(), folder.out)

        newest: list[Record] = []

        def on_round(record: Record) -> None:
            newest.append(record)
            if folder:
                folder.add(record)
                told_too("on_round", record)
            progress.on_round(record)

        told = replace(progress, on_start=on_start, on_round=on_round)
        given = recipe, device, session, told, checkpoint_of(recipe, out, resume, progress)
        split = recipe.run.kind == "split"
        if transport is None:
            outcome = (run_split if split else run_federated)(*given)
        elif split:
            outcome = serve_split(*given, transport, endpoint)
        else:
            outcome = serve_federated(*given, transport)
        before = outcome.result.records[: len(outcome.result.records) - len(newest)]
        seconds = time.perf_counter() - began + sum(record.seconds for record in before)
        summary = summarise(recipe, outcome, device, seconds)
        if folder:
            folder.finish(outcome.result, summary)
            told_too("on_end", summary)
    return outcome.result, summary


def pretrain(recipe: Recipe, session: Session, progress: Progress) -> None:
    """Run the recipe that this one begins with, if it names one and it was not run here before."""
    first = recipe_of(recipe.model)
    if first is None or (path := kept_tensors(first)).is_file():
        return
    progress.say(f"{recipe.model.pretrained} is run first, once on this machine")
    with announced(str(recipe.model.pretrained)):
        tensors = run(first, session=session)[0].tensors
    with replacing(path) as draft:
        save_file(tensors, draft)


def checkpoint_of(
    recipe: Recipe, out: Path | None, resume: bool, progress: Progress
) -> Checkpoint | None:
    """Where and how often the run is saved; None where nothing is written."""
    if out is None:
        return None
    return Checkpoint(
        out / "checkpoints",
        resume,
        every=recipe.run.checkpoint_every,
        keep=recipe.run.checkpoint_keep,
        say=progress.say,
        models=out / "model",
        best=recipe.run.keep == "best",
        metric=short_name(recipe.run.metric),
    )


def run_federated(
    recipe: Recipe,
    device: str,
    session: Session,
    progress: Progress,
    checkpoint: Checkpoint | None,
) -> Outcome:
    """Train a model of texts or images across clients."""
    data, model, train, test, source = federated_model(recipe, session, progress.say)
    parts, held_out = divided(recipe, data)
    workers = worker_count(recipe, device)
    progress.say(
        f"model: {short_name(recipe.model.name)} from {source}, on {device}, "
        f"{workers} worker{'s' if workers > 1 else ''}"
    )
    long = train.filled(recipe.data.max_tokens) if isinstance(train, TextDataset) else 0
    if long:
        progress.say(
            f"tokens: {long:,} of {len(train):,} training examples fill data.max_tokens = "
            f"{recipe.data.max_tokens}; what is longer is cut"
        )
    strategy, training = chosen_strategy(recipe)
    require_examples(recipe, parts)
    how = rounds_of(recipe, device, progress, checkpoint)
    if pooled := isinstance(strategy, Central):
        training = pooled_training(training, plan_of(recipe), parts)
        parts, workers = [np.concatenate(parts)], 1
        held_out = [np.concatenate(held_out)]
        how |= {"participation": 1.0, "min_clients": 1}
    if recipe.run.timeout and device != "cpu":
        raise InputError(
            f"run.timeout = {recipe.run.timeout:g} needs the CPU; this runs on {device}"
        )
    result = federate(
        model,
        [train.subset(part) for part in parts],
        test,
        strategy,
        **how,
        max_retries=recipe.run.max_retries,
        max_step=recipe.run.max_step,
        leave_one_out=recipe.run.leave_one_out,
        evaluate_every=recipe.run.evaluate_every,
        personal_examples=recipe.run.personal,
        local_tests=[train.subset(p) for p in held_out] if recipe.data.local_test else None,
        timeout=recipe.run.timeout,
        training=training,
        workers=workers,
        threads=recipe.run.threads if device == "cpu" else None,
        stacked=0 if pooled else recipe.run.stacked,
        head_start=recipe.head_start,
        features=session.feature_cache(recipe.run.feature_memory_mb, recipe.run.feature_disk_mb),
        on_update=progress.on_update,
    )
    given = image_input(data) if isinstance(data, ImageData) else None
    return Outcome(result, data.source, data.label_names, given)


def pooled_training(training: Training, plan: Rounds, parts: Sequence[Sequence[Any]]) -> Training:
    """Settings by which one client takes as many steps a round as those of a plan do together."""
    steps = [training.steps(len(part)) for part in parts if len(part)]
    taking_part = plan.count(range(len(steps))) / len(steps)
    return replace(training, local_steps=max(1, round(sum(steps) * taking_part)))


def run_split(
    recipe: Recipe,
    device: str,
    session: Session,
    progress: Progress,
    checkpoint: Checkpoint | None,
) -> Outcome:
    """Train an image classifier that is cut between clients and a server."""
    data, train, test = session.images(recipe.data, progress.say)
    parts = parts_of(recipe, data)
    model = chosen_network(recipe, train.shape, len(data.label_names), progress.say)
    assert recipe.model.cut is not None
    still = "" if recipe.trains_front() else ", layers before the cut frozen: no gradients cross"
    progress.say(
        f"model: {short_name(recipe.model.name)} cut at {recipe.model.cut}, on {device}{still}"
    )
    try:
        result = split_train(
            model,
            recipe.model.cut,
            [train.subset(part) for part in parts],
            test,
            chosen_compressor(recipe),
            **rounds_of(recipe, device, progress, checkpoint),
            schedule=recipe.run.schedule,
            tail_at=recipe.model.tail,
            client_aggregation=STRATEGIES[recipe.run.client_aggregation](),
            training=recipe.training(),
            threads=recipe.run.threads if device == "cpu" else None,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    return Outcome(result, data.source, data.label_names, image_input(data))


def rounds_of(
    recipe: Recipe, device: str, progress: Progress, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """The arguments that `federate` and `split_train` have in common."""
    return {
        "rounds": recipe.run.rounds,
        "participation": recipe.run.participation,
        "seed": recipe.run.seed,
        "min_clients": recipe.run.min_clients,
        "patience": recipe.run.patience,
        "metric": metric_of(recipe.run.metric),
        "device": device,
        "on_start": progress.on_start,
        "on_round": progress.on_round,
        "checkpoint": checkpoint,
    }


def require_examples(recipe: Recipe, parts: Sequence[Sequence[Any]]) -> None:
    """Raise InputError if too few clients hold examples."""
    try:
        plan_of(recipe).check([client for client, part in enumerate(parts) if len(part)])
    except ValueError as error:
        raise InputError(str(error)) from None
