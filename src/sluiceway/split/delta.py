"""Delta coding: of every example, what changed since it last crossed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.split.compress import Compressor, Quantize
from sluiceway.split.packing import BatchId
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

    def outgoing(self, A: Tensor, batch: BatchId) -> Tensor:
        if batch not in self._due:
            return A
        rows, size = self._due[batch]
        if batch.client not in self._kept:
            self._kept[batch.client] = A.new_zeros((size, *A.shape[1:]))
        kept = self._kept[batch.client] = self._kept[batch.client].to(A.device)
        return A.detach() - kept[rows.to(A.device)]

    @torch.no_grad()
    def incoming(self, values: Tensor, batch: BatchId) -> Tensor:
        if batch not in self._due:
            return values
        rows, _ = self._due.pop(batch)
        kept, rows = self._kept[batch.client], rows.to(values.device)
        values = kept[rows] + values
        kept[rows] = values
        return values

    def state_dict(self) -> dict[str, Tensor]:
        kept = {f"kept/{client}": values.cpu() for client, values in self._kept.items()}
        return super().state_dict() | kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        kept = unprefixed(state, "kept/")
        self._kept = {int(client): values.clone() for client, values in kept.items()}
        super().load_state_dict({k: v for k, v in state.items() if not k.startswith("kept/")})
