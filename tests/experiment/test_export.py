"""Exported folders load elsewhere, and compute what was measured."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests.experiment.conftest import Run
from tests.worlds import tiny_bert
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sluiceway
from sluiceway.cli import main
from sluiceway.data import load_own
from sluiceway.errors import InputError
from sluiceway.experiment.export import export
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.session import Session

#: Loads a folder by transformers alone; prints the accuracy on a csv's rows, given by number.
ALONE = """
import sys, json, builtins
sys.modules["sluiceway"] = None  # importing it fails
import torch, transformers
folder, texts, labels, adapter = sys.argv[1], *map(json.loads, sys.argv[2:5])
try:
    transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=False
    )
    raise SystemExit("loaded without its code")
except ValueError:
    pass
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, trust_remote_code=True
)
if adapter:
    import peft
    model = peft.PeftModel.from_pretrained(model, folder + "/adapter")
batch = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(**{n: batch[n] for n in ("input_ids", "attention_mask")}).logits
names = [model.config.id2label[i] for i in logits.argmax(1).tolist()]
print(sum(a == b for a, b in zip(names, labels)) / len(labels))
"""


def alone(folder: Path, csv_file: Path, home: Path, adapter: bool) -> float:
    """Accuracy on the test part of the csv, in a process that has no Sluiceway."""
    data = load_own(str(csv_file), test_fraction=0.2, seed=0)
    labels = [data.label_names[label] for label in data.test.labels]
    given = data.test.texts, labels, adapter
    return float(in_process(ALONE, home, str(folder), *map(json.dumps, given)))


def in_process(code: str, home: Path, *arguments: str) -> str:
    """What the code prints, in a process of its own."""
    said = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={"HF_HOME": str(home), "PATH": "/usr/bin", "HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    return said.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "merge"),
    [
        ((), False),
        (("model.experts=0",), False),
        (("model.lora=2",), False),
        (("model.lora=2", "method.lora=residual"), True),
    ],
    ids=["upcycled", "dense", "lora", "merged"],
)
def test_transformers_alone_has_the_reported_accuracy(
    run: Run, recipe: Path, csv_file: Path, tmp_path: Path, settings: tuple[str, ...], merge: bool
) -> None:
    method = () if "model.experts=0" not in settings else ("method.name=fedavg",)
    summary = run(recipe, "out", *settings, *method)
    flags = ["--merge"] if merge else []
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "ours"), *flags]) == 0
    adapter = "model.lora=2" in settings and not merge
    assert (tmp_path / "ours" / "adapter").is_dir() == adapter
    assert alone(tmp_path / "ours", csv_file, tmp_path, adapter) == summary["accuracy"]
    again = sluiceway.load(tmp_path / "ours")
    texts = load_own(str(csv_file), test_fraction=0.2, seed=0).test.texts
    loaded = sluiceway.load(tmp_path / "out")
    if "model.lora=2" not in settings:
        with pytest.raises(InputError, match="--merge has no effect here"):
            export(loaded, tmp_path / "merged", merge=True)
    first = loaded.predict(texts)
    assert torch.allclose(again.predict(texts).probabilities, first.probabilities, atol=1e-5)


LM = """
import sys, json
sys.modules["sluiceway"] = None
import torch, transformers
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    print(json.dumps(model.eval()(input_ids=torch.tensor(ids)).logits[0, -1].tolist()))
assert model.generate(torch.tensor(ids), max_new_tokens=2, do_sample=False).shape[1] > len(ids)
"""


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 4])
def test_language_model(
    run: Run, recipe: Path, llama_folder: Path, csv_file: Path, tmp_path: Path, experts: int
) -> None:
    run(
        recipe,
        "out",
        *(f"model.name={llama_folder}", "model.answer=likelihood", f"model.experts={experts}"),
        *("method.name=fedavg", 'model.words=["w3", "w4", "w5"]', "data.max_tokens=24"),
    )
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "ours")]) == 0
    assert (tmp_path / "ours" / "upcycled.py").exists() == (experts > 0)
    model = sluiceway.load(tmp_path / "out")
    again = sluiceway.load(tmp_path / "ours")
    texts = load_own(str(csv_file), test_fraction=0.2, seed=0).test.texts
    first, second = (m.predict(texts).probabilities for m in (model, again))
    assert torch.allclose(first, second, atol=1e-6)
    ids = [[5, 6, 7, 8]]
    said = in_process(LM, tmp_path, str(tmp_path / "ours"), json.dumps(ids))
    assert model.pretrained is not None
    with torch.no_grad():
        logits = model.pretrained.backbone(input_ids=torch.tensor(ids)).logits[0, -1]
    assert torch.allclose(torch.tensor(json.loads(said)), logits, atol=1e-5)


@pytest.mark.parametrize("settings", [(), ("method.name=bottleneck", "method.quantize=int8")])
def test_split_network_is_whole(
    run: Run, split_recipe: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    run(split_recipe, "out", *(settings or ("method.name=acp-sl", "method.share=0.5")))
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "ours")]) == 0
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert manifest["network"]["name"] == "conv4"
    data, _, _ = Session().images(load_recipe(split_recipe).data, lambda line: None)
    a, b = (sluiceway.load(tmp_path / n).predict(data.test.images) for n in ("out", "ours"))
    assert torch.equal(a.probabilities, b.probabilities)
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "ours")]) == 2


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_upcycled_model_is_saved_as_what_it_is(kind: str, tmp_path: Path) -> None:
    plain = tiny_bert() if kind == "bert" else tiny_llama()
    model = sluiceway.upcycle(plain, 1, 4, noise=0.5).eval()
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**inputs)[0]
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(OSError, match="no file named model"):
        type(plain).from_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert isinstance(again, type(plain))
    with torch.no_grad():
        assert torch.allclose(again(**inputs)[0], before, atol=1e-6)
    again.save_pretrained(tmp_path / "twice")
    copied.save_pretrained(tmp_path / "copied")
    for name in ("twice", "copied"):
        third = AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert_same(third.state_dict(), model.state_dict())


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )


@pytest.fixture
def llama_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A tiny Llama with the tokenizer of the tiny BERT."""
    folder = tmp_path / "llama"
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    return folder
