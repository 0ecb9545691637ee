"""report.html of a run, of several runs side by side, or of a comparison."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import matplotlib
import tomli_w
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from sluiceway.errors import InputError
from sluiceway.experiment.compare import cut_ends, metric_of, tabulate, variant_name
from sluiceway.experiment.moe_plots import moe_figures, overlaps_figure
from sluiceway.experiment.plots import (
    NAMED,
    STYLE,
    THEME,
    byte_unit,
    clients_figure,
    comparison_figure,
    holdings_figure,
    loss_figure,
    personal_figure,
)
from sluiceway.experiment.split_plots import at_the_cut, split_figures
from sluiceway.experiment.summary import summary_so_far
from sluiceway.experiment.tables import data_name, flattened, method_label, with_current_keys

#: Keys of a recipe that change no result or name no variant of a joint report.
ASIDE = (
    "description",
    "compare",
    "run.seed",
    "run.workers",
    "run.feature_memory_mb",
    "run.feature_disk_mb",
    "run.track",
)


@dataclass(frozen=True)
class Run:
    """A run folder as read. `summary` of an unfinished run has what its rounds tell."""

    folder: Path
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    finished: bool


def write_report(folders: Sequence[Path]) -> list[Path]:
    """Write a self-contained report.html for run folders and comparison folders.

    One run folder has its report inside it. Several share one report, in their parent folder if
    it is the same, else in the current folder. Every comparison folder has its own.

    Args:
        folders: each with summary.json, metrics.jsonl (an unfinished run) or compare.json.

    Returns:
        The files written.

    Raises:
        InputError: no folder, one that holds none of these, or a file that cannot be read.
    """
    if not folders:
        raise InputError("no folder given to report on")
    comparisons = [folder for folder in folders if (folder / "compare.json").is_file()]
    runs = [read_run(folder) for folder in folders if folder not in comparisons]
    written = [write_comparison(folder) for folder in comparisons]
    if runs:
        written.append(write_run(runs[0]) if len(runs) == 1 else write_joint(runs))
    return written


def read_run(folder: Path) -> Run:
    """A finished or unfinished run. Raises InputError."""
    lines = folder / "metrics.jsonl"
    records = read_lines(lines) if lines.is_file() else []
    if (folder / "summary.json").is_file():
        summary = read_json(folder / "summary.json", "accuracy_by_round")
    elif records:
        summary = summary_so_far(written_recipe(folder / "recipe.toml"), records)
    elif lines.is_file():
        raise InputError(f"{lines} holds no finished round yet")
    else:
        looked_for = "summary.json, metrics.jsonl or compare.json"
        raise InputError(f"{folder} is no run or comparison: it holds no {looked_for}")
    summary["recipe"] = with_current_keys(summary.get("recipe", {}), tell=False)
    return Run(folder, summary, records, (folder / "summary.json").is_file())


def read_json(path: Path, key: str) -> dict[str, Any]:
    """A JSON object that has the key. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not content.get(key):
        raise InputError(f"{path} cannot be read: it holds no {key}")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rounds of metrics.jsonl. Raises InputError."""
    records: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            # A resumed run may have written a round again; the later line counts.
            records[record["round"]] = record
        except (ValueError, TypeError, KeyError):
            if number < len(lines):  # the last line may be cut off by an interruption
                raise InputError(f"{path}, line {number}: not a round of a run") from None
    return [records[number] for number in sorted(records)]


def written_recipe(path: Path) -> dict[str, Any]:
    """The tables of a run's recipe.toml, none if it is not there. Raises InputError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}") from None


def write_run(run: Run) -> Path:
    """The report of one run, in its folder."""
    s = run.summary
    variant = {"name": s["method"], "values": {"method.name": s["method"]}, "runs": {"": s}}
    figures = {"progress": comparison_figure({"variants": [variant]})} | split_figures([variant])
    figures |= moe_figures(run.records)
    if s.get("accuracy_by_client"):
        personal = {int(client): v for client, v in s.get("personal_accuracy", {}).items()}
        figures["clients"] = clients_figure(s["accuracy_by_client"], personal)
    train, test = ([record.get(key) for record in run.records] for key in ("train_loss", "loss"))
    if any(loss is not None for loss in [*train, *test]):
        figures["loss"] = loss_figure(train, test)
    return save(run.folder, s, figures, records=run.records, finished=run.finished)


