"""Vision models of Hugging Face as chains of named blocks, to be cut at a name.

Every block takes and gives one tensor with the channels second, as split learning expects: maps
[B, C, H, W] of a ResNet or MobileNet, tokens [B, C, T] of a ViT.
"""

from __future__ import annotations

import tomllib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sluiceway.core.waits import announced
from sluiceway.data.images import ImageSet
from sluiceway.errors import InputError, quoted
from sluiceway.experiment.models import model_place, readable
from sluiceway.split.networks import Head

#: Kinds of models (`model_type` of their configuration) that can be cut.
KINDS: Final = ("resnet", "mobilenet_v1", "mobilenet_v2", "vit")


@dataclass(frozen=True)
class Picture:
    """How a model wants its images, and how the data has them.

    Attributes:
        side: images are resized to side x side; 0 leaves them.
        scale, shift: of each of the model's channels, from the data's normalisation to the model's:
            x * scale + shift. Images of one channel are repeated.
    """

    side: int = 0
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)


class Stem(nn.Module):
    """The first block: images are made as the model wants them, then its own first layers."""

    scale: Tensor
    shift: Tensor

    def __init__(self, picture: Picture, layers: nn.Module) -> None:
        super().__init__()
        self.side, self.layers = picture.side, layers
        for name in ("scale", "shift"):  # constants of the recipe, in no checkpoint
            values = torch.tensor(getattr(picture, name)).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] as the data set normalises them; gives what the layers give."""
        x = x * self.scale + self.shift
        if self.side:
            x = functional.interpolate(x, self.side, mode="bilinear", align_corners=False)
        out: Tensor = self.layers(x)
        return out


class Tokens(nn.Module):
    """A block of tokens [B, T, C] as one of channels [B, C, T]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] to [B, C, T]."""
        out: Tensor = self.layer(x.transpose(1, 2))
        return out.transpose(1, 2)


class FirstTokens(nn.Module):
    """A ViT's embeddings of an image, as [B, C, T]."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, C, T]; the first token is the class token."""
        out: Tensor = self.embeddings(x)
        return out.transpose(1, 2)


class TokenHead(nn.Module):
    """The norm of the class token, then a linear layer to the classes."""

    def __init__(self, norm: nn.Module, wide: int, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] to [B, classes]."""
        logits: Tensor = self.linear(self.norm(x[:, :, 0]))
        return logits


def chain_of(model: Any, classes: int, picture: Picture | None = None) -> nn.Sequential:
    """A model of Hugging Face as a chain with a new head; its layers are used, not copied.

    Blocks are `stem`, then `stage1_1`, `stage1_2`, ... (ResNet), `layer1`, `layer2`, ...
    (MobileNet, ViT), `last` (MobileNet V2, its final 1x1 convolution), and `head`.

    Args:
        model: of `AutoModel`, of one of `KINDS`.
        classes: of the head, whose values are drawn from torch's global generator.
        picture: how images are made as the model wants them; None leaves them.
    """
    kind, config = model.config.model_type, model.config
    picture = picture or Picture()
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    if kind == "vit":
        blocks["stem"] = Stem(picture, FirstTokens(model.embeddings))
        layers = model.layers if hasattr(model, "layers") else model.encoder.layer
        blocks |= numbered(Tokens(layer) for layer in layers)
        blocks["head"] = TokenHead(model.layernorm, config.hidden_size, classes)
        return nn.Sequential(blocks)
    if kind == "resnet":
        blocks["stem"], wide = Stem(picture, model.embedder), config.hidden_sizes[-1]
        for number, stage in enumerate(model.encoder.stages, 1):
            blocks |= {f"stage{number}_{i}": layer for i, layer in enumerate(stage.layers, 1)}
    else:
        blocks["stem"] = Stem(picture, model.conv_stem)
        blocks |= numbered(model.layer)
        last = model.layer[-1]
        if kind == "mobilenet_v2":
            last = blocks["last"] = model.conv_1x1
        wide = last.convolution.out_channels
    blocks["head"] = Head(wide, classes)
    return nn.Sequential(blocks)


def numbered(layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Layers as layer1, layer2, ..."""
    return {f"layer{number}": layer for number, layer in enumerate(layers, 1)}


