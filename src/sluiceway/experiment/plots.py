"""The figures of a report, as matplotlib figures that know no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from sluiceway.experiment.compare import half_width, line_key, panel_name, variant_name

Numbers = NDArray[Any]

#: Colours by role, (on light, on dark). Figures are drawn with the first; a report replaces
#: each by a CSS variable of that name, so that one drawing reads on both.
THEME = {
    "ink": ("#1f2328", "#e8ebef"),
    "muted": ("#646c76", "#99a3ae"),
    "grid": ("#e4e7eb", "#2c333c"),
    "panel": ("#fefefe", "#171b21"),
    "grey": ("#7c828a", "#9ea6b0"),
    "strong": ("#0068b4", "#55acf5"),
    "orange": ("#c76500", "#f4a340"),
    "green": ("#00856a", "#34c7a1"),
    "pink": ("#b3468c", "#ea92c6"),
    "red": ("#b93a26", "#f2806c"),
    "olive": ("#847400", "#cdbb3d"),
    "cyan": ("#0e8ba8", "#5fd0e8"),
    "brown": ("#85593a", "#cf9f7b"),
}
INK, MUTED, GRID, PANEL = (THEME[role][0] for role in ("ink", "muted", "grid", "panel"))
STRONG, GREY, RED = (THEME[role][0] for role in ("strong", "grey", "red"))
#: Methods by colour, the same in every report. The plain baselines are grey.
COLOURS = {
    "grey": ("fedavg", "sl"),
    "strong": ("fedalign-moe", "acp-sl"),
    "orange": ("fedprox", "random"),
    "green": ("fedmoe", "topk", "randtopk"),
    "pink": ("scaffold", "l1"),
    "red": ("fedadam", "entropy"),
    "olive": ("usage", "std"),
    "cyan": ("non-expert", "quantize", "bottleneck"),
    "brown": ("frozen-gate", "taylor"),
}
METHODS = {method: colour for colour, methods in COLOURS.items() for method in methods}
#: For variants that are not methods, and methods not named above.
OTHERS = ("strong", "orange", "green", "pink", "cyan", "olive", "red", "brown")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
#: Classes whose names are written on an axis, at most.
NAMED = 30
#: Panels of small multiples, at most; with more all lines share one.
MOST_PANELS = 12
#: One hue between both backgrounds; the count is in its opacity.
HEAT = "#1f83d6"
#: Inches. A report shows the full width at about 900 px.
WIDTH = 9.4
STYLE: Any = {
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a label's name is a dollar
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Curve:
    """One variant: accuracy and cumulative bytes, both [seeds, rounds], and how it is drawn."""

    name: str
    accuracy: Numbers
    nbytes: Numbers
    colour: str
    dash: Any
    lw: float = 2


def comparison_figure(compare: Mapping[str, Any]) -> Figure:
    """Accuracy by round and accuracy by bytes sent, one line per variant.

    Args:
        compare: content of compare.json.

    Returns:
        Mean over seeds with its 95 % band (Student's t); with one seed, the line alone.
    """
    variants = compare["variants"]
    panels = panels_of(variants)
    if 1 < len(panels) <= MOST_PANELS:
        return panels_figure(panels)
    return curves_figure(curves_of(variants))


def panels_of(variants: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The variants by the values of all keys but the one that is compared, which names them."""
    combinations = [entry.get("values") or {"": entry["name"]} for entry in variants]
    key = line_key(combinations)
    panels: dict[str, list[dict[str, Any]]] = {}
    for entry, values in zip(variants, combinations, strict=True):
        if key is None or len(values) < 2:
            panels.setdefault("", []).append(dict(entry))
            continue
        own = {key: values[key]}
        named = {**entry, "name": variant_name(own), "values": own}
        panels.setdefault(panel_name(values, key), []).append(named)
    return panels


@matplotlib.rc_context(STYLE)
def panels_figure(panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Small multiples with one scale: a row for each value of the other keys.

    Left accuracy by round, right by bytes; a line of one colour is one value of the compared key.
    """
    names = list(dict.fromkeys(entry["name"] for held in panels.values() for entry in held))
    every = [entry for held in panels.values() for entry in held]
    first = [next(entry for entry in every if entry["name"] == name) for name in names]
    look = dict(zip(names, looks(first), strict=True))
    drawn = {name: curves_of(held) for name, held in panels.items()}
    figure = Figure(figsize=(WIDTH, 0.5 + 2.2 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 2, sharex="col", sharey=True, squeeze=False)
    most = max(float(c.nbytes.max(initial=0)) for curves in drawn.values() for c in curves)
    unit, size = byte_unit(most)
    for (left, right), (name, curves) in zip(rows, drawn.items(), strict=True):
        for curve in curves:
            curve = replace(curve, colour=look[curve.name][0], dash=look[curve.name][1])
            draw(left, curve, np.arange(curve.accuracy.shape[1]) + 1)
            draw(right, curve, curve.nbytes.mean(0) / size)
        left.set(title=short(name, 60))
        right.set_xlim(left=0)
    rows[0][0].yaxis.set_major_formatter(PercentFormatter(1))
    rows[-1][0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    rows[-1][0].set(xlabel="round")
    rows[-1][1].set(xlabel=f"{unit}, up and down, all clients")
    figure.legend(
        handles=[Line2D([], [], color=look[n][0], ls=look[n][1], lw=2.4) for n in names],
        labels=[short(n, 40) for n in names],
        loc="outside upper left",
        ncols=min(5, len(names)),
        labelcolor="linecolor",
    )
    return figure


@matplotlib.rc_context(STYLE)
def curves_figure(curves: Sequence[Curve]) -> Figure:
    """Two panels with one scale of accuracy, and a legend where there are several curves."""
    columns = max(1, int(105 / (max(len(curve.name) for curve in curves) + 7)))
    rows = -(-len(curves) // columns) if len(curves) > 1 else 0
    figure = Figure(figsize=(WIDTH, 3.3 + 0.2 * rows), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    unit, size = byte_unit(max(float(curve.nbytes.max(initial=0)) for curve in curves))
    for curve in curves:
        draw(left, curve, np.arange(curve.accuracy.shape[1]) + 1)
        draw(right, curve, curve.nbytes.mean(0) / size)
    left.yaxis.set_major_formatter(PercentFormatter(1))
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set(title="Accuracy by round", xlabel="round")
    right.set(title="Accuracy by data sent", xlabel=f"{unit}, up and down, all clients")
    right.set_xlim(left=0)
    if rows:
        figure.legend(
            handles=[Line2D([], [], color=c.colour, ls=c.dash, lw=2.4) for c in curves],
            labels=[short(curve.name, 90) for curve in curves],
            loc="outside upper left",
            ncols=min(columns, len(curves)),
            handlelength=2.8,
            labelcolor="linecolor",
        )
    return figure


def curves_of(variants: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The variants of a comparison with their colours, consistent over all figures."""
    curves = []
    for entry, look in zip(variants, looks(variants), strict=True):
        runs = list(entry["runs"].values())
        # A seed that is not done yet is shorter, and a mean needs all of them.
        length = min(len(run["accuracy_by_round"]) for run in runs)
        nbytes = [np.cumsum(run["bytes_by_round"])[:length] for run in runs]
        accuracy = [run["accuracy_by_round"][:length] for run in runs]
        curves.append(Curve(entry["name"], np.array(accuracy, float), np.array(nbytes), *look))
    return curves


def looks(variants: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Colour and dash of each variant: colour by method; a colour that comes again is dashed."""
    keys = [str(v.get("values", {}).get("method.name", v["name"])) for v in variants]
    fixed = {key: METHODS[key] for key in keys if key in METHODS}
    free = cycle([role for role in OTHERS if role not in fixed.values()] or OTHERS)
    roles = fixed | {key: next(free) for key in dict.fromkeys(keys) if key not in fixed}
    drawn = [roles[key] for key in keys]
    return [
        (THEME[role][0], DASHES[drawn[:number].count(role) % len(DASHES)])
        for number, role in enumerate(drawn)
    ]


def draw(axes: Axes, curve: Curve, x: Numbers) -> None:
    """A mean line and, with several seeds, the 95 % band of the mean."""
    known = np.isfinite(curve.accuracy).all(0)  # the rounds that were evaluated
    x, accuracy = x[known], curve.accuracy[:, known]
    mean = accuracy.mean(0)
    marker = "o" if len(mean) <= 25 else ""
    look: Any = {"color": curve.colour, "ls": curve.dash, "lw": curve.lw}
    axes.plot(x, mean, marker=marker, ms=1.8 * curve.lw, zorder=3, **look)
    if len(accuracy) > 1:
        half = half_width(accuracy)
        low, high = np.clip([mean - half, mean + half], 0, 1)
        axes.fill_between(x, low, high, color=curve.colour, alpha=0.16, lw=0)


def panel(height: float) -> tuple[Figure, Axes]:
    """A figure of full width with one pair of axes; height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def byte_unit(most: float) -> tuple[str, float]:
    """The unit that suits a number of bytes, and its size."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((name, size) for name, size in units if most >= size), ("bytes", 1.0))


@matplotlib.rc_context(STYLE)
def loss_figure(train: Sequence[float | None], test: Sequence[float | None]) -> Figure:
    """Mean training loss of the clients and loss of the global model on the test set, [rounds]."""
    figure, axes = panel(2.7)
    look: Any = {"lw": 2, "marker": "o", "ms": 3.6 if len(train) <= 25 else 0}
    x, y = np.arange(len(train)) + 1, np.array([train, test], float)  # NaN for None
    axes.plot(x, y[0], color=STRONG, label="in training, mean of the clients", **look)
    axes.plot(x, y[1], color=GREY, label="global model on the test set", **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="round", ylabel="loss")
    figure.legend(loc="outside upper left", ncols=2, labelcolor="linecolor")
    return figure


@matplotlib.rc_context(STYLE)
def clients_figure(shared: Sequence[float | None], personal: Mapping[int, float]) -> Figure:
    """Per client, the global model (ring) and the client's own model (dot), in [0, 1].

    Args:
        shared: [clients], None for a client without examples.
        personal: by client; clients that never trained are absent.
    """
    many = len(shared) > 500  # as a picture, where SVG would get heavy
    figure, axes = panel(3.1)
    ms = float(np.clip(45 / max(len(shared), 1) ** 0.5, 2.5, 6.5))
    held = {n: value for n, value in enumerate(shared) if value is not None}
    for n in held.keys() & personal.keys():
        axes.plot([n, n], [held[n], personal[n]], color=GREY, lw=1.2, alpha=0.7, rasterized=many)
    for of, face, edge, name in (
        (held, PANEL, GREY, "global model"),
        (personal, STRONG, STRONG, "the client's own model"),
    ):
        if of or of is held:
            x, y = [*of], [*of.values()]
            axes.plot(x, y, "o", ms=ms, mfc=face, mec=edge, mew=1.3, label=name, rasterized=many)
    for client in set(range(len(shared))) - set(held):
        axes.text(client, 0, "empty", color=RED, ha="center", va="bottom", rotation=90)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="client", xlim=(-0.7, len(shared) - 0.3), ylim=(-0.04, 1.04))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2)
    return figure


@matplotlib.rc_context(STYLE)
def personal_figure(compare: Mapping[str, Any]) -> Figure:
    """Per variant, the mean accuracy of the clients' own models; every seed, mean and interval."""
    variants = compare["variants"]
    figure, axes = panel(0.6 + 0.42 * len(variants))
    for row, (entry, (colour, _)) in enumerate(zip(variants, looks(variants), strict=True)):
        seeds = [run["mean_personal_accuracy"] for run in entry["runs"].values()]
        if len(seeds) > 1:
            values = np.array(seeds, float)  # NaN for None
            axes.scatter(values, [row + 0.26] * len(seeds), s=20, color=colour, alpha=0.6, lw=0)
        found = entry["measures"]["mean_personal_accuracy"]
        mean, half = np.array([found["mean"], found["half"]], float)
        ends = [[min(half, mean)], [min(half, 1 - mean)]]  # a share ends at 0 and 1
        axes.errorbar(mean, row, xerr=ends, fmt="o", color=colour, ms=7, lw=2, capsize=3)
    axes.set_yticks(range(len(variants)), [short(entry["name"], 36) for entry in variants])
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.grid(visible=False, axis="y")
    low, high = axes.get_xlim()
    more = max(0.0, 0.05 - (high - low)) / 2  # a small difference shall look small
    low, high = max(low - more, -0.02), min(high + more, 1.02)
    axes.set(xlim=(low, high), ylim=(len(variants) - 0.4, -0.5))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def holdings_figure(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Who holds what: clients x labels, opacity by log(1 + count), totals at the side.

    Args:
        counts: [clients, classes].
        names: [classes]; written on the axis when there are at most `NAMED`.
    """
    held = np.asarray(counts, dtype=np.int64)
    clients, classes = held.shape
    named = classes <= NAMED
    height = np.clip(0.24 * clients, 1.3, 9) + (1.7 if named else 1)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    wide = np.clip(0.36 * classes, 3.5, 7.4)
    cells, side = figure.subplots(1, 2, sharey=True, width_ratios=[wide, WIDTH - wide])
    shade = np.where(held > 0, 0.15 + 0.85 * np.log1p(held) / np.log1p(max(held.max(), 1)), 0)
    hue = np.broadcast_to(to_rgb(HEAT), (clients, classes, 3))
    cells.imshow(np.dstack([hue, shade]), aspect="auto", interpolation="none")
    for row, column in np.argwhere(held > 0) if held.size <= 250 else ():
        cells.text(column, row, f"{held[row, column]:,}", ha="center", va="center", size=8)
    cells.tick_params(length=0)
    cells.set(ylabel="client", xlabel="" if named else "label, by number")
    cells.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=40, min_n_ticks=1))
    if named:
        cells.set_xticks(range(classes), [short(n, 26) for n in names], rotation=40, ha="right")
    totals(side, held.sum(1))
    return figure


def mean_by_round(entry: Mapping[str, Any], key: str) -> Numbers | None:
    """The mean over a variant's runs of what `key` has by round, [R] of the shortest run.

    NaN where a run has none; None where no round has any.
    """
    held = [run.get(key) or [] for run in entry["runs"].values()]
    length = min(map(len, held))
    values: Numbers = np.array([one[:length] for one in held], float)  # NaN for None
    return values.mean(0) if np.isfinite(values).any() else None


def short(name: str, most: int) -> str:
    """A name of at most `most` characters, cut in its middle."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def totals(axes: Axes, sizes: Numbers) -> None:
    """Bars of the clients' numbers of examples; a client without any is named empty."""
    axes.barh(range(len(sizes)), sizes, color=GREY, height=0.62)
    axes.set(title="examples", xlim=(0, max(sizes.max(), 1) * 1.22))
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0, labelleft=False, labelbottom=False)
    for client, size in enumerate(sizes):
        if len(sizes) <= 60 or size == 0:
            text, colour = (f"{size:,}", MUTED) if size else ("empty", RED)
            axes.text(size + sizes.max() / 70, client, text, va="center", size=8, color=colour)
