"""Your own model, your own data, one call: FedAlign-MoE on two clients that see different classes.

python examples/own_model.py
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sluiceway
from sluiceway.moe import UpcycledExperts, UpcycledMoE, UpcycledRouter


class Classifier(nn.Module):
    """A mixture of 4 experts (top 2) on points in 8 dimensions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        experts = UpcycledExperts(
            0.1 * torch.randn(4, 32, 8), 0.1 * torch.randn(4, 8, 32), nn.GELU()
        )
        self.mixture = UpcycledMoE(UpcycledRouter(torch.randn(4, 8), top_k=2), experts)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.mixture(x))
        return out


torch.manual_seed(0)
points = torch.randn(1200, 8)
labels = (points[:, 0] > 0).long() + 2 * (points[:, 1] > 0).long()
train, test = slice(0, 800), TensorDataset(points[800:], labels[800:])
sides = [labels[train] < 2, labels[train] >= 2]
clients = [TensorDataset(points[train][side], labels[train][side]) for side in sides]

for strategy in (sluiceway.FedAvg(), sluiceway.FedAlignMoE()):
    torch.manual_seed(1)
    result = sluiceway.federate(Classifier(), clients, test, strategy, rounds=10)
    print(f"{strategy.name}: {result.accuracy:.3f}, {result.bytes_up / 1e6:.2f} MB up")
