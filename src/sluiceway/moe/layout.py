"""Where routers and experts live in a model.

``moe_layout(model)`` walks the modules once, recognises blocks by the table in ``families.py`` (or,
where that finds nothing, by their structure, see ``search.py``), and names every tensor of a gate
or of one expert. Names are those of ``model.named_parameters()``: ``save_pretrained`` renames and
un-fuses, so saved names never match.

Experts are held in one of two ways, and both end as pieces (``ParamSlice``):

- fused: one parameter for all experts, leading axis E. Expert e's piece is the slice ``[e]``.
- one module per expert (``nn.ModuleList`` or ``nn.ModuleDict``): the pieces are whole parameters.

LoRA adapters belong to the expert or the gate that they adapt, see ``adapters.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn

from sluiceway.errors import BAD_INPUT, SluicewayError
from sluiceway.moe.adapters import Adapter, find_adapters, unwrapped
from sluiceway.moe.families import FAMILIES, Family, family_of
from sluiceway.moe.param_slice import ParamSlice
from sluiceway.moe.search import search, unrecognised


class NoExpertsError(SluicewayError, ValueError):
    """The model has no mixture-of-experts block that could be found."""

    exit_code = BAD_INPUT


@dataclass(frozen=True)
class Block:
    """One mixture-of-experts block.

    Attributes:
        position: 0, 1, ... in order of appearance in the model.
        name: module name of the block, the parent of router and experts ("" if it is the model).
        family: how its router is read; a row of ``families.FAMILIES``, or a `StructuralFamily`.
        router: module name of the router, the module whose forward gives the logits.
        experts: module name of the experts container; the block's where it holds them itself.
        gate: names of the router parameters with leading axis E (B of a LoRA pair included).
        num_experts: E.
        top_k: k, experts chosen per token.
        hidden: d, width of the hidden states that enter the router.
        pieces: [E] tuples, the pieces that belong to each expert.
        gate_rest: names of the router parameters without that axis (A of a LoRA pair).
        found: how the block was found by its structure, to be shown; "" for a known family.
    """

    position: int
    name: str
    family: Family = field(repr=False)
    router: str
    experts: str
    gate: tuple[str, ...]
    num_experts: int
    top_k: int
    hidden: int
    pieces: tuple[tuple[ParamSlice, ...], ...]
    gate_rest: tuple[str, ...]
    found: str = ""

    def expert(self, e: int) -> tuple[ParamSlice, ...]:
        """The pieces of expert ``e``, 0 <= e < E; IndexError otherwise."""
        if not 0 <= e < self.num_experts:
            raise IndexError(f"expert {e} of block {self.name}: it has {self.num_experts} experts")
        return self.pieces[e]


@dataclass(frozen=True)
class MoELayout:
    """All mixture-of-experts blocks of one model, and its LoRA pairs, in order of appearance.

    Attributes:
        blocks: the mixtures.
        adapters: the LoRA pairs.
        head: names of the weight [C, d], and the bias [C] if there is one, of the linear layer
            that gives the logits; empty where there is none.
    """

    blocks: tuple[Block, ...]
    adapters: tuple[Adapter, ...] = ()
    head: tuple[str, ...] = ()

    @cached_property
    def gate_params(self) -> frozenset[str]:
        """Names of all router parameters."""
        return frozenset(n for block in self.blocks for n in (*block.gate, *block.gate_rest))

    @cached_property
    def low_rank_a(self) -> frozenset[str]:
        """Names of the A of all LoRA pairs."""
        return frozenset(pair.a.param for pair in self.adapters)

    @cached_property
    def expert_params(self) -> frozenset[str]:
        """Names of all parameters that hold experts, fused or not."""
        return frozenset(piece.param for block in self.blocks for e in block.pieces for piece in e)

    @cached_property
    def _owners(self) -> dict[str, tuple[int, int]]:
        return {
            piece.key: (block.position, e)
            for block in self.blocks
            for e, pieces in enumerate(block.pieces)
            for piece in pieces
        }

    @cached_property
    def _fused(self) -> dict[str, tuple[ParamSlice, ...]]:
        fused: dict[str, list[ParamSlice]] = {}
        for block in self.blocks:
            for pieces in block.pieces:
                for piece in pieces:
                    if piece.index is not None:
                        fused.setdefault(piece.param, []).append(piece)
        return {param: tuple(pieces) for param, pieces in fused.items()}

    def expert(self, block: int, e: int) -> tuple[ParamSlice, ...]:
        """The pieces of expert ``e`` of block number ``block``; IndexError out of range."""
        return self.blocks[block].expert(e)

    def pieces(self, params: Iterable[str]) -> tuple[ParamSlice, ...]:
        """The given parameters as pieces, in the given order.

        A fused expert parameter becomes its E slices, in order of e; every other name becomes one
        whole piece.
        """
        found: list[ParamSlice] = []
        for param in params:
            found.extend(self._fused.get(param) or (ParamSlice.whole(param),))
        return tuple(found)

    def owner(self, key: str) -> tuple[int, int] | None:
        """(block, expert) that the piece ``key`` belongs to, or None for any other tensor."""
        return self._owners.get(key)

    def gate_block(self, param: str) -> int | None:
        """Position of the block whose gate has the parameter's rows, or None for any other."""
        return next((block.position for block in self.blocks if param in block.gate), None)


