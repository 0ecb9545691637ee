"""Random crops and flips of whole batches, and images as normalised floats.

Nothing here loops over images, and every draw comes from the generator that is given. torch is
imported where it is used: whoever only names a data set need not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluiceway.data.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad each image with zeros on all sides and cut its own size out again.

    Args:
        images: [B, C, H, W] of any type.
        padding: P, 0 or more.
        top: int64 [B], each 0..2P; P is where the image lies.
        left: likewise from the left.

    Returns:
        A new tensor of the images' shape and type.
    """
    import torch

    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (padding, padding, padding, padding))
    # A view [B, C, 2P+1, 2P+1, H, W] of every possible cut; indexing copies one for each image.
    cuts = padded.unfold(2, height, 1).unfold(3, width, 1)
    return cuts[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror the images [B, C, H, W] left to right where `flips`, bool [B], is true."""
    import torch

    return torch.where(flips[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True)
class Augmentation:
    """The usual augmentation of small images: a random crop, then a random mirror image.

    After Krizhevsky 2009 and He et al. 2016, section 4.2: zero padding on all sides, a crop of the
    image's size placed uniformly, mirrored with probability 1/2.

    Attributes:
        padding: pixels on each side, 0 (no crop) or more.
        mirror: whether a mirror image still shows its label; false for digits.

    Raises:
        DataError: `padding` is negative.
    """

    padding: int = 4
    mirror: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise DataError(f"padding is {self.padding}: it must be 0 or more")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        The draws are made on the generator's device, so that a CPU generator augments alike
        wherever the images lie.

        Args:
            images: [B, C, H, W] of any type, black being 0.
            generator: drawn from anew at every call.

        Returns:
            A tensor of the images' shape, type and device.
        """
        count = len(images)
        if self.padding:
            ends = 2 * self.padding + 1
            top, left = _draw((2, count), ends, generator).to(images.device)
            images = crop(images, self.padding, top, left)
        if self.mirror:
            flips = _draw((count,), 2, generator).to(images.device)
            images = flip(images, flips.bool())
        return images


def normalise(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Tensor:
    """(pixel / 255 - mean) / std, channel by channel.

    Args:
        images: uint8 [B, C, H, W].
        mean: C numbers for pixels scaled to 0..1.
        std: C numbers above 0, likewise.

    Returns:
        float32 [B, C, H, W].

    Raises:
        DataError: mean or std has another length, or a std is not above 0.
    """
    import torch

    channels = images.shape[1]
    centre = torch.as_tensor(mean, dtype=torch.float32, device=images.device)
    spread = torch.as_tensor(std, dtype=torch.float32, device=images.device)
    if centre.shape != (channels,) or spread.shape != (channels,):
        raise DataError(
            f"mean has shape {list(centre.shape)} and std {list(spread.shape)}: "
            f"the images need {channels} of each, one a channel"
        )
    if not bool((spread > 0).all()):
        raise DataError(f"std is {spread.tolist()}: every number must be above 0")
    shape = (channels, 1, 1)
    scaled = images.to(torch.float32).mul_((1 / (255 * spread)).view(shape))
    return scaled.sub_((centre / spread).view(shape))


def _draw(shape: tuple[int, ...], ends: int, generator: torch.Generator) -> Tensor:
    """Uniform integers in 0..ends-1."""
    import torch

    return torch.randint(ends, shape, generator=generator, device=generator.device)
