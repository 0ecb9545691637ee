"""Upcycled transformers as folders that `from_pretrained` loads, here and without Sluiceway.

The configuration of a plain architecture cannot say that layers were upcycled: loaded by it, they
would be random. So a folder says `model_type` "sluiceway_moe", has the configuration of the body in
its own, and carries this file and `upcycled.py` as its code. Its weights are in a file of another
name (a `variant`), so that the plain class finds none and says so.

Imports nothing of Sluiceway but `upcycled.py`, beside which it is copied.
"""

from __future__ import annotations

import importlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE, UpcycledRouter

#: The name of files with upcycled weights: `model.upcycled.safetensors`.
VARIANT = "upcycled"
#: What loads a folder, by what it holds.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering",
)


class BodyConfig(PreTrainedConfig):
    """A transformer whose feed-forward layers may be upcycled.

    Args:
        body: the configuration of the plain architecture.
        body_module, body_class: the class of the plain architecture.
        blocks: of each upcycled layer its `name`, `experts`, `top_k`, `scale`, the `shapes` of its
            experts' parameters, and the names of layers that became the `identity`.
        absent: names of parts that were taken away.
    """

    model_type = "sluiceway_moe"

    def __init__(
        self,
        body: dict[str, Any] | None = None,
        body_module: str = "",
        body_class: str = "",
        blocks: list[dict[str, Any]] | None = None,
        absent: list[str] | None = None,
        **more: Any,
    ) -> None:
        self.body, self.body_module, self.body_class = body or {}, body_module, body_class
        self.blocks, self.absent = blocks or [], absent or []
        super().__init__(**more)


class UpcycledModel(PreTrainedModel):
    """Loads an upcycled model: the plain class with the blocks in it, and not this class."""

    config_class = BodyConfig

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, place: Any, *args: Any, config: Any = None, **more: Any
    ) -> PreTrainedModel:
        """As of the plain class."""
        if not isinstance(config, BodyConfig):
            config = BodyConfig.from_pretrained(place)
        for taken in ("trust_remote_code", "variant", "code_revision"):
            more.pop(taken, None)
        kind, body = class_of(config)
        model: PreTrainedModel = kind.from_pretrained(
            place, *args, config=body, variant=VARIANT, **more
        )
        model.__class__ = kind.__mro__[1]
        protect(model)
        return model


def class_of(config: BodyConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that makes a model with its blocks, and the configuration that it takes."""
    if not config.body_module.startswith("transformers."):
        raise ValueError(f"body_module = {config.body_module!r}: not of transformers")
    plain = getattr(importlib.import_module(config.body_module), config.body_class)

    def init(self: Any, body: Any, *args: Any, **more: Any) -> None:
        plain.__init__(self, body, *args, **more)
        put_blocks(self, config)

    kind = type(plain.__name__, (plain,), {"__init__": init, "__module__": plain.__module__})
    values = dict(config.body)
    body = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
    return kind, body


def put_blocks(model: nn.Module, config: BodyConfig) -> None:
    """Put upcycled layers in the place of dense ones; their values are to be loaded."""
    for block in config.blocks:
        dense = model.get_submodule(block["name"])
        activation: Any = getattr(dense, "intermediate_act_fn", None) or dense.act_fn
        shapes: dict[str, Any] = {
            name: torch.empty(shape) for name, shape in block["shapes"].items()
        }
        router = UpcycledRouter(shapes.pop("router"), block["top_k"], block["scale"])
        experts = UpcycledExperts(activation=activation, **shapes)
        model.set_submodule(block["name"], UpcycledMoE(router, experts))
        for name in block["identity"]:
            model.set_submodule(name, nn.Identity())
    for name in config.absent:
        setattr(model, name, None)


def body_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What `BodyConfig` says of a model."""
    blocks = [
        block_facts(model, name, module)
        for name, module in model.named_modules()
        if isinstance(module, UpcycledMoE)
    ]
    absent = [name for name in ("pooler",) if getattr(model, name, 0) is None]
    return {
        "body": model.config.to_dict(),
        "body_module": type(model).__module__,
        "body_class": type(model).__name__,
        "blocks": blocks,
        "absent": absent,
        "dtype": model.dtype,
    }


def block_facts(model: nn.Module, name: str, block: UpcycledMoE) -> dict[str, Any]:
    """What `BodyConfig.blocks` says of one."""
    experts: Any = inner(block.experts)
    router: Any = inner(block.router)
    held = {
        "router": router.weight,
        "up": experts.up_proj,
        "down": experts.down_proj,
        "up_bias": experts.up_bias,
        "down_bias": experts.down_bias,
        "gate": experts.gate_proj,
    }
    beside = f"{name.rpartition('.')[0]}.output.dense".removeprefix(".")
    emptied = name.rpartition(".")[2] == "intermediate" and isinstance(
        model.get_submodule(beside), nn.Identity
    )
    return {
        "name": name,
        "top_k": router.top_k,
        "scale": router.scale,
        "shapes": {part: list(value.shape) for part, value in held.items() if value is not None},
        "identity": [beside] if emptied else [],
    }


def inner(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def protect(model: nn.Module) -> None:
    """Have every transformer with upcycled layers saved as what it is; see `save_upcycled`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(
            isinstance(part, UpcycledMoE) for part in module.modules()
        ):
            module.save_pretrained = partial(save_upcycled, module)  # type: ignore[method-assign]


def save_upcycled(model: PreTrainedModel, folder: Any, **more: Any) -> None:
    """`save_pretrained` of an upcycled model: weights, configuration, and code that loads them.

    It is loaded by `AutoModel.from_pretrained(folder, trust_remote_code=True)` and its like, or,
    without that, where `sluiceway.moe.saved` was imported.
    """
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("the model has adapters: merge them before it is saved")
    plain = type(model).save_pretrained
    plain(model, folder, **(more | {"variant": VARIANT}))
    config = BodyConfig(**body_facts(model))
    code = "saved.UpcycledModel"
    config.auto_map = {"AutoConfig": "saved.BodyConfig", **dict.fromkeys(AUTO_CLASSES, code)}
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    copy_code(Path(folder), Path(__file__), "saved", "upcycled")


def copy_code(folder: Path, beside: Path, *modules: str) -> None:
    """Copy files that are beside another into a folder, where all that are there import each other.

    Args:
        folder: to copy into.
        beside: a file of the package that the modules are in.
        modules: their names, which are different in all packages.
    """
    for module in modules:
        source = beside.with_name(f"{module}.py")
        text = re.sub(r"from sluiceway\.\w+\.", "from .", source.read_text(encoding="utf-8"))
        (folder / source.name).write_text(text, encoding="utf-8")


def register() -> None:
    """Have transformers load these folders without `trust_remote_code`."""
    import transformers

    transformers.AutoConfig.register(BodyConfig.model_type, BodyConfig, exist_ok=True)
    for name in AUTO_CLASSES:
        getattr(transformers, name).register(BodyConfig, UpcycledModel, exist_ok=True)