def vision_network(
    name: str, data: ImageSet, classes: int, *, side: int = 0, seed: int = 0
) -> tuple[nn.Sequential, str]:
    """A pretrained model as a chain with a new head, for the images of a data set.

    Args:
        name: a folder, a name on the hub, or the folder of an earlier run of such a model.
        data: whose images it will see.
        classes: of the head.
        side: images are resized to side x side; 0 leaves them.
        seed: of the head's values.

    Returns:
        The chain, and one line about it.

    Raises:
        InputError: no such model, none that can be cut, or one that does not take these images.
    """
    from transformers import AutoConfig, AutoModel

    name = first_source(name)
    key = "model.pretrained"
    place = model_place(name, key=key)
    loading = announced(f"loading the model from {place.source}")
    with loading, readable(name, place, key), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(place.where)
        if config.model_type not in KINDS:
            raise InputError(
                f"{key} = {quoted(name)} is a {config.model_type}; a split run takes "
                f"{', '.join(KINDS)}"
            )
        model, said = AutoModel.from_pretrained(
            place.where, dtype=torch.float32, output_loading_info=True
        )
        lacking = sorted(key for key in said["missing_keys"] if not key.startswith("pooler."))
        if lacking:
            raise InputError(f"{key} = {quoted(name)} has no weights of {lacking[0]}")
        own = normalisation(place.where)
        picture = picture_of(config, own, data, side, f"{key} = {name!r}")
        chain = chain_of(model, classes, picture)
    shape = "x".join(map(str, data.shape))
    wanted = "x".join(map(str, (len(picture.scale), *(2 * [side] if side else data.shape[1:]))))
    changed = f", images {shape} as {wanted}" if wanted != shape else ""
    whose = "the data's" if own is None else "its own"
    return chain, f"{place.source} ({config.model_type}{changed}, with {whose} normalisation)"


def first_source(name: str) -> str:
    """The model that runs, of which one began with the other, began with. Raises InputError."""
    seen = set[str]()
    while (file := Path(name) / "recipe.toml").is_file():
        seen.add(name)
        try:
            model = tomllib.loads(file.read_text(encoding="utf-8")).get("model", {})
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}") from None
        if model.get("name") != "huggingface" or str(model.get("pretrained")) in seen:
            raise InputError(f"model.name = 'huggingface': {name} is a run of {model.get('name')}")
        name = str(model.get("pretrained"))
    return name


def normalisation(where: str) -> tuple[list[float], list[float]] | None:
    """Mean and std of the model's images, pixels scaled to 0..1; None if it does not tell."""
    from transformers import BaseImageProcessor

    try:
        told, _ = BaseImageProcessor.get_image_processor_dict(where)
    except OSError:
        return None
    if not told.get("do_normalize", True) or "image_mean" not in told or "image_std" not in told:
        return None
    return told["image_mean"], told["image_std"]


def picture_of(
    config: Any,
    own: tuple[Sequence[float], Sequence[float]] | None,
    data: ImageSet,
    side: int,
    what: str,
) -> Picture:
    """How the images of a data set become the model's.

    Args:
        config: of the model.
        own: mean and std of the model's images; None keeps those of the data.
        data: the data set.
        side: images are resized to it; 0 leaves them.
        what: the model, for errors.

    Raises:
        InputError: the model has other channels, or takes images of one size alone.
    """
    channels, height, width = data.shape
    if channels != config.num_channels and channels != 1:
        raise InputError(
            f"{what} takes images of {config.num_channels} channels, these have {channels}"
        )
    # A ViT has an embedding for each place; the others take images of any size.
    fixed = config.image_size if config.model_type == "vit" else None
    sides = tuple(fixed) if isinstance(fixed, list | tuple) else (fixed, fixed)
    if fixed is not None and sides != ((side, side) if side else (height, width)):
        raise InputError(
            f"{what} takes images of {sides[0]}x{sides[1]}, these are "
            f"{side or height}x{side or width}: model.image_size = {sides[0]} resizes them"
        )
    count = config.num_channels
    if own is None:
        return Picture(side, (1.0,) * count, (0.0,) * count)
    # x = (p - mean) / std of the data, and the model wants (p - m) / s.
    mean, std = (values * (count // channels) for values in (data.mean, data.std))
    scale = tuple(d / s for d, s in zip(std, own[1], strict=True))
    shift = tuple((d - m) / s for d, m, s in zip(mean, *own, strict=True))
    return Picture(side, scale, shift)
