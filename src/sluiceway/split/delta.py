"""Delta coding: of every example, what changed since it last crossed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.split.compress import Compressor, Quantize
from sluiceway.split.packing import BatchContext, BatchId, Encoded, Message, Smashed
from sluiceway.strategies.base import unprefixed
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class Delta(Compressor):
    """What changed of each example since it last crossed, rounded (after AQ-SGD, arXiv 2206.01299).

    Of an example with values a and what was read of it so far m, 0 in the beginning::

        sent = rounded(a - m),    m <- m + sent,    the server trains on m

    so that behind layers that stay as they are rounding dies out from round to round. Both ends
    keep m of every example, in float32; here both are one, which takes one process: at sites the
    method is refused. When the model is used nothing crossed before, and it rounds a itself.
    """

    name: ClassVar[str] = "delta"
    one_process: ClassVar[bool] = True
    quantize: Quantize = "dct"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._due: dict[BatchId, tuple[Tensor, int]] = {}
        self._kept: dict[int, Tensor] = {}

    def expect(self, batch: BatchId, rows: Tensor, size: int) -> None:
        self._due[batch] = rows, size

    def up(
        self,
        A: Tensor,
        batch: BatchId,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        training: bool = True,
    ) -> tuple[Encoded, BatchContext]:
        if batch in self._due:
            rows, size = self._due[batch]
            if batch.client not in self._kept:
                self._kept[batch.client] = A.new_zeros((size, *A.shape[1:]))
            kept = self._kept[batch.client] = self._kept[batch.client].to(A.device)
            A = A.detach() - kept[rows.to(A.device)]
        return super().up(A, batch, labels, mask, training=training)

    @torch.no_grad()
    def open(
        self,
        message: Message,
        shape: tuple[int | None, ...] | None = None,
        batch: BatchId | None = None,
        labels: bool | None = None,
        classes: int | None = None,
        device: str | torch.device = "cpu",
    ) -> Smashed:
        rows, _ = self._due.pop(batch, (None, 0)) if batch is not None else (None, 0)
        opened = super().open(message, shape, batch, labels, classes, device)
        if rows is None:
            return opened
        kept, rows = self._kept[opened.context.batch.client], rows.to(device)
        values = kept[rows] + opened.values
        kept[rows] = values
        return replace(opened, values=values)

    def state_dict(self) -> dict[str, Tensor]:
        kept = {f"kept/{client}": values.cpu() for client, values in self._kept.items()}
        return super().state_dict() | kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        kept = unprefixed(state, "kept/")
        self._kept = {int(client): values.clone() for client, values in kept.items()}
        super().load_state_dict({k: v for k, v in state.items() if not k.startswith("kept/")})
