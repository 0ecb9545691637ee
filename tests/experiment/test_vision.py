"""Vision models of Hugging Face, cut at named blocks: tiny ones with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from sluiceway.cli import main
from sluiceway.data.images import IMAGE_SETS
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run as run_here
from sluiceway.experiment.session import Session
from sluiceway.experiment.trained import load
from sluiceway.experiment.vision import chain_of, vision_network
from sluiceway.split.cut import cut, cut_points

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic"}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
#: By kind: the whole classifier, and a small configuration.
MODELS: dict[str, tuple[Any, Any]] = {
    "resnet": (hf.ResNetForImageClassification, hf.ResNetConfig(**RESNET)),
    "mobilenet_v1": (
        hf.MobileNetV1ForImageClassification,
        hf.MobileNetV1Config(depth_multiplier=0.25),
    ),
    "mobilenet_v2": (
        hf.MobileNetV2ForImageClassification,
        hf.MobileNetV2Config(depth_multiplier=0.25),
    ),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**VIT)),
}
BLOCKS = {
    "resnet": ["stem", "stage1_1", "stage1_2", "stage2_1"],
    "mobilenet_v1": ["stem", *(f"layer{i}" for i in range(1, 27))],
    "mobilenet_v2": ["stem", *(f"layer{i}" for i in range(1, 17)), "last"],
    "vit": ["stem", "layer1", "layer2", "layer3"],
}
PROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a classifier of a kind, with how its images are normalised; its folder."""
    place = tmp_path_factory.mktemp("vision")

    def folder(kind: str) -> Path:
        if not (place / kind).exists():
            torch.manual_seed(1)
            cls, config = MODELS[kind]
            cls(config).save_pretrained(place / kind)
            told = {"image_processor_type": "ViTImageProcessor", "do_normalize": True, **PROCESSOR}
            (place / kind / "preprocessor_config.json").write_text(json.dumps(told))
        return place / kind

    return folder


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_the_chain_computes_what_the_model_does(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    cls, config = MODELS[kind]
    whole = cls(config)
    for module in whole.modules():  # of a random model these would hide differences
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            torch.nn.init.normal_(module.weight)
    chain = chain_of(getattr(whole, whole.base_model_prefix), config.num_labels)
    classifier = whole.classifier[1] if kind == "resnet" else whole.classifier
    chain.head.linear.load_state_dict(classifier.state_dict())
    if kind.startswith("mobilenet"):
        whole.dropout.p = 0.0  # the head of a split run has none
    x = torch.randn(3, 3, 8, 8)
    chain.train(training)
    whole.train(training)
    expected = whole(x).logits
    if training:  # BatchNorm saw the batch once already; its statistics do not enter here
        assert torch.allclose(chain(x), expected, atol=1e-5)
    else:
        assert torch.equal(chain(x), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_every_block_is_a_place_to_cut(kind: str, saved: Callable[[str], Path]) -> None:
    chain, _ = vision_network(str(saved(kind)), IMAGE_SETS["digits"], 5)
    x = torch.randn(2, 1, 8, 8)
    assert [point.name for point in cut_points(chain, x)] == BLOCKS[kind]
    chain.eval()
    for name in BLOCKS[kind]:
        front, back = cut(chain, name)
        assert torch.equal(back(front(x)), chain(x))
    # The channels come second: of a ViT 16, of 5 tokens.
    if kind == "vit":
        assert cut(chain, "layer2")[0](x).shape == (2, 16, 5)


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_images_are_normalised_and_resized_as_the_model_wants_them(
    name: str, saved: Callable[[str], Path]
) -> None:
    data = IMAGE_SETS[name]
    chain, said = vision_network(str(saved("vit")), data, 5, side=8)
    seen: list[torch.Tensor] = []
    chain.stem.layers.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    pixels = torch.rand(2, *data.shape, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (data.mean, data.std))
    chain(((pixels - mean) / std).float())
    m, s = (torch.tensor(v).view(-1, 1, 1) for v in PROCESSOR.values())
    expected = (pixels.expand(2, 3, -1, -1) - m) / s
    if name == "cifar10":  # bilinear, from 32 to 8: the middle two of every four pixels
        expected = expected.reshape(2, 3, 8, 4, 8, 4)[:, :, :, 1:3, :, 1:3].mean((3, 5))
    assert torch.allclose(seen[0].double(), expected, atol=1e-5)
    assert "its own normalisation" in said


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_of_each_kind_and_a_second_one_from_it(
    kind: str, saved: Callable[[str], Path], split_recipe: Path, tmp_path: Path
) -> None:
    cut_at = BLOCKS[kind][2]
    settings = ["model.name=huggingface", f"model.cut={cut_at}", "run.rounds=1", "train.lr=0.001"]
    settings += ["method.name=acp-sl", "method.warmup=0", "method.ramp_rounds=0", "data.limit=60"]
    first = load_recipe(split_recipe, [*settings, f"model.pretrained={saved(kind)}"])
    run_here(first, tmp_path / "first")
    result, summary = run_here(
        load_recipe(
            split_recipe, [*settings, f"model.pretrained={tmp_path / 'first'}", "train.front=false"]
        ),
        tmp_path / "second",
    )
    assert not any(name.startswith(("stem.", f"{cut_at}.")) for name in result.tensors)
    assert summary["bytes_down"] < summary["bytes_up"] / 5
    _, _, test = Session().images(first.data, lambda line: None)
    found = load(tmp_path / "second").logits(test).argmax(1)
    assert float((found == test.labels).double().mean()) == summary["accuracy"]


def test_weights_are_those_that_were_saved(saved: Callable[[str], Path]) -> None:
    whole = MODELS["resnet"][0].from_pretrained(saved("resnet"))
    before = torch.get_rng_state()
    chain, _ = vision_network(str(saved("resnet")), IMAGE_SETS["cifar10"], 5, seed=3)
    again, _ = vision_network(str(saved("resnet")), IMAGE_SETS["cifar10"], 5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    stage = whole.resnet.encoder.stages[1].layers[0]
    assert torch.equal(next(chain.stage2_1.parameters()), next(stage.parameters()))
    assert torch.equal(chain.head.linear.weight, again.head.linear.weight)


def test_what_cannot_be_cut_or_does_not_fit_is_one_line(
    saved: Callable[[str], Path],
    split_recipe: Path,
    model_folder: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    recipe: Path,
) -> None:
    def why(place: Path | str, *settings: str, name: str = "huggingface") -> str:
        given = [f"model.name={name}", f"model.pretrained={place}", *settings]
        flags = [part for setting in given for part in ("--set", setting)]
        return refused("run", split_recipe, "--out", tmp_path / "bad", *flags)

    assert "is a bert; a split run takes resnet, mobilenet_v1, mobilenet_v2, vit" in why(
        model_folder
    )
    said = why(saved("vit"), "model.image_size=16")
    assert "takes images of 8x8, these are 16x16: model.image_size = 8 resizes them" in said
    assert "no model could be loaded" in why(tmp_path)
    assert "it can be cut at: stem, stage1_1" in why(saved("resnet"), "model.cut=conv2")
    assert "for model.name = 'huggingface'" in why(saved("resnet"), name="conv4")
    grey = tmp_path / "grey"
    hf.ResNetModel(hf.ResNetConfig(**RESNET, num_channels=4)).save_pretrained(grey)
    assert "takes images of 4 channels, these have 3" in why(grey, "data.name=cifar10")
    (grey / "config.json").write_text(json.dumps(MODELS["vit"][1].to_dict()))
    assert "has no weights of " in why(grey)
    assert "model.pretrained" in refused("run", split_recipe, "--set", "model.name=huggingface")
    assert "image_size" in refused("run", split_recipe, "--set", "model.image_size=32")
    assert "is for images" in refused("run", recipe, "--set", "model.pretrained=x")


@pytest.mark.parametrize("kind", MODELS)
def test_inspect_lists_the_blocks(
    kind: str, saved: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(saved(kind))]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    # The lines above the table are more where the folder's name is long.
    header = next(at for at, line in enumerate(shown) if line[:1] == ["cut"])
    assert [line[0] for line in shown[header + 1 :]] == BLOCKS[kind]


def test_inspect_takes_the_shape_of_the_images(
    saved: Callable[[str], Path],
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    for given, stem in ([], "8x56x56"), (["--image", "1x32x64"], "8x8x16"):
        assert main(["inspect", str(saved("resnet")), *given]) == 0
        assert f"stem {stem} " in " ".join(capsys.readouterr().out.split())  # a quarter
    vit = saved("vit")
    assert "--image 3x16x16: Input image size (16*16)" in refused(
        "inspect", vit, "--image", "3x16x16"
    )
    assert "--image 3x8: write 3x32x32" in refused("inspect", vit, "--image", "3x8")
    for option in ("--experts", "--lora"):
        why = f"{option} has no effect here: it needs a model of texts"
        assert why in refused("inspect", vit, option, "4")
    why = "--image has no effect here: it needs a model of images"
    assert why in refused("inspect", model_folder, "--image", "3x8x8")
