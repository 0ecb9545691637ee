"""Dense -> mixture of experts: each chosen feed-forward layer is copied, or cut, into E experts.

A dense family is one function that recognises a layer and hands back its linear maps (``_Dense``);
to support another one, write that function and add it to ``_FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from sluiceway.moe.layout import find_layout
from sluiceway.moe.search import unrecognised
from sluiceway.moe.upcycled import Activation, UpcycledExperts, UpcycledMoE, UpcycledRouter

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Dense:
    """A dense feed-forward layer, and how to put a block in its place."""

    up: nn.Linear
    down: nn.Linear
    gate: nn.Linear | None
    activation: Activation
    replace: Callable[[nn.Module], None]


def upcycle(
    model: Model,
    layers: Sequence[int] | int,
    experts: int,
    top_k: int = 2,
    noise: float = 0.0,
    router_std: float = 0.02,
    seed: int = 0,
    scale: bool = False,
    sliced: bool = False,
) -> Model:
    """Turn feed-forward layers of a dense transformer into mixture-of-experts blocks, in place.

    Known dense families: BERT-style (``intermediate`` + ``output``; dropout, residual and
    LayerNorm of ``output`` stay) and Llama-style (``mlp`` with gate, up and down). With
    ``noise=0`` and ``scale=False`` the model computes what the dense one did, up to rounding.
    The same arguments give the same model, bit for bit. Experts that are slices of the layer are
    different from the start, so that the router's choice matters; the model then computes what the
    dense one did only where a token goes to all of them alike.

    Args:
        model: the dense model; layers are counted in order of appearance, from 0.
        layers: an int n: the last n layers, n >= 1; else their numbers, negative ones from the end.
        experts: E >= 1, experts per layer.
        top_k: k in [1, E], experts per token.
        noise: >= 0, relative: every weight matrix of every expert gets noise * std(matrix) * a
            normal draw. A little (0.01) or top_k >= 2 with different experts is what gives the
            router a task gradient: identical experts make every choice equal.
        router_std: >= 0, standard deviation of the new router's weights.
        seed: of the routers' and the noise's generator.
        scale: multiply the output by the chosen probabilities, not renormalised (Switch-style).
            Needed for top_k=1; the output is then smaller than the dense model's.
        sliced: each expert holds one of E equal parts of the layer's inner width I, its output
            times E, instead of a copy of the whole.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an argument out of range, layers out of range or repeated, a model whose
            feed-forward layers are not recognised, or one that has experts already; slices of an
            inner width that E does not divide. The model is then unchanged.
    """
    if experts < 1:
        raise ValueError(f"experts={experts}: must be at least 1")
    for name, value in (("noise", noise), ("router_std", router_std)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value}: must be at least 0, and finite")
    if find_layout(model) is not None:
        raise ValueError(f"model {type(model).__name__} has mixture-of-experts blocks already")
    if seen := unrecognised(model):
        raise ValueError(
            f"model {type(model).__name__} has experts that are not recognised ({seen}): it is not "
            "upcycled, which would leave them frozen; experts=0 trains it as a dense model"
        )
    found = [dense for module in model.modules() if (dense := _recognise(module)) is not None]
    if not found:
        raise ValueError(
            f"model {type(model).__name__}: no feed-forward layer recognised; "
            "known are BERT-style (intermediate + output) and Llama-style (gate, up, down)"
        )
    chosen = [found[position] for position in _positions(layers, len(found))]
    for dense in chosen:
        if sliced and dense.up.weight.shape[0] % experts:
            raise ValueError(
                f"experts={experts}: an inner width of {dense.up.weight.shape[0]} cannot be cut "
                "into that many equal slices"
            )
    generator = torch.Generator().manual_seed(seed)
    for dense in chosen:
        # Drawn before the noise, so that a router is the same with and without noise.
        weight = router_std * torch.randn(experts, dense.up.in_features, generator=generator)
        router = UpcycledRouter(weight.to(dense.up.weight), top_k, scale)
        block = UpcycledMoE(router, _experts(dense, experts, noise, sliced, generator))
        block.requires_grad_(dense.up.weight.requires_grad).train(dense.up.training)
        dense.replace(block)
    if any(hasattr(module, "save_pretrained") for module in model.modules()):
        from sluiceway.moe.saved import protect

        protect(model)
    return model


def _positions(layers: Sequence[int] | int, count: int) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise ValueError(f"layers={layers}: the model has {count} feed-forward layers")
        return list(range(count - layers, count))
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong or not layers:
        raise ValueError(
            f"layers={list(layers)}: name at least one of the {count} layers, 0 to {count - 1}"
        )
    positions = sorted({layer % count for layer in layers})
    if len(positions) != len(layers):
        raise ValueError(f"layers={list(layers)}: a layer is named twice")
    return positions


def _experts(
    dense: _Dense, experts: int, noise: float, sliced: bool, generator: Generator
) -> UpcycledExperts:
    """Copies or slices of the layer, each weight matrix with noise of its own."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0).repeat(experts, *[1] * tensor.ndim)

    def inner(tensor: Tensor, axis: int) -> Tensor:
        """What each expert has of a tensor with the inner width on this axis; axis E leads."""
        return torch.stack(tensor.chunk(experts, axis)) if sliced else repeated(tensor)

    def noisy(linear: nn.Linear, axis: int) -> Tensor:
        weight = linear.weight.detach()
        tensor = inner(weight, axis)
        if noise > 0:
            draw = torch.randn(tensor.shape, generator=generator).to(weight.device)
            tensor += (noise * weight.float().std() * draw).to(weight.dtype)
        return tensor

    up_bias, down_bias = (linear.bias for linear in (dense.up, dense.down))
    # Weights of the chosen sum to one, where the layer added its slices up.
    factor = experts if sliced else 1
    return UpcycledExperts(
        gate=None if dense.gate is None else noisy(dense.gate, 0),
        up=noisy(dense.up, 0),
        up_bias=None if up_bias is None else inner(up_bias.detach(), 0),
        down=noisy(dense.down, 1) * factor,
        down_bias=None if down_bias is None else repeated(down_bias.detach()),
        activation=dense.activation,
    )


def _bert(layer: nn.Module) -> _Dense | None:
    intermediate, output = layer._modules.get("intermediate"), layer._modules.get("output")
    up, down = getattr(intermediate, "dense", None), getattr(output, "dense", None)
    activation = getattr(intermediate, "intermediate_act_fn", None)
    if activation is None or not isinstance(up, nn.Linear) or not isinstance(down, nn.Linear):
        return None

    def replace(block: nn.Module) -> None:
        layer.intermediate = block
        # Dropout, residual and LayerNorm stay where they are; only the linear map goes.
        assert output is not None
        output.dense = nn.Identity().train(output.training)

    return _Dense(up, down, None, activation, replace)


def _llama(layer: nn.Module) -> _Dense | None:
    mlp = layer._modules.get("mlp")
    gate, up, down = (getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down"))
    activation = getattr(mlp, "act_fn", None)
    if (
        activation is None
        or not isinstance(gate, nn.Linear)
        or not isinstance(up, nn.Linear)
        or not isinstance(down, nn.Linear)
        or gate.bias is not None
    ):
        return None

    def replace(block: nn.Module) -> None:
        layer.mlp = block

    return _Dense(up, down, gate, activation, replace)


_FAMILIES: tuple[Callable[[nn.Module], _Dense | None], ...] = (_bert, _llama)


def _recognise(layer: nn.Module) -> _Dense | None:
    return next((dense for family in _FAMILIES if (dense := family(layer)) is not None), None)
