"""LoRA adapters of PEFT: where they are, and which part of them belongs to which expert.

PEFT keeps the adapters of a fused expert parameter in two matrices for all experts, A [E r, in]
and B [out, r E]. Expert e's part is ``A.view(E, r, in)[e]`` and ``B.view(out, r, E)[:, :, e]``:
blocks of r columns of B would mix the experts (checked against PEFT's own merge in the tests).
Several adapted parameters of one module nest their wrappers, so adapters are found by walking the
live modules, never by the names of their tensors. Nothing of PEFT is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sluiceway.moe.param_slice import ParamSlice


@dataclass(frozen=True)
class Adapter:
    """A low-rank pair on one matrix W [out, in]: the model computes with W + scale * B A.

    Attributes:
        base: the matrix, frozen.
        a: A, [r, in].
        b: B, [out, r].
        scale: LoRA's alpha / r (or alpha / sqrt r).
        transposed: W is stored as [in, out], and (B A) is added transposed.
    """

    base: ParamSlice
    a: ParamSlice
    b: ParamSlice
    scale: float
    transposed: bool

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """scale * B A in the layout of the matrix, from values of A [r, in] and B [out, r]."""
        product = self.scale * (b @ a)
        return product.T if self.transposed else product


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers, or the module itself."""
    while True:
        inner = getattr(module, "base_layer", None)
        if inner is None:
            inner = getattr(module, "original_module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def find_adapters(model: nn.Module) -> tuple[Adapter, ...]:
    """All LoRA pairs of the model on linear layers and parameters, in order of appearance."""
    return tuple(
        adapter
        for name, module in model.named_modules()
        if _is_lora(module)
        for adapter in _adapters_of(name, module)
    )


def _is_lora(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, n, None), nn.ModuleDict) for n in ("lora_A", "lora_B"))


def _adapters_of(name: str, module: Any) -> Iterator[Adapter]:
    param, base = _base_of(name, module)
    experts = base.shape[0] if base.ndim == 3 else 1
    transposed = base.ndim == 3 and getattr(unwrapped(module), "is_transposed", False)
    prefix = f"{name}." if name else ""
    for key, lora_a in module.lora_A.items():
        lora_b = module.lora_B[key]
        if not isinstance(lora_a, nn.Linear) or not isinstance(lora_b, nn.Linear):
            continue  # of a convolution or an embedding: averaged like any other tensor
        a, b = f"{prefix}lora_A.{key}.weight", f"{prefix}lora_B.{key}.weight"
        scale = float(module.scaling[key])
        if base.ndim != 3:
            whole = (ParamSlice.whole(param), ParamSlice.whole(a), ParamSlice.whole(b))
            yield Adapter(*whole, scale, transposed)
            continue
        rank = lora_a.weight.shape[0] // experts
        by_expert = (experts, rank, lora_a.weight.shape[1])
        by_column = (lora_b.weight.shape[0], rank, experts)
        for e in range(experts):
            yield Adapter(
                ParamSlice.part(param, e),
                ParamSlice.part(a, e, by_expert),
                ParamSlice.part(b, e, by_column, axis=2),
                scale,
                transposed,
            )


def _base_of(name: str, module: nn.Module) -> tuple[str, Tensor]:
    """Name and value of the parameter that a LoRA module adapts."""
    own = str(getattr(module, "parameter_name", "weight"))
    inner: Any = module
    path = [name] if name else []
    while isinstance(getattr(inner, "base_layer", None), nn.Module):
        inner = inner.base_layer
        path.append("base_layer")
    value: Tensor = getattr(inner, own)
    return ".".join([*path, own]), value


def add_lora(
    model: nn.Module,
    targets: dict[str, nn.Parameter],
    rank: int,
    alpha: float,
) -> None:
    """Put LoRA adapters on the named parameters, in place; everything else is left as it is.

    Adapters are float32 whatever the model's type, and start at B = 0: the model computes what it
    did. Names change: an adapted parameter moves below ``base_layer``.

    Args:
        model: any module.
        targets: parameters by name, matrices [out, in] or fused [E, ., .]; others are passed over.
        rank: r, >= 1.
        alpha: the adapters' scale is alpha / r.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: none of the targets can be adapted.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    matrices = [name for name, param in targets.items() if param.ndim in (2, 3)]
    modules = [n.removesuffix(".weight") for n in matrices if n.removesuffix(".weight") in linear]
    fused = [name for name in matrices if name.removesuffix(".weight") not in linear]
    # A bias for each expert is two-dimensional too, and no matrix.
    fused = [name for name in fused if targets[name].ndim == 3 or name.endswith("weight")]
    if not modules and not fused:
        raise ValueError("LoRA: the model has no matrix to adapt among the chosen parameters")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=fused or None,
    )
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    inject_adapter_in_model(config, model)
    for name, param in model.named_parameters():
        if ".lora_" in name and name not in trained:
            # Half precision is too coarse for small steps; PEFT casts to the base on use.
            param.data = param.data.to(torch.promote_types(param.dtype, torch.float32))