def write_comparison(folder: Path) -> Path:
    """The report of a comparison, in its folder, with links to the runs' folders."""
    table = read_json(folder / "compare.json", "variants")
    for entry in table["variants"]:
        for part in ("measures", "against_first", "against"):
            for interval in entry.get(part, {}).values():
                if isinstance(interval, dict):
                    interval.update((k, float("nan")) for k, v in interval.items() if v is None)
        for seed, summary in entry["runs"].items():
            place = entry.get("folder") or entry["name"].replace("/", "_")
            below = folder / place / f"seed-{seed}"
            if (below / "summary.json").is_file():
                summary["folder"] = below
                page, told = below / "report.html", below / "summary.json"
                if not page.is_file() or page.stat().st_mtime < told.stat().st_mtime:
                    write_run(read_run(below))
    return save_table(folder, table, paired=True)


def write_joint(runs: Sequence[Run]) -> Path:
    """One report of several runs; those that differ in nothing but the seed are one variant."""
    flat = [flattened(run.summary["recipe"]) for run in runs]
    keys = [key for key in dict.fromkeys(k for one in flat for k in one) if differs(key, flat)]
    variants: dict[str, dict[str, Any]] = {}
    grouped: dict[str, dict[int, dict[str, Any]]] = {}
    for run, one in zip(runs, flat, strict=True):
        s = run.summary | {"folder": run.folder}
        if s.get("mean_personal_accuracy") is None:
            s["mean_personal_accuracy"] = math.nan
        values = {k: one[k] for k in keys if k in one} or {"method.name": s["method"]}
        name = variant_name(values)
        if len(name) > 48 or s["seed"] in grouped.get(name, {}):
            values = {"method.name": s["method"], "folder": str(run.folder)}
            name = variant_name(values)
        variants[name] = values
        grouped.setdefault(name, {})[s["seed"]] = s
    same_seeds = len({frozenset(by_seed) for by_seed in grouped.values()}) == 1
    paired = same_seeds and not {"data.name", "data.path"} & {*keys}
    batches = [list(variants)] if paired else [[name] for name in variants]
    tables = [tabulate([variants[name] for name in batch], grouped) for batch in batches]
    table = {"variants": [entry for table in tables for entry in table["variants"]]}
    parents = {run.folder.resolve().parent for run in runs}
    where = parents.pop() if len(parents) == 1 else Path()
    return save_table(where, table, paired=paired, joint=True, title=f"{len(runs)} runs")


