"""Images as tensors, and fast batches out of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sluiceway.data.augment import Augmentation, normalise
from sluiceway.data.errors import DataError
from sluiceway.data.image_tables import ByteArray, ImageData
from sluiceway.data.rows import LabelledRows
from sluiceway.data.tables import IntArray


class ImageDataset(LabelledRows[Tensor]):
    """Images with labels, kept as bytes and turned into floats batch by batch.

    `dataset[i]` is (float32 [C, H, W] normalised and never augmented, label int64 []).

    Args:
        images: uint8 [N, C, H, W]; shared, not copied.
        labels: int64 [N].
        mean: C numbers for pixels scaled to 0..1.
        std: C numbers above 0, likewise.
        augmentation: applied by `gather` where it is handed a generator.

    Raises:
        DataError: another type or shape, images and labels differ in length, or mean and std do not
            fit the channels.
    """

    def __init__(
        self,
        images: ByteArray | Tensor,
        labels: IntArray | Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(labels)
        self._images = torch.as_tensor(images)
        if self._images.dtype != torch.uint8 or self._images.ndim != 4:
            raise DataError(
                f"images are {self._images.dtype} {list(self._images.shape)}: "
                "they must be uint8 [N, C, H, W]"
            )
        if len(self._images) != len(self):
            raise DataError(f"there are {len(self._images)} images for {len(self)} labels")
        self._mean, self._std = torch.tensor(mean), torch.tensor(std)
        normalise(self._images[:0], self._mean, self._std)  # refuses what does not fit
        self.augmentation = augmentation

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self._rows[index]
        return normalise(self._images[row, None], self._mean, self._std)[0], self._labels[row]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    def gather(
        self,
        indices: Sequence[int] | IntArray | Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A batch.

        Args:
            indices: B row numbers, each 0..N-1.
            generator: augments the batch if the dataset has an augmentation; the same state gives
                the same batch. Without it nothing is augmented.

        Returns:
            The images, float32 [B, C, H, W] normalised, and the labels, int64 [B].
        """
        rows = self._rows[torch.as_tensor(indices, dtype=torch.int64)]
        images = self._images.index_select(0, rows)
        # On bytes: a quarter of the memory, and zero still means black.
        if generator is not None and self.augmentation is not None:
            images = self.augmentation(images, generator)
        return normalise(images, self._mean, self._std), self._labels[rows]


def image_datasets(data: ImageData, augment: bool = True) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) of a data set with its own mean and std; only train is ever augmented.

    Args:
        data: as `load_images` returns it.
        augment: false leaves the train images as they are too.
    """
    train, test = data.train, data.test
    augmentation = data.augmentation if augment else None
    return (
        ImageDataset(train.images, train.labels, data.mean, data.std, augmentation),
        ImageDataset(test.images, test.labels, data.mean, data.std),
    )
