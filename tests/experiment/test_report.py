"""Reports of run folders that the library itself wrote, from made-up numbers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from matplotlib.figure import Figure

from sluiceway.core.round_loop import Record, Result
from sluiceway.errors import InputError
from sluiceway.experiment.compare import Interval, markdown, references_of, shown, tabulate
from sluiceway.experiment.moe_plots import moe_figures, used_share
from sluiceway.experiment.plots import (
    THEME,
    clients_figure,
    comparison_figure,
    curves_of,
    holdings_figure,
)
from sluiceway.experiment.recipe import Recipe, recipe_from
from sluiceway.experiment.report import cell, human_bytes, human_time, percent, points, write_report
from sluiceway.experiment.run_directory import strict_json, write_json
from sluiceway.experiment.summary import Outcome, summarise
from sluiceway.experiment.tables import data_name

COUNTS = [[3, 0, 5], [0, 0, 0], [0, 40, 1]]
LABELS = ("sport & <play>", "price in $ and $", "漢字")


def recipe_of(method: str = "fedavg", seed: int = 0, **data: Any) -> Recipe:
    return recipe_from(
        {
            "run": {"rounds": 4, "seed": seed},
            "data": {"path": "mine.csv", "clients": 3, "alpha": 0.1} | data,
            "method": {"name": method},
        }
    )


def result_of(rounds: int = 4, seed: int = 0, better: float = 0.0) -> Result:
    records = [
        Record(
            round=n,
            accuracy=0.5 + 0.05 * n + 0.01 * seed + better,
            loss=1 / n,
            train_loss=2 / n,
            bytes_up=1_000_000 * n,
            bytes_down=1_000_000,
            seconds=1.5,
            clients=[0, 2],
            rejected={2: "NaN or Inf in <gate>"} if n == 2 else {},
            accuracy_by_client=[0.6, None, 0.7],
        )
        for n in range(1, rounds + 1)
    ]
    return Result(records, {}, {0: 0.9, 2: 0.8}, [1], COUNTS)


def write_run(folder: Path, recipe: Recipe, result: Result, *, finished: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe.resolved()), encoding="utf-8")
    lines = [json.dumps(record.as_dict()) + "\n" for record in result.records]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    if finished:
        write_json(folder / "summary.json", summary_of(recipe, result))
    return folder


def summary_of(recipe: Recipe, result: Result) -> dict[str, Any]:
    return summarise(recipe, Outcome(result, "mine.csv", LABELS), "cpu", 75.0)


def write_comparison(folder: Path, better: dict[str, dict[int, float]]) -> Path:
    summaries: dict[str, dict[int, dict[str, Any]]] = {}
    for method, by_seed in better.items():
        for seed, gain in by_seed.items():
            recipe, result = recipe_of(method, seed), result_of(seed=seed, better=gain)
            write_run(folder / method / f"seed-{seed}", recipe, result)
            summaries.setdefault(method, {})[seed] = summary_of(recipe, result)
    write_json(
        folder / "compare.json", tabulate([{"method.name": method} for method in better], summaries)
    )
    return folder


def words(path: Path) -> str:
    """What a reader of the page sees, figures included."""
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            seen.append(data)

    text = path.read_text(encoding="utf-8")
    Reader().feed(re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL))
    return " ".join(" ".join(seen).replace("\xa0", " ").split())


def test_a_run_says_what_it_came_to(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", recipe_of("fedalign-moe"), result_of())
    assert write_report([folder]) == [folder / "report.html"]
    seen = words(folder / "report.html")
    for expected in (
        "fedalign-moe on mine.csv",
        "3 clients, Dirichlet 0.1, 4 rounds, seed 0",
        "70.0%",  # accuracy
        "85.0%",  # mean of the clients' own models
        "10 MB",
        "4 MB",
        "1 min 15 s",
        "1 without examples",
        "local engine, cpu",
        "2 2 NaN or Inf in <gate>",
        "sport & <play>",
        "price in $ and $",
        "漢字",
        "empty",
        "Resolved recipe",
        "transformers",
    ):
        assert expected in seen
    assert "Unfinished" not in seen


def test_a_private_run_says_its_epsilon(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", recipe_of(), result_of())
    assert "epsilon" not in words(write_report([folder])[0])
    summary = json.loads((folder / "summary.json").read_text())
    private = {"epsilon": 3.9999, "delta": 1e-5, "privacy": {"where": "client"}}
    (folder / "summary.json").write_text(json.dumps(summary | private))
    seen = words(write_report([folder])[0])
    assert "epsilon 4 of each client, delta 1e-05, noise at the client" in seen


def test_a_report_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", recipe_of(), result_of())
    text = write_report([folder])[0].read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<link" not in text
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert str(tmp_path) not in text


def test_figures_take_the_page_s_colours_and_their_ids_do_not_clash(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", recipe_of(), result_of())
    text = write_report([folder])[0].read_text(encoding="utf-8")
    body = text[text.index("<body>") :]
    assert "var(--ink)" in body
    assert not [role for role, (light, _) in THEME.items() if light in body]
    assert "prefers-color-scheme: dark" in text
    ids = re.findall(r'\bid="([^"]+)"', body)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", body)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', body)) <= set(ids)


def test_the_same_run_gives_the_same_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", recipe_of(), result_of())
    first = write_report([folder])[0].read_bytes()
    assert write_report([folder])[0].read_bytes() == first


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", recipe_of(), result_of(rounds=3), finished=False)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 4, "accur')
    seen = words(write_report([folder])[0])
    assert "Unfinished: 3 of 4 rounds are done" in seen
    assert "65.0%" in seen
    assert "Who holds what" not in seen


def test_a_comparison_with_seeds(tmp_path: Path) -> None:
    gains = {
        "fedavg": {0: 0.0, 1: 0.0, 2: 0.0},
        "fedprox": {0: 0.05, 1: -0.04, 2: 0.0},
        "fedalign-moe": {0: 0.099, 1: 0.1, 2: 0.101},
    }
    path = write_report([write_comparison(tmp_path / "cmp", gains)])[0]
    assert path == tmp_path / "cmp" / "report.html"
    seen = words(path)
    assert "3 seeds, mean ± half width of the 95 % interval" in seen
    assert "+10.0 ± 0.2" in seen
    prox, align = seen.index("fedprox seeds"), seen.index("fedalign-moe seeds")
    assert "+0.3 ± 11.2 no difference shown at 95 %" in seen[prox:align]
    assert "+10.0 ± 0.2 81.0%" in seen[align:]  # the next cell, no such note between
    assert "fedavg, fedprox and fedalign-moe on mine.csv" in seen
    assert (tmp_path / "cmp" / "fedavg" / "seed-1" / "report.html").is_file()
    assert 'href="fedalign-moe/seed-2/report.html"' in path.read_text(encoding="utf-8")


def test_runs_with_and_without_a_robust_rule_are_not_seeds_of_one_variant(tmp_path: Path) -> None:
    tables = recipe_of().model_dump(exclude_none=True)
    tables["run"]["seed"] = 1
    tables["method"]["robust"] = {"name": "median"}
    plain = write_run(tmp_path / "plain", recipe_of(), result_of())
    robust = write_run(tmp_path / "robust", recipe_from(tables), result_of(seed=1))
    (path,) = write_report([plain, robust])
    assert "method.robust.name=median" in words(path)


def test_a_comparison_of_one_seed_claims_no_interval(tmp_path: Path) -> None:
    gains = {"fedavg": {0: 0.0}, "fedalign-moe": {0: 0.1}}
    seen = words(write_report([write_comparison(tmp_path, gains)])[0])
    assert "One seed: no interval" in seen
    assert "±" not in seen
    assert "nan" not in seen
    assert "no difference shown" not in seen


def test_data_of_several_files_are_called_like_the_first() -> None:
    assert data_name({"data": {"path": ["/notes/a.csv", "/notes/b.csv"]}}) == "a.csv"
    assert data_name({"data": {"path": "/notes/a.csv"}}) == "a.csv"
    assert data_name({"data": {"name": "agnews"}}) == "agnews"


def test_every_file_of_a_comparison_is_strict_json(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, {"fedavg": {0: 0.0}, "fedalign-moe": {0: 0.1}})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        for line in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            json.loads(line, parse_constant=refuse)
    assert strict_json({"a": [float("nan"), (1.5, float("-inf"))]}) == '{"a": [null, [1.5, null]]}'


def test_several_runs_share_a_report_beside_them(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{method}-{seed}", recipe_of(method, seed), result_of(seed=seed))
        for method in ("fedavg", "fedprox")
        for seed in (0, 1)
    ]
    assert write_report(folders) == [tmp_path / "report.html"]
    seen = words(tmp_path / "report.html")
    assert "4 runs" in seen
    assert "2 seeds" in seen
    assert "against fedavg" in seen


def test_runs_from_different_places_and_data_share_a_report_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [
        write_run(Path("a/run"), recipe_of(), result_of()),
        write_run(Path("b/run"), recipe_of(path="other.csv", alpha=1.0), result_of(rounds=2)),
        write_run(Path("c/run"), recipe_of("fedprox"), result_of(rounds=1), finished=False),
    ]
    assert write_report(folders) == [Path("report.html")]
    seen = words(Path("report.html"))
    assert "No differences: these runs do not share data and seeds." in seen
    assert "against" not in seen
    assert 'href="b/run/"' in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no run or comparison: it holds no summary.json, metrics.jsonl or compare.json"),
        ({"metrics.jsonl": ""}, "metrics.jsonl holds no finished round yet"),
        ({"metrics.jsonl": "{\n{}\n"}, "metrics.jsonl, line 1: not a round"),
        ({"summary.json": "{"}, "summary.json cannot be read"),
        ({"summary.json": "{}"}, "summary.json cannot be read: it holds no accuracy_by_round"),
        ({"compare.json": "[]"}, "compare.json cannot be read: it holds no variants"),
    ],
)
def test_what_cannot_be_reported(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        write_report([tmp_path])
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_follow_the_rounds() -> None:
    summary = summary_of(recipe_of(), result_of())
    summary["bytes_by_round"] = [2e6, 3e6, 4e6, 5e6]
    variant = {"name": "fedavg", "values": {}, "runs": {"0": summary}}
    assert curves_of([variant])[0].nbytes.tolist() == [[2e6, 5e6, 9e6, 14e6]]


def test_methods_keep_their_colour_and_variants_their_own_look() -> None:
    run = {"0": summary_of(recipe_of(), result_of())}
    names = ["fedalign-moe", "fedavg", "fedalign-moe", "someone-else"]
    variants = [
        {"name": f"{name}, {n}", "values": {"method.name": name}, "runs": run}
        for n, name in enumerate(names)
    ]
    curves = curves_of(variants)
    assert curves[0].colour == curves[2].colour == THEME["strong"][0]
    assert curves[1].colour == THEME["grey"][0]
    assert len({(curve.colour, str(curve.dash)) for curve in curves}) == 4


def test_extreme_holdings_and_clients_are_drawn(tmp_path: Path) -> None:
    drawn: list[Figure] = [
        holdings_figure([[0, 0]], ["a", "b"]),
        holdings_figure(
            [[n * m for m in range(77)] for n in range(70)], [str(n) for n in range(77)]
        ),
        clients_figure([None], {}),
        clients_figure([0.5] * 501, {3: 0.7}),
    ]
    for figure in drawn:
        figure.savefig(tmp_path / "figure.png")


def test_numbers_as_people_read_them() -> None:
    assert [human_bytes(n) for n in (0, 999, 1_230_000, 45.6e9)] == [
        "0 bytes", "999 bytes", "1.23 MB", "45.6 GB",
    ]  # fmt: skip
    assert [human_time(s) for s in (0.44, 42, 125, 7500)] == [
        "0.4 s", "42 s", "2 min 05 s", "2 h 05 min",
    ]  # fmt: skip
    assert percent(0.8123, 0.014) == "81.2% ± 1.4"
    assert percent(0.97, 0.05) == "97.0% (92.0% to 100.0%)"
    assert cell(percent(0.97, 0.05)) == '97.0%<small class="ends">(92.0% to 100.0%)</small>'
    assert cell(percent(0.8123, 0.014)) == "81.2% ± 1.4"
    assert percent(0.04, 0.05) == "4.0% (0.0% to 9.0%)"
    assert percent(None) == percent(float("nan")) == "-"
    assert points({"mean": -0.01, "half": None}) == "-1.0"


def swept(gain: dict[tuple[float, str], float], seeds: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """A comparison over data.alpha and method.name."""
    combinations = [{"data.alpha": alpha, "method.name": name} for alpha, name in gain]
    summaries = {
        f"data.alpha={alpha}, {name}": {
            seed: summary_of(recipe_of(name, seed, alpha=alpha), result_of(seed=seed, better=more))
            for seed in seeds
        }
        for (alpha, name), more in gain.items()
    }
    return tabulate(combinations, summaries)


SWEPT = {(0.1, "fedavg"): 0.0, (0.1, "usage"): 0.1, (1.0, "fedavg"): 0.2, (1.0, "usage"): 0.17}


def test_a_sweep_over_two_keys_compares_within_each_value_of_the_other(tmp_path: Path) -> None:
    table = swept(SWEPT)
    against = [entry.get("against") for entry in table["variants"]]
    assert [one and one["name"] for one in against] == [
        None,
        "data.alpha=0.1, fedavg",
        None,
        "data.alpha=1.0, fedavg",
    ]
    assert against[3]["accuracy"]["mean"] == pytest.approx(-0.03)
    assert "-0.0300 ± 0.0000 to data.alpha=1.0, fedavg" in markdown(table)
    figure = comparison_figure(table)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        *("data.alpha=0.1", "", "data.alpha=1.0", "")
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fedavg", "usage"]
    write_json(tmp_path / "compare.json", table)
    seen = words(write_report([tmp_path])[0])
    assert "data.alpha and method.name varied on mine.csv" in seen
    assert "-3.0 ± 0.0 to data.alpha=1.0, fedavg" in seen


def test_variants_of_other_keys_are_compared_with_the_first() -> None:
    apart = [{"a": 1}, {"a": 1, "b": 2}, {"b": 3}]
    assert references_of(apart) == [apart[0]] * 3
    one = [{"run.lr": lr} for lr in (1, 2, 3)]
    assert references_of(one) == [one[0]] * 3
    both = [{"x": x, "y": y} for x in (1, 2) for y in (5, 6)]
    assert references_of(both) == [both[0], both[0], both[2], both[2]]


def test_intervals_end_where_shares_do() -> None:
    assert shown(vars(Interval(0.98, 0.05))) == "0.9800 (0.9300 to 1.0000)"
    assert shown(vars(Interval(0.5, 0.05))) == "0.5000 ± 0.0500"
    assert shown(vars(Interval(-0.02, 0.05)), sign=True) == "-0.0200 ± 0.0500"


def test_titles_say_what_was_run_whatever_the_description(tmp_path: Path) -> None:
    tables = recipe_of().model_dump(exclude_none=True)
    tables["description"] = "FedAlign-MoE on AG News"
    tables["method"]["robust"] = {"name": "median"}
    folder = write_run(tmp_path / "one", recipe_from(tables), result_of())
    text = write_report([folder])[0].read_text(encoding="utf-8")
    assert "<h1>fedavg + median on mine.csv</h1>" in text


def test_the_chosen_metric_leads(tmp_path: Path) -> None:
    tables = recipe_of().model_dump(exclude_none=True)
    tables["run"]["metric"] = "macro_f1"
    result = result_of()
    result.records[:] = [replace(one, metrics={"macro_f1": 0.3}) for one in result.records]
    folder = write_run(tmp_path / "cmp" / "fedavg" / "seed-0", recipe_from(tables), result)
    assert "macro f1 30.0% by which rounds are compared" in words(write_report([folder])[0])
    summary = summary_of(recipe_from(tables), result)
    table = tabulate([{"method.name": "fedavg"}], {"fedavg": {0: summary}})
    assert markdown(table).startswith("|  | macro f1 | accuracy |")
    write_json(tmp_path / "cmp" / "compare.json", table)
    assert "macro f1 accuracy best round" in words(write_report([tmp_path / "cmp"])[0])


def test_many_classes_have_a_key(tmp_path: Path) -> None:
    names = [f"label {n}" for n in range(52)]
    result = Result(result_of().records, {}, {0: 0.9}, [], [[n % 3 for n in range(52)]] * 3)
    recipe = recipe_of()
    folder = write_run(tmp_path / "one", recipe, result, finished=False)
    write_json(folder / "summary.json", summarise(recipe, Outcome(result, "x", names), "cpu", 1))
    text = write_report([folder])[0].read_text(encoding="utf-8")
    assert '<ol class="key" start="0"><li>label 0</li>' in text
    assert "The 52 labels by number" in text


def routed(round: int, client_level: bool = True) -> dict[str, Any]:
    block: dict[str, Any] = {"experts": [0.75, 0.25], "overlap": 0.5 + 0.1 * round}
    if client_level:
        block |= {name: {"0": [1.0, 0.0], "2": [0.5, 0.5]} for name in ("load", "weight")}
    return {"round": round, "routing": [block, block]}


def test_a_run_of_experts_shows_them(tmp_path: Path) -> None:
    assert moe_figures([{"round": 1, "routing": []}]) == {}
    figures = moe_figures([routed(1), routed(2)])
    assert sorted(figures) == ["load", "routing", "weight"]
    lines = {line.get_label(): line.get_ydata() for line in figures["routing"].axes[0].lines}
    assert lines["overlap of the routing"].tolist() == pytest.approx([0.6, 0.7])
    # exp of the entropy of (3/4, 1/4), of two experts
    use = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))) / 2
    assert lines["share of the experts in use"].tolist() == pytest.approx([use, use])
    assert (used_share([1, 0]), used_share([0.5, 0.5]), used_share([0, 0])) == (0.5, 1, 0)
    rows = [label.get_text() for label in figures["load"].axes[0].get_yticklabels()]
    assert rows == ["0", "2"]
    assert [axes.get_title(loc="left") for axes in figures["weight"].axes] == [
        "mixture 1",
        "mixture 2",
    ]
    assert "weight" not in moe_figures([routed(1, client_level=False)])
    result = result_of()
    result.records[:] = [
        replace(one, routing=routed(one.round)["routing"]) for one in result.records
    ]
    folder = write_run(tmp_path / "one", recipe_of(), result)
    seen = words(write_report([folder])[0])
    assert "Load by client and expert" in seen
    summary = summary_of(recipe_of(), result)
    assert summary["routing_overlap_by_round"] == pytest.approx([0.6, 0.7, 0.8, 0.9])
