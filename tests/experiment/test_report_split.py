"""Reports of split runs: tiny real runs on random images, summed up by the library itself."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.experiment.test_report import (
    recipe_of,
    result_of,
    summary_of,
    words,
    write_run,
)

from sluiceway.core.round_loop import Result
from sluiceway.core.settings import Optimisation
from sluiceway.data import ImageDataset
from sluiceway.experiment.compare import tabulate
from sluiceway.experiment.plots import DASHES, THEME, looks
from sluiceway.experiment.recipe import Recipe, recipe_from
from sluiceway.experiment.report import write_report
from sluiceway.experiment.run_directory import write_json
from sluiceway.experiment.split_plots import kept_figure, ranks, scores_figure, split_figures
from sluiceway.split import ACPSL, METHODS
from sluiceway.split.networks import Conv4
from sluiceway.split.training import split_train

SINGLE = {"name": "acp-sl", "values": {"method.name": "acp-sl"}}


def images(count: int, seed: int) -> ImageDataset:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=g, dtype=torch.uint8)
    return ImageDataset(pixels, torch.arange(count) % 3, (0.5,), (0.3,))


@cache
def trained(method: str, seed: int = 0) -> Result:
    torch.manual_seed(seed)
    return split_train(
        Conv4(1, 3, width=8),
        "conv1",
        [images(24, 1), images(0, 2), images(12, 3)],
        images(30, 4),
        ACPSL(preset="paper") if method == "acp-sl" else method,
        rounds=5,
        seed=seed,
        training=Optimisation(lr=0.01, batch_size=12),
    )


def split_recipe(method: str, seed: int = 0) -> Recipe:
    return recipe_from(
        {
            "run": {"kind": "split", "rounds": 5, "seed": seed},
            "data": {"name": "mnist5k", "clients": 3, "alpha": 0.3},
            "model": {"name": "conv4", "width": 8, "cut": "conv1"},
            "method": {"name": method} | ({"preset": "paper"} if method == "acp-sl" else {}),
        }
    )


def split_folder(folder: Path, method: str, seed: int = 0, *, finished: bool = True) -> Path:
    recipe, result = split_recipe(method, seed), trained(method, seed)
    return write_run(folder, recipe, result, finished=finished)


def split_comparison(folder: Path, methods: tuple[str, ...], seeds: tuple[int, ...]) -> Path:
    folder.mkdir(exist_ok=True)
    summaries = {
        method: {
            seed: summary_of(split_recipe(method, seed), trained(method, seed)) for seed in seeds
        }
        for method in methods
    }
    combinations = [{"method.name": method} for method in methods]
    write_json(folder / "compare.json", tabulate(combinations, summaries))
    return folder


def headings(path: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", path.read_text(encoding="utf-8"))


def test_a_split_run_says_what_crossed_the_cut(tmp_path: Path) -> None:
    path = write_report([split_folder(tmp_path / "one", "acp-sl")])[0]
    seen = words(path)
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    kept = summary["kept_by_round"][-1]
    assert kept < 8  # else this run shows nothing
    assert f"channels kept {kept:.3g} of 8 in the last round, cut after conv1" in seen
    assert f"nothing dropped {summary['accuracy_full']:.1%}" in seen
    assert "as deployed, test set" in seen
    assert "Accuracy by data sent" in seen
    assert "parallel, seed 0" in seen
    assert "personal" not in seen.replace("personal = 500", "")  # the key of the recipe
    assert "own model" not in seen
    assert "nan" not in seen
    assert headings(path) == [
        "Accuracy of the global model",
        "Channels kept by round",
        "Bits a value by round",
        "Scores of the channels",
        "Client by client",
        "Class by class",
        "Who holds what",
        "Loss by round",
    ]
    body = path.read_text(encoding="utf-8").partition("<body>")[2]
    assert not [role for role, (light, _) in THEME.items() if light in body]
    ids = re.findall(r'\bid="([^"]+)"', body)
    assert len(ids) == len(set(ids))


def test_bits_a_value_are_those_of_what_crossed(tmp_path: Path) -> None:
    """36 examples of [8, 8, 8] floats and a label each cross in a round: 32 bits and headers."""
    plain = trained("sl").records[-1].as_dict()
    assert 32 < plain["bits"] < 33
    kept, some = trained("acp-sl"), trained("acp-sl").records[-1].as_dict()
    assert 0 < some["bits"] - 32 * some["kept"] / 8 < 1
    summary = summary_of(split_recipe("acp-sl"), kept)
    assert summary["bits_by_round"] == [record.as_dict()["bits"] for record in kept.records]
    shown = f"{some['bits']:.3g}"
    path = write_report([split_folder(tmp_path / "one", "acp-sl")])[0]
    assert f"bits a value {shown} of the smashed data in the last round" in words(path)
    folder = split_comparison(tmp_path / "two", ("sl", "acp-sl"), (0, 1))
    assert "Bits a value by round" in headings(write_report([folder])[0])
    (axes,) = split_figures([SINGLE | {"runs": {0: summary}}])["bits"].axes
    (line,) = axes.lines
    assert list(np.asarray(line.get_ydata())) == pytest.approx(summary["bits_by_round"])


def test_deployed_is_solid_and_full_is_dashed() -> None:
    summary = summary_of(split_recipe("acp-sl"), trained("acp-sl"))
    summary["accuracy_full_by_round"] = [0.1, 0.2, 0.3, 0.4, 0.5]
    figures = split_figures([SINGLE | {"runs": {"0": summary}}])
    for axes in figures["progress"].axes:
        deployed, full = axes.get_lines()
        assert deployed.get_linestyle() == "-"
        assert full.get_linestyle() == "--"
        assert list(deployed.get_ydata()) == summary["accuracy_by_round"]
        assert list(full.get_ydata()) == summary["accuracy_full_by_round"]
    by_bytes = np.asarray(deployed.get_xdata())
    assert by_bytes / by_bytes[-1] == pytest.approx(
        np.cumsum(summary["bytes_by_round"]) / sum(summary["bytes_by_round"])
    )


def test_a_run_that_drops_nothing_has_no_figure_of_it(tmp_path: Path) -> None:
    path = write_report([split_folder(tmp_path / "one", "sl")])[0]
    assert "channels kept 8 of 8" in words(path)
    assert "Dashed" not in words(path)
    assert not {"Channels kept by round", "Scores of the channels"} & {*headings(path)}


def test_an_unfinished_split_run_shows_its_channels(tmp_path: Path) -> None:
    path = write_report([split_folder(tmp_path / "one", "acp-sl", finished=False)])[0]
    assert "Scores of the channels" in headings(path)
    assert "with --resume continues it" in words(path)
    finished = write_report([split_folder(tmp_path / "two", "acp-sl")])[0]
    kept = re.compile(r"channels kept [\d.]+ of 8")
    assert kept.findall(words(path)) == kept.findall(words(finished)) != []


def test_a_comparison_of_split_runs(tmp_path: Path) -> None:
    methods = ("sl", "acp-sl", "random")
    path = write_report([split_comparison(tmp_path / "cmp", methods, (0, 1))])[0]
    seen = words(path)
    assert "best round nothing dropped data sent time" in seen  # no personal between
    assert "8 of 8 channels" in seen
    assert "Channels kept by round" in headings(path)
    assert "personal" not in seen.replace("personal = 500", "")  # the key of the recipe
    assert "nan" not in seen
    table = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    rows = kept_figure(table["variants"]).axes
    assert [axes.get_yticklabels()[0].get_text() for axes in rows] == [
        f"{method}\nof 8" for method in methods
    ]
    colours = [colour for colour, _ in looks(table["variants"])]
    assert colours[:2] == [THEME["grey"][0], THEME["strong"][0]]
    full = table["variants"][1]["runs"]["0"]["accuracy_full"]
    full = (full + table["variants"][1]["runs"]["1"]["accuracy_full"]) / 2
    assert f"{full:.1%} (" in seen  # the interval passes 0 or 1, so its ends are told


def test_split_and_federated_runs_share_a_report(tmp_path: Path) -> None:
    folders = [
        split_folder(tmp_path / "a", "acp-sl"),
        write_run(tmp_path / "b", recipe_of("fedavg"), result_of()),
    ]
    seen = words(write_report(folders)[0])
    assert "nothing dropped personal data sent" in seen
    assert "85.0%" in seen
    assert "nan" not in seen


def test_every_method_has_a_colour_and_none_of_two_looks_the_same() -> None:
    names = list(METHODS)
    drawn = looks([{"name": name, "values": {"method.name": name}} for name in names])
    assert len({(colour, str(dash)) for colour, dash in drawn}) == len(names)
    assert drawn[names.index("random")][0] != THEME["strong"][0]
    alone = looks([{"name": "randtopk", "values": {"method.name": "randtopk"}}])
    assert alone == [(THEME["green"][0], DASHES[0])]


def test_scores_are_scaled_round_by_round() -> None:
    assert ranks([3.0, 1.0, 2.0], 3).tolist() == [1.0, 0.0, 0.5]
    assert ranks([3e9, 1e9, 2e9], 3).tolist() == [1.0, 0.0, 0.5]
    assert ranks([1.0, 1.0, 1.0], 3).tolist() == [0.5, 0.5, 0.5]
    assert np.isnan(ranks(None, 3)).all()
    assert ranks([7.0], 1).tolist() == [1.0]


def test_kept_channels_are_marked_and_rounds_without_scores_are_blank() -> None:
    scores = [[3.0, 1.0, 2.0], None, [30.0, 20.0, 10.0]]
    masks = [[True, True, True], [True, False, True], [True, False, True]]
    axes = scores_figure(scores, masks).axes[0]
    shade = np.asarray(axes.get_images()[0].get_array())[..., 3]
    assert (shade[:, 1] == 0).all()
    assert (shade[:, [0, 2]] > 0).all()
    assert [int(tick.get_text()) for tick in axes.get_yticklabels()] == [0, 2, 1]
    (dots,) = axes.get_lines()
    marked = {*zip(dots.get_xdata(), dots.get_ydata(), strict=True)}
    assert marked == {(1, 0), (1, 1), (1, 2), (3, 0), (3, 1)}


def test_extreme_split_runs_are_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    many = {"kept_by_round": [512 - n for n in range(300)], "channels": 512}
    variant = SINGLE | {"runs": {"0": many | {"accuracy_full": 0.5}}}
    mask = (rng.random((300, 512)) > 0.5).tolist()
    for figure in (
        kept_figure([variant]),
        scores_figure(rng.random((300, 512)).tolist(), mask),
        scores_figure([None, [1.0]], [None, [True]]),
    ):
        figure.savefig(tmp_path / "figure.png")
