"""Tables and pictures of docs/results.md from what a sweep has run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from sluiceway.experiment.compare import Interval

#: A run by setting, method and seed.
Runs = Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]
Value = Callable[[Mapping[str, Any]], float]


def final(run: Mapping[str, Any]) -> float:
    """Accuracy after the last round."""
    return float(run["accuracy_by_round"][-1])


def level(run: Mapping[str, Any]) -> float:
    """Mean accuracy of the second half of the rounds."""
    accuracies = run["accuracy_by_round"]
    half = accuracies[len(accuracies) // 2 :]
    return float(sum(half) / len(half))


def reached(target: float) -> Value:
    """The first round with at least this accuracy; one more than there are if there is none."""

    def rounds(run: Mapping[str, Any]) -> float:
        enough = [n for n, a in enumerate(run["accuracy_by_round"], 1) if a >= target]
        return float(enough[0]) if enough else float(len(run["accuracy_by_round"]) + 1)

    return rounds


def spent(target: float) -> Value:
    """Megabytes, both directions, until at least this accuracy; infinite if it never was."""

    def megabytes(run: Mapping[str, Any]) -> float:
        total = 0.0
        for accuracy, nbytes in zip(run["accuracy_by_round"], run["bytes_by_round"], strict=True):
            total += nbytes / 1e6
            if accuracy >= target:
                return total
        return float("inf")

    return megabytes


def table(
    runs: Runs,
    settings: Sequence[str],
    methods: Sequence[str],
    value: Value,
    against: str,
    form: Callable[[float], str] = lambda x: f"{x:.3f}".lstrip("0"),
    spread: bool = True,
) -> str:
    """Markdown: a row a method, a column a setting, mean and 95 % interval over seeds.

    A star marks a difference to `against`, paired by seed, whose 95 % interval leaves out zero; the
    best of a column is bold.
    """
    lines = [f"| | {' | '.join(settings)} |", f"|---|{'---:|' * len(settings)}"]
    means = {
        setting: {
            method: float(np.mean([value(run) for run in runs[setting][method].values()]))
            for method in methods
            if runs.get(setting, {}).get(method)
        }
        for setting in settings
    }
    for method in methods:
        cells = []
        for setting in settings:
            mine = runs.get(setting, {}).get(method)
            if not mine:
                cells.append("")
                continue
            found = Interval.of([value(run) for run in mine.values()])
            text = form(found.mean)
            if spread and found.half == found.half:
                text += f" ± {form(found.half)}"
            if means[setting][method] == max(means[setting].values()):
                text = f"**{text}**"
            cells.append(text + starred(mine, runs[setting].get(against), value))
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def starred(
    mine: Mapping[int, Mapping[str, Any]],
    other: Mapping[int, Mapping[str, Any]] | None,
    value: Value,
) -> str:
    """A star if the two differ outside of the interval."""
    shared = sorted(set(mine) & set(other or {}))
    if not other or mine is other or len(shared) < 2:
        return ""
    gap = Interval.of([value(mine[seed]) - value(other[seed]) for seed in shared])
    return "*" if abs(gap.mean) > gap.half else ""


def gaps(
    runs: Runs, settings: Sequence[str], ours: str, rivals: Sequence[str], value: Value
) -> str:
    """Markdown: what `ours` is ahead of each rival, paired by seed: points, 95 % interval."""
    lines = [f"| {ours} against | {' | '.join(settings)} |", f"|---|{'---:|' * len(settings)}"]
    for rival in rivals:
        cells = []
        for setting in settings:
            mine, other = (runs.get(setting, {}).get(name, {}) for name in (ours, rival))
            shared = sorted(set(mine) & set(other))
            if not shared:
                cells.append("")
                continue
            gap = Interval.of([100 * (value(mine[s]) - value(other[s])) for s in shared])
            cells.append(f"{gap.mean:+.1f} ± {gap.half:.1f}")
        if any(cells):
            lines.append(f"| {rival} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(runs: Runs, settings: Sequence[str], methods: Sequence[str], path: Path) -> None:
    """Accuracy by round, mean over seeds with its 95 % interval; a panel a setting."""
    panels(
        runs,
        settings,
        methods,
        path,
        lambda mine: (
            np.arange(1, 1 + len(next(iter(mine.values()))["accuracy_by_round"])),
            np.array([run["accuracy_by_round"] for run in mine.values()]),
        ),
        "round",
    )


def panels(
    runs: Runs,
    settings: Sequence[str],
    methods: Sequence[str],
    path: Path,
    points: Callable[[Mapping[int, Mapping[str, Any]]], tuple[Any, Any]],
    axis_name: str,
) -> None:
    """A panel a setting and a line a method, from (x [R], accuracies [seeds, R])."""
    shown = [s for s in settings if runs.get(s)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("tab10")
    for place, setting in zip(axes.flat, shown, strict=False):
        for index, method in enumerate(methods):
            mine = runs[setting].get(method)
            if not mine:
                continue
            x, accuracies = points(mine)
            found = [Interval.of(list(column)) for column in accuracies.T]
            mean, half = (np.array([getattr(f, name) for f in found]) for name in ("mean", "half"))
            place.plot(x, mean, color=colours(index % 10), label=method, linewidth=1.6)
            place.fill_between(
                x, mean - half, mean + half, color=colours(index % 10), alpha=0.08, linewidth=0
            )
            place.set_ylim(*limits(place, mean))
        place.set_title(setting, fontsize=10)
        place.set_xlabel(axis_name)
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
        ncols=min(6, len(handles)),
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


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a table in a page."""
    begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    content = page.read_text("utf-8")
    before, found, rest = content.partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page} has no place for {name}: {begin} ... {end}")
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")
