"""Rows of a labelled data set of which parts share one storage."""

import copy
from collections.abc import Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sluiceway.data.tables import IntArray

Inputs = TypeVar("Inputs")


class LabelledRows(Dataset[tuple[Inputs, Tensor]]):
    """What text and image datasets have in common: labels, and parts that copy nothing.

    Args:
        labels: int64 [N].
    """

    def __init__(self, labels: IntArray | Tensor) -> None:
        self._labels = torch.as_tensor(labels, dtype=torch.int64)
        self._rows = torch.arange(len(self._labels))
        self._whole: Self | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> Tensor:
        """The labels of this dataset's rows, int64 [N]."""
        return self._labels[self._rows]

    def subset(self, indices: Sequence[int] | IntArray | Tensor) -> Self:
        """The rows at `indices` (each 0..N-1), in that order; what they hold is shared."""
        part = copy.copy(self)
        part._rows = self._rows[torch.as_tensor(indices, dtype=torch.int64)]
        part._whole = self.base
        return part

    @property
    def base(self) -> Self:
        """The whole dataset that this one is a part of; itself if it is whole."""
        return self if self._whole is None else self._whole

    @property
    def indices(self) -> Tensor:
        """The rows of `base` that this dataset takes, int64 [N]."""
        return self._rows
