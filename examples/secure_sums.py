"""FedAvg or usage-weighted experts by Flower's secure aggregation: the server sees sums alone.

python examples/secure_sums.py [fedavg | usage]

Both need nothing of their clients but sum_i c_i and sum_i c_i d_i, where d_i is what client i
changed and c_i what it counts: its examples, or the tokens that an expert got. Clients mask both
(SecAgg+, `flwr.client.mod.secaggplus_mod`); the masks cancel in the sum. docs/flower.md says what
that protects against and what it does not.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg as FlowerFedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from torch.utils.data import TensorDataset

from own_flower import Classifier, points
from sluiceway import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import STRATEGIES, Broadcast, FedAvg
from sluiceway.transport.local import standing

CLIENTS = 3
ROUNDS = 2
#: What a client may count for at most, and how far a value may move in a round. Known to all.
MOST = 2000.0
RANGE = 0.5


def parts() -> list[TensorDataset]:
    """The clients' data: two of the four classes each, of different numbers of examples."""
    halves = (range(2), range(2, 4), range(1, 3))
    return [TensorDataset(*points(i, half)[: 400 - 100 * i]) for i, half in enumerate(halves)]


def standing_worker(rule: FedAvg, model: Classifier, only: int | None = None) -> Any:
    """A worker with one client's data, or everybody's."""
    prepare(model, rule, CLIENTS)
    data = [
        part if only in (None, i) else TensorDataset(*part[:0]) for i, part in enumerate(parts())
    ]
    return standing(
        model, data, points(9, range(4)), rule, Training(lr=3e-3),
        loss=F.cross_entropy, device=torch.device("cpu"), seed=0,
    )  # fmt: skip


def weighted(worker: Worker, number: int, broadcast: Broadcast) -> list[np.ndarray]:
    """What client `number` would send: c_i d_i of each piece, and all the c_i, over `MOST`."""
    rule = worker.strategy
    assert isinstance(rule, FedAvg)
    update = worker.train(number, broadcast, {}, personal=False)
    changes, counts = [], []
    for piece in rule.shared_pieces:
        count = torch.as_tensor(rule.weight(update, piece)) / MOST
        old = piece.of(broadcast.tensors)
        changes.append((count * (update.tensors.get(piece.key, old) - old)).numpy())
        counts.append(float(count))
    return [*changes, np.array(counts)]


def step(rule: FedAvg, mean: list[np.ndarray]) -> None:
    """The new global values from the clients' mean of what `weighted` gives."""
    tensors = {name: tensor.clone() for name, tensor in rule.tensors.items()}
    for piece, change, count in zip(rule.shared_pieces, mean[:-1], mean[-1], strict=True):
        if count > 0.5 / MOST:
            piece.of(tensors).add_(torch.from_numpy(np.asarray(change / count)).float())
    rule.tensors = tensors


class Client(NumPyClient):
    """One client; counts for one, as Flower would send a number of examples unmasked."""

    def __init__(self, number: int) -> None:
        self.number = number

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        rule = STRATEGIES[config["method"]]()
        assert isinstance(rule, FedAvg)
        with standing_worker(rule, Classifier(), self.number) as worker:
            tensors = dict(zip(rule.tensors, map(torch.from_numpy, parameters), strict=True))
            rule.tensors = tensors
            sent = weighted(worker, self.number, Broadcast(config["round"], tensors))
        return sent, 1, {}


client = ClientApp(
    client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client(),
    mods=[secaggplus_mod],
)


class Sums(FlowerFedAvg):
    """Hands the sums of a round to one of our strategies."""

    def __init__(self, rule: FedAvg, after: Callable[[int], None]) -> None:
        self.rule = rule
        self.after = after
        super().__init__(
            fraction_evaluate=0,
            min_fit_clients=CLIENTS,
            min_available_clients=CLIENTS,
            initial_parameters=self.parameters(),
            on_fit_config_fn=lambda number: {"round": number, "method": rule.name},
        )

    def parameters(self) -> Any:
        return ndarrays_to_parameters([tensor.numpy() for tensor in self.rule.tensors.values()])

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        if results:  # all hold the same mean
            step(self.rule, parameters_to_ndarrays(results[0][1].parameters))
            self.after(server_round)
        return self.parameters(), {}


def serve(grid: Grid, context: Context, name: str) -> FedAvg:
    """All rounds; prints how far each is from the same round without masks."""
    rule, model = STRATEGIES[name](), Classifier()
    assert isinstance(rule, FedAvg)
    plain = STRATEGIES[name]()
    assert isinstance(plain, FedAvg)
    with standing_worker(plain, Classifier()) as worker:
        prepare(model, rule, CLIENTS)

        def after(number: int) -> None:
            broadcast = plain.broadcast(number)
            sent = [weighted(worker, i, broadcast) for i in range(CLIENTS)]
            step(plain, [np.mean(values, axis=0) for values in zip(*sent, strict=True)])
            far = max(float((rule.tensors[n] - plain.tensors[n]).abs().max()) for n in rule.tensors)
            right = worker.evaluate(rule.tensors, list(range(len(worker.test)))).accuracy
            print(f"round {number}: accuracy {right:.3f}, off by {far:.1e}", flush=True)

        strategy = Sums(rule, after)
        workflow = DefaultWorkflow(
            fit_workflow=SecAggPlusWorkflow(
                num_shares=CLIENTS, reconstruction_threshold=CLIENTS - 1,
                max_weight=1.0, clipping_range=RANGE, timeout=300,
            )
        )  # fmt: skip
        legacy = LegacyContext(context, ServerConfig(num_rounds=ROUNDS), strategy)
        workflow(grid, legacy)
    return rule


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    serve(grid, context, str(context.run_config["method"]))


if __name__ == "__main__":
    from sluiceway.deploy.flower.deployment import Deployment, write_app

    with tempfile.TemporaryDirectory() as place, Deployment(folder=Path(place)) as flower:
        app = Path(place) / "app"
        write_app(app, "secure_sums:server", "secure_sums:client", {"method": "fedavg"})
        for name in ("secure_sums.py", "own_flower.py"):
            shutil.copy(Path(__file__).with_name(name), app / name)
        flower.start_link()
        flower.start_executor()
        names = [f"node-{part}" for part in range(CLIENTS)]
        flower.register(*names)
        for part, name in enumerate(names):
            flower.start_node(name, {"partition-id": part})
        run = flower.run(app, {"method": (sys.argv[1:] or ["fedavg"])[0]})
        while not (status := flower.status(run)[0]).startswith("finished"):
            time.sleep(1)
        lines = flower.logged(run).splitlines()
        print(
            "\n".join(line for line in lines if line.startswith("round")) or "\n".join(lines[-30:])
        )
        print(status)
