"""Tables of docs/results.md and docs/evidence from what a sweep has run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def bytes_up(run: Mapping[str, Any]) -> float:
    """Sent by clients, all rounds."""
    return float(run["bytes_up"])


def reached(target: float) -> Value:
    """The first round with at least this accuracy; one more than there are if there is none."""
    return lambda run: float(first_round(run, target) or len(run["accuracy_by_round"]) + 1)


def rounds_to(targets: Mapping[int, float]) -> Value:
    """The first round with at least the accuracy of the run's seed; infinite if there is none."""
    return lambda run: float(first_round(run, targets[run["seed"]]) or "inf")


def spent(targets: Mapping[int, float]) -> Value:
    """Megabytes, both directions, until then."""

    def megabytes(run: Mapping[str, Any]) -> float:
        rounds = first_round(run, targets[run["seed"]])
        return sum(run["bytes_by_round"][:rounds]) / 1e6 if rounds else float("inf")

    return megabytes


def first_round(run: Mapping[str, Any], target: float) -> int | None:
    """With at least this accuracy; None if there is none."""
    enough = (n for n, a in enumerate(run["accuracy_by_round"], 1) if float(a) >= target)
    return next(enough, None)


def mean(value: Value, runs: Mapping[int, Mapping[str, Any]]) -> float:
    """Of the runs of all seeds."""
    return float(np.mean([value(run) for run in runs.values()]))


def table(
    runs: Runs,
    settings: Sequence[str],
    methods: Sequence[str],
    value: Value | Mapping[str, Value],
    against: str,
    in_steps: bool = False,
) -> str:
    """Markdown: a row a method, a column a setting, mean and 95 % interval over seeds.

    A star marks a difference to `against`, paired by seed, whose 95 % interval leaves out zero; the
    best of a column is bold. `value` may be one for each setting. `in_steps`: values count rounds
    or megabytes instead of shares: one decimal, without an interval, the least is the best, and
    methods for which all are infinite have no row.
    """
    lines = [f"| | {' | '.join(settings)} |", f"|---|{'---:|' * len(settings)}"]
    values = value if isinstance(value, Mapping) else dict.fromkeys(settings, value)
    known = {setting: {m: r for m, r in runs.get(setting, {}).items() if r} for setting in settings}
    means = {s: [mean(values[s], r) for m, r in known[s].items() if m in methods] for s in settings}
    for method in methods:
        cells = []
        for setting in settings:
            mine = known[setting].get(method)
            if mine is None:
                cells.append("")
                continue
            if in_steps:
                best, text = min(means[setting]), f"{mean(values[setting], mine):.1f}"
            else:
                found = Interval.of([values[setting](run) for run in mine.values()])
                best, text = max(means[setting]), f"{share(found.mean)} ± {share(found.half)}"
            if mean(values[setting], mine) == best:
                text = f"**{text}**"
            cells.append(text + starred(mine, known[setting].get(against), values[setting]))
        if set(cells) - {"", "inf"}:
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(value: float) -> str:
    """.123"""
    return f"{value:.3f}".lstrip("0")


def starred(
    mine: Mapping[int, Mapping[str, Any]],
    other: Mapping[int, Mapping[str, Any]] | None,
    value: Value,
) -> str:
    """A star if the two differ outside of the interval."""
    shared = sorted(set(mine) & set(other or {}))
    if not other or mine is other or len(shared) < 2:
        return ""
    pairs = [(value(mine[seed]), value(other[seed])) for seed in shared]
    if not np.isfinite(pairs).all():
        return ""
    gap = Interval.of([one - two for one, two in pairs])
    return "*" if abs(gap.mean) > gap.half else ""


def gaps(
    runs: Runs, settings: Sequence[str], ours: str, rivals: Sequence[str], value: Value
) -> str:
    """Markdown: what `ours` is ahead of each rival, paired by seed: points, 95 % interval."""
    lines = [
        f"| {ours} against | {' | '.join(settings)} | all |",
        f"|---|{'---:|' * (len(settings) + 1)}",
    ]
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
            cells.append(pooled(runs, settings, ours, rival, value))
            lines.append(f"| {rival} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pooled(runs: Runs, settings: Sequence[str], ours: str, rival: str, value: Value) -> str:
    """What `ours` is ahead of a rival, over all pairs of a setting and a seed: points, interval."""
    found = [
        100 * (value(run) - value(other))
        for setting in settings
        for seed, run in runs.get(setting, {}).get(ours, {}).items()
        if (other := runs[setting].get(rival, {}).get(seed)) is not None
    ]
    if len(found) < 2 or ours == rival:
        return ""
    gap = Interval.of(found)
    return f"{gap.mean:+.1f} ± {gap.half:.1f} ({len(found)})"


def pools(runs: Runs, ours: Sequence[str], rivals: Sequence[str], value: Value) -> str:
    """Markdown: what each of `ours` is ahead of each rival, over all settings and seeds."""
    lines = [f"| against | {' | '.join(ours)} |", f"|---|{'---:|' * len(ours)}"]
    for rival in rivals:
        cells = [pooled(runs, list(runs), name, rival, value) for name in ours]
        if any(cells):
            lines.append(f"| {rival} | {' | '.join(cells)} |")
    return "\n".join(lines)


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a table in a page."""
    begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    content = page.read_text("utf-8")
    before, found, rest = content.partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page} has no place for {name}: {begin} ... {end}")
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")
