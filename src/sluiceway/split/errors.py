"""What can go wrong between the halves."""

from sluiceway.federated.wire import WireError

__all__ = ["WireError"]
