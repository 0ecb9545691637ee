"""The same recipe with some keys varied, over several seeds, in one table."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from sluiceway.errors import InputError, quoted
from sluiceway.experiment.own_code import placed, short_name
from sluiceway.experiment.recipe import (
    Recipe,
    load_recipe,
    recipe_from,
    require_effects,
    require_few,
)
from sluiceway.experiment.run import run
from sluiceway.experiment.run_directory import write_json
from sluiceway.experiment.session import Progress, Session
from sluiceway.experiment.tables import (
    key_of,
    overridden_tables,
    parsed,
    set_key,
    with_current_keys,
)
from sluiceway.files import write_atomically

#: What is compared, by its key in summary.json.
MEASURES = (
    "accuracy",
    "metric_value",
    "best_accuracy",
    "mean_personal_accuracy",
    "bytes_up",
    "bytes_down",
    "seconds",
)


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % confidence interval; NaN for one value."""

    mean: float
    half: float

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """Of one value or more."""
        numbers = np.asarray(values, dtype=np.float64)
        half = half_width(numbers) if len(numbers) > 1 else float("nan")
        return Interval(float(numbers.mean()), float(half))


def half_width(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the 95 % interval of a mean over the first of [n, ...], n > 1.

    t(0.975, n - 1) * s / sqrt(n). From scipy.special, since scipy.stats takes long to import.
    """
    count = len(values)
    found: NDArray[np.float64] = stdtrit(count - 1, 0.975) * (
        values.std(0, ddof=1) / np.sqrt(count)
    )
    return found


def parse_vary(given: Sequence[str]) -> dict[str, list[Any]]:
    """`key=a,b,c` arguments as lists of values. Raises InputError."""
    vary: dict[str, list[Any]] = {}
    for text in given:
        key, sign, values = text.partition("=")
        if not sign or "." not in key or not values:
            raise InputError(f"cannot vary {quoted(text)}; write table.key=a,b,c")
        key = key.strip()
        vary[key] = [placed(key, parsed(value.strip()), Path()) for value in values.split(",")]
    return vary


def parse_seeds(text: str | None) -> list[int] | None:
    """`0,1,2` as numbers. Raises InputError."""
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text}: give different whole numbers from 0, such as 0,1,2")
    return seeds


def compare(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    vary: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | None = None,
    out: Path | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every combination of the varied keys with every seed.

    Finished runs in `out` are not run again, so an interrupted comparison goes on where it was.

    Args:
        recipe: shipped name or TOML file.
        overrides: `key=value` for all runs.
        vary: values by key; None takes the recipe's [compare].
        seeds: None takes the recipe's [compare].
        out: folder of the run folders and of compare.json; None writes nothing.
        progress: what to tell meanwhile.

    Returns:
        The content of compare.json: `variants`, each with `name`, `values`, `runs` (summaries by
        seed), `measures` ({name: {mean, half}}) and, but for the first, `against_first`.

    Raises:
        InputError and what `run` raises; every combination is checked before the first runs.
    """
    planned = planned_runs(recipe, overrides, vary, seeds)
    progress = progress or Progress()
    session = Session()
    combinations = {variant_name(one.values): one.values for one in planned}
    places = folder_names(list(combinations), out)
    summaries: dict[str, dict[int, dict[str, Any]]] = {}
    for number, plan in enumerate(planned, start=1):
        name, seed, one = variant_name(plan.values), plan.seed, plan.recipe
        folder = out / places[name] / f"seed-{seed}" if out else None
        summary = finished(folder, one)
        known = ", known from before" if summary else ""
        progress.say(f"run {number} of {len(planned)}: {name}, seed {seed}{known}")
        if summary is None:
            _, summary = run(one, folder, resume=True, session=session, progress=progress)
        summaries.setdefault(name, {})[seed] = summary
    table = tabulate(list(combinations.values()), summaries)
    for entry in table["variants"]:
        entry["folder"] = places[entry["name"]]
    if out:
        write_json(out / "compare.json", table)
        write_atomically(out / "compare.md", markdown(table))
    return table


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison: the values of what is varied, the seed, and its checked recipe."""

    values: dict[str, Any]
    seed: int
    recipe: Recipe


def planned_runs(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    vary: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[PlannedRun]:
    """The runs of a comparison, checked, variant by variant; see `compare`. Raises InputError."""
    base = load_recipe(recipe, overrides, alone=False)
    vary = vary or base.compare.vary
    seeds = list(seeds or base.compare.seeds)
    if not vary:
        raise InputError("nothing to compare: give --vary key=a,b,c, or [compare] in the recipe")
    try:
        require_few(vary, seeds)
    except ValueError as error:
        raise InputError(str(error)) from None
    planned = [
        PlannedRun(
            values, seed, recipe_from(varied_tables(recipe, overrides, values, seed), code=True)
        )
        for combination in itertools.product(*vary.values())
        for values in [by_key(dict(zip(vary, combination, strict=True)))]
        for seed in seeds
    ]
    given = [*(key_of(override) for override in overrides), *vary]
    require_effects([one.recipe for one in planned], recipe, given)
    return planned


def folder_names(names: Sequence[str], out: Path | None) -> dict[str, str]:
    """A folder's name for each variant, of letters, digits and `.=-_` alone.

    Args:
        names: of the variants.
        out: of the comparison; a folder of an earlier release there keeps its name.
    """
    found: dict[str, str] = {}
    for name in names:
        if out is not None and (out / (old := name.replace("/", "_"))).is_dir():
            found[name] = old
            continue
        stem = re.sub(r"[^\w.=-]+", "_", name, flags=re.ASCII).strip("._")[:120] or "variant"
        number = 1
        while (one := stem if number == 1 else f"{stem}-{number}") in found.values():
            number += 1
        found[name] = one
    return found


def by_key(values: Mapping[str, Any]) -> dict[str, Any]:
    """One combination, with the keys of whole tables one by one."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{part}": one for part, one in value.items()}
        else:
            found[key] = value
    return found


