"""`sluiceway export`: a trained model as a folder that others load.

| run | what is written |
|---|---|
| texts, `model.answer = "head"` | a transformers folder with its code: body, experts, head |
| texts, `model.answer = "likelihood"` | the language model; plain transformers, unless upcycled |
| images | `model.safetensors` and `manifest.json` |
| own code | the same, and the files of the code |

With LoRA the folder has the base (with what was trained whole, as head and routers), and `adapter/`
is a PEFT adapter on it; merged, the folder has it all. `sluiceway.json` says what labels, prompt
and round the model is of, and `sluiceway.load` takes the folder like a run folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sluiceway.core.checkpoints import unshared
from sluiceway.errors import InputError
from sluiceway.experiment.heads import TextClassifier
from sluiceway.experiment.own_code import copy_code, is_code, without_folders
from sluiceway.experiment.trained import EXPORTED, TrainedModel
from sluiceway.files import write_atomically
from sluiceway.moe import find_adapters

_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+)\.default(\.|$)")


def export(model: TrainedModel, out: Path, *, merge: bool = False) -> list[str]:
    """Write the model into a new folder.

    Args:
        model: of `sluiceway.load`.
        out: made here; may be empty.
        merge: adapters are merged into the base, instead of beside it.

    Returns:
        Lines about what was written and how to load it.

    Raises:
        InputError: the folder is not empty, there is nothing to merge, or the model's code is not
            of transformers.
    """
    if merge and not find_adapters(model.model):
        raise InputError("--merge has no effect here: the model has no LoRA adapters")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    if model.pretrained is None or is_code(model.recipe.model.name):
        lines = export_network(model, out)
    else:
        lines = export_transformer(model, out, merge)
        model.pretrained.tokenizer.save_pretrained(out)
    tables = model.recipe.resolved()
    for name in copy_code(tables, out):
        lines.append(f"your own code is beside it: {name}")
    (out / "recipe.toml").write_text(tomli_w.dumps(without_folders(tables)), encoding="utf-8")
    facts = {"label_names": list(model.label_names), "input": model.input, "round": model.round}
    write_atomically(out / EXPORTED, json.dumps(facts, indent=1))
    return lines


def export_network(model: TrainedModel, out: Path) -> list[str]:
    """A network of images: its tensors, and what they are of."""
    state = model.model.state_dict()
    save_file(unshared(state), out / "model.safetensors", {"round": str(model.round)})
    recipe = model.recipe
    manifest = {
        "network": without_folders(
            {"model": recipe.model.model_dump(include={"name", "width", "cut", "tail"})}
        )["model"],
        "classes": len(model.label_names),
        "method": without_folders(recipe.resolved())["method"],
        "input": model.input,
        "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in state.items()},
    }
    write_atomically(out / "manifest.json", json.dumps(manifest, indent=1))
    return [f'load it: sluiceway.load("{out}").model']


def export_transformer(model: TrainedModel, out: Path, merge: bool) -> list[str]:
    """A model of texts as a transformers folder, with its adapters beside it or merged."""
    from transformers.utils import logging

    built, adapters = model.model, find_adapters(model.model)
    state = unwrapped_state(built, merge=merge)
    logging.disable_progress_bar()
    plain = plain_model(built)
    if not type(plain).__module__.startswith("transformers."):
        raise InputError(f"{type(plain).__name__} is not of transformers; use sluiceway.load")
    if isinstance(built, TextClassifier):
        made: nn.Module = classifier_of(model, plain)
        prefix, kind = "answer.", "AutoModelForSequenceClassification"
        state = {f"{prefix}{name}": value for name, value in state.items()}
    else:
        made, prefix = language_model_of(plain), ""
        seq2seq = plain.config.is_encoder_decoder
        kind = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
        state = {n.removeprefix("lm."): v for n, v in state.items() if n.startswith("lm.")}
    made.load_state_dict(state, strict=True)
    made.save_pretrained(out)  # type: ignore[operator]
    if isinstance(built, TextClassifier):
        add_code(out)
    own = (out / "upcycled.py").exists()
    lines = [
        f'load it: transformers.{kind}.from_pretrained("{out}"'
        + (", trust_remote_code=True)" if own else ")")
    ]
    if adapters and not merge:
        export_adapter(built, out, prefix)
        lines.append(f'its adapter: peft.PeftModel.from_pretrained(model, "{out / "adapter"}")')
    return lines


def plain_model(built: nn.Module) -> Any:
    """The transformer in the scoring module."""
    return built.backbone if isinstance(built, TextClassifier) else built.lm


@torch.no_grad()
def unwrapped_state(built: nn.Module, *, merge: bool) -> dict[str, Tensor]:
    """The model's state under the names that it has without adapters."""
    state = {name: value.clone() for name, value in built.state_dict(keep_vars=False).items()}
    if merge:
        for adapter in find_adapters(built):
            base = adapter.base.of(state)
            base += adapter.delta(adapter.a.of(state), adapter.b.of(state)).to(base.dtype)
    return {
        name.replace(".base_layer", ""): value
        for name, value in state.items()
        if ".lora_" not in name
    }


