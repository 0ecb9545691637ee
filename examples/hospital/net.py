"""The hospital's own network: skips on both sides of `narrow`, none over it."""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels = shape[0]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.narrow = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.narrow(x + torch.relu(self.first(x))))
        x = self.pool(x + torch.relu(self.second(x)))
        out: Tensor = self.head(torch.flatten(x, 1))
        return out


def make(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network for images of shape (C, H, W)."""
    return Net(classes, shape)
