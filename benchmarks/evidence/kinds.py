"""What the page shows of each kind of sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pages import Runs, Value, final, gaps, level, mean, pooled, pools, reached, spent, table
from pictures import by_megabytes, panels


def federated(runs: Runs, docs: Path) -> str:
    """Accuracy by method and setting, what FedAlign-MoE is ahead, rounds to FedMoE's level."""
    ours = [name for name in methods_of(runs) if name.startswith("fedalign-moe")]
    skewed = [s for s in runs if s.endswith(" .1")]
    others = [s for s in runs if not s.endswith(" .1")]
    panels(runs, skewed, methods_of(runs), docs / "federated.png")
    parts = [
        "Accuracy after the last round, Dirichlet 0.1 (in the settings' names: alpha):",
        table(runs, skewed, methods_of(runs), final, "fedavg"),
        "![accuracy by round](federated.png)",
    ]
    if others:
        parts += ["Other skews:", table(runs, others, methods_of(runs), final, "fedavg")]
    parts += [
        "What each form of FedAlign-MoE is ahead of a rival over all settings and seeds, mean of "
        "the second half of the rounds, in points, paired, with the number of pairs:",
        pools(runs, ours, methods_of(runs), level),
    ]
    for name in ours:
        parts += [
            f"The same for `{name}` by setting; the last column is over these:",
            gaps(runs, skewed, name, [m for m in methods_of(runs) if m not in ours], level),
        ]
    parts += [
        "Rounds until FedMoE's mean accuracy of the second half of the rounds is reached (one more "
        "than there were, if it never was):",
        by_target(runs, skewed, methods_of(runs), "fedmoe", 1.0, reached),
    ]
    return "\n\n".join(parts)


def ablation(runs: Runs, docs: Path) -> str:
    """The paper's five steps, one after another."""
    settings, names = list(runs), methods_of(runs)
    return "\n\n".join(
        [
            "Accuracy after the last round; a star marks a difference to parameter averaging:",
            table(runs, settings, names, final, names[0]),
            "Mean of the second half of the rounds:",
            table(runs, settings, names, level, names[0]),
        ]
    )


def choices(runs: Runs, docs: Path) -> str:
    """Ways to do one thing, on held-out training examples."""
    settings, names = list(runs), methods_of(runs)
    return "\n\n".join(
        [
            f"Mean accuracy of the second half of the rounds; a star marks a difference to "
            f"`{names[0]}`, the last column what a way is ahead of it over all, in points:",
            with_pool(table(runs, settings, names, level, names[0]), runs, settings, names[0]),
        ]
    )


def with_pool(text: str, runs: Runs, settings: Sequence[str], against: str) -> str:
    """The table with a last column: the mean difference over all settings and seeds."""
    head, rule, *rows = text.splitlines()
    named = [(row, row[1:].split("|", 1)[0].strip()) for row in rows]
    return "\n".join(
        [f"{head} all |", f"{rule}---:|"]
        + [f"{row} {pooled(runs, settings, name, against, level)} |" for row, name in named]
    )


def split(runs: Runs, docs: Path) -> str:
    """Accuracy by method and level of traffic, and what a target costs."""
    names = methods_of(runs)
    groups = {setting.rsplit(" ", 1)[0]: None for setting in runs}
    lines = [f"{name} {traffic}" for name in names for traffic in ("1x", "32x")]
    picture = docs / "split.png"
    panels(
        by_group(runs), list(groups), lines, picture, by_megabytes, "MB, both directions", log=True
    )
    parts = []
    for group in groups:
        settings = [f"{group} {x}" for x in LEVELS if f"{group} {x}" in runs]
        parts += [
            f"{group}, accuracy after the last round:",
            table(runs, settings, names, final, "acp-sl"),
        ]
    parts += ["![accuracy by data sent](split.png)"]
    compressed = {s: methods for s, methods in runs.items() if not s.endswith(" 1x")}
    ours = [name for name in names if name.startswith("acp-sl")]
    parts += [
        "What ACP-SL is ahead of a rival over all settings with less traffic and all seeds, mean "
        "of the second half of the rounds, in points, paired, with the number of pairs:",
        pools(compressed, ours, [name for name in names if name != "sl"], level),
        "Megabytes, both directions, until 95 % of the level of `sl` is reached (the mean over "
        "seeds; inf: not by all):",
        by_target(by_group(runs), list(groups), lines, "sl 1x", 0.95, spent),
    ]
    return "\n\n".join(parts)


LEVELS = ("1x", "8x", "32x", "128x")


def by_group(runs: Runs) -> Runs:
    """Settings without their level, which the methods' names get."""
    found: dict[str, dict[str, object]] = {}
    for setting, methods in runs.items():
        group, traffic = setting.rsplit(" ", 1)
        found.setdefault(group, {}).update({f"{n} {traffic}": m for n, m in methods.items()})
    return found  # type: ignore[return-value]


def by_target(
    runs: Runs,
    settings: Sequence[str],
    methods: Sequence[str],
    reference: str,
    share: float,
    measure: Callable[[float], Value],
) -> str:
    """A table of a measure with a target of each setting: a share of the reference's level."""
    targets = {
        setting: share * mean(level, found)
        for setting in settings
        if (found := runs[setting].get(reference))
    }
    values = {setting: measure(target) for setting, target in targets.items()}
    return table(runs, list(targets), methods, values, reference, in_steps=True)


def methods_of(runs: Runs) -> list[str]:
    """All methods, in the order in which they first appear."""
    return list({name: None for methods in runs.values() for name in methods})


KINDS = {"federated": federated, "ablation": ablation, "choices": choices, "split": split}
