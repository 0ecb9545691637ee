"""SCAFFOLD: control variates against client drift (Karimireddy et al., arXiv 1910.06378)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Final

import torch
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.errors import InputError
from sluiceway.moe import BlockRouting, MoELayout, ParamSlice
from sluiceway.strategies.base import LocalContext, Update, unprefixed
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS

#: Most of the cosine between a client's change and its mean gradient. In honest runs with AdamW it
#: was -0.37 to -0.03.
OPPOSED: Final = 0.1
#: What `parts` may name. "other" is what is neither head nor gate nor expert.
PARTS = ("head", "gate", "experts", "other")


def known_parts(value: str) -> str:
    """The value, if it is "all" or some of `PARTS` with commas between. Raises ValueError."""
    if value != "all" and not set(value.split(",")) <= set(PARTS):
        raise ValueError(f"must be all, or some of {', '.join(PARTS)} with commas between")
    return value


@dataclass(config=PARAMETERS, kw_only=True)
class Scaffold(FedAvg):
    """Each client descends along g - c_i + c; the server averages models and controls.

    The client's new control is the mean of its raw gradients over the round. Under SGD this is
    the paper's option II, c_i - c + (x - y_i) / (K lr); it stays defined under other
    optimisers [ours]. The server's control: c + 1/N sum_i (c_i_new - c_i), N clients in all.
    Unused experts cross as well where they have control variates, which move them.

    parts: which parameters have control variates: "all", or some of head, gate, experts and other
        with commas between; the others are averaged as in FedAvg, and no control of them crosses
        [ours].
    """

    name: ClassVar[str] = "scaffold"
    parts: Annotated[str, AfterValidator(known_parts)] = "all"

    def setup(self, tensors: Mapping[str, Tensor], layout: MoELayout, clients: int) -> None:
        super().setup(tensors, layout, clients)
        # A sum of small steps in half precision would stand still.
        self.control = {
            name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
            for name, t in self.tensors.items()
            if self.parts == "all" or self.part(name) in self.parts.split(",")
        }
        if not self.control and self.parts != "all":  # in a split run there may be no layers
            raise InputError(f"method.parts = {self.parts!r}: the model has nothing of it to train")

    def part(self, param: str) -> str:
        """Which of `PARTS` the named parameter is of."""
        layout = self.layout
        of = {"head": layout.head, "gate": layout.gate_params, "experts": layout.expert_params}
        return next((part for part, names in of.items() if param in names), "other")

    def server_extra(self) -> Mapping[str, Tensor]:
        return {f"control/{name}": tensor for name, tensor in self.control.items()}

    def client_extra(self) -> Mapping[str, Tensor]:
        return self.server_extra()

    def fault(self, update: Update) -> str | None:
        """Controls that contradict the update's own change of the model.

        A client moved against its gradients with its drift taken off, c_i_new - c_i + c on the
        mean, of which the server knows c: under SGD its change is exactly minus that, times K lr.
        Under any optimiser the two must not point the same way, their cosine above `OPPOSED`
        [ours].
        """
        along = squares = moved = 0.0
        for piece in self.shared_pieces:
            sent = update.extra.get(f"control/{piece.param}")
            new, old = update.tensors.get(piece.key), piece.of(self.tensors)
            if sent is not None and new is not None and not piece.is_statistic:
                way = piece.of({piece.param: sent}).to(old.device)
                drift = way + piece.of(self.control)
                step = new.to(old.device) - old
                along += float((drift * step).sum())
                squares += float(drift.square().sum())
                moved += float(step.square().sum())
        return (
            "its control variates contradict its change of the model"
            if along > OPPOSED * (squares * moved) ** 0.5
            else None
        )

    def begin(self, number: int, updates: Sequence[Update] = ()) -> None:
        super().begin(number, updates)
        self.change = {name: torch.zeros_like(t) for name, t in self.control.items()}

    def accumulate(self, update: Update) -> None:
        super().accumulate(update)
        for name, total in self.change.items():
            if (sent := update.extra.get(f"control/{name}")) is not None:
                total.add_(sent)

    def finish(self) -> None:
        super().finish()
        for name, total in self.change.items():
            self.control[name].add_(total, alpha=1 / self.clients)
        del self.change

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | dict(self.server_extra())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.control = unprefixed(state, "control/")

    def sends(self, piece: ParamSlice, routing: Sequence[BlockRouting]) -> bool:
        return piece.param in self.control or super().sends(piece, routing)

    # -- the client's half ---------------------------------------------------------------------

    def start_training(self, client: LocalContext) -> None:
        extra = client.broadcast.extra
        server = {name: extra[f"control/{name}"] for name in client.params if name in self.control}
        own = {name: client.state.get(f"control/{name}") for name in server}
        client.scratch["shift"] = {
            name: (server[name] if c is None else server[name] - c).to(client.master_params[name])
            for name, c in own.items()
        }
        client.scratch["sum"] = {
            name: torch.zeros_like(client.master_params[name]) for name in server
        }

    def correct(self, client: LocalContext) -> None:
        for name, shift in client.scratch["shift"].items():
            param = client.master_params[name]
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            client.scratch["sum"][name].add_(param.grad)
            param.grad.add_(shift)

    def finish_training(self, client: LocalContext) -> Mapping[str, Tensor]:
        sent: dict[str, Tensor] = {}
        for name, total in client.scratch["sum"].items():
            key = f"control/{name}"
            new = (total / max(client.steps, 1)).detach().cpu()
            old = client.state.get(key)
            sent[key] = new if old is None else new - old
            client.state[key] = new
        return sent
