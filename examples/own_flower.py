"""Your own model, data and loop in a Flower app, with FedAlign-MoE as its strategy.

python examples/own_flower.py

`server` and `client` are what an app's pyproject.toml names, and all that Flower needs. The rest
runs them: a SuperLink and two SuperNodes on this machine, over TLS, which end with the run.
"""

import shutil
import tempfile
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sluiceway import Training
from sluiceway.deploy.flower import ClientSetup, FedAlignMoE, client_app, load_arrays
from sluiceway.moe import UpcycledExperts, UpcycledMoE, UpcycledRouter


class Classifier(nn.Module):
    """A mixture of 4 experts (top 2) on points in 8 dimensions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)  # all begin with the same values
        experts = UpcycledExperts(
            0.1 * torch.randn(4, 32, 8), 0.1 * torch.randn(4, 8, 32), nn.GELU()
        )
        self.mixture = UpcycledMoE(UpcycledRouter(torch.randn(4, 8), top_k=2), experts)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.mixture(x))
        return out


def points(seed: int, classes: range) -> TensorDataset:
    """400 points whose class, of four, says in which quarter they are."""
    found = torch.randn(1600, 8, generator=torch.Generator().manual_seed(seed))
    labels = (found[:, 0] > 0).long() + 2 * (found[:, 1] > 0).long()
    ours = (labels >= classes.start) & (labels < classes.stop)
    return TensorDataset(found[ours][:400], labels[ours][:400])


def setup(context: Context) -> ClientSetup:
    """A client's model, and its data: each sees two of the four classes."""
    part = int(context.node_config["partition-id"])
    return ClientSetup(Classifier(), points(part, range(2 * part, 2 * part + 2)))


client = client_app(setup)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Your own loop, or Flower's as here, with your own evaluation."""
    model, test = Classifier(), points(9, range(4))

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        load_arrays(model, arrays)
        with torch.no_grad():
            inputs, labels = test.tensors
            right = (model(inputs).argmax(-1) == labels).float().mean()
        print(f"round {number}: accuracy {float(right):.3f}", flush=True)
        return MetricRecord({"accuracy": float(right)})

    strategy = FedAlignMoE(model, clients=2, training=Training(lr=3e-3), lambda_=0.1)
    strategy.start(grid, num_rounds=3, evaluate_fn=evaluate)


if __name__ == "__main__":
    from sluiceway.deploy.flower.deployment import Deployment, write_app

    with tempfile.TemporaryDirectory() as name, Deployment(folder=Path(name)) as flower:
        app = Path(name) / "app"
        write_app(app, "own_flower:server", "own_flower:client", {})
        shutil.copy(__file__, app / "own_flower.py")
        flower.start_link()
        flower.start_executor()
        flower.register("node-0", "node-1")
        for part in range(2):
            flower.start_node(f"node-{part}", {"partition-id": part})
        run = flower.run(app, {})
        while not (status := flower.status(run)[0]).startswith("finished"):
            time.sleep(1)
        print(status)
        lines = flower.logged(run).splitlines()
        print("\n".join(line for line in lines if line.startswith("round")))
