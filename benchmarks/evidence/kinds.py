"""What the pages show of each kind of sweep: Markdown by page below docs/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pages import (
    Runs,
    Value,
    bytes_up,
    final,
    gaps,
    level,
    mean,
    pooled,
    pools,
    reached,
    rounds_to,
    spent,
    table,
)
from pictures import by_megabytes, panels


def federated(runs: Runs, docs: Path, picture: str = "federated.png") -> dict[str, str]:
    """One table and a picture for the page of results; by setting in the page of evidence."""
    names, ours = methods_of(runs), "fedalign-moe"
    rivals = [name for name in names if name != ours]
    panels(runs, list(runs), names, docs / picture)
    levels = levels_of(runs, "fedavg", final)
    short = [
        "Accuracy after the last round by setting, and over all settings and seeds: what "
        f"`{ours}` is ahead of a row after the last round and in the mean of the second half of "
        "the rounds (points, paired, 95 % interval, number of pairs), rounds until FedAvg's "
        "accuracy after its last round is reached (one more than there were, if it never was), "
        "and bytes sent up relative to FedAvg's. A star marks a difference to `fedavg` whose "
        "interval leaves out zero:",
        beside(
            table(runs, list(runs), names, final, "fedavg"),
            {
                f"{ours} ahead": lambda name: pooled(runs, list(runs), ours, name, final),
                "second half": lambda name: pooled(runs, list(runs), ours, name, level),
                "rounds": lambda name: over_all(runs, name, levels),
                "up": lambda name: upload(runs, name),
            },
        ),
        f"![accuracy by round]({picture})",
    ]
    long = [
        "Accuracy after the last round; a star marks a difference to `fedavg`:",
        table(runs, list(runs), names, final, "fedavg"),
        "Mean of the second half of the rounds:",
        table(runs, list(runs), names, level, "fedavg"),
        f"What `{ours}` is ahead of a rival, mean of the second half of the rounds, in points:",
        gaps(runs, list(runs), ours, rivals, level),
        "The same after the last round:",
        gaps(runs, list(runs), ours, rivals, final),
        "Rounds until FedAvg's accuracy after its last round (the mean over seeds) is reached:",
        by_target(runs, list(runs), names, levels, reached, "fedavg"),
        "The same for FedMoE's:",
        by_target(runs, list(runs), names, levels_of(runs, "fedmoe", final), reached, "fedmoe"),
    ]
    return {"results.md": "\n\n".join(short), "evidence/federated.md": "\n\n".join(long)}


def over_all(runs: Runs, name: str, levels: Mapping[str, float]) -> str:
    """Rounds until each setting's level is reached, the mean over settings and seeds."""
    found = [
        mean(reached(levels[setting]), methods[name])
        for setting, methods in runs.items()
        if name in methods and setting in levels
    ]
    return f"{sum(found) / len(found):.1f}" if found else ""


def upload(runs: Runs, name: str) -> str:
    """Bytes sent up, relative to FedAvg's, the mean over settings."""
    ratios = [
        mean(bytes_up, methods[name]) / mean(bytes_up, methods["fedavg"])
        for methods in runs.values()
        if name in methods and "fedavg" in methods
    ]
    return f"{sum(ratios) / len(ratios):.2f}" if ratios else ""


def ablation(runs: Runs, docs: Path) -> dict[str, str]:
    """The paper's five steps, one after another."""
    settings, names = list(runs), methods_of(runs)
    text = "\n\n".join(
        [
            "Accuracy after the last round; a star marks a difference to parameter averaging:",
            table(runs, settings, names, final, names[0]),
            "Mean of the second half of the rounds:",
            table(runs, settings, names, level, names[0]),
        ]
    )
    return {"evidence/federated.md": text}


def choices(runs: Runs, docs: Path) -> dict[str, str]:
    """Ways to do one thing, on held-out training examples."""
    settings, names = list(runs), methods_of(runs)
    text = "\n\n".join(
        [
            f"Mean accuracy of the second half of the rounds; a star marks a difference to "
            f"`{names[0]}`, the last column what a way is ahead of it over all, in points:",
            beside(
                table(runs, settings, names, level, names[0]),
                {"all": lambda name: pooled(runs, settings, name, names[0], level)},
            ),
        ]
    )
    return {"evidence/split.md": text}


