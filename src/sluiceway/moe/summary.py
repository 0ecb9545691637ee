"""The mixture-of-experts layout of a model as plain rows: what ``sluiceway inspect`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sluiceway.moe.layout import Block, moe_layout


@dataclass(frozen=True)
class TensorRow:
    """One parameter: its name, its shape, and the axis that numbers the experts (None: no axis,
    the parameter belongs to one expert alone)."""

    name: str
    shape: tuple[int, ...]
    expert_axis: int | None


@dataclass(frozen=True)
class BlockRow:
    """One mixture-of-experts block.

    Attributes:
        name, family, num_experts, top_k: as in ``Block``.
        router: the gate's parameters, shapes [E, ...].
        experts: the parameters that hold the experts. For experts in modules of their own, those
            of expert 0 stand for all.
        parameters_per_expert: number of values in one expert.
        bytes_per_expert: their bytes, in the dtype that they have now.
        found: as in ``Block``: how a block of no known family was found.
    """

    name: str
    family: str
    num_experts: int
    top_k: int
    router: tuple[TensorRow, ...]
    experts: tuple[TensorRow, ...]
    parameters_per_expert: int
    bytes_per_expert: int
    found: str = ""


@dataclass(frozen=True)
class ModelSummary:
    """Rows for the blocks of a model, and totals over all its parameters, tied ones once."""

    rows: tuple[BlockRow, ...]
    parameters: int
    bytes: int
    expert_parameters: int
    expert_bytes: int
    router_parameters: int
    router_bytes: int

    @property
    def expert_share(self) -> float:
        """Share of the parameters that are experts, in [0, 1]."""
        return self.expert_parameters / self.parameters

    @property
    def router_share(self) -> float:
        """Share of the parameters that are gates, in [0, 1]."""
        return self.router_parameters / self.parameters


def model_summary(model: nn.Module) -> ModelSummary:
    """Describe the mixture-of-experts blocks of ``model``; the meta device is enough.

    Raises:
        NoExpertsError: the model has no mixture-of-experts block that could be found.
    """
    found = moe_layout(model)
    params: dict[str, Tensor] = dict(model.named_parameters())
    experts = [params[name] for name in found.expert_params]
    routers = [params[name] for name in found.gate_params]
    return ModelSummary(
        rows=tuple(_row(block, params) for block in found.blocks),
        parameters=_count(params.values()),
        bytes=_bytes(params.values()),
        expert_parameters=_count(experts),
        expert_bytes=_bytes(experts),
        router_parameters=_count(routers),
        router_bytes=_bytes(routers),
    )


def _row(block: Block, params: Mapping[str, Tensor]) -> BlockRow:
    one = [piece.of(params) for piece in block.expert(0)]
    return BlockRow(
        name=block.name,
        family=block.family,
        num_experts=block.num_experts,
        top_k=block.top_k,
        router=tuple(TensorRow(name, tuple(params[name].shape), 0) for name in block.gate),
        experts=tuple(
            TensorRow(
                piece.param,
                tuple(params[piece.param].shape),
                None if piece.index is None else 0,
            )
            for piece in block.expert(0)
        ),
        parameters_per_expert=_count(one),
        bytes_per_expert=_bytes(one),
        found=block.found,
    )


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
