"""What a strategy is: how a server combines updates, and what it asks of a client.

A strategy lives on both sides of the wire. Its server half holds the global tensors and folds
updates into them; its client half may add a term to the loss, correct gradients and send
something extra back. So a new method is one file. It decides nothing about transport.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from sluiceway.moe import Block, BlockRouting, MoELayout, NoExpertsError, Observer, ParamSlice
from sluiceway.strategies.server import ServerOptimizer


@dataclass(frozen=True)
class Broadcast:
    """What the server sends to every client of a round.

    Attributes:
        round: number of the round, from 1.
        tensors: the shared parameters and buffers, by their name in the model.
        extra: what else the strategy sends (control variates, global routing, ...).
    """

    round: int
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What one client sends back.

    Attributes:
        client: number of the client, from 0.
        round: the round it answers.
        examples: how many training examples the client holds, > 0.
        tensors: the trained values (not differences) by `ParamSlice.key`; experts that saw no token
            are absent. May be a lazy mapping over a file.
        routing: what the client measured per MoE block; empty for a dense model.
        extra: what else the strategy's client half sends.
        metrics: numbers for people to read (loss, seconds, ...).
        nbytes: length of the packed message, in bytes.
    """

    client: int
    round: int
    examples: int
    tensors: Mapping[str, Tensor]
    routing: Sequence[BlockRouting] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    nbytes: int = 0


@dataclass
class LocalContext:
    """One client in one round, as its strategy's client half sees it.

    Attributes:
        model: the model being trained, in place.
        params: the trained parameters by name, which the model computes with.
        received: the values they had when the round began, by name (same shapes).
        broadcast: the server's message.
        layout: where routers and experts are; no blocks for a dense model.
        observer: routing of the training forwards; `observer.last` is the newest step.
        state: tensors that stay with this client from round to round and never cross.
        masters: what the optimiser steps, by name: the parameters themselves, or float32 copies
            of half-precision ones, which follow each step. `correct` finds gradients here.
        steps: optimiser steps taken in this round.
        passes: how often each example is trained on in this round.
        scratch: for the strategy to use within this round.
    """

    model: nn.Module
    params: dict[str, nn.Parameter]
    received: Mapping[str, Tensor]
    broadcast: Broadcast
    layout: MoELayout
    observer: Observer | None
    state: dict[str, Tensor]
    master_params: dict[str, nn.Parameter] = field(default_factory=dict)
    steps: int = 0
    passes: float = 1.0
    scratch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.master_params = self.master_params or self.params


class UpdateRule(Protocol):
    """A function on a round's updates, called before the strategy adds them up; see `robust`.

    It may have a method `least()`, how many clients a round must have for it to be of use; a run
    of fewer is refused.
    """

    def streams(self) -> bool:
        """True if it changes each update by itself, so that it may be called with one at a time."""
        ...

    def __call__(self, updates: list[Update], strategy: Strategy) -> list[Update]:
        """The updates to add up instead; the strategy is read and not changed."""
        ...


class Mechanism(Protocol):
    """Differential privacy of clients around a strategy; see `privacy.Gaussian`."""

    where: str
    noise_seed: int | None
    key: bytes
    limit: float
    count: int
    multiplier: float
    delta: float

    def setup(self, releases: int) -> None:
        """Begin a run of at most so many releases in which one client has a part."""
        ...

    def spent(self, releases: int) -> float:
        """Epsilon after so many releases."""
        ...

    def begin(self) -> None:
        """Begin to count the updates of a round, at the server."""
        ...

    def streams(self) -> bool:
        """True: updates are changed one at a time."""
        ...

    def __call__(self, updates: list[Update], strategy: Strategy) -> list[Update]:
        """Clipped updates, which count alike, at the server."""
        ...

    def finish(self, strategy: Strategy, number: int) -> None:
        """Add noise to the strategy's new values of a round, at the server."""
        ...

    def sent(
        self,
        update: Update,
        received: Mapping[str, Tensor],
        blocks: Sequence[Block],
        state: dict[str, Tensor],
    ) -> Update:
        """What leaves a client in place of its update."""
        ...

    def head_share(self, sums: Tensor) -> Tensor:
        """A client's sums for the head's start as they count."""
        ...

    def head_sent(self, sums: Tensor, client: int) -> Tensor:
        """What leaves a client of its sums."""
        ...

    def head_total(self, total: Tensor, size: float) -> Tensor:
        """The sums of all clients, for `fedalign.means_head`."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What the next round depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a dictionary that `state_dict` is a part of."""
        ...


