"""The ClientApp of your own Flower app: any model, any data, any of our strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.supercore.utils import get_flwr_home
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.utils.data import Subset

from sluiceway.core.batches import Examples, Loss
from sluiceway.core.device import chosen_device
from sluiceway.core.messages import read_broadcast
from sluiceway.core.settings import Training
from sluiceway.core.trial import try_model
from sluiceway.deploy.flower.client import site_app
from sluiceway.experiment.methods import method_of
from sluiceway.experiment.validation import first_fault
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import Strategy
from sluiceway.transport.local import standing
from sluiceway.transport.protocol import ClientHandler, Request, Response
from sluiceway.transport.site import ClientStateStore, SiteError, Trainer, whole


@dataclass(frozen=True)
class ClientSetup:
    """A client's model, as it was before training, and its own examples.

    Attributes:
        model: made the same way everywhere; its output is logits [B, C] or has them as `.logits`.
        train: (inputs, label) of this client.
        test: on which it evaluates the global model and its own; None for none.
    """

    model: nn.Module
    train: Examples
    test: Examples | None = None


def client_app(
    setup: Callable[[Context], ClientSetup],
    *,
    training: Training | None = None,
    loss: Loss = F.cross_entropy,
    device: str = "auto",
    folder: Callable[[Context], Path] | None = None,
) -> ClientApp:
    """A ClientApp for the strategies of `sluiceway.deploy.flower`.

    Args:
        setup: called for every message, since Flower starts a process for each.
        training: how to train; None for the server's settings.
        loss: of (logits, labels).
        device: "auto" (CUDA where there is one), "cpu", "cuda", ...
        folder: for the client's state between rounds, such as control variates; by default a folder
            in Flower's own, named after the node.
    """
    place = folder or default_folder

    def opened(context: Context) -> CustomClient:
        chosen = torch.device(chosen_device(device))
        return CustomClient(lambda: setup(context), place(context), training, loss, chosen)

    return site_app(opened, lambda context: place(context) / "transfers")


def default_folder(context: Context) -> Path:
    """A node's folder in Flower's."""
    return Path(get_flwr_home()) / "sluiceway" / str(context.node_id)


@dataclass(frozen=True)
class CustomClient(ClientHandler):
    """A `ClientHandler` for your own model and data; see `client_app`."""

    setup: Callable[[], ClientSetup]
    folder: Path
    training: Training | None
    loss: Loss
    device: torch.device

    def handle(self, request: Request, folder: Path) -> Response:
        """Train, or evaluate the global model.

        Raises:
            SiteError: another request, or an impossible client number.
            InputError: the model cannot be run on the client's examples.
            WireError: the server's model has other tensors than this client's.
        """
        number, clients = whole(request.facts, "client"), whole(request.facts, "clients")
        if number >= clients:
            raise SiteError(f"client {number} of {clients}")
        if request.what not in ("train", "evaluate") or request.message is None:
            raise SiteError(f"a strategy has no request {request.what!r}")
        setup = self.setup()
        strategy = strategy_from(request.facts)
        prepare(setup.model.to(self.device), strategy, clients)
        nothing: Examples = Subset(setup.train, [])  # type: ignore[arg-type]
        parts = [setup.train if i == number else nothing for i in range(clients)]
        test = nothing if setup.test is None else setup.test
        training = self.training or training_from(request.facts)
        if shown := next((held for held in (setup.train, test) if len(held)), None):
            given = setup.model, parts, shown, "accuracy", self.device
            try_model(*given, layout=strategy.layout, training=training, must=True)
        with standing(
            setup.model,
            parts,
            test,
            strategy,
            training,
            loss=self.loss,
            device=self.device,
            seed=whole(request.facts, "seed"),
        ) as worker:
            if request.what == "evaluate":
                return evaluated(worker, request.message)
            states = ClientStateStore(self.folder / "states")
            return Trainer(worker, number, states).train(request, folder)


def evaluated(worker: Worker, message: Path) -> Response:
    """The global model on the client's own test examples."""
    indices = list(range(len(worker.test)))
    if not indices:
        raise SiteError("this client has no test examples")
    found = worker.evaluate(read_broadcast(message).tensors, indices)
    facts = {"examples": len(indices), "accuracy": found.accuracy, "loss": found.mean_loss}
    return Response(facts)


def strategy_from(facts: Mapping[str, Any]) -> Strategy:
    """The strategy whose client half to run. Raises InputError, SiteError."""
    table = facts.get("method")
    if not isinstance(table, dict):
        raise SiteError("the server names no method")
    made = method_of(table, split=False)
    assert isinstance(made, Strategy)
    return made


def training_from(facts: Mapping[str, Any]) -> Training:
    """The server's training settings. Raises SiteError."""
    try:
        return TypeAdapter(Training).validate_python(facts.get("train"))
    except ValidationError as error:
        raise SiteError(first_fault(error, Training, "train")) from None
