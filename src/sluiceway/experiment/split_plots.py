"""What a report shows of split runs alone: accuracy with nothing dropped, channels, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sluiceway.experiment.compare import Interval
from sluiceway.experiment.plots import (
    DASHES,
    GREY,
    GRID,
    HEAT,
    INK,
    PANEL,
    STYLE,
    WIDTH,
    Numbers,
    curves_figure,
    curves_of,
    looks,
    mean_by_round,
    panel,
    short,
)

Summary = Mapping[str, Any]


def at_the_cut(runs: Mapping[str, Summary]) -> dict[str, Any] | None:
    """Of a variant's split runs, by seed: `full` accuracy, `kept` in the last round, `channels`.

    Also `bits` a value in the last round, None where that is not known. None for runs of another
    kind.
    """
    if not all(run.get("channels") for run in runs.values()):
        return None
    return {
        "full": Interval.of([run["accuracy_full"] for run in runs.values()]),
        "kept": float(np.mean([run["kept_by_round"][-1] for run in runs.values()])),
        "channels": max(run["channels"] for run in runs.values()),
        "bits": mean_of([(run.get("bits_by_round") or [None])[-1] for run in runs.values()]),
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def split_figures(variants: Sequence[Summary]) -> dict[str, Figure]:
    """The figures by name that split runs add, or have instead of the usual; else none."""
    if not any(at_the_cut(entry["runs"]) for entry in variants):
        return {}
    figures: dict[str, Figure] = {}
    runs = [run for entry in variants for run in entry["runs"].values() if run.get("channels")]
    if any(kept < run["channels"] for run in runs for kept in run["kept_by_round"]):
        figures["kept"] = kept_figure(variants)
    if any((bits or 32) < 31 for run in runs for bits in run.get("bits_by_round") or []):
        figures["bits"] = bits_figure(variants)
    if len(variants) == len(runs) == 1:
        if runs[0]["accuracy_full_by_round"] != runs[0]["accuracy_by_round"]:
            figures["progress"] = two_ways_figure(variants[0])
        if any(scores is not None for scores in runs[0]["scores_by_round"]):
            figures["scores"] = scores_figure(runs[0]["scores_by_round"], runs[0]["masks_by_round"])
    return figures


def two_ways_figure(entry: Summary) -> Figure:
    """Accuracy of one run by round and by bytes, as deployed and with nothing dropped."""
    (run,) = entry["runs"].values()
    (curve,) = curves_of([entry])
    full = np.array([run["accuracy_full_by_round"]], float)
    return curves_figure(
        [
            replace(curve, name="as deployed"),
            replace(
                curve, name="with nothing dropped or rounded", accuracy=full, dash=DASHES[1], lw=1.3
            ),
        ]
    )


@matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False})
def kept_figure(variants: Sequence[Summary]) -> Figure:
    """How many channels crossed by round: a row a variant, over the pale bars of all channels.

    Mean over seeds. Rows and not lines, as methods with one schedule would hide one another.
    """
    rows = [
        (entry, colour)
        for entry, (colour, _) in zip(variants, looks(variants), strict=True)
        if at_the_cut(entry["runs"])
    ]
    figure = Figure(figsize=(WIDTH, 0.55 + 0.52 * len(rows)), layout="constrained")
    column = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (entry, colour) in zip(column, rows, strict=True):
        runs = list(entry["runs"].values())
        length = min(len(run["kept_by_round"]) for run in runs)
        kept = np.array([run["kept_by_round"][:length] for run in runs], float).mean(0)
        bars(axes, kept, max(run["channels"] for run in runs), colour)
        name = f"{short(entry['name'], 30)}\n" if len(variants) > 1 else ""
        axes.set_yticks([0.5], [f"{name}of {max(run['channels'] for run in runs)}"])
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=INK)
    column[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=25, min_n_ticks=1))
    column[-1].set(xlabel="round")
    return figure


@matplotlib.rc_context(STYLE)
def bits_figure(variants: Sequence[Summary]) -> Figure:
    """Bits up for each value of the smashed data by round, mean over seeds, a line a variant."""
    figure, axes = panel(2.7)
    for entry, (colour, dash) in zip(variants, looks(variants), strict=True):
        if (mean := mean_by_round(entry, "bits_by_round")) is None:
            continue
        x = np.arange(len(mean)) + 1
        marker = "o" if len(mean) <= 25 else ""
        name = short(entry["name"], 40)
        axes.plot(x, mean, color=colour, ls=dash, lw=2, marker=marker, ms=3.6, label=name)
        axes.annotate(
            f"{mean[-1]:.3g}",
            (x[-1], mean[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:.3g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.get_ylim()
    axes.set(xlabel="round", ylabel="bits a value", ylim=(min(low, 0.5), max(high, 33)))
    if len(variants) > 1:
        figure.legend(loc="outside upper left", ncols=3, labelcolor="linecolor")
    return figure


def bars(axes: Axes, kept: Numbers, channels: int, colour: str) -> None:
    """One row: the share kept in each round, its count written where there is room."""
    x: Numbers = np.arange(len(kept)) + 1
    share = kept / channels
    if len(x) > 60:  # one shape in place of many
        edges = np.arange(len(x) + 1) + 0.5
        axes.stairs(np.ones(len(x)), edges, fill=True, color=GRID)
        axes.stairs(share, edges, fill=True, color=colour)
    else:
        axes.bar(x, 1.0, width=0.9, color=GRID)
        axes.bar(x, share, width=0.9, color=colour)
    for n, part, count in zip(x, share, kept, strict=True) if len(x) <= 25 else ():
        high = part > 0.55
        look: Any = {"color": PANEL if high else INK, "va": "top" if high else "bottom"}
        axes.text(n, part - 0.08 if high else part + 0.05, f"{count:.3g}", ha="center", **look)
    axes.set(ylim=(0, 1.02), xlim=(0.5, max(len(x), 1) + 0.5))
    axes.spines["bottom"].set_visible(False)


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def scores_figure(
    scores: Sequence[Sequence[float] | None], masks: Sequence[Sequence[bool] | None]
) -> Figure:
    """Channels x rounds, the most often kept channel on top.

    Opacity is the rank of a channel's score in its round, so that rounds of other scale compare.
    A kept channel is blue with a dot, a dropped one grey; a round without scores is blank.

    Args:
        scores: [rounds][C], None for a round without any; one round at least has some.
        masks: [rounds][C], None for a round in which no mask was common to all clients.
    """
    channels = next(len(of) for of in scores if of is not None)
    rank = np.stack([ranks(of, channels) for of in scores], 1)
    kept = np.stack([np.zeros(channels, bool) if of is None else of for of in masks], 1)
    last = rank[:, ~np.isnan(rank[0])][:, -1]
    order = np.lexsort((-last, -kept.sum(1)))
    rank, kept = rank[order], kept[order].astype(bool)
    figure = Figure(figsize=(WIDTH, np.clip(0.16 * channels, 1.5, 8) + 0.6), layout="constrained")
    axes = figure.subplots()
    shade = np.where(np.isnan(rank), 0, 0.15 + 0.85 * np.nan_to_num(rank))
    hue = np.where(kept[..., None], to_rgb(HEAT), to_rgb(GREY))
    axes.imshow(
        np.dstack([hue, shade]),
        aspect="auto",
        interpolation="none",
        extent=(0.5, len(scores) + 0.5, channels - 0.5, -0.5),
    )
    if kept.size <= 2500:
        row, column = np.nonzero(kept & ~np.isnan(rank))
        axes.plot(column + 1, row, "o", color=INK, ms=3)
    axes.tick_params(length=0)
    axes.set(xlabel="round", ylabel="channel")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=25, min_n_ticks=1))
    axes.set_yticks(range(channels) if channels <= 64 else (), order if channels <= 64 else ())
    axes.tick_params(axis="y", labelsize=7)
    return figure


def ranks(scores: Sequence[float] | None, channels: int) -> Numbers:
    """Ranks in [0, 1], the highest score 1 and equal scores equal; NaN where there are none."""
    if scores is None:
        return np.full(channels, np.nan)
    if channels == 1:
        return np.ones(1)
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below: Numbers = counts.cumsum() - (counts + 1) / 2  # equal ones have their middle
    return below[places] / (channels - 1)
