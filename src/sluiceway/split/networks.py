"""Image networks as chains of named blocks, to be cut at a name.

Each takes [B, in_channels, H, W] float32 and gives logits [B, classes]. Sides of 8 to 64 all work:
every network ends in a global average. Weights are drawn from torch's global generator.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, ReLU, and 2x2 max pooling if asked for; odd sides round up."""

    def __init__(self, wide: int, out: int, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(wide, out, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, wide, H, W] to [B, out, H', W'], H' = ceil(H / 2) with pooling."""
        pooled: Tensor = self.pool(functional.relu(self.bn(self.conv(x))))
        return pooled


class Head(nn.Module):
    """Global average over positions, then a linear layer to the classes."""

    def __init__(self, wide: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, wide, H, W] to [B, classes]."""
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class Conv4(nn.Sequential):
    """Four convolutions, 3x3 with batch norm and ReLU: `conv1` to `conv4`, then `head`.

    Widths are w, w, 2w, 2w. The first three blocks end in 2x2 max pooling, so that behind `conv1`
    a 32x32 image is [w, 16, 16], behind `conv2` [w, 8, 8], `conv3` [2w, 4, 4], `conv4` [2w, 4, 4].

    Args:
        in_channels: of the images, at least 1.
        classes: at least 1.
        width: w, at least 1.
    """

    def __init__(self, in_channels: int, classes: int, width: int = 32) -> None:
        widths = (width, width, 2 * width, 2 * width)
        inputs = (in_channels, *widths)
        blocks: OrderedDict[str, nn.Module] = OrderedDict(
            (f"conv{i + 1}", ConvBlock(inputs[i], widths[i], pool=i < 3)) for i in range(4)
        )
        blocks["head"] = Head(widths[-1], classes)
        super().__init__(blocks)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., arXiv 1512.03385), post-activation.

    Where sides or channels change, the shortcut is a 1x1 convolution with batch norm.

    Args:
        wide: input channels.
        out: output channels.
        stride: of the first convolution, 1 or 2.
    """

    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or wide != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, wide, H, W] to [B, out, ceil(H / stride), ceil(W / stride)]."""
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


def resnet18(width: int = 64, in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """ResNet-18 for small images: `stem`, `layer1_1`, `layer1_2`, ..., `layer4_2`, `head`.

    The stem is one 3x3 convolution without pooling, as is usual for 32x32 images. Layers have
    widths w, 2w, 4w, 8w; the first blocks of layers 2 to 4 halve the sides.

    Args:
        width: w, at least 1; 64 is the paper's.
        in_channels: of the images, at least 1.
        classes: at least 1.
    """
    blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBlock(in_channels, width))
    wide = width
    for layer in range(4):
        for block in range(2):
            stride = 2 if layer > 0 and block == 0 else 1
            out = width << layer
            blocks[f"layer{layer + 1}_{block + 1}"] = ResidualBlock(wide, out, stride)
            wide = out
    blocks["head"] = Head(wide, classes)
    return nn.Sequential(blocks)


def vgg11(width: int = 64, in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """VGG-11 with batch norm for small images: `conv1` to `conv8`, then `head`.

    Widths are w, 2w, 4w, 4w, 8w, 8w, 8w, 8w (Simonyan and Zisserman, arXiv 1409.1556, column A),
    with pooling behind convolutions 1, 2, 4, 6 and 8. One linear layer stands for the paper's
    three, as is usual for 32x32 images.

    Args:
        width: w, at least 1; 64 is the paper's.
        in_channels: of the images, at least 1.
        classes: at least 1.
    """
    factors = (1, 2, 4, 4, 8, 8, 8, 8)
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    wide = in_channels
    for i, factor in enumerate(factors):
        pool = i in (0, 1, 3, 5, 7)
        blocks[f"conv{i + 1}"] = ConvBlock(wide, width * factor, pool)
        wide = width * factor
    blocks["head"] = Head(wide, classes)
    return nn.Sequential(blocks)
