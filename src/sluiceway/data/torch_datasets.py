"""Tokens and images with labels as torch datasets, and fast batches out of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sluiceway.data.augment import Augmentation, normalise
from sluiceway.data.errors import DataError
from sluiceway.data.tables import ByteArray, ImageData, IntArray

Inputs = TypeVar("Inputs")
Rows = Sequence[int] | IntArray | Tensor


class LabelledDataset(Dataset[tuple[Inputs, Tensor]]):
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

    def subset(self, indices: Rows) -> Self:
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


class TextDataset(LabelledDataset[dict[str, Tensor]]):
    """Tokenised texts, or contexts and their endings, with labels.

    `dataset[i]` is (row i of every input, label int64 []): {"input_ids": int64 [S],
    "attention_mask": int64 [S]} of a text.

    Args:
        inputs: what `encode`, `encode_choices` or `encode_pairs` returns: int64 [N, S] or
            [N, C, S] each. Inputs named decoder_... are padded as "decoder_attention_mask" tells,
            all others as "attention_mask" tells.
        labels: int64 [N].

    Raises:
        DataError: inputs and labels differ in length, a mask is missing, or an input and its mask
            differ in width.
    """

    def __init__(self, inputs: dict[str, Tensor], labels: IntArray | Tensor) -> None:
        super().__init__(labels)
        for name, tensor in inputs.items():
            if tensor.shape[0] != len(self):
                raise DataError(f"{name} has {tensor.shape[0]} rows for {len(self)} labels")
            mask = inputs.get(_mask_of(name))
            if mask is None:
                raise DataError(f"{name} comes without its {_mask_of(name)}")
            if tensor.shape[-1] != mask.shape[-1]:
                raise DataError(
                    f"{name} is {tensor.shape[-1]} wide and its {_mask_of(name)} "
                    f"{mask.shape[-1]}: they must be alike"
                )
        self._inputs = inputs
        self._lengths = {mask: _lengths(inputs[mask]) for mask in map(_mask_of, inputs)}

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        row = self._rows[index]
        return {name: tensor[row] for name, tensor in self._inputs.items()}, self._labels[row]

    def gather(self, indices: Rows) -> tuple[dict[str, Tensor], Tensor]:
        """A batch, without the padding that no row of it needs.

        Args:
            indices: B row numbers, each 0..N-1.

        Returns:
            The inputs, int64 [B, S'] or [B, C, S'] each with S' the longest row's number of tokens
            by the input's mask, and the labels, int64 [B].
        """
        rows = self._rows[torch.as_tensor(indices, dtype=torch.int64)]
        widths = {
            mask: int(lengths[rows].max()) if len(rows) else 0
            for mask, lengths in self._lengths.items()
        }
        batch = {
            name: tensor[..., : widths[_mask_of(name)]].index_select(0, rows)
            for name, tensor in self._inputs.items()
        }
        return batch, self._labels[rows]

    def filled(self, width: int) -> int:
        """How many rows, or rows of options, reach so many tokens."""
        return int((self._lengths["attention_mask"][self._rows] >= width).sum())


class ImageDataset(LabelledDataset[Tensor]):
    """Images with labels, kept as bytes and turned into floats batch by batch.

    `dataset[i]` is (float32 [C, H, W] normalised and never augmented, label int64 []).

    Args:
        images: uint8 [N, C, H, W]; shared, not copied.
        labels: int64 [N].
        mean: C numbers for pixels scaled to 0..1.
        std: C numbers above 0, likewise.
        augmentation: applied by `gather` where it is given a generator.

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
        self, indices: Rows, generator: torch.Generator | None = None
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
        augment: False leaves the train images as they are too.
    """
    train, test = data.train, data.test
    augmentation = data.augmentation if augment else None
    return (
        ImageDataset(train.images, train.labels, data.mean, data.std, augmentation),
        ImageDataset(test.images, test.labels, data.mean, data.std),
    )


def _mask_of(name: str) -> str:
    """The mask that tells which part of an input is padding."""
    return "decoder_attention_mask" if name.startswith("decoder_") else "attention_mask"


def _lengths(mask: Tensor) -> Tensor:
    """Where the last token of each row ends, int64 [N], of a mask [N, S] or [N, C, S].

    Right padding alone counts as padding: whatever lies before the last token stays.
    """
    positions = torch.arange(1, mask.shape[-1] + 1)
    # With a leading 0 there is always something to take the maximum of.
    return torch.nn.functional.pad((mask * positions).flatten(1), (1, 0)).amax(dim=1)
