"""Images rebuilt from what crosses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.experiment.conftest import Run

from sluiceway.cli import main
from sluiceway.experiment.inversion import Decoder, crosses, invert, ssim
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.session import Session
from sluiceway.experiment.trained import load
from sluiceway.split.deployed import DeployedNetwork


def slow_ssim(x: list[list[float]], y: list[list[float]], side: int) -> float:
    """Of one plane, by the definition."""
    half = (side - 1) / 2
    weights = [
        [math.exp(-((i - half) ** 2 + (j - half) ** 2) / 4.5) for j in range(side)]
        for i in range(side)
    ]
    total, found = sum(map(sum, weights)), []
    for top in range(len(x) - side + 1):
        for left in range(len(x[0]) - side + 1):
            cells = [(i, j) for i in range(side) for j in range(side)]
            w = [weights[i][j] / total for i, j in cells]
            p, q = ([plane[top + i][left + j] for i, j in cells] for plane in (x, y))
            mp, mq = (sum(a * b for a, b in zip(w, v, strict=True)) for v in (p, q))
            sp = sum(a * (b - mp) ** 2 for a, b in zip(w, p, strict=True))
            sq = sum(a * (b - mq) ** 2 for a, b in zip(w, q, strict=True))
            both = sum(a * (b - mp) * (c - mq) for a, b, c in zip(w, p, q, strict=True))
            found.append(
                (2 * mp * mq + 1e-4)
                * (2 * both + 9e-4)
                / ((mp**2 + mq**2 + 1e-4) * (sp + sq + 9e-4))
            )
    return sum(found) / len(found)


@pytest.mark.parametrize(("height", "width", "side"), [(8, 9, 7), (14, 12, 11)])
def test_ssim_is_its_definition(height: int, width: int, side: int) -> None:
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    y = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    for n in range(2):
        planes = [slow_ssim(x[n, c].tolist(), y[n, c].tolist(), side) for c in range(3)]
        assert float(ssim(x, y)[n]) == pytest.approx(sum(planes) / 3, abs=1e-9)
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64))


def test_the_decoder_meets_every_shape() -> None:
    for seen, shape in (((4, 8, 8), (3, 32, 32)), ((5, 1, 1), (1, 28, 28)), ((2, 8, 8), (1, 8, 8))):
        values = torch.randn(6, *seen)
        values[:, 0] = 1.0  # a channel that never crosses
        images = Decoder(values, shape)(values).detach()
        assert images.shape == (6, *shape)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        assert bool(images.isfinite().all())


def test_what_is_attacked_is_what_crosses(run: Run, split_recipe: Path, tmp_path: Path) -> None:
    settings = ["method.name=acp-sl", "method.warmup=0", "method.ramp_rounds=0", "run.rounds=1"]
    run(split_recipe, "out", *settings, "method.quantize=int4")
    trained = load(tmp_path / "out")
    assert isinstance(trained.model, DeployedNetwork)
    data, _, test = Session().images(load_recipe(split_recipe).data, lambda line: None)
    values = crosses(trained, trained.model, data.test)
    kept = trained.model.links["-1"].mask
    assert values.shape[:2] == (len(test), 8)
    assert torch.equal(values.flatten(2).any(2).any(0), kept)
    exact = trained.model.front(test.gather(range(64))[0])[:, kept]
    assert 0 < float((values[:64, kept] - exact).abs().max()) < 0.2 * float(exact.max())


def test_delta_coding_gives_away_more_than_one_message(
    run: Run, split_recipe: Path, tmp_path: Path
) -> None:
    found = {}
    for name, delta in (("once", "false"), ("again", "true")):
        ours = ["method.name=acp-sl", "method.basis=eigen", "method.ratio=32", "run.rounds=4"]
        run(split_recipe, name, *ours, "train.front=false", f"method.delta={delta}")
        trained = load(tmp_path / name)
        assert isinstance(trained.model, DeployedNetwork)
        data, _, test = Session().images(load_recipe(split_recipe).data, lambda line: None)
        exact = trained.model.front(test.gather(range(len(test)))[0])
        found[name] = float((crosses(trained, trained.model, data.test) - exact).square().mean())
    assert found["again"] < 0.5 * found["once"]


@pytest.mark.slow
def test_less_crosses_less_is_rebuilt(run: Run, split_recipe: Path, tmp_path: Path) -> None:
    short = {"share": 0.3, "victims": 80, "steps": 200}
    found = {}
    for name, settings in {"open": [], "hidden": ["method.noise=5.0"]}.items():
        run(split_recipe, name, "run.rounds=1", "model.cut=conv1", *settings)
        found[name] = invert(tmp_path / name, **short)
        assert (found[name].known, found[name].victims) == (72, 80)
    assert found["open"].class_mean == found["hidden"].class_mean
    assert found["open"].decoder.mse < 0.7 * found["open"].class_mean.mse
    assert found["open"].decoder.ssim > found["open"].class_mean.ssim
    assert found["hidden"].decoder.mse > 1.5 * found["open"].decoder.mse
    assert invert(tmp_path / "open", **short) == found["open"]


@pytest.mark.slow
def test_the_command(
    run: Run,
    split_recipe: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    run(split_recipe, "out", "run.rounds=1")
    assert "no run folder" in refused("inspect", tmp_path / "nothing", "--inversion")
    run(recipe, "texts", "run.rounds=1")
    assert "is a federated one" in refused("inspect", tmp_path / "texts", "--inversion")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--inversion"]) == 0
    shown = capsys.readouterr().out
    assert "19 training images, on 221 others" in shown
    assert "class mean" in shown