def classifier_of(model: TrainedModel, plain: Any) -> nn.Module:
    """An empty classifier of the same shape."""
    from sluiceway.experiment.classifier import Classifier, ClassifierConfig
    from sluiceway.moe.saved import body_facts

    head: Any = model.model.head
    names = dict(enumerate(model.label_names))
    config = ClassifierConfig(
        hidden=head.in_features,
        outputs=head.out_features,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        **body_facts(plain),
    )
    code = "classifier"
    config.auto_map = {
        "AutoConfig": f"{code}.ClassifierConfig",
        "AutoModelForSequenceClassification": f"{code}.Classifier",
    }
    made: nn.Module = Classifier(config).to(plain.dtype)
    return made


def language_model_of(plain: Any) -> nn.Module:
    """An empty language model of the same shape."""
    from sluiceway.moe.saved import BodyConfig, body_facts, class_of, protect

    kind, body = class_of(BodyConfig(**body_facts(plain)))
    made: nn.Module = kind(body).to(plain.dtype)
    made.__class__ = kind.__mro__[1]
    protect(made)
    return made


def add_code(out: Path) -> None:
    """The code of an exported classifier, whose files import each other."""
    from sluiceway.moe import saved

    saved.copy_code(out, Path(saved.__file__), "saved", "upcycled")
    saved.copy_code(out, Path(__file__), "classifier", "heads")


def export_adapter(built: nn.Module, out: Path, prefix: str) -> None:
    """The LoRA adapters as PEFT loads them onto the exported model.

    Args:
        prefix: of names in the exported model, before those in the scoring module.
    """
    from peft import LoraConfig

    def named(name: str) -> str:
        return f"{prefix}{name}" if prefix else name.removeprefix("lm.")

    tensors = {
        "base_model.model." + named(_ADAPTER.sub(r".\1\2", name)): value
        for name, value in built.state_dict().items()
        if ".lora_" in name
    }
    modules, parameters = set[str](), set[str]()
    for adapter in find_adapters(built):
        name = named(adapter.base.param.replace(".base_layer", ""))
        if adapter.base.index is None and name.endswith(".weight"):
            modules.add(name.removesuffix(".weight"))
        else:
            parameters.add(name)
    first: Any = next(m for m in built.modules() if hasattr(m, "lora_A") and hasattr(m, "r"))
    config = LoraConfig(
        r=first.r["default"],
        lora_alpha=first.lora_alpha["default"],
        lora_dropout=0.0,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters) or None,
        base_model_name_or_path=str(out),
        inference_mode=True,
    )
    (out / "adapter").mkdir()
    config.save_pretrained(str(out / "adapter"))
    save_file(unshared(tensors), out / "adapter" / "adapter_model.safetensors")
