"""How one client trains and what it sends; how a model is evaluated on the test set.

A `Worker` holds one model and trains as every client in turn: the received values are written into
it, it trains in place, and the trained values go out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, Loss, is_alone, labels_of
from sluiceway.core.evaluation import Evaluation, evaluate
from sluiceway.core.handshake import ModelSignature, check_joining
from sluiceway.core.messages import take_values
from sluiceway.core.parameters import exchanged, frozen_modules, head_of
from sluiceway.core.seeds import derive_seed
from sluiceway.core.settings import Training
from sluiceway.core.signals import check_stop
from sluiceway.core.waits import counted
from sluiceway.errors import InputError
from sluiceway.fedalign import load_balance
from sluiceway.federated.stepping import (
    Stepper,
    checkpointable,
    checkpointed,
    master_params_of,
    refuse_reentrant,
)
from sluiceway.moe import (
    BlockRouting,
    BlockStep,
    MoELayout,
    Observer,
    find_adapters,
    find_layout,
    repair,
)
from sluiceway.strategies import Broadcast, LocalContext, Strategy, Update
from sluiceway.strategies.privacy import unmeasured


def prepare(model: nn.Module, strategy: Strategy, clients: int) -> None:
    """Settle what is trained, and hand the strategy the initial values.

    Parameters that the strategy does not train are frozen in the model, in place. Trained tensors
    are what crosses: parameters, and floating-point buffers of the modules around them. So is what
    only the server changes (`Strategy.server_owned`).

    Raises:
        NoExpertsError: the strategy needs experts and the model has none.
        ValueError: nothing is left to train, or experts are under reentrant checkpointing.
    """
    repair(model)
    layout = find_layout(model) or MoELayout((), find_adapters(model))
    layout = replace(layout, head=head_of(model))
    if layout.blocks:
        refuse_reentrant(model)
    for name, param in model.named_parameters():
        param.requires_grad_(param.requires_grad and strategy.trains(name, layout))
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError("nothing to train: every parameter of the model is frozen")
    tensors = exchanged(model)
    layout = trained_layout(layout, set(tensors))
    tensors |= {name: model.get_parameter(name) for name in sorted(strategy.server_owned(layout))}
    held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    strategy.setup(held, layout, clients)


def trained_layout(layout: MoELayout, names: set[str]) -> MoELayout:
    """What of a layout has parameters among `names`, with blocks numbered anew."""
    blocks = [
        block
        for block in layout.blocks
        if names & {*block.gate, *(p.param for expert in block.pieces for p in expert)}
    ]
    pairs = tuple(pair for pair in layout.adapters if pair.b.param in names)
    numbered = tuple(replace(block, position=i) for i, block in enumerate(blocks))
    return MoELayout(numbered, pairs, layout.head if names.issuperset(layout.head) else ())


class Worker:
    """One model that trains as any client, and evaluates.

    Args:
        model: trained in place.
        clients: each client's examples.
        test: the global test set; labels are class numbers.
        strategy: already set up with this model (see `prepare`).
        training: how a client trains.
        loss: task loss.
        device: where the model runs.
        seed: of the whole run.
        personal_examples: test examples that a client's own model is evaluated on, about; 0 for
            no evaluation.
        local_tests: each client's own test examples, on all of which its own model is evaluated
            instead; None without.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Sequence[Examples],
        test: Examples,
        strategy: Strategy,
        training: Training,
        *,
        loss: Loss = F.cross_entropy,
        device: torch.device | str = "cpu",
        seed: int = 0,
        personal_examples: int = 500,
        local_tests: Sequence[Examples] | None = None,
    ) -> None:
        if training.aux_loss and not strategy.layout.blocks:
            raise InputError(
                f"train.aux_loss = {training.aux_loss:g} has no effect here: it balances experts, "
                "and the model has none that are trained"
            )
        if training.routing_mask == "none" and not strategy.layout.blocks:
            raise InputError(
                'train.routing_mask = "none" has no effect here: it is about the tokens of '
                "experts, and the model has none that are trained"
            )
        if training.checkpointing:
            checkpointable(model)  # so that it fails before the first round and not in it
        self.model = model
        self.clients = clients
        self.test = test
        self.strategy = strategy
        self.training = training
        self.loss = loss
        self.seed = seed
        # Under privacy no client tells its accuracy.
        self.personal_examples = personal_examples if strategy.privacy is None else 0
        self.local_tests = local_tests
        self.layout = strategy.layout
        self.move(device)
        check_joining(ModelSignature.of(strategy.tensors), ModelSignature.of(self.exchanged))
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.initial = {n: t.clone() for n, t in strategy.tensors.items() if strategy.private(n)}
        self.still = frozen_modules(model)
        self.trains = False

    def move(self, device: torch.device | str) -> None:
        """Go on on another device."""
        self.device = torch.device(device)
        self.model.to(device)
        owned = sorted(self.strategy.server_owned(self.layout))
        self.exchanged = exchanged(self.model) | {n: self.model.get_parameter(n) for n in owned}
        # What is neither exchanged nor trained must not pass from one client to the next.
        others = {n: b for n, b in self.model.named_buffers() if n not in self.exchanged}
        self.others = [(buffer, buffer.clone()) for buffer in others.values()]

    def train(
        self, number: int, broadcast: Broadcast, state: dict[str, Tensor], *, personal: bool
    ) -> Update:
        """Train as client `number` for one round.

        Args:
            number: of the client, from 0; it must hold at least one example.
            broadcast: the server's message.
            state: what the client keeps; changed in place.
            personal: also evaluate the client's own model after training, see
                `personal_accuracy`.

        Raises:
            WireError: the message's tensors are not those that are exchanged.
        """
        examples = self.clients[number]
        self.load(broadcast.tensors, needed=self.exchanged.keys() - self.initial.keys())
        if self.initial:
            self.load({n: state.get(f"private/{n}", t) for n, t in self.initial.items()})
        with (
            self.randomness(derive_seed(self.seed, broadcast.round, number)),
            self.observation() as seen,
        ):
            client = LocalContext(
                model=self.model,
                params=self.params,
                received={n: p.detach().clone() for n, p in self.params.items()},
                broadcast=broadcast,
                layout=self.layout,
                observer=seen,
                state=state,
                master_params=master_params_of(self.params),
                passes=self.training.passes(len(examples)),
            )
            self.strategy.start_training(client)
            metrics = self.fit(client, examples)
            routing = self.reported(seen.routing() if seen else [], client.passes)
            extra = dict(self.strategy.finish_training(client))
        state |= {f"private/{n}": self.exchanged[n].detach().cpu().clone() for n in self.initial}
        if personal:
            metrics |= self.personal_accuracy(number)
        tensors = {
            piece.key: piece.of(self.exchanged).detach()
            for piece in self.strategy.shared_pieces
            if self.strategy.sends(piece, routing)
        }
        update = Update(
            number, broadcast.round, len(examples), tensors, routing, extra=extra, metrics=metrics
        )
        return self.sent(update, broadcast, state)

    def reported(self, routing: list[BlockRouting], passes: float) -> list[BlockRouting]:
        """The routing by which a client's tensors are chosen; under its own noise it tells none."""
        private = self.strategy.privacy
        if private is None or private.where == "server":
            return self.strategy.reports(routing, passes)
        return [unmeasured(block) for block in self.layout.blocks]

    def sent(self, update: Update, broadcast: Broadcast, state: dict[str, Tensor]) -> Update:
        """What leaves a client in place of its update."""
        if self.strategy.privacy is None:
            return update
        received = {p.key: p.of(broadcast.tensors) for p in self.strategy.shared_pieces}
        received = {key: value.to(self.device) for key, value in received.items()}
        return self.strategy.privacy.sent(update, received, self.layout.blocks, state)

    def fit(self, client: LocalContext, examples: Examples) -> dict[str, float]:
        """Local training, in place; returns its mean loss and penalty.

        And the number of `skipped_steps`, where gradients overflowed float16.
        """
        stepper = Stepper(client, self.training, self.device)
        self.training_mode()
        losses: list[Tensor] = []
        penalties: list[Tensor] = []
        recomputing = checkpointed(self.model) if self.training.checkpointing else None
        with recomputing or contextlib.nullcontext():
            of = self.training.steps(len(examples))
            for rows in counted("training of a client, steps", self.steps(examples), of):
                check_stop()
                terms: list[tuple[Tensor, Tensor | None]] = []
                for part in self.parts(rows):
                    batch = Batch.of(examples, part, self.device)
                    try:
                        terms.append(self.descend(client, stepper, batch, len(part) / len(rows)))
                    except ValueError as error:
                        # BatchNorm of [B, C] cannot train on a last batch of one: it is left out.
                        alone = len(part) == 1 and is_alone(error)
                        if not alone or not (terms or losses):
                            raise
                if not terms:
                    continue
                stepper.step(self.strategy.correct)
                losses.append(total([loss for loss, _ in terms]))
                if held := [penalty for _, penalty in terms if penalty is not None]:
                    penalties.append(total(held))
        metrics = {"loss": float(torch.stack(losses).mean())}
        if penalties:
            metrics["penalty"] = float(torch.stack(penalties).mean())
        if stepper.skipped:
            metrics["skipped_steps"] = float(stepper.skipped)
        return metrics

    def steps(self, examples: Examples) -> Iterator[Tensor]:
        """Rows of each of the round's steps, shuffled anew in every epoch."""
        left = self.training.steps(len(examples))
        while left:
            order = torch.randperm(len(examples))
            for rows in order.split(self.training.batch_size * self.training.accumulate)[:left]:
                left -= 1
                yield rows

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        """The batches of a step."""
        return [rows] if self.training.accumulate == 1 else rows.split(self.training.batch_size)

    def descend(
        self, client: LocalContext, stepper: Stepper, batch: Batch, share: float
    ) -> tuple[Tensor, Tensor | None]:
        """Forward and backward of a batch that is `share` of its step, in (0, 1].

        Returns:
            Loss and penalty (None if there is none), weighted by the share, without graph. The
            auxiliary load-balancing loss, and a loss that the model returns beside its logits, are
            part of the penalty.
        """
        seen = client.observer
        masked = self.training.routing_mask == "attention"
        masks = (batch.mask, batch.decoder_mask) if masked else (None, None)
        observing = seen.observing(*masks) if seen else None
        with self.training.precision(self.device):
            with observing or contextlib.nullcontext():
                logits, own = batch.outcome(self.model)
            loss = self.loss(logits, batch.labels)
            if share != 1:
                loss = loss * share
            penalty = self.strategy.penalty(client)
            if seen and self.training.aux_loss:
                balance = self.training.aux_loss * imbalance(seen.last)
                penalty = balance if penalty is None else penalty + balance
            if own is not None:
                penalty = own if penalty is None else penalty + own
        if penalty is None:
            stepper.backward(loss)
            return loss.detach(), None
        if share != 1:
            penalty = penalty * share
        stepper.backward(loss + penalty)
        return loss.detach(), penalty.detach()

    def training_mode(self) -> None:
        """Training mode, except for modules that are entirely frozen."""
        if self.trains and self.model.training:  # an evaluation has not changed it since
            return
        self.trains = True
        self.model.train()
        for module in self.still:
            module.eval()

    def load(self, tensors: Mapping[str, Tensor], needed: Iterable[str] = ()) -> None:
        """Write the named values into the model; see `take_values`. Raises WireError.

        Buffers that are not exchanged (counts of batches, those not in its state) begin anew.
        """
        take_values(self.exchanged, tensors, needed)
        for buffer, initial in self.others:
            buffer.copy_(initial)

    def evaluate(self, tensors: Mapping[str, Tensor], indices: Sequence[int]) -> Evaluation:
        """The model with these values on some of the test set, in the precision of training."""
        self.load(tensors)
        with self.training.precision(self.device):
            return evaluate(self.model, self.test, indices, self.loss, self.device)

    def personal_accuracy(self, number: int) -> dict[str, float]:
        """Accuracy of the model as it is, as a metric of client `number`; {} of nothing to test on.

        On the client's own test part where there are such. Else on test examples of the classes it
        holds, weighted as it holds them: of each class the first, about `personal_examples` in all.
        """
        test = self.test if self.local_tests is None else self.local_tests[number]
        if not self.personal_examples or not len(test):
            return {}
        indices: Sequence[int] = range(len(test))
        counts = None
        if self.local_tests is None:
            counts = torch.bincount(labels_of(self.clients[number]))
            held, labels = counts.nonzero().flatten(), labels_of(test)
            each = -(-self.personal_examples // len(held))
            indices = torch.cat([(labels == y).nonzero().flatten()[:each] for y in held]).tolist()
        with self.training.precision(self.device):
            found = evaluate(self.model, test, indices, self.loss, self.device)
        right = found.accuracy if counts is None else found.weighted_accuracy(counts)
        return {"personal_accuracy": right}

    @contextlib.contextmanager
    def observation(self) -> Iterator[Observer | None]:
        """An observer of this round's routing, or None for a dense model."""
        if not self.layout.blocks:
            yield None
            return
        strategy = self.strategy
        observer = Observer(
            self.model, self.layout, strategy.wants_regions(), strategy.wants_samples()
        )
        try:
            yield observer
        finally:
            observer.close()

    @contextlib.contextmanager
    def randomness(self, seed: int) -> Iterator[None]:
        """All random choices inside come from the seed; the generators outside are untouched."""
        devices: list[Any] = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if devices:
                torch.manual_seed(seed)
            else:  # the same on a CPU, and faster: it looks for no other device
                torch.default_generator.manual_seed(seed)
            yield


def imbalance(last: Sequence[BlockStep | None]) -> Tensor:
    """The load-balancing loss of a forward, mean over the MoE layers that it ran; a scalar."""
    steps = [step for step in last if step is not None]
    return torch.stack([load_balance(s.logits, s.selected, s.mask) for s in steps]).mean()


def total(terms: list[Tensor]) -> Tensor:
    """The sum of scalars."""
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()
