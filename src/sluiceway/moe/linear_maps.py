"""The linear maps of experts and gates: which pieces are matrix and bias of one, and what it reads.

A map of an expert reads the hidden state that enters it (projections up, and those of gated
forms), or the expert's inner activation (the projection down). Told by shapes: the hidden width H
is the input of the first kind and the output of the second; by names where both are H.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sluiceway.moe.adapters import Adapter
from sluiceway.moe.layout import Block, MoELayout
from sluiceway.moe.param_slice import ParamSlice

#: `LinearMap.block` of the head, which is in none.
HEAD = -1

_DOWN = re.compile(r"(^|[._])(down|wo|fc2|w2|out|output)", re.I)


@dataclass(frozen=True)
class LinearMap:
    """y = W x + b; or of a LoRA pair whose A is not trained, y = B (A x).

    Attributes:
        block: position of its block, or `HEAD`.
        expert: its expert, or None for a gate and the head.
        reads: "hidden", what enters the block, "inner", the expert's inner activation, or
            "features", what enters the head.
        weight: W as [out, in], or B [out, r].
        bias: b, [out]; None if none is trained.
        transposed: W is stored as [in, out].
        width: of its input without the bias's 1: in, or r.
        pair: the LoRA pair whose B `weight` is, or None.
    """

    block: int
    expert: int | None
    reads: str
    weight: ParamSlice
    bias: ParamSlice | None
    transposed: bool
    width: int
    pair: Adapter | None = None

    @property
    def source(self) -> str:
        """Names what it reads; maps of one source share their moment."""
        if self.pair is not None:
            return self.weight.key
        return f"{self.block}/{'gate' if self.expert is None else self.expert}/{self.reads}"

    @property
    def inputs(self) -> int:
        """n, the input's width with the bias's 1."""
        return self.width + (self.bias is not None)

    @property
    def pieces(self) -> tuple[ParamSlice, ...]:
        """Its trained pieces."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[W, b], [out, n], from pieces by key: float32 or wider, a view or a copy."""
        weight = tensors[self.weight.key]
        weight = weight.T if self.transposed else weight
        if self.bias is None:
            return weight
        return torch.cat([weight, tensors[self.bias.key].unsqueeze(1).to(weight.dtype)], dim=1)

    def change(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensor:
        """[W, b] of one less that of the other, [out, n] in the type of the old, float32 or wider.

        Raises:
            KeyError: one of them lacks a piece.
        """
        weight, before = new[self.weight.key].to(old[self.weight.key]), old[self.weight.key]
        if self.transposed:
            weight, before = weight.T, before.T
        found = before.new_empty(len(before), self.inputs)
        torch.sub(weight, before, out=found[:, : self.width])
        if self.bias is not None:
            bias = old[self.bias.key]
            torch.sub(new[self.bias.key].to(bias), bias, out=found[:, -1])
        return found


def linear_maps(layout: MoELayout, tensors: Mapping[str, Tensor]) -> tuple[LinearMap, ...]:
    """The maps of all experts and gates of which a matrix is among the given trained tensors.

    What is in none of them (norms of an expert, matrices of other shapes) stays what it is: a
    tensor like any other.
    """
    found: list[LinearMap] = []
    for block in layout.blocks:
        for e, pieces in enumerate(block.pieces):
            pairs = [pair for pair in layout.adapters if pair.b in pieces]
            found += _of_expert(block, e, pieces, pairs, tensors)
        gate = [ParamSlice.whole(name) for name in block.gate if name in tensors]
        pairs = [pair for pair in layout.adapters if pair.b in gate]
        found += _of_gate(block, gate, pairs, tensors)
    return tuple(found)


def head_map(layout: MoELayout, tensors: Mapping[str, Tensor]) -> LinearMap:
    """The linear head of a layout that has one, as a map of the features that enter it."""
    weight, *bias = map(ParamSlice.whole, layout.head)
    width = weight.of(tensors).shape[1]
    return LinearMap(HEAD, None, "features", weight, bias[0] if bias else None, False, width)


def _of_expert(
    block: Block,
    e: int,
    pieces: Sequence[ParamSlice],
    pairs: Sequence[Adapter],
    tensors: Mapping[str, Tensor],
) -> Iterator[LinearMap]:
    low_rank = {piece.key for pair in pairs for piece in (pair.a, pair.b)}
    shapes = {
        p.key: tuple(p.of(tensors).shape)
        for p in pieces
        if p.param in tensors and p.key not in low_rank
    }
    full = [p for p in pieces if len(shapes.get(p.key, ())) == 2]
    sides = {p.key: _sides(_inside(p, block), shapes[p.key], block.hidden) for p in full}
    # A layout holds for all matrices of an expert: those that are square do not tell.
    told = {transposed for _, transposed in sides.values() if transposed is not None}
    transposed = told == {True}
    for p in full:
        reads, own = sides[p.key]
        if reads is None or (own is not None and own != transposed):
            continue
        width = shapes[p.key][0 if transposed else 1]
        out = shapes[p.key][1 if transposed else 0]
        bias = next((b for b in pieces if _is_bias(b, p) and shapes.get(b.key) == (out,)), None)
        yield LinearMap(block.position, e, reads, p, bias, transposed, width)
    for pair in pairs:
        if pair.b.param not in tensors or pair.a.param not in tensors:
            continue
        rank, width = pair.a.of(tensors).shape
        shape = len(pair.b.of(tensors)), width
        reads, _ = _sides(_inside(pair.base, block), shape, block.hidden)
        if reads is not None:
            yield LinearMap(block.position, e, reads, pair.b, None, False, rank, pair)


def _of_gate(
    block: Block,
    gate: Sequence[ParamSlice],
    pairs: Sequence[Adapter],
    tensors: Mapping[str, Tensor],
) -> Iterator[LinearMap]:
    low_rank = {pair.b.key: pair for pair in pairs if pair.a.param in tensors}
    for p in gate:
        if (pair := low_rank.get(p.key)) is not None:
            rank = pair.a.of(tensors).shape[0]
            yield LinearMap(block.position, None, "hidden", p, None, False, rank, pair)
        elif p.of(tensors).shape == (block.num_experts, block.hidden):
            bias = next((b for b in gate if _is_bias(b, p) and b.of(tensors).ndim == 1), None)
            yield LinearMap(block.position, None, "hidden", p, bias, False, block.hidden)


def _inside(piece: ParamSlice, block: Block) -> str:
    """A piece's name inside its expert."""
    name = piece.param.removeprefix(f"{block.experts}." if block.experts else "")
    return name.replace("base_layer.", "").removesuffix(".weight")


def _sides(name: str, shape: Sequence[int], hidden: int) -> tuple[str | None, bool | None]:
    """(what a matrix reads, whether it is stored as [in, out]); None for what is not told."""
    down = _DOWN.search(name) is not None
    reads = "inner" if down else "hidden"
    rows, columns = shape
    if rows == columns:
        return (reads, None) if rows == hidden else (None, None)
    if hidden not in shape:
        return None, None
    # The side that is not H: the output of a map that reads H, the input of one that gives H.
    normal = (rows == hidden) == down
    return reads, not normal


def _is_bias(bias: ParamSlice, weight: ParamSlice) -> bool:
    """Whether a piece is called like the bias of a matrix of the same expert."""
    stem = weight.param.removesuffix(".weight").removesuffix("_proj")
    names = {f"{stem}.bias", f"{stem}_bias", f"{stem}_proj_bias", f"{stem}_proj.bias"}
    return bias.index == weight.index and bias.param in names
