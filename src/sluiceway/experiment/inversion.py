"""How much of its images a split run gives away: an attack on what crosses its own cut.

The attacker holds a share of the training images, runs the clients' layers on them, which it has
as every client has, and trains a small decoder from what would cross (with the run's selection,
basis, rounding and noise) to the image. It is then shown what crosses of images that it has not.
Who cannot see anything, but knows the label, would guess the mean image of the class  [ours].
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sluiceway.core.evaluation import BATCH
from sluiceway.core.seeds import derive_seed
from sluiceway.core.waits import counted
from sluiceway.data import ImageDataset, ImageTable, holdout, limit
from sluiceway.errors import InputError
from sluiceway.experiment.builders import chosen_compressor
from sluiceway.experiment.session import Session
from sluiceway.experiment.trained import TrainedModel, load
from sluiceway.split.deployed import DeployedNetwork, Link

#: The attacker's share of the training images, how many others it is tried on, and its training.
SHARE: Final = 0.08
VICTIMS: Final = 1000
STEPS: Final = 1500
WIDTHS: Final = (64, 32)

#: Of `ssim`: side and standard deviation of the window, and the constants of Wang et al.
WINDOW: Final = 11
SIGMA: Final = 1.5
SMALL: Final = (0.01**2, 0.03**2)


@dataclass(frozen=True)
class Rebuilt:
    """How near images come to the true ones, pixels in 0..1.

    Attributes:
        mse: mean squared error; higher is more private.
        ssim: mean structural similarity, 1 for equal images; lower is more private.
    """

    mse: float
    ssim: float

    @staticmethod
    def of(images: Tensor, truth: Tensor) -> Rebuilt:
        """Of images [N, C, H, W] as guesses of others."""
        error = float((images - truth).square().mean())
        return Rebuilt(error, float(ssim(images, truth).mean()))


@dataclass(frozen=True)
class Inversion:
    """An attack on a run.

    Attributes:
        decoder: images rebuilt from what crosses.
        class_mean: the mean of the attacker's images of the true class.
        known, victims: how many images the attacker held, and was tried on.
    """

    decoder: Rebuilt
    class_mean: Rebuilt
    known: int
    victims: int


def show_inversion(folder: Path, device: str) -> None:
    """Print how well images are rebuilt from what crosses of a split run. Raises as `invert`."""
    from sluiceway.experiment.inspect import plain_table, wide_console

    found = invert(folder, device=device)
    console = wide_console()
    console.print(
        f"{folder}: an attacker with {found.known} training images, on {found.victims} others",
        highlight=False,
    )
    guesses = {"from what crosses": found.decoder, "class mean": found.class_mean}
    rows = [(name, f"{g.mse:.4f}", f"{g.ssim:.3f}") for name, g in guesses.items()]
    console.print(plain_table(("guess",), ("MSE", "SSIM"), rows))


def invert(
    folder: Path,
    *,
    share: float = SHARE,
    victims: int = VICTIMS,
    steps: int = STEPS,
    seed: int = 0,
    device: str = "cpu",
) -> Inversion:
    """Attack a finished split run; see the module's text.

    Args:
        folder: of the run.
        share: of the training images that the attacker holds, in (0, 1).
        victims: images at most that it is tried on.
        steps: of the decoder's training, batches of 32.
        seed: decides who holds what, and the decoder.
        device: where it runs.

    Raises:
        InputError: no finished split run.
        DataError: its data cannot be loaded.
    """
    trained = load(folder, device=device)
    if not isinstance(trained.model, DeployedNetwork):
        raise InputError(f"--inversion attacks split runs; {folder} is a federated one")
    data, _, _ = Session().images(trained.recipe.data, lambda line: None)
    others, known = holdout(data.train, share, seed)
    others = limit(others, victims, seed)
    given, truth = pixels(known), pixels(others)
    seen, crossing = (crosses(trained, trained.model, table) for table in (known, others))
    with torch.random.fork_rng([trained.device] if trained.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, len(given)))
        decoder = trained_decoder(seen, given, steps, trained.device)
    with torch.no_grad():
        found = [decoder(part.to(trained.device)).cpu() for part in crossing.split(BATCH)]
    # A class of which the attacker has no image is guessed by the mean of all.
    means = {label: given[known.labels == label].mean(0) for label in np.unique(known.labels)}
    guesses = [means.get(label, given.mean(0)) for label in others.labels]
    return Inversion(
        Rebuilt.of(torch.cat(found), truth),
        Rebuilt.of(torch.stack(guesses), truth),
        len(known),
        len(others),
    )


def pixels(table: ImageTable) -> Tensor:
    """Images [N, C, H, W] float32 in 0..1."""
    return torch.from_numpy(table.images).float() / 255


@torch.no_grad()
def crosses(trained: TrainedModel, model: DeployedNetwork, table: ImageTable) -> Tensor:
    """What the server reads of these images in training, as maps [N, C, h, w] on the CPU.

    With delta coding what it has read of them in the end, had the layers always been what they are.
    Tokens of a square become one, without a class token; other vectors become points.
    """
    given = trained.input
    assert given is not None
    images = ImageDataset(table.images, table.labels, given["mean"], given["std"])
    deployed, found = model.links[str(model.client)], []
    assert isinstance(deployed, Link)
    compressor, recipe = chosen_compressor(trained.recipe), trained.recipe
    link = Link(compressor, deployed.mask, deployed.basis).to(trained.device)
    again = recipe.run.rounds * recipe.training().local_epochs - 1 if compressor.delta else 0
    for part in torch.arange(len(images)).split(BATCH):
        batch, _ = images.gather(part)
        made = model.front(batch.to(trained.device))
        read = link(made)
        for _ in range(again):
            read = link(made, read)
        found.append(read.cpu())
    values = torch.cat(found)
    if values.dim() == 3 and isqrt(values.shape[2] - 1) ** 2 == values.shape[2] - 1:
        values = values[:, :, 1:]
        values = values.unflatten(2, (isqrt(values.shape[2]),) * 2)
    return values if values.dim() == 4 else values.reshape(len(values), -1, 1, 1)


class Decoder(nn.Module):
    """Convolutions that double the sides until the image's are reached.

    Args:
        seen: what crosses of the attacker's images, [N, c, h, w], to scale channels by.
        shape: (C, H, W) of the images.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, seen: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        std, mean = torch.std_mean(seen, (0, 2, 3), correction=0, keepdim=True)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", 1 / std.clamp(min=1e-6) * (std > 1e-6))
        wide, narrow = WIDTHS
        self.first = nn.Conv2d(seen.shape[1], wide, 3, padding=1)
        self.sides = [(seen.shape[2] << i, seen.shape[3] << i) for i in range(1, 16)]
        self.sides = [(h, w) for h, w in self.sides if h < shape[1] and w < shape[2]]
        self.sides.append((shape[1], shape[2]))
        self.middle = nn.ModuleList(
            nn.Conv2d(wide if i == 0 else narrow, narrow, 3, padding=1)
            for i in range(len(self.sides))
        )
        self.last = nn.Conv2d(narrow, shape[0], 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        """[B, c, h, w] to images [B, C, H, W] in 0..1."""
        x = functional.relu(self.first((values - self.mean) * self.scale))
        for size, layer in zip(self.sides, self.middle, strict=True):
            x = functional.interpolate(x, size, mode="bilinear", align_corners=False)
            x = functional.relu(layer(x))
        out: Tensor = self.last(x).sigmoid()
        return out


def trained_decoder(seen: Tensor, images: Tensor, steps: int, device: torch.device) -> Decoder:
    """A decoder that was trained on pairs of what crosses and the image, by squared error."""
    decoder = Decoder(seen, tuple(images.shape[1:])).to(device)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in counted("training of the attack, steps", range(steps), steps):
        rows = torch.randint(len(seen), (min(32, len(seen)),))
        loss = functional.mse_loss(decoder(seen[rows].to(device)), images[rows].to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return decoder.eval()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al., IEEE Trans. Image Process. 13, 2004)  [paper].

    The mean over channels and windows of
    (2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2)),
    in Gaussian windows of 11x11 pixels that lie wholly inside; smaller ones in smaller images.

    Args:
        x, y: images [N, C, H, W] in 0..1.

    Returns:
        [N], at most 1.
    """
    n, c, height, width = x.shape
    side = min(WINDOW, height - 1 + height % 2, width - 1 + width % 2)
    line = torch.exp(-((torch.arange(side) - (side - 1) / 2) ** 2) / (2 * SIGMA**2)).to(x)
    window = torch.outer(line, line) / line.sum() ** 2
    planes = [x, y, x * x, y * y, x * y]
    stacked = torch.stack(planes).reshape(len(planes) * n * c, 1, height, width)
    means = functional.conv2d(stacked, window[None, None]).view(len(planes), n, -1)
    mx, my, xx, yy, xy = means
    c1, c2 = SMALL
    top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    bottom = (mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)
    found: Tensor = (top / bottom).mean(1)
    return found
