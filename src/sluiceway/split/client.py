"""The client's side: its data, its front, and in a U-shape its tail with the loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluiceway.channels import Basis
from sluiceway.core.batches import Batch, Examples
from sluiceway.core.messages import WireError, message_of, take_values
from sluiceway.core.parameters import exchanged
from sluiceway.core.seeds import derive_seed
from sluiceway.core.settings import SplitTraining
from sluiceway.split.config import (
    SplitConfig,
    SplitModel,
    TrainedLayers,
    batch_counts,
    joined,
    own_copy,
    summed_losses,
)
from sluiceway.split.defence import NOISE, distance_correlation, noisy
from sluiceway.split.memory import ExampleMemory, crossed, to_cross
from sluiceway.split.messages import read_round_start
from sluiceway.split.packing import BatchContext, BatchId, Encoded, Message
from sluiceway.split.scorers import ChannelScorer
from sluiceway.strategies import LocalContext, Strategy
from sluiceway.strategies.base import unprefixed


@dataclass(frozen=True)
class SentBatch:
    """What a client keeps of a batch until its gradient has returned.

    Attributes:
        smashed: with its graph.
        context: of the message.
        labels: on the CPU.
        penalty: the client's own loss of its front, or None.
    """

    smashed: Tensor
    context: BatchContext
    labels: Tensor
    penalty: Tensor | None = None


class SplitClient:
    """One client, as a `ClientProxy` of this process.

    Args:
        client_id: from 0.
        examples: its data; labels stay here in a U-shape.
        model: whose front and tail are copied.
        config: what both sides know.
        strategy: averages the client's layers.
        scorer: rates channels, or None.
        seed: of the whole run.
    """

    def __init__(
        self,
        client_id: int,
        examples: Examples,
        model: SplitModel,
        config: SplitConfig,
        strategy: Strategy,
        scorer: ChannelScorer | None,
        seed: int,
    ) -> None:
        self.client_id, self.size, self.examples = client_id, len(examples), examples
        self.front, self.tail = own_copy(model.front), copy.deepcopy(model.tail)
        self.config, self.strategy, self.scorer, self.seed = config, strategy, scorer, seed
        self.smallest = model.smallest[0]
        self.mask: Tensor | None = None
        self.basis: Basis | None = None
        self.layers = model._replace(front=self.front, tail=self.tail).client_layers()
        self.owned = exchanged(self.layers)
        self.params = {n: p for n, p in self.owned.items() if isinstance(p, nn.Parameter)}
        self.trained = TrainedLayers(self.layers, config.training)
        self.waiting: dict[BatchId, SentBatch] = {}
        self.losses: list[tuple[int, Tensor]] = []
        self.state: dict[str, Tensor] = {}
        #: What the server read of each example so far.
        self.memory = ExampleMemory() if config.link.delta else None

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept from round to round, but the layers that the server sends; not copied."""
        counts = {n: b for n, b in self.layers.named_buffers() if n not in self.owned}
        scorer = {} if self.scorer is None else self.scorer.state_dict()
        memory = {} if self.memory is None else self.memory.state_dict()
        return joined(
            {
                "counts": counts,
                "optimiser": self.trained.state_dict(),
                "scorer": scorer,
                "state": self.state,
                "memory": memory,
            }
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave, between rounds."""
        counts = dict(self.layers.named_buffers())
        for name, value in unprefixed(state, "counts/").items():
            counts[name].copy_(value)
        self.trained.load_state_dict(unprefixed(state, "optimiser/"))
        if self.scorer is not None:
            # "meter" is what the scorer was called when the first checkpoints were written.
            found = unprefixed(state, "scorer/") or unprefixed(state, "meter/")
            self.scorer.load_state_dict(found)
        self.state = unprefixed(state, "state/")
        if self.memory is not None:
            self.memory.load_state_dict(unprefixed(state, "memory/"))

    # -- a round -------------------------------------------------------------------------------

    @torch.no_grad()
    def rate(self) -> bytes:
        """Rate channels before anything crosses: one pass of the front, as it is, over the data.

        Returns:
            The message with the scores, which crosses where masks are merged.
        """
        assert self.scorer is not None
        self.trained.train()
        front = copy.deepcopy(self.front)  # BatchNorm counts what it sees
        parts = torch.arange(self.size).split(self.config.training.batch_size)
        for part in parts[:: self.scorer.every]:
            if len(part) >= self.smallest:
                batch = Batch.of(self.examples, part, self.config.device)
                self.scorer.watch(batch.run(front), batch.labels)
        scores = self.scorer.scores()
        parts = {} if scores is None else {"scores": {"channels": scores.float()}}
        return message_of(parts, {"client": self.client_id})

    def begin(
        self, round: int, message: bytes, mask: Tensor | None = None, forget: bool = False
    ) -> None:
        """Take the layers of a round, and let the strategy start.

        Args:
            message: the server's, see `read_round_start`.
            mask: where it does not cross, because the client knows it by itself.
            forget: begin the memory of delta coding anew, as the server does.

        Raises:
            WireError: it is no such message, of another round, or its tensors or mask do not fit
                the client's layers.
        """
        broadcast, merged, basis = read_round_start(message, round, self.config.shape[0])
        take_values(self.owned, broadcast.tensors, needed=self.owned)
        self.mask = mask if merged is None else merged
        if forget and self.memory is not None:
            self.memory.forget(self.client_id)
        if self.scorer is not None:
            self.scorer.begin(round)
        self.basis = None if basis is None else basis.to(self.config.device)
        self.role = LocalContext(
            model=self.layers,
            params=self.params,
            received={n: p.detach().clone() for n, p in self.params.items()},
            broadcast=broadcast,
            layout=self.strategy.layout,
            observer=None,
            state=self.state,
        )
        self.strategy.start_training(self.role)
        self._batches = self.batches(round)
        epochs = self.config.training.local_epochs
        self.count = len(self.config.epoch_batches(self.size, self.smallest, epochs))

    def batches(self, round: int) -> Iterator[tuple[BatchId, Batch, Tensor]]:
        """The client's batches of a round on the CPU, shuffled and augmented by their own seed.

        Each with the numbers of its examples, [B] int64.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, round, self.client_id))
        count = 0
        for _ in range(self.config.training.local_epochs):
            order = torch.randperm(self.size, generator=generator)
            for part in order.split(self.config.training.batch_size):
                if len(part) >= self.smallest:
                    batch = Batch.of(self.examples, part, torch.device("cpu"), generator)
                    yield BatchId(self.client_id, round, count), batch, part
                    count += 1

    def end(self, round: int, crossing: bool) -> tuple[bytes, Tensor | None]:
        """The message at the end of a round, see `RoundEnd`; and the scores, [C].

        Args:
            crossing: the scores are in the message too.
        """
        scores = self.scorer.scores() if self.scorer is not None else None
        extra = dict(self.strategy.finish_training(self.role))
        model = {
            piece.key: piece.of(self.owned)
            for piece in self.strategy.shared_pieces
            if self.strategy.sends(piece, ())
        }
        parts = {"model": model, "extra": extra, "counts": batch_counts(self.layers)}
        if scores is not None and crossing:
            parts["scores"] = {"channels": scores.float()}
        if self.tail is not None:
            examples = sum(examples for examples, _ in self.losses)
            total = sum(summed_losses(self.losses))
            parts["loss"] = {
                "examples": torch.tensor(examples),
                "sum": torch.tensor(total, dtype=torch.float64),
            }
            self.losses = []
        facts = {"client": self.client_id, "round": round, "examples": self.size}
        return message_of(parts, facts), scores

    # -- a step --------------------------------------------------------------------------------

    def request(self, batch_id: BatchId, crosses: bool) -> None:
        """Leave the next batch out, unless it crosses; see `ClientProxy`."""
        if not crosses:
            self._next(batch_id)

    def smashed_data(self, batch_id: BatchId) -> Encoded:
        """The message of the next batch. Raises WireError if it is not the requested one."""
        return self.send(batch_id, *self._next(batch_id))

    def _next(self, batch_id: BatchId) -> tuple[Batch, Tensor]:
        """The next batch, and which examples are in it."""
        found, batch, rows = next(self._batches, (None, None, None))
        if found != batch_id or batch is None or rows is None:
            raise WireError(f"batch {batch_id.batch} is not the next one")
        return batch, rows

    def send(self, batch_id: BatchId, batch: Batch, rows: Tensor) -> Encoded:
        """The message of what the front makes of a batch; with labels, but in a U-shape.

        Args:
            rows: which examples are in it, [B] int64.
        """
        self.trained.train()
        moved = batch.to(self.config.device)
        smashed = moved.run(self.front)
        if self.scorer is not None and batch_id.batch % self.scorer.every == 0:
            self.scorer.watch(smashed.detach(), batch.labels)
        penalty = self.penalty(moved, smashed)
        labels = None if self.tail else batch.labels
        finer = self.config.finer(batch_id.batch, self.count)
        sent, link = smashed.detach(), self.config.finer_link if finer else self.config.link
        if link.noise:
            sent = noisy(sent, link.noise, derive_seed(self.seed, *batch_id, NOISE))
        if self.memory is None:
            sent = to_cross(sent, self.basis)
            message, context = link.up(sent, batch_id, labels, self.mask)
        else:
            before = self.memory.read(self.client_id, rows, self.size, sent, self.basis)
            sent = to_cross(sent, self.basis, before)
            message, context = link.up(sent, batch_id, labels, self.mask, rows=rows)
            opened = link.open(message, device=self.config.device).values
            self.memory.write(self.client_id, rows, crossed(opened, self.basis, before))
        if self.config.gradients or self.tail:
            self.waiting[batch_id] = SentBatch(smashed, context, batch.labels, penalty)
        return message

    def penalty(self, batch: Batch, smashed: Tensor) -> Tensor | None:
        """The client's own loss of its front, `train.nopeek`; None if it has none.

        Args:
            batch: on the device of the layers.
            smashed: what the front makes of it.
        """
        training = self.config.training
        if not isinstance(training, SplitTraining) or not training.nopeek:
            return None
        if not isinstance(batch.inputs, Tensor):
            raise ValueError("train.nopeek needs inputs that are one tensor")
        return training.nopeek * distance_correlation(batch.inputs, smashed)

    def tail_gradient(self, batch_id: BatchId, message: Message) -> Encoded:
        """In a U-shape: run the tail on what the server made; returns the gradient of the loss.

        Where no gradient will come for the front, the tail steps at once.
        """
        assert self.tail is not None
        link, device = self.config.tail_link, self.config.device
        labels = self.waiting[batch_id].labels.to(device, non_blocking=True)
        opened = link.open(message, batch=batch_id, labels=False, device=device)
        hidden = opened.values.requires_grad_()
        # A copy, since the tail's first layer may work in place, which a leaf does not allow.
        loss = self.config.loss(self.tail(hidden.clone()), labels)
        loss.backward()
        self.losses.append((len(labels), loss.detach()))
        if not self.config.gradients:
            del self.waiting[batch_id]
            self._step()
        assert hidden.grad is not None
        return link.down(hidden.grad, opened.context)

    def receive(self, batch_id: BatchId, message: Message) -> None:
        """Open the gradient of that batch, go backward through the front, and step."""
        sent = self.waiting.pop(batch_id)
        gradient = self.config.link.open_gradient(message, sent.context, self.config.device)
        if self.basis is not None:
            gradient = self.basis.gradient_back(gradient)
        if self.scorer is not None and batch_id.batch % self.scorer.every == 0:
            self.scorer.watch_gradient(sent.smashed.detach(), gradient)
        if sent.penalty is not None:
            torch.autograd.backward([sent.smashed, sent.penalty], [gradient, None])
        elif sent.smashed.requires_grad:
            sent.smashed.backward(gradient)
        self._step()

    def _step(self) -> None:
        """Step on the gradients as the strategy corrects them."""
        if self.trained.optimiser is None:
            return
        if (penalty := self.strategy.penalty(self.role)) is not None:
            penalty.backward()
        self.strategy.correct(self.role)
        self.trained.step()
        self.role.steps += 1
