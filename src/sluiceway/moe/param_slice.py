"""Pieces of a model: what crosses the wire, a whole parameter or one expert's part of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ParamSlice:
    """One tensor that may cross the wire: a whole parameter, or one expert's part of a fused one.

    Attributes:
        key: ``"<param>"`` for a whole parameter, ``"<param>[e]"`` for a part. Unique in a model.
        param: the parameter's name in ``model.named_parameters()``.
        index: the expert's position on the expert axis, or None for the whole parameter.
        shape: the shape to view the parameter as before taking the part, where the expert axis is
            not an axis of its own (LoRA); None: as it is.
        axis: the expert axis, of ``shape`` where that is given.
    """

    key: str
    param: str
    index: int | None
    shape: tuple[int, ...] | None = None
    axis: int = 0

    @staticmethod
    def whole(param: str) -> ParamSlice:
        """The whole parameter."""
        return ParamSlice(param, param, None)

    @staticmethod
    def part(
        param: str, index: int, shape: tuple[int, ...] | None = None, axis: int = 0
    ) -> ParamSlice:
        """Expert ``index``'s part of a fused parameter."""
        return ParamSlice(f"{param}[{index}]", param, index, shape, axis)

    @property
    def is_statistic(self) -> bool:
        """Whether it is a running statistic of BatchNorm, by its name.

        Clients' statistics are averaged. They are no parameters: no optimiser steps along their
        change, and no norm of an update counts them  [ours].
        """
        return self.param.rpartition(".")[2] in ("running_mean", "running_var")

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The piece inside ``tensors[param]``: a view, never a copy.

        Raises:
            KeyError: ``tensors`` lacks the parameter.
            RuntimeError: the parameter is not contiguous and has no expert axis of its own.
        """
        tensor = tensors[self.param]
        if self.index is None:
            return tensor
        return (tensor if self.shape is None else tensor.view(self.shape)).select(
            self.axis, self.index
        )