def differs(key: str, flat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key tells runs apart, and not only because their methods have other parameters."""
    own = key.startswith("method.") and not key.endswith(".name")
    foreign = own and any(key not in one for one in flat)
    apart = len({repr(one.get(key)) for one in flat}) > 1
    return apart and not foreign and not key.startswith(ASIDE)


def save_table(folder: Path, table: Mapping[str, Any], **more: Any) -> Path:
    """Write the report of a table of variants."""
    figures = {"progress": comparison_figure(table)} | split_figures(table["variants"])
    if overlaps := overlaps_figure(table["variants"]):
        figures["overlap"] = overlaps
    more = {"title": title_of_table(table["variants"]), "metric": metric_of(table)} | more
    found = [entry["measures"]["mean_personal_accuracy"]["mean"] for entry in table["variants"]]
    if any(value is not None and value == value for value in found):
        figures["personal"] = personal_figure(table)
    first, *_ = table["variants"][0]["runs"].values()
    return save(folder, first, figures, variants=table["variants"], **more)


def save(folder: Path, s: Mapping[str, Any], figures: dict[str, Figure], **more: Any) -> Path:
    """Fill the template; `s` is the summary of the only or the first run."""
    counts = s.get("label_counts")
    if counts and counts[0]:
        names = s.get("label_names") or [str(n) for n in range(len(counts[0]))]
        figures["holdings"] = holdings_figure(counts, names)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": percent,
        "cell": cell,
        "report_in": lambda below: "report.html" if (below / "report.html").is_file() else "",
        "points": points,
        "size": human_bytes,
        "time": human_time,
        "at_the_cut": at_the_cut,
        "link": lambda below: quote(Path(os.path.relpath(below, folder)).as_posix()),
    }
    method = method_label(s["recipe"].get("method", {"name": s["method"]}))
    if "title" not in more:
        more["title"] = f"{method} on {data_name(s['recipe'])}"
    template = resources.files("sluiceway.experiment") / "report.html.j2"
    text = environment.from_string(template.read_text(encoding="utf-8")).render(
        s=s,
        data=data_name(s["recipe"]),
        method=method,
        parts=partition_name(s["recipe"]),
        unit=channel_word(s["recipe"]),
        key=counts and len(counts[0]) > NAMED and s.get("label_names"),
        recipe=tomli_w.dumps(s["recipe"]),
        theme=THEME,
        figures={name: svg(name, figure) for name, figure in figures.items()},
        **more,
    )
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def partition_name(recipe: Mapping[str, Any]) -> str:
    """How a run's examples are divided, in a word or two."""
    data = recipe.get("data", {})
    kinds = {
        "iid": "IID",
        "dirichlet": f"Dirichlet {data.get('alpha')}",
        "pathological": f"{data.get('classes_per_client')} classes a client",
        "natural": f"by {data.get('group')}",
    }
    return kinds.get(data.get("partition", ""), "")


def channel_word(recipe: Mapping[str, Any]) -> str:
    """What a split run sends of the smashed data: channels, or components of a basis."""
    basis = recipe.get("method", {}).get("basis", "channels")
    return "channels" if basis == "channels" else "components"


def title_of_table(variants: Sequence[Mapping[str, Any]]) -> str:
    """What a comparison compares, on which data."""
    combinations = [entry["values"] for entry in variants]
    keys = list(dict.fromkeys(key for values in combinations for key in values))
    varied = [k for k in keys if len({repr(values.get(k)) for values in combinations}) > 1]
    recipes = [run["recipe"] for entry in variants for run in entry["runs"].values()]
    data = list(dict.fromkeys(data_name(recipe) for recipe in recipes))
    on = " and ".join(data) if len(data) < 3 else f"{len(data)} data sets"
    if varied == ["method.name"] and len(variants) <= 5:
        names = [str(values["method.name"]) for values in combinations]
        return f"{', '.join(names[:-1])} and {names[-1]} on {on}"
    if not varied:
        return f"{method_label(recipes[0].get('method', {}))} on {on}"
    method = "" if "method.name" in varied else f", {method_label(recipes[0].get('method', {}))}"
    return f"{' and '.join(varied)} varied{method} on {on}"


def svg(name: str, figure: Figure) -> Markup:
    """A figure as inline SVG that takes the page's colours and font."""
    buffer = StringIO()
    salted: Any = STYLE | {"svg.hashsalt": name}  # ids apart from the other figures', and stable
    with matplotlib.rc_context(salted), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the browser has the glyphs that matplotlib's font lacks
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' (?:width|height)="[^"]*pt"', "", text, count=2)  # as wide as the page
    for role, (light, _) in THEME.items():
        text = text.replace(light, f"var(--{role})")
    return Markup(text)


def percent(value: float | None, half: float | None = None) -> str:
    """A share, with the half width of its interval: "81.2% ± 1.4"; "-" for None and NaN.

    An interval that would pass 0 or 1 is told by its ends: "97.0% (93.1% to 100.0%)".
    """
    if value is None or math.isnan(value):
        return "-"
    if half is not None and (ends := cut_ends(value, half)):
        return f"{value:.1%} ({ends[0]:.1%} to {ends[1]:.1%})"
    return f"{value:.1%}{plus_minus(half)}"


def cell(shown: str) -> Markup:
    """A share in a table's cell: an interval that is told by its ends on a line of its own."""
    share, _, ends = shown.partition(" (")
    more = Markup('<small class="ends">({}</small>').format(ends) if ends else Markup()
    return escape(share) + more


def points(gap: Mapping[str, float | None]) -> str:
    """A difference of two shares in points: "+1.3 ± 0.9"; "-" for None and NaN."""
    mean = gap["mean"]
    if mean is None or math.isnan(mean):
        return "-"
    return f"{mean * 100:+.1f}{plus_minus(gap['half'])}"


def plus_minus(half: float | None) -> str:
    """The half width of an interval in points, if there is one."""
    return "" if half is None or math.isnan(half) else f" ± {half * 100:.1f}"


def human_bytes(count: float) -> str:
    """Bytes in a unit that suits them: "1.23 MB"."""
    unit, size = byte_unit(count)
    return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"


def human_time(seconds: float) -> str:
    """Seconds as people say them: "3.2 s", "4 min 10 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, more = divmod(minutes, 60)
    return f"{hours} h {more:02d} min" if hours else f"{minutes} min {rest:02d} s"
