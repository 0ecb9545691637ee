"""Differential privacy of a whole run: what it goes with, and how often a client has a part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sluiceway.errors import InputError, line
from sluiceway.strategies import Strategy
from sluiceway.strategies.base import Mechanism


def arrange_privacy(strategy: Strategy, model: nn.Module, rounds: int, head_start: str) -> None:
    """Begin a run with the strategy's mechanism, if it has one; call once it is set up.

    Args:
        model: prepared.
        rounds: that a client may take part in.
        head_start: how the head starts.

    Raises:
        InputError: something would cross that gets no noise.
    """
    if strategy.privacy is None:
        return
    if why := hindrance(strategy, model, head_start):
        raise InputError(f"method.privacy: {why}")
    strategy.privacy.setup(releases_of(strategy, rounds, head_start))


def releases_of(strategy: Strategy, rounds: int, head_start: str) -> int:
    """Releases in which one client has a part, at most."""
    return (rounds if strategy.trains_clients else 0) + (head_start != "random") or 1


def hindrance(strategy: Strategy, model: nn.Module, head_start: str) -> str | None:
    """What excludes privacy, in one line; None if nothing does."""
    assert strategy.privacy is not None
    name, where = strategy.name, strategy.privacy.where
    if strategy.reads_routing:
        return (
            f"method {name} weighs clients by the routing that they report, which would cross "
            "without noise; use fedavg, fedprox, fedavgm, fedadam or fedyogi"
        )
    if type(strategy).finish_training is not Strategy.finish_training:
        return f"method {name} sends more than the trained values, which would get no noise"
    if strategy.wants_label_counts():
        return f"method {name} with these parameters needs each client's counts of classes"
    if head_start == "ridge":
        return "the second moments of model.head_start = 'ridge' get no noise; use 'means'"
    if where == "server" and strategy.rules:
        return "method.robust looks at several clients at once; it goes with where = 'client'"
    if where == "server" and not strategy.needs_sums_alone():
        return f"where = 'server' is for methods that need sums alone; {name} with these is not"
    params = {name for name, _ in model.named_parameters()}
    for buffer in strategy.tensors.keys() - params:
        return f"{line(buffer, 80)} is a statistic that training changes, as BatchNorm's are"
    return None


def told(label_counts: Tensor, strategy: Strategy) -> Tensor:
    """Counts of classes as the run knows them, [clients, classes]: one of each under privacy."""
    if strategy.privacy is None:
        return label_counts
    held = label_counts.sum(1, keepdim=True) > 0
    return held.to(label_counts.dtype).expand_as(label_counts).clone()


def spent(
    mechanism: Mechanism, rounds: Iterable[tuple[Sequence[int], int]], head_start: str
) -> dict[str, Any]:
    """What a run has cost so far.

    Args:
        rounds: the clients and the number of retries of each round. A client may have answered in
            a retry as well.
        head_start: how the head started.
    """
    parts: Counter[int] = Counter()
    retries = 0
    for clients, again in rounds:
        parts.update(clients)
        retries += again if mechanism.where == "client" else 0
    releases = max(parts.values(), default=0) + retries + (head_start != "random")
    return {
        "epsilon": mechanism.spent(releases),
        "delta": mechanism.delta,
        "noise": mechanism.multiplier,
        "clip": mechanism.limit,
        "where": mechanism.where,
        "releases": releases,
        "repeatable": mechanism.noise_seed is not None,
    }


def feature_size(features: Iterable[Tensor]) -> float:
    """The mean norm of feature vectors, [B, d] each; one where there are none."""
    norms = [one.float().norm(dim=1) for one in features]
    return float(torch.cat(norms).mean()) if norms else 1.0
