"""What can go wrong between the halves."""

from sluiceway.core.messages import WireError

__all__ = ["WireError"]