def moe_layout(model: nn.Module) -> MoELayout:
    """Find the mixture-of-experts blocks of ``model``, which may be wrapped or on the meta device.

    Raises:
        NoExpertsError: the model has no block of a known family, and none was found by structure.
        ValueError: a block of a known family has shapes that contradict its number of experts.
    """
    found = find_layout(model)
    if found is None:
        seen = unrecognised(model)
        raise NoExpertsError(
            f"model {type(model).__name__} has no mixture-of-experts block: no known family "
            f"({', '.join(FAMILIES)}), and {search(model).nothing}"
            + (f"; it has experts that are not recognised: {seen}" if seen else "")
        )
    return found


def find_layout(model: nn.Module) -> MoELayout | None:
    """Like ``moe_layout``, but None for a model in which no mixture-of-experts block was found."""
    params = dict(model.named_parameters())
    adapters = find_adapters(model)
    blocks: list[Block] = []
    for name, module in model.named_modules():
        family = family_of(module)
        if family is not None:
            blocks.append(_block(len(blocks), name, module, family, params, adapters))
    known = [block.name for block in blocks]
    for match in search(model).matches:
        if not any(_overlap(match.name, name) for name in known):
            block = _block(0, match.name, match.block, match.family, params, adapters)
            blocks.append(replace(block, found=match.found))
    if not blocks:
        return None
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    blocks.sort(key=lambda block: order[block.name])
    return MoELayout(tuple(replace(b, position=i) for i, b in enumerate(blocks)), adapters)


def _overlap(a: str, b: str) -> bool:
    """Whether one module is the other or inside it."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") or not a or not b


def _block(
    position: int,
    name: str,
    module: nn.Module,
    family: Family,
    params: Mapping[str, Tensor],
    adapters: Sequence[Adapter],
) -> Block:
    router = unwrapped(module.get_submodule(family.router))
    experts = unwrapped(module.get_submodule(family.experts))
    router_name, experts_name = _join(name, family.router), _join(name, family.experts)
    num_experts, top_k = family.sizes(router)
    low_rank = {pair.a.param for pair in adapters}, {pair.b.param for pair in adapters}
    routing = _under(params, router_name)
    gate = tuple(n for n in routing if n not in low_rank[0] and _leads(params[n], num_experts))
    full = [n for n in gate if n not in low_rank[1] and params[n].ndim == 2]
    if not full:
        raise ValueError(f"router {router_name}: no [{num_experts}, hidden] parameter")
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        pieces = _module_pieces(experts_name, experts, params)
    else:
        inside = params if family.experts else _beside(params, name, router_name)
        pieces = _fused_pieces(experts_name, num_experts, inside, adapters)
    if not any(pieces) and any(True for _ in experts.parameters()):
        raise NoExpertsError(
            f"{experts_name} has the experts of another layer: experts that layers share cannot be "
            "trained as experts; model.train = 'all' with a method without experts trains them"
        )
    if len(pieces) != num_experts or not all(pieces):
        raise ValueError(f"{experts_name}: parameters do not make {num_experts} experts")
    return Block(
        position=position,
        name=name,
        family=family,
        router=router_name,
        experts=experts_name,
        gate=gate,
        num_experts=num_experts,
        top_k=top_k,
        hidden=params[full[0]].shape[1],
        pieces=pieces,
        gate_rest=tuple(n for n in routing if n in low_rank[0]),
    )


def _module_pieces(
    name: str, experts: nn.ModuleList | nn.ModuleDict, params: Mapping[str, Tensor]
) -> tuple[tuple[ParamSlice, ...], ...]:
    # A dropout that all experts share has no parameters.
    named = [
        child for child, inner in experts.named_children() if any(True for _ in inner.parameters())
    ]
    children = sorted(named, key=_number)
    return tuple(
        tuple(ParamSlice.whole(param) for param in _under(params, _join(name, child)))
        for child in children
    )


def _fused_pieces(
    name: str, num_experts: int, params: Mapping[str, Tensor], adapters: Sequence[Adapter]
) -> tuple[tuple[ParamSlice, ...], ...]:
    pairs = [pair for pair in adapters if pair.base.param.startswith(f"{name}.")]
    low_rank = {piece.param for pair in pairs for piece in (pair.a, pair.b)}
    fused = [
        param
        for param in _under(params, name)
        if param not in low_rank and _leads(params[param], num_experts)
    ]
    return tuple(
        (
            *(ParamSlice.part(param, e) for param in fused),
            *(p for pair in pairs if pair.base.index == e for p in (pair.a, pair.b)),
        )
        for e in range(num_experts)
    )


def _number(child: str) -> int:
    """The expert's number in a child's name ("expert_10" -> 10): routers select by number."""
    digits = re.search(r"\d+$", child)
    if digits is None:
        raise ValueError(f"expert module {child!r} has no number at the end of its name")
    return int(digits.group())


def _leads(tensor: Tensor, num_experts: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == num_experts


def _under(params: Mapping[str, Tensor], module: str) -> list[str]:
    return [param for param in params if not module or param.startswith(f"{module}.")]


def _beside(params: Mapping[str, Tensor], block: str, router: str) -> dict[str, Tensor]:
    """Parameters of a block that may hold experts: not the router's, and no bias [H] of its own."""
    own = [name for name in _under(params, block) if not name.startswith(f"{router}.")]
    return {
        name: params[name]
        for name in own
        if params[name].ndim >= 3 or "." in name[len(block) :].removeprefix(".")
    }


def _join(parent: str, child: str) -> str:
    return ".".join(part for part in (parent, child) if part)
