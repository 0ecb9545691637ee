"""The clients of peers.py, and a round of pfl 0.6.0 over them for every line that comes in.

Runs in an environment of its own, without Sluiceway: `peers.py --pfl` makes it and starts this.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data = list[tuple[Tensor, Tensor]]


def network(name: str) -> nn.Module:
    """A small network for images of 8 x 8, "mlp" or "cnn"; always the same one."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))
    return nn.Sequential(*layers)


def clients_of(count: int, examples: int) -> Data:
    """Images with labels that can be learned."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(64, 10, generator=rng)
    images = torch.randn(count, examples, 1, 8, 8, generator=rng)
    return [(x, (x.flatten(1) @ truth).argmax(1)) for x in images]


def serve(name: str, data: Data, batch: int, lr: float) -> None:
    """Train; after each round write its CPU seconds, and wait for a line."""
    from pfl.aggregate.simulate import SimulatedBackend  # type: ignore
    from pfl.algorithm.base import NNAlgorithmParams  # type: ignore
    from pfl.algorithm.federated_averaging import FederatedAveraging  # type: ignore
    from pfl.callback.base import TrainingProcessCallback  # type: ignore
    from pfl.data.federated_dataset import FederatedDataset  # type: ignore
    from pfl.data.pytorch import PyTorchTensorDataset  # type: ignore
    from pfl.data.sampling import get_user_sampler  # type: ignore
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # type: ignore
    from pfl.metrics import Metrics, Weighted  # type: ignore
    from pfl.model.pytorch import PyTorchModel  # type: ignore

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(name)

        def loss(self, images: Tensor, labels: Tensor) -> Tensor:
            self.train()
            return F.cross_entropy(self.net(images), labels)

        def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
            return {"loss": Weighted(float(self.loss(images, labels)), len(labels))}

    class Clock(TrainingProcessCallback):  # type: ignore
        began = 0.0

        def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Any]:
            print(time.process_time() - self.began, flush=True)
            over = not sys.stdin.readline()
            self.began = time.process_time()
            return over, Metrics()

    users = list(range(len(data)))
    held = {user: PyTorchTensorDataset(list(pair)) for user, pair in enumerate(data)}
    federated = FederatedDataset(held.__getitem__, get_user_sampler("minimize_reuse", users))
    model = Model()
    central = torch.optim.SGD(model.parameters(), lr=1.0)
    clock = Clock()
    clock.began = time.process_time()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=10**6,
            evaluation_frequency=10**6,
            train_cohort_size=len(data),
            val_cohort_size=0,
        ),
        SimulatedBackend(federated, federated),
        PyTorchModel(model, torch.optim.SGD, central),
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=lr, local_batch_size=batch),
        NNEvalHyperParams(local_batch_size=None),
        [clock],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(
        sys.argv[1],
        clients_of(int(sys.argv[2]), int(sys.argv[3])),
        int(sys.argv[4]),
        float(sys.argv[5]),
    )
