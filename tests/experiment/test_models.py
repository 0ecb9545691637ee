"""Models by folder, as a recipe names them: mixtures as they are, dense ones upcycled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    MixtralModel,
    OlmoeConfig,
    OlmoeModel,
    Qwen3MoeConfig,
    Qwen3MoeModel,
    SwitchTransformersConfig,
    SwitchTransformersModel,
)

from sluiceway.cli import main
from sluiceway.experiment.models import classifier, load_pretrained
from sluiceway.experiment.recipe import Model

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MODELS: dict[str, Any] = {
    "mixtral": lambda: MixtralModel(MixtralConfig(**SMALL, num_local_experts=4)),
    "olmoe": lambda: OlmoeModel(OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": lambda: Qwen3MoeModel(
        Qwen3MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
        )
    ),
    "switch": lambda: SwitchTransformersModel(
        SwitchTransformersConfig(
            vocab_size=64,
            d_model=16,
            d_ff=32,
            d_kv=8,
            num_heads=2,
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_experts=4,
        )
    ),
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL)),
}


@pytest.fixture(params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path: Path, model_folder: Path) -> Path:
    """A saved tiny model of one family, with the tests' tokenizer."""
    torch.manual_seed(0)
    path = tmp_path / request.param
    MODELS[request.param]().save_pretrained(path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(path)
    return path


@pytest.mark.parametrize("train", ["moe", "layers"])
def test_a_recipe_runs_on_every_family(
    folder: Path, tmp_path: Path, csv_file: Path, train: str
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f"""
        [run]
        rounds = 2
        workers = 1
        device = "cpu"
        [data]
        path = "{csv_file}"
        clients = 3
        alpha = 1.0
        max_tokens = 10
        [model]
        name = "{folder}"
        experts = 4
        train = "{train}"
        [method]
        name = "fedalign-moe"
        [train]
        lr = 0.01
        """
    )
    out = tmp_path / "out"
    assert main(["run", str(recipe), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["refused_updates"] == 0
    assert summary["bytes_up"] > 0


def test_what_is_trained(model_folder: Path) -> None:
    def trained(**settings: Any) -> set[str]:
        built = classifier(load_pretrained(str(model_folder)), Model(**settings), 3, seed=0)
        return {n.removeprefix("backbone.") for n, p in built.named_parameters() if p.requires_grad}

    head = {"head.weight", "head.bias"}
    moe = "encoder.layer.1.intermediate."
    assert all(n.startswith(moe + "experts") for n in trained(train="experts") - head)
    assert trained(train="moe") - trained(train="experts") == {moe + "router.weight"}
    layers = trained(train="layers") - head
    assert trained(train="moe") - head < layers
    assert all(name.startswith("encoder.layer.1.") for name in layers)
    assert "embeddings.word_embeddings.weight" in trained(train="all")
    dense = trained(experts=0, train="moe")
    assert all(name.startswith("encoder.layer.1.") for name in dense - head)
    assert head <= dense