def finished(folder: Path | None, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of this very recipe's finished run in the folder, if it is there."""
    if folder is None or not (folder / "summary.json").is_file():
        return None
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = with_current_keys(summary["recipe"], tell=False)
    return summary if found == json.loads(json.dumps(recipe.resolved())) else None


def varied_tables(
    recipe: str | Path, overrides: Sequence[str], values: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """The recipe's tables with overrides, one combination and one seed."""
    tables = overridden_tables(recipe, overrides)
    for key, value in values.items():
        set_key(tables, key, value)
    set_key(tables, "run.seed", seed)
    tables.pop("compare", None)
    return tables


def value(summary: Mapping[str, Any], measure: str) -> float:
    """A measure of one run; NaN where it was not taken.

    Seconds are those of the rounds: what comes before, variants of one session share.
    """
    found = summary.get("round_seconds") if measure == "seconds" else None
    if found is None:
        found = summary.get(measure)
    return float("nan") if found is None else float(found)


def variant_name(values: Mapping[str, Any]) -> str:
    """A variant by its values: "fedavg" for one method, "data.alpha=0.1" for other keys."""
    said = {key: short_name(v) if isinstance(v, str) else v for key, v in values.items()}
    parts = [str(v) if key == "method.name" else f"{key}={v}" for key, v in said.items()]
    return ", ".join(parts)


def tabulate(
    combinations: Sequence[Mapping[str, Any]], summaries: Mapping[str, dict[int, dict[str, Any]]]
) -> dict[str, Any]:
    """Means, intervals, and differences to the first variant, paired by seed."""
    variants: list[dict[str, Any]] = []
    first: dict[int, dict[str, Any]] | None = None
    references = references_of(combinations)
    for values, reference in zip(combinations, references, strict=True):
        name = variant_name(values)
        runs = summaries[name]
        entry: dict[str, Any] = {
            "name": name,
            "values": dict(values),
            "measures": {
                m: vars(Interval.of([value(s, m) for s in runs.values()])) for m in MEASURES
            },
            "runs": {str(seed): summary for seed, summary in runs.items()},
        }
        if first is None:
            first = runs
        else:
            entry["against_first"] = differences(runs, first)
        if reference is not values:
            other = variant_name(reference)
            entry["against"] = {"name": other, **differences(runs, summaries[other])}
        variants.append(entry)
    return {"variants": variants}


def differences(
    runs: Mapping[int, Mapping[str, Any]], first: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """By measure, the mean difference of a variant to another, paired by seed, and its interval."""
    return {
        m: vars(Interval.of([value(runs[s], m) - value(first[s], m) for s in runs]))
        for m in MEASURES
    }


def line_key(combinations: Sequence[Mapping[str, Any]]) -> str | None:
    """The key whose values are compared with each other: the method, else the last one varied.

    None where the variants have other keys than each other.
    """
    keys = list(combinations[0])
    if any(list(values) != keys for values in combinations):
        return None
    varied = [key for key in keys if len({repr(values[key]) for values in combinations}) > 1]
    return "method.name" if "method.name" in varied else (varied or keys)[-1]


def references_of(combinations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What each variant is compared with: the first whose other keys have the same values."""
    key = line_key(combinations)
    if key is None:
        return [combinations[0]] * len(combinations)
    found: dict[str, Mapping[str, Any]] = {}
    for values in combinations:
        found.setdefault(panel_name(values, key), values)
    return [found[panel_name(values, key)] for values in combinations]


def panel_name(values: Mapping[str, Any], key: str) -> str:
    """The values of all keys but one: "data.alpha=0.1"; "" if there are no others."""
    return variant_name({name: value for name, value in values.items() if name != key})


def metric_of(table: Mapping[str, Any]) -> str | None:
    """The measure besides accuracy by which all runs of a comparison were judged, if any."""
    found = {run.get("metric") for entry in table["variants"] for run in entry["runs"].values()}
    return None if found & {"accuracy", None} or len(found) > 1 else str(found.pop())


def markdown(table: Mapping[str, Any]) -> str:
    """The comparison as a markdown table."""
    variants = table["variants"]
    seeds = len(variants[0]["runs"])
    metric = metric_of(table)
    several = len({entry["against"]["name"] for entry in variants if "against" in entry}) > 1
    head = [
        "",
        *([metric.replace("_", " ")] if metric else []),
        "accuracy",
        "difference" if several else f"against {variants[0]['name']}",
        "best",
        "personal",
        "MB up",
        "MB down",
        "s",
    ]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for entry in variants:
        m, gap = entry["measures"], entry.get("against")
        behind = f" to {gap['name']}" if gap and several else ""
        rows.append(
            [
                entry["name"],
                *([shown(m["metric_value"])] if metric else []),
                shown(m["accuracy"]),
                shown(gap["accuracy"], sign=True) + behind if gap else "",
                shown(m["best_accuracy"]),
                shown(m["mean_personal_accuracy"]),
                f"{m['bytes_up']['mean'] / 1e6:.1f}",
                f"{m['bytes_down']['mean'] / 1e6:.1f}",
                f"{m['seconds']['mean']:.0f}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    note = f"{seeds} seeds, mean and 95 % interval, differences paired by seed."
    return "\n".join([*lines, "", note if seeds > 1 else "One seed.", ""])


def cut_ends(mean: float, half: float) -> tuple[float, float] | None:
    """The ends of a share's interval that would pass 0 or 1, which end there; None of others."""
    if math.isnan(half) or half <= mean <= 1 - half:
        return None
    return max(mean - half, 0), min(mean + half, 1)


def shown(interval: Mapping[str, float], *, sign: bool = False) -> str:
    """An interval for a table cell."""
    if interval["mean"] != interval["mean"]:  # NaN: not measured in this kind of run
        return ""
    mean, half = interval["mean"], interval["half"]
    text = f"{mean:+.4f}" if sign else f"{mean:.4f}"
    if half != half:
        return text
    if not sign and (ends := cut_ends(mean, half)):
        return f"{text} ({ends[0]:.4f} to {ends[1]:.4f})"
    return f"{text} ± {half:.4f}"
