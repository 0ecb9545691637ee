"""Differential privacy of clients: a round's updates are clipped, and Gaussian noise is added.

The mathematics is pure functions: how much noise an epsilon needs, and what was spent. Rounds that
release N(f(D), z^2 S^2), S the sensitivity of f, compose exactly: k of them are one Gaussian
mechanism of mu = sqrt(k) / z [paper: Dong, Roth, Su, arXiv 1905.02383], whose (epsilon, delta) is
known in closed form [paper: Balle and Wang, arXiv 1805.06530, theorem 8]. Nothing is gained from
sampling clients: who takes part follows from `run.seed`, which is no secret [ours].
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from scipy.special import log_ndtr
from torch import Tensor

from sluiceway.moe import Block, BlockRouting
from sluiceway.strategies.base import Strategy, Update
from sluiceway.strategies.parameters import PARAMETERS
from sluiceway.strategies.robust import Change

#: Largest epsilon that is told; beyond it nothing is promised.
LARGEST_EPSILON = 1e6
#: Where in a run a noise belongs, besides its round and client.
HEAD, UPDATE, MEAN, COUNT = range(4)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The smallest delta of a Gaussian mechanism, in [0, 1].

    delta = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)
    [paper: arXiv 1805.06530, theorem 8].

    Args:
        mu: sensitivity divided by the standard deviation, >= 0.
        epsilon: >= 0.
    """
    if mu == 0:
        return 0.0
    above = log_ndtr(mu / 2 - epsilon / mu)
    below = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return max(0.0, float(math.exp(above) * -math.expm1(min(0.0, below - above))))


def gaussian_epsilon(noise: float, releases: int, delta: float) -> float:
    """The smallest epsilon of so many releases, each with noise of `noise` sensitivities.

    Args:
        noise: > 0. releases: >= 0. delta: in (0, 1).

    Returns:
        Infinity above `LARGEST_EPSILON`.
    """
    from scipy.optimize import brentq

    mu = math.sqrt(releases) / noise
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    if gaussian_delta(mu, LARGEST_EPSILON) > delta:
        return math.inf
    found: float = brentq(
        lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, LARGEST_EPSILON, xtol=1e-9
    )
    return found


def noise_for(epsilon: float, releases: int, delta: float) -> float:
    """The least noise, in sensitivities, with which so many releases cost `epsilon`.

    Args:
        epsilon: > 0. releases: >= 1. delta: in (0, 1).
    """
    from scipy.optimize import brentq

    def over(log_mu: float) -> float:
        return gaussian_delta(math.exp(log_mu), epsilon) - delta

    # At mu = 50 + 2 epsilon hardly anything is left of privacy; at e^-40 hardly any is lost.
    log_mu = brentq(over, -40.0, math.log(50 + 2 * epsilon), xtol=1e-13)
    return math.sqrt(releases) / math.exp(log_mu)


def split_noise(noise: float, count_noise: float) -> float:
    """Noise of the sum where noise of the count of clipped updates is spent besides.

    z_sum = (z^-2 - (2 s)^-2)^(-1/2), so that both together cost what z alone does; the count is of
    bits shifted by a half, whose sensitivity is 1/2 [paper: Andrew et al., arXiv 1905.03871].

    Args:
        noise: z, > 0. count_noise: s, the count's standard deviation, > z / 2.
    """
    return float((noise**-2 - (2 * count_noise) ** -2) ** -0.5)


def next_clip(clip: float, within: float, quantile: float, rate: float) -> float:
    """The next limit: clip e^(-rate (within - quantile)) [paper: arXiv 1905.03871].

    Args:
        clip: > 0. within: share of updates within it, as far as it is known, clamped to [0, 1].
        quantile: share that is aimed at. rate: > 0.
    """
    return clip * math.exp(-rate * (min(max(within, 0.0), 1.0) - quantile))


