"""Your own network and data, cut in two: what a label-aware choice of channels saves.

python examples/own_split.py
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import sluiceway

torch.manual_seed(0)
shapes = torch.randn(4, 1, 8, 8)
labels = torch.randint(4, (1000,))
images = shapes[labels] + 2 * torch.randn(1000, 1, 8, 8)
test = TensorDataset(images[800:], labels[800:])
sides = [labels[:800] < 2, labels[:800] >= 2]
clients = [TensorDataset(images[:800][side], labels[:800][side]) for side in sides]

for method in ("sl", "acp-sl"):
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 4),
    )
    # Both clients run the layers up to "1"; the server, those behind it.
    result = sluiceway.split_train(network, "1", clients, test, method, rounds=10)
    sent = (result.bytes_up + result.bytes_down) / 1e6
    print(f"{method}: {result.accuracy:.3f}, {sent:.1f} MB")
