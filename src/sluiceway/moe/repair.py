"""Repair models whose installed release computes something else than their definition.

So far that is NLLB-MoE alone, see ``nllb.py``: in transformers 5.23.0 only two of its experts ever
run, and its routers' capacity depends on the batches before. Unrepaired, most experts would neither
be trained nor measured, and nothing would say so.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from sluiceway.moe.families import family_of

Model = TypeVar("Model", bound=nn.Module)


def repair(model: Model) -> Model:
    """Repair the blocks of known faulty families, in place; every other model is left as it is.

    A fault is looked for in the behaviour of a tiny block of the same class, not in the version.
    May be called again: repaired blocks are left as they are. Names, values and gradients of
    parameters are untouched, and so are all other models of the process.

    Returns:
        ``model`` itself.
    """
    configs: dict[str, Any] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0] if name else None
        above = None if parent is None else configs[parent]
        configs[name] = getattr(module, "config", None) or above
        family = family_of(module)
        if family is not None and family.repair is not None:
            family.repair(module, configs[name])
    return model
