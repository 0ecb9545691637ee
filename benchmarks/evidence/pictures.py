"""Pictures of docs/results.md: a panel a setting, a line a method, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from pages import Runs

from sluiceway.experiment.compare import Interval

Points = Callable[[Mapping[int, Mapping[str, Any]]], tuple[Any, Any]]


def by_round(mine: Mapping[int, Mapping[str, Any]]) -> tuple[Any, Any]:
    """Rounds [R], and accuracies [seeds, R]."""
    accuracies = np.array([run["accuracy_by_round"] for run in mine.values()])
    return np.arange(1, 1 + accuracies.shape[1]), accuracies


def by_megabytes(mine: Mapping[int, Mapping[str, Any]]) -> tuple[Any, Any]:
    """Megabytes so far, both directions and the mean over seeds [R], and accuracies [seeds, R]."""
    spent = np.array([run["bytes_by_round"] for run in mine.values()]).mean(0).cumsum() / 1e6
    return spent, by_round(mine)[1]


def panels(
    runs: Runs,
    settings: Sequence[str],
    methods: Sequence[str],
    path: Path,
    points: Points = by_round,
    axis_name: str = "round",
    log: bool = False,
) -> None:
    """Draw a panel a setting with what was run in it, from (x [R], accuracies [seeds, R])."""
    shown = [s for s in settings if runs.get(s)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    drawn = [m for m in methods if any(runs[setting].get(m) for setting in shown)]
    palette = [*plt.get_cmap("tab10").colors, "black", "gold", "teal"]  # type: ignore[attr-defined]
    colours = {method: palette[i % len(palette)] for i, method in enumerate(drawn)}
    for place, setting in zip(axes.flat, shown, strict=False):
        for method in drawn:
            mine = runs[setting].get(method)
            if not mine:
                continue
            x, accuracies = points(mine)
            found = [Interval.of(list(column)) for column in accuracies.T]
            mean, half = (np.array([getattr(f, name) for f in found]) for name in ("mean", "half"))
            place.plot(x, mean, color=colours[method], label=method, linewidth=1.6)
            place.fill_between(
                x, mean - half, mean + half, color=colours[method], alpha=0.08, linewidth=0
            )
            place.set_ylim(*limits(place, mean))
        if log:
            place.set_xscale("log")
        place.set_title(setting, fontsize=10)
        place.set_xlabel(axis_name)
        if axis_name == "round":
            place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.grid(alpha=0.3)
    for place in axes.flat[len(shown) :]:
        place.axis("off")
    axes[0][0].set_ylabel("accuracy")
    handles = {
        label: handle
        for place in axes.flat
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=min(2 * axes.shape[1], 6, len(handles)),
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def limits(place: Any, mean: Any) -> tuple[float, float]:
    """Bounds of a panel that hold all means so far; wide intervals may leave it."""
    known = place.get_lines()[:-1]
    low, high = float(mean.min()), float(mean.max())
    for line in known:
        low, high = min(low, float(min(line.get_ydata()))), max(high, float(max(line.get_ydata())))
    room = 0.08 * max(high - low, 0.05)
    return low - room, high + room
