"""Named tensors as one array of bytes: Flower's own arrays know no bfloat16."""

from __future__ import annotations

from flwr.app import ArrayRecord
from torch import Tensor, nn

from sluiceway.core.files import scratch_folder
from sluiceway.core.messages import read_broadcast, take_values, write_broadcast
from sluiceway.core.parameters import exchanged
from sluiceway.deploy.flower.chunks import array_record, bytes_of
from sluiceway.strategies import Broadcast


def packed(broadcast: Broadcast) -> ArrayRecord:
    """Named tensors of any type as one array of bytes."""
    with scratch_folder() as folder:
        path = folder / "broadcast"
        write_broadcast(path, broadcast)
        return array_record(path.read_bytes())


def unpacked(arrays: ArrayRecord) -> dict[str, Tensor]:
    """The inverse of `Adapter.arrays`: tensors by name. Raises ParcelError, WireError."""
    with scratch_folder() as folder:
        path = folder / "global"
        path.write_bytes(bytes_of(arrays))
        return {name: t.clone() for name, t in read_broadcast(path).tensors.items()}


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> None:
    """Write the global values that Flower's loop holds into a model. Raises WireError."""
    take_values(exchanged(model) | dict(model.named_parameters()), unpacked(arrays))