class Strategy:
    """Base of all strategies. `FedAvg` is the one to start from when writing another.

    A round on the server: `broadcast`, then `begin`, `accumulate` for each update as it arrives,
    `finish`. A round on a client: `start_training`, then `penalty` and `correct` in every step,
    `finish_training`.
    """

    name: ClassVar[str]
    #: Needs a mixture-of-experts model.
    needs_experts: ClassVar[bool] = False
    #: Its rounds have clients that train.
    trains_clients: ClassVar[bool] = True
    #: Clients count by what they report of their routing.
    reads_routing: ClassVar[bool] = False

    tensors: dict[str, Tensor]
    layout: MoELayout
    clients: int
    #: Who holds what, [clients, classes] int64, as clients said when they joined. The round loop
    #: sets it before the first round; None in Flower's own loop, which does not ask.
    label_counts: Tensor | None = None
    #: Applied in turn to the updates of every round, before they are added up.
    rules: tuple[UpdateRule, ...] = ()
    #: Steps along what every round changed; None takes the round's values as they are.
    server: ServerOptimizer | None = None
    #: Clips updates and adds noise; None does neither.
    privacy: Mechanism | None = None

    def with_rules(self, *rules: UpdateRule) -> Self:
        """Itself, with these rules on its updates, such as `Median()`."""
        self.rules = rules
        return self

    def with_server(self, optimizer: ServerOptimizer) -> Self:
        """Itself, with a server optimiser on every round's change, such as `Momentum()`.

        Raises:
            ValueError: it has one of its own.
        """
        if self.server is not None:
            raise ValueError(f"{self.name} has a server optimiser of its own")
        self.server = optimizer
        return self

    def with_privacy(self, privacy: Mechanism) -> Self:
        """Itself, with differential privacy of clients, such as `Gaussian(epsilon=4, clip=1)`."""
        self.privacy = privacy
        return self

    # -- the server's half ---------------------------------------------------------------------

    def setup(self, tensors: Mapping[str, Tensor], layout: MoELayout, clients: int) -> None:
        """Take the initial values of all that is trained.

        Args:
            tensors: trained parameters, exchanged buffers and `server_owned` ones, by name.
            layout: where routers and experts live; no blocks for a dense model.
            clients: how many clients there are in all, sampled or not.

        Raises:
            NoExpertsError: the strategy needs experts and the model has none.
        """
        if self.needs_experts and not layout.blocks:
            raise NoExpertsError(
                f"method {self.name} needs a mixture-of-experts model, and this one is dense; "
                "give a MoE model, or upcycle a dense one (model.experts = 8)"
            )
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.layout = layout
        self.clients = clients
        self.pieces: tuple[ParamSlice, ...] = layout.pieces(self.tensors)
        if self.server is not None:
            self.server.setup(self.tensors)
        owned = self.server_owned(layout)
        self.shared_pieces = tuple(
            p for p in self.pieces if p.param not in owned and not self.private(p.param)
        )

    def broadcast(self, number: int) -> Broadcast:
        """The message that opens round `number` (from 1)."""
        shared = {name: t for name, t in self.tensors.items() if not self.private(name)}
        return Broadcast(number, shared, self.server_extra())

    def server_extra(self) -> Mapping[str, Tensor]:
        """What the broadcast carries besides the model; nothing unless a strategy says so."""
        return {}

    def client_extra(self) -> Mapping[str, Tensor] | None:
        """What `finish_training` may send, as tensors of the same names, shapes and types.

        An update with anything else is refused. None leaves it open: then only NaN and Inf are.
        """
        return None

    def fault(self, update: Update) -> str | None:
        """What else is wrong with an update whose tensors are as they must be; None if nothing."""
        return None

    def begin(self, number: int, updates: Sequence[Update] = ()) -> None:
        """Begin to add up the updates of round `number`, from 1; what was begun before is dropped.

        Args:
            number: of the round.
            updates: all of the round's updates, in the order in which `accumulate` is given them;
                none where `streams` says that they are not needed.
        """
        raise NotImplementedError

    def accumulate(self, update: Update) -> None:
        """Add one update to the running sums. The global values stay as they are."""
        raise NotImplementedError

    def finish(self) -> None:
        """Put the new global values into a new `self.tensors`; without any update they stay.

        The old ones are not changed in place: a server optimiser compares the two.
        """
        raise NotImplementedError

    def streams(self) -> bool:
        """True if `begin` needs no updates, so that each is forgotten once it is added."""
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next round depends on, as named tensors."""
        states = {} if self.server is None else self.server.state_dict()
        private = {} if self.privacy is None else self.privacy.state_dict()
        return {f"tensors/{n}": tensor for n, tensor in self.tensors.items()} | states | private

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave; call after `setup`."""
        self.tensors = unprefixed(state, "tensors/")
        if self.server is not None:
            self.server.load_state_dict(state)
        if self.privacy is not None:
            self.privacy.load_state_dict(state)

    def report(self) -> dict[str, float]:
        """Numbers about the last aggregation for metrics.jsonl."""
        return {}

    def needs_sums_alone(self) -> bool:
        """Whether the new values follow from the sum of w_i and of the clients' weighted values."""
        return False

    # -- what is trained and what crosses ------------------------------------------------------

    def trains(self, param: str, layout: MoELayout) -> bool:
        """Whether the named parameter is trained at all."""
        return True

    def server_owned(self, layout: MoELayout) -> frozenset[str]:
        """Parameters that clients receive and never train: only the server may change them."""
        return frozenset()

    def private(self, param: str) -> bool:
        """Whether the named parameter stays with its client and never crosses."""
        return False

    def sends(self, piece: ParamSlice, routing: Sequence[BlockRouting]) -> bool:
        """Whether a client with this routing sends the piece: all but experts without a token."""
        owner = self.layout.owner(piece.key)
        return owner is None or float(routing[owner[0]].load[owner[1]]) > 0

    def reports(self, routing: list[BlockRouting], passes: float) -> list[BlockRouting]:
        """What a client tells of its routing.

        Args:
            routing: as it was measured.
            passes: how often it trained on each of its examples.
        """
        return routing

    def wants_regions(self) -> bool:
        """Whether updates must carry the experts' region means ([E, d] per block)."""
        return False

    def wants_samples(self) -> int:
        """How many tokens of each block a client's observer should keep; they never cross."""
        return 0

    def wants_label_counts(self) -> bool:
        """Whether the server must know `label_counts` before the first round."""
        return False

    # -- the client's half ---------------------------------------------------------------------

    def start_training(self, client: LocalContext) -> None:
        """Called once the received values are in the model, before the first step."""

    def penalty(self, client: LocalContext) -> Tensor | None:
        """A term that is added to the task loss of this step (scalar with graph), or None."""
        return None

    def correct(self, client: LocalContext) -> None:
        """Called after backward, before clipping and the optimiser's step.

        Gradients are in `client.master_params`; it is not called for a step that is left out
        because they overflowed.
        """

    def finish_training(self, client: LocalContext) -> Mapping[str, Tensor]:
        """What the update carries besides the model, at the end of local training."""
        return {}


def unprefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of `state` below `prefix`, cloned, without it."""
    return {
        key.removeprefix(prefix): value.clone()
        for key, value in state.items()
        if key.startswith(prefix)
    }


class RunningMean:
    """A weighted mean of updates, taken one at a time.

    After adding x_1..x_n with weights v_1..v_n it holds sum_i v_i x_i / sum_i v_i, in float32 or
    wider whatever the updates' type. A piece that was given no weight keeps its old value, and
    the first value added is held exactly: one client alone gets its own tensors back. Memory:
    one copy of the model, however many updates.
    """

    def __init__(self, old: Mapping[str, Tensor]) -> None:
        self.old = old
        self.mean = {
            name: t.to(torch.promote_types(t.dtype, torch.float32), copy=True)
            for name, t in old.items()
        }
        self.total: dict[str, float | Tensor] = {}

    def add(self, piece: ParamSlice, value: Tensor | None, weight: float | Tensor) -> None:
        """Count one client's value of one piece.

        Args:
            piece: which tensor.
            value: same shape as the piece; None means unchanged (the old value counts).
            weight: >= 0, a number, or one for each row of the leading axis ([E] for a gate), or
                of more axes, as broadcast against the piece.
        """
        mean = piece.of(self.mean)
        value = (piece.of(self.old) if value is None else value).to(mean)
        before = self.total.get(piece.key, 0.0)
        total = self.total[piece.key] = before + weight
        # lerp is exact at both ends, which a plain `mean + share * (value - mean)` is not
        if isinstance(total, float):
            if weight > 0:
                mean.lerp_(value, weight / total)
            return
        share = torch.where(total > 0, weight / total.clamp_min(1e-300), 0.0)
        if share.ndim == 1:
            share = share.reshape(-1, *[1] * (mean.ndim - 1))
        mean.lerp_(value, share.to(mean))

    def result(self) -> dict[str, Tensor]:
        """The mean of every tensor, in the tensors' own types."""
        return {name: mean.to(self.old[name].dtype) for name, mean in self.mean.items()}