@dataclass(config=PARAMETERS, kw_only=True)
class Gaussian:
    """Client-level differential privacy: clipped updates with Gaussian noise.

    With it clients count alike, whatever they hold, and no client tells its loss, its accuracy or
    its counts of classes. The head's start from class means is one release more; each client's sums
    count with norm one [ours].

    clip: L2 norm of a client's change of the model, at most, > 0; larger ones are shortened to it.
    epsilon: of the whole run, for each client, > 0; the noise follows from it. Give this or noise.
    noise: standard deviation of a round's noise, in sensitivities, > 0.
    delta: probability with which epsilon may not hold, in (0, 1); well below one over the number of
        clients.
    where: "server": the server sees every update, and noise is added to their mean: whoever sees
        the models learns little of one client. One client's part is replaced by nothing: the
        sensitivity is clip. For methods that need sums alone. "client": each client adds noise
        before anything leaves it, so that the server learns little as well; that takes 2
        sqrt(clients) times more noise, as one update is replaced by any other. For all methods that
        weigh clients by nothing they measured.
    quantile: with where = "server", the share of updates that is to be within the limit, in (0, 1):
        clip is the first limit, and follows [paper: arXiv 1905.03871]; None leaves it.
    rate: how fast the limit follows, > 0.
    noise_seed: for results that can be repeated: noise by this number, in [0, 2^63). Epsilon then
        holds against nobody who knows it. None draws from a secret, which checkpoints hold.
    """

    clip: float = Field(gt=0, le=1e9)
    epsilon: float | None = Field(default=None, gt=0, le=1e4)
    noise: float | None = Field(default=None, ge=1e-3, le=1e6)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    where: Literal["server", "client"] = "server"
    quantile: float | None = Field(default=None, gt=0, lt=1)
    rate: float = Field(default=0.2, gt=0, le=10)
    noise_seed: int | None = Field(default=None, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def one_of_both(self) -> Gaussian:
        """Raise ValueError unless one of epsilon and noise is given."""
        if (self.epsilon is None) == (self.noise is None):
            raise ValueError("give epsilon or noise, one of them")
        if self.quantile is not None and self.where == "client":
            raise ValueError("quantile needs where = 'server': no client tells its norm")
        return self

    def setup(self, releases: int) -> None:
        """Begin a run of at most so many releases, >= 1, in which one client has a part."""
        self.multiplier = self.noise or noise_for(self.epsilon or 0, releases, self.delta)
        self.limit = self.clip
        self.secret = torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.uint8)
        #: A site's own secret, which stands above `noise_seed`.
        self.key = b""
        self.begin()

    def spent(self, releases: int) -> float:
        """Epsilon after so many releases."""
        return gaussian_epsilon(self.multiplier, releases, self.delta)

    # -- at the server -------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin to count the updates of a round."""
        self.count = self.within = 0

    def streams(self) -> bool:
        return True

    def __call__(self, updates: list[Update], strategy: Strategy) -> list[Update]:
        """Updates with changes of `limit` at most, which count alike."""
        return [replace(self.clipped(one, strategy), examples=1, metrics={}) for one in updates]

    def clipped(self, update: Update, strategy: Strategy) -> Update:
        """An update with its change shortened to `limit`, where it is longer."""
        old = {piece.key: piece.of(strategy.tensors) for piece in strategy.shared_pieces}
        change = Change(update.tensors, old.get)
        self.count += 1
        self.within += change.norm <= self.limit
        return replace(update, tensors=change.within(self.limit))

    def finish(self, strategy: Strategy, number: int) -> None:
        """Add noise to the new mean of `count` >= 1 updates, and let the limit follow."""
        count, z = self.count, self.multiplier
        if self.quantile is not None:
            bits = max(count / 20, z)
            z = split_noise(z, bits)
        draw = self.generator(number, 0, MEAN)
        tensors = dict(strategy.tensors)
        for piece in strategy.shared_pieces:
            if tensors[piece.param] is strategy.tensors[piece.param]:
                tensors[piece.param] = tensors[piece.param].clone()
            value = piece.of(tensors)
            value.copy_(noised(value, z * self.limit / count, draw))
        strategy.tensors = tensors
        if self.quantile is not None:
            drawn = float(torch.randn((), generator=self.generator(number, 0, COUNT)))
            within = (self.within + bits * drawn) / count
            self.limit = next_clip(self.limit, within, self.quantile, self.rate)

    def state_dict(self) -> dict[str, Tensor]:
        """What the next round depends on."""
        # As bits, since norms are taken of what is of floating-point numbers, in float32.
        state = {"privacy/limit": torch.tensor(self.limit, dtype=torch.float64).view(torch.int64)}
        return state if self.noise_seed is not None else state | {"privacy/secret": self.secret}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a dictionary that `state_dict` is a part of; call after `setup`."""
        self.limit = float(state["privacy/limit"].view(torch.float64))
        self.secret = state.get("privacy/secret", self.secret).clone()

    # -- at a client ---------------------------------------------------------------------------

    def sent(
        self,
        update: Update,
        received: Mapping[str, Tensor],
        blocks: Sequence[Block],
        state: dict[str, Tensor],
    ) -> Update:
        """What leaves a client in place of its update, which has every piece.

        Args:
            received: what it was sent, by the keys of pieces.
            blocks: of the model; no routing is told.
            state: what the client keeps; has its secret.
        """
        update = replace(update, examples=1, metrics={})
        if self.where == "server":
            return update
        if self.noise_seed is None and not self.key:
            state.setdefault("privacy/secret", self.secret)
        draw = self.generator(
            update.round, update.client, UPDATE, secret=state.get("privacy/secret")
        )
        clipped = Change(update.tensors, received.get).within(self.limit)
        tensors = {
            key: noised(clipped[key], 2 * self.multiplier * self.limit, draw)
            for key in sorted(clipped)
        }
        return replace(update, tensors=tensors, routing=[unmeasured(block) for block in blocks])

    # -- the head's start ----------------------------------------------------------------------

    def head_share(self, sums: Tensor) -> Tensor:
        """A client's sums as they count, [C, d + 1]: of norm one, without counts."""
        held = sums.double().clone()
        held[:, -1] = 0
        share: Tensor = held / held.norm().clamp_min(1e-300)
        return share

    def head_sent(self, sums: Tensor, client: int) -> Tensor:
        """What leaves a client of its sums, [C, d + 1] float32."""
        if self.where == "server":
            return sums
        found = noised(self.head_share(sums), 2 * self.multiplier, self.generator(0, client, HEAD))
        found[:, -1] = 0
        return found.float()

    def head_total(self, total: Tensor, size: float) -> Tensor:
        """Sums for `means_head` from those of all clients, [C, d + 1] float64.

        Args:
            total: of `head_share`, or of what clients sent.
            size: norm of a feature vector, from data that are nobody's.
        """
        rows = total[:, :-1]
        if self.where == "server":
            rows = noised(rows, self.multiplier, self.generator(0, 0, HEAD))
        rows = rows * (size / rows.norm(dim=1, keepdim=True).clamp_min(1e-300))
        return torch.cat((rows, torch.ones(len(rows), 1).to(rows)), 1)

    def generator(
        self, number: int, client: int, place: int, secret: Tensor | None = None
    ) -> torch.Generator:
        """What draws the noise of a place in a run."""
        if self.key:
            key = self.key
        elif self.noise_seed is not None:
            key = self.noise_seed.to_bytes(8, "little")
        else:
            key = bytes((self.secret if secret is None else secret).tolist())
        digest = hashlib.blake2b(f"{number}/{client}/{place}".encode(), key=key, digest_size=8)
        found = torch.Generator()
        found.manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
        return found


def noised(value: Tensor, deviation: float, draw: torch.Generator) -> Tensor:
    """A tensor with Gaussian noise, drawn on the CPU so that it is the same on every device."""
    wide = torch.promote_types(value.dtype, torch.float32)
    noise = torch.randn(value.shape, generator=draw, dtype=wide)
    return (value.to(wide) + deviation * noise.to(value.device)).to(value.dtype)


def unmeasured(block: Block) -> BlockRouting:
    """A report that tells nothing: every expert was used alike."""
    experts = block.num_experts
    even = torch.ones(experts, dtype=torch.float64)
    return BlockRouting(even * block.top_k, even / experts, even * 0, None, experts)


#: Every mechanism by the name that `method.privacy.name` uses.
PRIVACY: dict[str, type[Any]] = {"gaussian": Gaussian}