def cases(runs: Runs, docs: Path) -> dict[str, str]:
    """ACP-SL and some rivals over other data, networks and cuts."""
    settings, names = list(runs), methods_of(runs)
    rivals = [name for name in names if name != "acp-sl"]
    text = "\n\n".join(
        [
            "Mean of the second half of the rounds; a star marks a difference to `acp-sl`:",
            table(runs, settings, names, level, "acp-sl"),
            "What `acp-sl` is ahead of a method, in points, paired:",
            gaps(runs, settings, "acp-sl", rivals, level),
            "Accuracy after the last round:",
            table(runs, settings, names, final, "acp-sl"),
        ]
    )
    return {"evidence/split.md": text}


def beside(text: str, columns: Mapping[str, Callable[[str], str]]) -> str:
    """The table with more columns, each a function of the row's name."""
    head, rule, *rows = text.splitlines()
    names = [row[1:].split("|", 1)[0].strip() for row in rows]
    return "\n".join(
        [f"{head} {' | '.join(columns)} |", f"{rule}{'---:|' * len(columns)}"]
        + [
            f"{row} {' | '.join(column(name) for column in columns.values())} |"
            for row, name in zip(rows, names, strict=True)
        ]
    )


def split(runs: Runs, docs: Path, picture: str = "split.png") -> dict[str, str]:
    """Accuracy by method and level of traffic, and what a target costs.

    The picture has the methods that most groups of settings have.
    """
    names, grouped = methods_of(runs), by_group(runs)
    groups = {setting.rsplit(" ", 1)[0]: None for setting in runs}
    lines = [f"{name} {traffic}" for name in names for traffic in ("1x", "32x")]
    common = [line for line in lines if 2 * sum(line in m for m in grouped.values()) > len(groups)]
    path, axis = docs / picture, "MB, both directions"
    panels(grouped, list(groups), common, path, by_megabytes, axis, log=True)
    parts = []
    for group in groups:
        settings = [f"{group} {x}" for x in LEVELS if f"{group} {x}" in runs]
        parts += [
            f"{group}, accuracy after the last round:",
            table(runs, settings, names, final, "acp-sl"),
        ]
    parts += [f"![accuracy by data sent](../{picture})"]
    compressed = {s: methods for s, methods in runs.items() if not s.endswith(" 1x")}
    ours = [name for name in names if name.startswith("acp-sl")]
    parts += [
        "What ACP-SL is ahead of a rival over all settings with less traffic and all seeds, mean "
        "of the second half of the rounds, in points, paired, with the number of pairs:",
        pools(compressed, ours, [name for name in names if name != "sl"], level),
    ]
    rows = [f"{name} {traffic}" for name in names for traffic in LEVELS]
    for what, measure in (("Megabytes, both directions,", spent), ("Rounds", rounds_to)):
        for share in (0.95, 0.99):
            values = {
                group: measure({s: share * level(run) for s, run in found["sl 1x"].items()})
                for group, found in grouped.items()
                if "sl 1x" in found
            }
            parts += [
                f"{what} until {share:.0%} of the level of `sl` with the same seed is reached (the "
                "mean over seeds; inf, and no row: not with all):".replace("%", " %"),
                table(grouped, list(values), rows, values, "sl 1x", in_steps=True),
            ]
    text = "\n\n".join(parts)
    return {"evidence/split.md": text}


LEVELS = ("1x", "8x", "32x", "128x")


def by_group(runs: Runs) -> Runs:
    """Settings without their level, which the methods' names get."""
    found: dict[str, dict[str, object]] = {}
    for setting, methods in runs.items():
        group, traffic = setting.rsplit(" ", 1)
        found.setdefault(group, {}).update({f"{n} {traffic}": m for n, m in methods.items()})
    return found  # type: ignore[return-value]


def levels_of(runs: Runs, name: str, value: Value, share: float = 1.0) -> dict[str, float]:
    """By setting: a share of a method's mean over seeds, to be reached by the others."""
    return {s: share * mean(value, methods[name]) for s, methods in runs.items() if name in methods}


def by_target(
    runs: Runs,
    settings: Sequence[str],
    methods: Sequence[str],
    targets: Mapping[str, float],
    measure: Callable[[float], Value],
    against: str,
) -> str:
    """A table of a measure with a target of each setting, and stars as `table` has them."""
    values = {setting: measure(targets[setting]) for setting in settings if setting in targets}
    return table(runs, list(values), methods, values, against, in_steps=True)


def methods_of(runs: Runs) -> list[str]:
    """All methods, in the order in which they first appear."""
    return list({name: None for methods in runs.values() for name in methods})


KINDS: dict[str, Callable[[Runs, Path], dict[str, str]]] = {
    "federated": federated,
    "coarse": partial(federated, picture="coarse.png"),
    "ablation": ablation,
    "choices": choices,
    "cases": cases,
    "split": split,
    "wire": partial(split, picture="split-wire.png"),
}
