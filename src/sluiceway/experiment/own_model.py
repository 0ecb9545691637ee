"""Models that a function of the user's makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sluiceway.errors import InputError, first_line, quoted
from sluiceway.experiment.models import Pretrained
from sluiceway.experiment.own_code import fault, load_code, short_name
from sluiceway.experiment.pretrained import load_tensors
from sluiceway.experiment.recipe import Model


def own_network(
    chosen: Model, classes: int, shape: Sequence[int], seed: int, *, filled: bool = True
) -> nn.Module:
    """The user's network for images.

    Args:
        chosen: [model], whose name is code.
        classes: of the data.
        shape: (C, H, W) of the images.
        seed: of torch's global generator while it is made.
        filled: False where all values come later: nothing is tried.

    Raises:
        InputError: the code fails, or what it makes gives no logits [B, classes].
    """
    made = call(chosen.name, seed, classes=classes, shape=tuple(shape))
    said = f"model.name = {quoted(short_name(chosen.name))}"
    if not isinstance(made, nn.Module):
        raise InputError(f"{said} makes {type(made).__name__}; expected a torch.nn.Module")
    if filled:
        try:
            with torch.no_grad():
                out = made.eval()(torch.zeros(2, *shape))
        except Exception as error:
            raise InputError(f"{said} fails on images {list(shape)}: {fault(error)}") from None
        out = out if isinstance(out, torch.Tensor) else getattr(out, "logits", out)
        found = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        if found != [2, classes]:
            raise InputError(f"{said} gives {found} for two images; expected logits [2, {classes}]")
        made.train()
    return made


def own_language_model(chosen: Model, classes: int, seed: int) -> Pretrained:
    """The user's model of texts, with its tokenizer.

    Raises:
        InputError: the code fails, or makes something else; settings that change a model.
    """
    said = f"model.name = {quoted(short_name(chosen.name))}"
    if chosen.lora or chosen.answer != "head" or chosen.gguf:
        raise InputError(f"{said} is used as it is made: no model.lora, answer or gguf")
    made = call(chosen.name, seed, classes=classes)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InputError(
            f"{said} makes {type(made).__name__}; expected, for texts, a pair: a model that "
            "takes input_ids and attention_mask and gives logits, and its tokenizer"
        )
    model, tokenizer = made
    source = f"own code, {short_name(chosen.name)}"
    if chosen.pretrained is not None:
        source += f", {load_tensors(model, chosen.pretrained)}"
    return Pretrained(model, tokenizer, source, 0)


def call(name: str, seed: int, **facts: Any) -> Any:
    """Call the function or class with those of the facts that it takes. Raises InputError."""
    make: Callable[..., Any] = load_code("model.name", name)
    said = f"model.name = {quoted(short_name(name))}"
    if not callable(make):
        raise InputError(f"{said} is {type(make).__name__}, not a function")
    try:
        takes = inspect.signature(make).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"{said}: {first_line(error)}") from None
    anything = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    given = {key: value for key, value in facts.items() if anything or key in takes}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make(**given)
    except Exception as error:
        raise InputError(f"{said}: {fault(error)}") from None
