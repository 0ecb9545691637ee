"""What a report shows of mixtures of experts: use of the experts, likeness of the routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sluiceway.experiment.plots import (
    GREY,
    HEAT,
    STRONG,
    STYLE,
    THEME,
    WIDTH,
    Numbers,
    looks,
    mean_by_round,
    panel,
    short,
)

#: Mixtures whose heat maps are shown, evenly spread over all.
SHOWN = 4
#: By name in a record of routing: title of its line.
LINES = {
    "overlap": ("overlap of the routing", STRONG),
    "agreement": ("agreement of their regions", THEME["green"][0]),
    "used": ("share of the experts in use", GREY),
}


def moe_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The figures by name of one run; none if its rounds tell nothing of experts."""
    told = [record for record in records if record.get("routing")]
    if not told:
        return {}
    figures = {"routing": routing_figure(told)}
    last = told[-1]["routing"]
    blocks = np.unique(np.linspace(0, len(last) - 1, SHOWN).round().astype(int))
    for name in ("load", "weight"):
        if all(name in block for block in last):
            figures[name] = heat_figure([(int(b), last[b][name]) for b in blocks])
    if "load" not in figures:
        figures["load"] = heat_figure([(int(b), {"all": last[b]["experts"]}) for b in blocks])
    return figures


def used_share(experts: Sequence[float]) -> float:
    """exp(entropy of the load) / E: 1 where all experts get as many tokens, 1/E where one does."""
    p = np.asarray(experts, float)
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()) / len(experts)) if len(p) else 0.0


@matplotlib.rc_context(STYLE)
def routing_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Overlap, agreement and use of the experts by round, mean over the mixtures."""
    figure, axes = panel(2.7)
    rounds = [record["round"] for record in records]
    for name, (title, colour) in LINES.items():
        values = [
            [
                used_share(block["experts"]) if name == "used" else block.get(name)
                for block in record["routing"]
            ]
            for record in records
        ]
        known = [[value for value in row if value is not None] for row in values]
        means = [np.mean(row) if row else np.nan for row in known]
        if np.isfinite(means).any():
            marker = "o" if len(rounds) <= 25 else ""
            axes.plot(rounds, means, color=colour, lw=2, marker=marker, ms=3.6, label=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="round", ylim=(min(0.0, axes.get_ylim()[0]), 1.03))
    figure.legend(loc="outside upper left", ncols=3, labelcolor="linecolor")
    return figure


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def heat_figure(blocks: Sequence[tuple[int, Mapping[str, Sequence[float]]]]) -> Figure:
    """Clients x experts for some mixtures, opacity by the share; percents where there is room.

    Args:
        blocks: number of the mixture, and by client a share for each expert.
    """
    clients = list(blocks[0][1])
    height = float(np.clip(0.24 * len(clients), 0.4, 9)) + 0.9
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    row = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    for axes, (number, by_client) in zip(row, blocks, strict=True):
        shares: Numbers = np.array([by_client[client] for client in clients], float)
        shade = np.where(shares > 0, 0.08 + 0.92 * (shares / max(shares.max(), 1e-12)), 0).clip(
            max=1
        )
        hue = np.broadcast_to(to_rgb(HEAT), (*shares.shape, 3))
        axes.imshow(np.dstack([hue, shade]), aspect="auto", interpolation="none")
        if shares.shape[1] * len(blocks) <= 20 and len(clients) <= 40:
            for at in np.ndindex(*shares.shape):
                if shares[at] >= 0.005:
                    axes.text(at[1], at[0], f"{shares[at]:.0%}", ha="center", va="center", size=7)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1))
        axes.set(title=f"mixture {number + 1}", xlabel="expert")
    ticks = range(0, len(clients), max(1, len(clients) // 30))
    row[0].set_yticks(list(ticks), [clients[n] for n in ticks])
    row[0].set(ylabel="client")
    return figure


@matplotlib.rc_context(STYLE)
def overlaps_figure(variants: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Overlap of the clients' routing by round, a line a variant; None where none has any."""
    figure, axes = panel(2.9)
    drawn = 0
    for entry, (colour, dash) in zip(variants, looks(variants), strict=True):
        if (mean := mean_by_round(entry, "routing_overlap_by_round")) is None:
            continue
        drawn += 1
        name = short(entry["name"], 60)
        axes.plot(np.arange(len(mean)) + 1, mean, color=colour, ls=dash, lw=2, label=name)
    if not drawn:
        return None
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="round")
    figure.legend(loc="outside upper left", ncols=3, labelcolor="linecolor")
    return figure
