"""The mixer: smashed data cross in a better basis than the channels; the server turns them back.

Clients measure moments of their channels (`scorers.MomentScorer`), the server merges them into a
basis for the next round (`BasisSelector`), and both sides use it. The server's layers always see
all channels, so that another basis, or other bits, disturb nothing that they have learned. The
gradient crosses as U^T g: since rounding is passed straight through, turning it back gives what the
same gradient by channels would have been.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sluiceway import channels
from sluiceway.channels import Basis, Moments
from sluiceway.split.config import SplitModel, joined
from sluiceway.split.deployed import PARTS
from sluiceway.split.methods import ACPSL
from sluiceway.strategies.base import unprefixed


class BasisSelector:
    """The basis of a run, from the newest moments of all clients.

    It is estimated anew in the rounds in which masks would be chosen anew; "learned" only once.

    Args:
        method: says how.
        count: C.
        classes: K.
    """

    def __init__(self, method: ACPSL, count: int, classes: int) -> None:
        self.method, self.count, self.classes = method, count, classes
        self.measured: dict[int, Tensor] = {}
        self.basis: Basis | None = None
        self._round = 0
        self._due = False

    def unrated(self, clients: Sequence[int]) -> list[int]:
        """Of the clients of a round, those that must measure before it begins."""
        ahead = self.method.warmup == 0 and not self.measured
        return list(clients) if ahead else []

    def rate(self, client: int, measured: Tensor) -> None:
        """Take a client's newest measurement; see `MomentScorer`."""
        self.measured[client] = measured.double().cpu()

    def choose(self, round: int) -> bool:
        """Estimate the basis of a round, if it is due; returns whether it was."""
        method, missed = self.method, range(self._round + 1, round + 1)
        self._round = round
        self._due |= any(
            channels.rechoose(r - method.warmup, method.every, method.growth) for r in missed
        )
        once = method.basis == "learned" and self.basis is not None
        if not self._due or not self.measured or once:
            return False
        self.basis, self._due = self.estimated(), False
        return True

    def estimated(self) -> Basis:
        """The basis of what all clients measured; float32 numbers of which U crosses as float16."""
        _, size = measured_size(self.method, self.count, self.classes)
        found = [self.measured[client] for client in sorted(self.measured)]
        classes = self.classes if self.method.by_class else 1
        each = [Moments.from_vector(one[:size], self.count, classes) for one in found]
        moments = channels.merge_moments(each)
        scale = torch.ones(self.count)
        if self.method.basis == "label":
            share = self.method.label_weight
            rotation = channels.label_basis(moments.covariance, moments.between, share)
        elif self.method.basis == "gradient":
            totals = torch.stack([one.total for one in each])
            squares = torch.stack([one[size:] for one in found])
            mean = (totals @ squares) / totals.sum()
            rotation, scale = channels.gradient_basis(moments.covariance, mean)
        else:
            rotation, _ = channels.eigenbasis(moments.covariance)
        weight = torch.ones(self.count)
        if self.method.label_bits:
            scales = torch.outer(scale, scale).double()
            both = (moments.covariance * scales, moments.between * scales)
            weight = channels.label_weights(*both, rotation, self.method.label_bits)
        mean = moments.mean.float()
        return Basis(rotation.half().float(), mean, scale.float(), weight.float())

    def on(self, device: torch.device) -> Basis | None:
        """The basis in which smashed data cross; None for channels, or layers that learn theirs."""
        if self.basis is None or self.method.basis == "learned":
            return None
        return self.basis.to(device)

    def to_send(self) -> dict[str, Tensor]:
        """What crosses at the start of a round; nothing of no basis, or of one that trains."""
        if self.basis is None or self.method.basis == "learned":
            return {}
        basis = self.basis
        parts = {name: getattr(basis, name) for name in PARTS}
        return parts | {"rotation": basis.rotation.half()}

    def state_dict(self) -> dict[str, Tensor]:
        """What the next round's basis depends on."""
        basis = {} if self.basis is None else {n: getattr(self.basis, n) for n in PARTS}
        facts = {"round": torch.tensor(self._round), "due": torch.tensor(self._due)}
        measured = {str(client): one for client, one in self.measured.items()}
        return joined({"measured": measured, "basis": basis, "now": facts})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        measured = unprefixed(state, "measured/")
        self.measured = {int(client): one.clone() for client, one in measured.items()}
        basis = unprefixed(state, "basis/")
        self.basis = Basis(**{n: basis[n].clone() for n in PARTS}) if basis else None
        self._round, self._due = int(state["now/round"]), bool(state["now/due"])


def measured_size(method: ACPSL, count: int, classes: int) -> tuple[int, int]:
    """How many numbers a client measures, and how many of them, the first, are moments."""
    moments = channels.moments_size(count, classes if method.by_class else 1)
    return moments + (count if method.basis == "gradient" else 0), moments


@torch.no_grad()
def start_learned(model: SplitModel, backs: Sequence[nn.Module], basis: Basis) -> dict[str, Tensor]:
    """Turn the layers around the cut to a basis of what the first gives; the network stays.

    With M, b of `mix` and N, d of `unmix`: M' = W U^T M, b' = W U^T (b - mu), N' = N U W^-1 and
    d' = N mu + d.

    Args:
        model: the global network.
        backs: the server's layers, of which each has an `unmix`.
        basis: of the output of `mix`.

    Returns:
        The new tensors of the client's layers by name, which must reach the clients.
    """
    M, b = (model.front.get_parameter(f"mix.{name}") for name in ("weight", "bias"))
    basis = basis.to(b.device)
    M.copy_((basis.matrix @ M.flatten(1)).view(M.shape))
    b.copy_(basis.matrix @ (b - basis.mean))
    for back in backs:
        N, d = (back.get_parameter(f"unmix.{name}") for name in ("weight", "bias"))
        d.add_(N.flatten(1) @ basis.mean)
        N.copy_((N.flatten(1) @ basis.inverse_matrix).view(N.shape))
    return {"front.mix.weight": M.detach().cpu(), "front.mix.bias": b.detach().cpu()}
