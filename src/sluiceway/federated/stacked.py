"""Many clients at once: one step over copies of what is trained.

There are two ways. A plain module goes through `torch.func.vmap` as a whole. A model with upcycled
experts, one of texts that vmap cannot take, or any under a method with a client half of its own, is
folded (see `folded`). The batches, their order and the formulas are those of `Worker.train`; sums
are taken in another order, so that results agree with it up to rounding. Shapes: K clients of a
stack, S steps of the longest of them, B examples a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset

from sluiceway.core.batches import Batch, Loss, tensors_of
from sluiceway.core.guards import Failure
from sluiceway.core.seeds import derive_seed
from sluiceway.core.signals import check_stop
from sluiceway.errors import InputError, described, first_line, line
from sluiceway.federated.client import Worker
from sluiceway.federated.folded import FoldedObserver, Folding
from sluiceway.moe import Observer
from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE
from sluiceway.strategies import Broadcast, FedProx, LocalContext, Strategy, Update

#: Examples of the trial step.
FEW = 4
#: Largest difference of the trial's gradients, relative to their largest value.
TOLERANCE = 1e-2

#: How a trial says that a step raised.
CANNOT = "this model or loss cannot be stacked"

#: The column of a text's attention mask.
MASK = "inputs/attention_mask"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shard:
    """A client's examples and the order in which it visits them.

    Attributes:
        number: of the client.
        columns: inputs, labels and features by name, [N, ...] each.
        rows: positions in the columns, [steps, B]; 0 in place of an absent example.
        counts: examples of each step, [steps].
        ends: of texts how many of an example's columns are needed, [N] on the CPU; else None.
        held: how many examples the client holds.
    """

    number: int
    columns: Tensors
    rows: Tensor
    counts: Tensor
    ends: Tensor | None
    held: int

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for shards that can be stacked: the shape and type of an example."""
        return tuple((name, t.shape[1:], t.dtype) for name, t in self.columns.items())


@dataclass
class Stack:
    """Clients that take their steps together.

    Attributes:
        shards: in descending number of steps. A client that has taken its steps is left out of
            those that follow, so that nothing of it changes.
        params: [K, ...] each, of those clients that still step.
        clients: each as the strategy's client half sees it, with parameters that are views of
            `params`; none where the strategy has no such half.
        observer: of routing, or None.
    """

    shards: Sequence[Shard]
    params: dict[str, nn.Parameter]
    clients: list[LocalContext]
    observer: FoldedObserver | None


class StackedTrainer:
    """Trains several clients of a worker at once.

    Args:
        worker: its model lends the layers; what is trained is copied for each client.

    Attributes:
        folding: the model folded; None where it goes through vmap.

    Raises:
        InputError: its model, its strategy or the way it trains does not allow that.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.example_losses = per_example(worker.loss)
        #: Trained parameters that get no gradient; an optimiser leaves them as they are.
        self.unused: set[str] = set()
        received = {name: param.detach() for name, param in worker.params.items()}
        self.first = Broadcast(0, received)
        self.folding: Folding | None = None
        #: The strategy's client half is called client by client.
        self.own_half = has_client_half(worker.strategy)
        if why := hindrance(worker):
            raise InputError(f"run.stacked: {why}")
        context = self.context(received, received, self.first)
        self.penalised = not self.own_half and worker.strategy.penalty(context) is not None
        why = None if worker.layout.blocks else self.trial()
        # Texts' models look into masks to choose a path, which vmap cannot follow and folding can.
        cannot = why is not None and why.startswith(CANNOT) and self.texts()
        if cannot or (why is None and (worker.layout.blocks or self.own_half)):
            self.folding = Folding(worker.model, worker.params.keys())
            found = self.trial()
            why = found if why is None or found is None else why
        if why:
            raise InputError(f"run.stacked: {why}")

    def train(
        self,
        broadcast: Broadcast,
        clients: Sequence[int],
        personal: set[int],
        states: dict[int, dict[str, Tensor]],
    ) -> list[Update | Failure]:
        """What each client answers, in the order of `clients`; see `Worker.train`.

        A client whose examples cannot be read, or whose training raises, has failed alone.

        Args:
            states: what each client keeps; replaced where it has trained.
        """
        answers: dict[int, Update | Failure] = {}
        shards = []
        for number in clients:
            try:
                seed = derive_seed(self.worker.seed, broadcast.round, number)
                shards.append(self.shard(number, seed))
            except Exception as error:
                answers[number] = Failure(number, described(error), error=error)
        stacks: dict[object, list[Shard]] = {}
        for shard in aligned(shards):
            stacks.setdefault(shard.kind, []).append(shard)
        for stack in stacks.values():
            answers |= self.attempt(broadcast, stack, personal, states)
        return [answers[number] for number in clients]

    def attempt(
        self,
        broadcast: Broadcast,
        shards: list[Shard],
        personal: set[int],
        states: dict[int, dict[str, Tensor]],
    ) -> dict[int, Update | Failure]:
        """Train shards of one kind; where that raises, each by itself."""
        held = {shard.number: dict(states[shard.number]) for shard in shards}
        try:
            found = {u.client: u for u in self.fit(broadcast, shards, personal, held)}
        except Exception as error:
            if len(shards) == 1:
                number = shards[0].number
                return {number: Failure(number, described(error), error=error)}
            alone = [self.attempt(broadcast, [shard], personal, states) for shard in shards]
            return {number: answer for one in alone for number, answer in one.items()}
        states |= held
        return dict(found)

    def shard(self, number: int, seed: int) -> Shard:
        """A client's examples, in the order in which `Worker.steps` visits them."""
        examples, training = self.worker.clients[number], self.worker.training
        count, size = len(examples), training.batch_size * training.accumulate
        once = hasattr(examples, "gather") or isinstance(examples, TensorDataset)
        batches, orders = [], []
        with self.worker.randomness(seed):
            left, read = training.steps(count), 0
            while left:
                order = torch.randperm(count)[: left * size]
                left -= -(-len(order) // size)
                if once:  # an example is the same whenever it is read
                    orders.append(order)
                else:
                    batches.append(Batch.of(examples, order, self.worker.device))
                    orders.append(torch.arange(len(order)) + read)
                    read += len(order)
            if once:
                batches.append(Batch.of(examples, torch.arange(count), self.worker.device))
        columns = [columns_of(batch) for batch in batches]
        rows = torch.cat([F.pad(o, (0, -len(o) % size)).view(-1, size) for o in orders])
        counts = torch.tensor([len(part) for o in orders for part in o.split(size)])
        joined = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
        return Shard(number, joined, rows, counts, ends_of(joined), count)

    def fit(
        self,
        broadcast: Broadcast,
        shards: list[Shard],
        personal: set[int],
        states: Mapping[int, dict[str, Tensor]],
    ) -> Iterator[Update]:
        """Train shards of one kind at once, and give each client's update.

        Args:
            states: what each client keeps; changed in place.
        """
        worker = self.worker
        worker.load(broadcast.tensors, needed=worker.exchanged.keys() - worker.initial.keys())
        worker.training_mode()
        shards = sorted(shards, key=lambda shard: -len(shard.counts))  # the first train longest
        values = self.first_values([states[shard.number] for shard in shards])
        received = {name: param.detach().clone() for name, param in worker.params.items()}
        with ExitStack() as stack:
            observers = [stack.enter_context(worker.observation()) for _ in shards]
            seen = [observer for observer in observers if observer is not None]
            observer = None
            if seen:
                observer = FoldedObserver(seen, worker.model, worker.layout)
                stack.callback(observer.close)
            if self.folding:
                stack.enter_context(self.folding.installed())
            clients = []
            if self.own_half:
                for place, shard in enumerate(shards):
                    own = {n: nn.Parameter(t[place]) for n, t in values.items()}
                    before = {n: t.detach().clone() for n, t in own.items()}
                    client = self.context(
                        own,
                        before,
                        broadcast,
                        observers[place],
                        states[shard.number],
                        worker.training.passes(shard.held),
                    )
                    worker.strategy.start_training(client)
                    clients.append(client)
            params = {name: nn.Parameter(value) for name, value in values.items()}
            losses, penalties = self.descend(
                Stack(shards, params, clients, observer), received, broadcast
            )
            extras = []
            for client in clients:
                worker.load(client.params)  # a strategy may ask the model itself
                extras.append(dict(worker.strategy.finish_training(client)))
        for place, shard in enumerate(shards):
            tensors = worker.exchanged | {n: t[place] for n, t in values.items()}
            routing = worker.reported(
                seen[place].routing() if seen else [], worker.training.passes(shard.held)
            )
            metrics = {"loss": losses[place]}
            if penalties is not None:
                metrics["penalty"] = penalties[place]
            kept = {n: tensors[n].detach().cpu().clone() for n in worker.initial}
            states[shard.number].update({f"private/{n}": t for n, t in kept.items()})
            if shard.number in personal and worker.personal_examples:
                worker.load({n: tensors[n] for n in values.keys() | worker.initial.keys()})
                metrics |= worker.personal_accuracy(shard.number)
            sent = {
                piece.key: piece.of(tensors)
                for piece in worker.strategy.shared_pieces
                if worker.strategy.sends(piece, routing)
            }
            update = Update(
                shard.number,
                broadcast.round,
                shard.held,
                sent,
                routing,
                extra=extras[place] if extras else {},
                metrics=metrics,
            )
            yield worker.sent(update, broadcast, states[shard.number])

    def first_values(self, states: Sequence[Mapping[str, Tensor]]) -> Tensors:
        """What is trained, as each client begins with it, [K, ...] each."""
        found = {}
        for name, param in self.worker.params.items():
            start = param.detach()
            found[name] = start.expand(len(states), *start.shape).clone()
            if name in self.worker.initial:
                for place, state in enumerate(states):
                    own = state.get(f"private/{name}", self.worker.initial[name])
                    found[name][place].copy_(own)
        return found

    def descend(
        self, stack: Stack, received: Tensors, broadcast: Broadcast
    ) -> tuple[list[float], list[float] | None]:
        """Local training of a stack, in place; the mean losses, and penalties if there are any."""
        training, device, shards = self.worker.training, self.worker.device, stack.shards
        starts = torch.tensor([0, *(len(shard.columns["labels"]) for shard in shards)]).cumsum(0)
        rows = pad_sequence(
            [s.rows + start for s, start in zip(shards, starts, strict=False)], True
        )
        counts = pad_sequence([shard.counts for shard in shards], True)
        real = torch.arange(rows.shape[-1]) < counts[..., None]
        weights = (real / counts[..., None].clamp_min(1)).to(device)
        ends = [shard.ends for shard in shards if shard.ends is not None]
        widths = torch.cat(ends)[rows].amax((0, 2)).tolist() if ends else []
        whole = real.flatten(1).all()
        rows, real = rows.to(device), real.to(device)
        names = shards[0].columns
        columns = {name: torch.cat([shard.columns[name] for shard in shards]) for name in names}
        step = self.step(broadcast, received)
        params = stack.params
        optimiser = training.optimiser(list(params.values()))
        sums = torch.zeros(2, len(shards), device=device)
        penalised = self.penalised
        for number, (active, longest) in enumerate(
            zip((counts > 0).sum(0).tolist(), counts.amax(0).tolist(), strict=True)
        ):
            check_stop()
            narrow(params, optimiser, active)
            for first in range(0, longest, training.batch_size):
                some = slice(first, min(first + training.batch_size, longest))
                where = rows[:active, number, some]
                batch = {name: column[where] for name, column in columns.items()}
                if widths:
                    batch = shortened(batch, widths[number])
                shares = weights[:active, number, some]
                if self.folding is None:
                    now = {name: param.detach() for name, param in params.items()}
                    grads, (_, terms) = step(now, batch, shares)
                    for name in params.keys() - self.unused:
                        grad = params[name].grad
                        params[name].grad = grads[name] if grad is None else grad.add_(grads[name])
                else:
                    counted = None if whole else real[:active, number, some]
                    terms, more = self.backward(stack, batch, shares, counted, received, broadcast)
                    penalised |= more
                sums[:, :active] += torch.stack(terms)
            self.correct(stack, active)
            if training.max_grad_norm > 0:
                clip(
                    [p.grad for p in params.values() if p.grad is not None], training.max_grad_norm
                )
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            for client in stack.clients[:active]:
                client.steps += 1
        steps = torch.tensor([len(shard.counts) for shard in shards], device=device)
        losses, penalties = (sums / steps).tolist()
        return losses, penalties if penalised else None

    def backward(
        self,
        stack: Stack,
        columns: Tensors,
        weights: Tensor,
        real: Tensor | None,
        received: Tensors,
        broadcast: Broadcast,
    ) -> tuple[tuple[Tensor, Tensor], bool]:
        """Forward and backward of a folded batch; gradients are added to the stack's parameters.

        Args:
            columns: [K, B, ...] each.
            weights: of the examples, [K, B].
            real: [K, B] bool, the examples that are not there to fill up; None if all are.

        Returns:
            Loss and penalty of each client, [K] each without graph, and whether there is one.
        """
        assert self.folding is not None
        clients, strategy = len(weights), self.worker.strategy
        batch = batch_of({name: column.flatten(0, 1) for name, column in columns.items()})
        seen = stack.observer
        watching = seen.watching(clients, real, batch) if seen else contextlib.nullcontext()
        with watching:
            logits = self.folding.run(batch, stack.params, clients)
        each = self.example_losses(logits, batch.labels).view(clients, -1)
        losses = (each * weights).sum(1)
        total, penalty, shares = losses.sum(), torch.zeros_like(losses), weights.detach().sum(1)
        penalised = self.penalised
        if self.penalised:
            one = partial(self.penalty, received=received, broadcast=broadcast)
            penalty = cast(Tensor, vmap(one)(stack.params))
        elif self.own_half:
            found = [strategy.penalty(client) for client in stack.clients[:clients]]
            if penalised := any(term is not None for term in found):
                none = losses.new_zeros(())
                penalty = torch.stack([none if term is None else term for term in found])
        if penalised:
            penalty = penalty * shares
            total = total + penalty.sum()
        total.backward()
        return (losses.detach(), penalty.detach()), penalised

    def penalty(self, values: Tensors, received: Tensors, broadcast: Broadcast) -> Tensor | None:
        """The strategy's penalty of one client."""
        return self.worker.strategy.penalty(self.context(values, received, broadcast))

    def correct(self, stack: Stack, active: int) -> None:
        """Let the strategy correct the gradients of the clients that step."""
        for place, client in enumerate(stack.clients[:active]):
            for name, own in client.params.items():
                whole = stack.params[name]
                if own.grad is not None:  # a penalty on the parameters themselves
                    if whole.grad is None:
                        whole.grad = torch.zeros_like(whole)
                    whole.grad[place].add_(own.grad)
                own.grad = None if whole.grad is None else whole.grad[place]
            self.worker.strategy.correct(client)
            for name, own in client.params.items():
                whole = stack.params[name]
                if own.grad is not None:
                    if whole.grad is None:
                        whole.grad = torch.zeros_like(whole)
                    if own.grad.data_ptr() != whole.grad[place].data_ptr():
                        whole.grad[place].copy_(own.grad)
                own.grad = None

    def step(self, broadcast: Broadcast, received: Tensors) -> Callable[..., Any]:
        """Gradients and terms of `objective`, for K clients whose arguments are stacked."""
        function = partial(self.objective, broadcast, received)
        return vmap(grad_and_value(function, has_aux=True))

    def objective(
        self,
        broadcast: Broadcast,
        received: Tensors,
        values: Tensors,
        columns: Tensors,
        weights: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What one client's part of a step adds to its loss, with the loss and the penalty in it.

        Args:
            values: the client's parameters by name.
            columns: the part's examples, [B, ...] each.
            weights: of the examples, [B]; those of a step sum to 1.
        """
        model = self.worker.model

        def run(*args: Tensor, **kwargs: Tensor) -> Any:
            return functional_call(model, values, args, kwargs)

        batch = batch_of(columns)
        loss = (self.example_losses(batch.run(run), batch.labels) * weights).sum()
        penalty = self.penalty(values, received, broadcast) if self.penalised else None
        if penalty is None:
            return loss, (loss, torch.zeros_like(loss))
        penalty = penalty * weights.sum()
        return loss + penalty, (loss, penalty)

    def context(
        self,
        values: Mapping[str, Tensor],
        received: Tensors,
        broadcast: Broadcast,
        observer: Observer | None = None,
        state: dict[str, Tensor] | None = None,
        passes: float = 1.0,
    ) -> LocalContext:
        """A client with these parameters, as its strategy sees it."""
        return LocalContext(
            model=self.worker.model,
            params=cast(dict[str, nn.Parameter], values),
            received=received,
            broadcast=broadcast,
            layout=self.worker.layout,
            observer=observer,
            state={} if state is None else state,
            passes=passes,
        )

    def texts(self) -> bool:
        """Whether examples come with an attention mask."""
        batch = few_examples(self.worker)
        return batch is not None and batch.mask is not None

    def trial(self) -> str | None:
        """Why a stacked step cannot be taken, or differs from one that is not; None if neither.

        The model is left as it was.
        """
        worker = self.worker
        batch = few_examples(worker)
        if batch is None:  # no client's examples can be read: each will fail by itself
            return None
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in worker.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        worker.training_mode()
        try:
            with worker.randomness(0):
                logits = batch.run(worker.model)
                for module, name, buffer, value in buffers:
                    if module.get_buffer(name) is not buffer or not torch.equal(buffer, value):
                        return f"training changes the buffer {name} ({type(module).__name__})"
                return self.compared(batch, logits)
        except Exception as error:
            return f"{CANNOT} ({line(first_line(error), 160)})"
        finally:
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))

    def compared(self, batch: Batch, logits: Tensor) -> str | None:
        """Why a stacked step on a batch does not agree with a plain one; None if it does."""
        worker, count = self.worker, len(batch.labels)
        loss = worker.loss(logits, batch.labels)
        plain = torch.autograd.grad(loss, list(worker.params.values()), allow_unused=True)
        if not mean_of_examples(worker.loss, self.example_losses, logits.detach()):
            return "the loss is not the mean of the examples' losses"
        columns = {name: torch.cat([c, c[:1]]) for name, c in columns_of(batch).items()}
        weights = F.pad(torch.full((count,), 1 / count, device=worker.device), (0, 1))
        two = [
            {name: t.expand(2, *t.shape) for name, t in part.items()}
            for part in ({n: p.detach() for n, p in worker.params.items()}, columns)
        ]
        if self.folding is None:
            grads, _ = self.step(self.first, two[0])(*two, weights.expand(2, -1))
        else:
            grads = self.folded_gradients(two[0], two[1], weights.expand(2, -1))
        largest = max((float(grad.abs().max()) for grad in plain if grad is not None), default=0.0)
        for (name, stacked), grad in zip(grads.items(), plain, strict=True):
            if grad is None:
                if not stacked.any():
                    self.unused.add(name)
            elif not torch.allclose(stacked[0], grad, rtol=0, atol=TOLERANCE * largest):
                return "what the model makes of an example depends on the others of its batch"
        return None

    def folded_gradients(self, values: Tensors, columns: Tensors, weights: Tensor) -> Tensors:
        """Gradients of a folded step without penalty; of what has none, zeros."""
        assert self.folding is not None
        params = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        stack = Stack((), params, [], None)
        own, self.own_half, penalised, self.penalised = self.own_half, False, self.penalised, False
        try:
            with self.folding.installed():
                self.backward(stack, columns, weights, None, values, self.first)
        finally:
            self.own_half, self.penalised = own, penalised
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in params.items()}


def has_client_half(strategy: Strategy) -> bool:
    """Whether a strategy does more with a client than FedProx's penalty."""
    kind = type(strategy)
    return (
        kind.start_training is not Strategy.start_training
        or kind.correct is not Strategy.correct
        or kind.finish_training is not Strategy.finish_training
        or kind.penalty not in (Strategy.penalty, FedProx.penalty)
    )


def hindrance(worker: Worker) -> str | None:
    """What of a worker's strategy, training or layers excludes stacking; None if nothing does.

    Leaves the model in training mode.
    """
    training = worker.training
    for block in worker.layout.blocks:
        module = worker.model.get_submodule(block.name)
        if not isinstance(module, UpcycledMoE):
            return f"{block.name} holds experts that are not upcycled ({block.family.name})"
        if not isinstance(module.experts, UpcycledExperts):
            return f"the experts of {block.name} have adapters"
    if training.aux_loss:
        return f"aux_loss = {training.aux_loss:g}"
    if training.routing_mask != "attention":
        return f"routing_mask = {training.routing_mask!r}"
    if training.checkpointing:
        return "checkpointing = true"
    if training.mixed != "no":
        return f"mixed = {training.mixed!r}"
    if half := [n for n, p in worker.params.items() if p.dtype.itemsize < 4]:
        return f"{half[0]} is of half precision"
    worker.training_mode()
    for name, module in worker.model.named_modules():
        if not module.training:
            continue
        if isinstance(module, _BatchNorm) or (
            isinstance(module, _NormBase) and module.track_running_stats
        ):
            return f"{name} ({type(module).__name__}) takes statistics of its batches"
        if isinstance(module, _DropoutNd) and module.p > 0:
            return f"{name} ({type(module).__name__}) is random"
    return None


def few_examples(worker: Worker) -> Batch | None:
    """Some examples of the first client whose can be read; None if no client's can."""
    for examples in worker.clients:
        if count := min(FEW, len(examples)):
            try:
                with worker.randomness(0):
                    return Batch.of(examples, torch.arange(count), worker.device)
            except Exception:
                continue
    return None


def per_example(loss: Loss) -> Loss:
    """The losses [B] of which a loss is the mean."""
    if loss is F.cross_entropy:
        return partial(F.cross_entropy, reduction="none")
    return vmap(lambda logits, label: loss(logits[None], label[None]))


def mean_of_examples(loss: Loss, losses: Loss, logits: Tensor) -> bool:
    """Whether `loss` is the mean of `losses`, on as many examples as there are classes."""
    classes = logits.shape[-1]
    numbers = torch.linspace(-1, 1, classes * classes, dtype=logits.dtype, device=logits.device)
    some = (7 * numbers).sin().view(classes, classes)
    labels = torch.arange(classes, device=logits.device)
    return torch.allclose(loss(some, labels), losses(some, labels).mean(), rtol=1e-3, atol=1e-6)


def columns_of(batch: Batch) -> Tensors:
    """A batch as named tensors, [B, ...] each."""
    inputs = tensors_of(batch.inputs)
    known = {} if batch.features is None else {"features": batch.features}
    return {f"inputs/{name}": t for name, t in inputs.items()} | known | {"labels": batch.labels}


def batch_of(columns: Mapping[str, Tensor]) -> Batch:
    """The inverse of `columns_of`."""
    inputs = {n.removeprefix("inputs/"): t for n, t in columns.items() if n.startswith("inputs/")}
    held: Any = inputs.get("", inputs)
    if "0" in inputs:  # places of a tuple
        held = tuple(inputs[str(place)] for place in range(len(inputs)))
    return Batch(held, columns["labels"], columns.get("features"))


def aligned(shards: Sequence[Shard]) -> list[Shard]:
    """The same shards, their texts padded to one length where that is a mask's to say."""
    masks = [shard.columns.get(MASK) for shard in shards]
    width = max((mask.shape[-1] for mask in masks if mask is not None), default=0)
    return [
        shard if mask is None else replace(shard, columns=lengthened(shard.columns, mask, width))
        for shard, mask in zip(shards, masks, strict=True)
    ]


def lengthened(columns: Tensors, mask: Tensor, width: int) -> Tensors:
    """Columns of `mask`'s shape [N, ..., S], and features [N, ..., S, d], with S = `width`."""
    more = width - mask.shape[-1]
    found = {n: F.pad(t, (0, more)) if t.shape == mask.shape else t for n, t in columns.items()}
    if "features" in columns:
        found["features"] = F.pad(columns["features"], (0, 0, 0, more))
    return found


def ends_of(columns: Tensors) -> Tensor | None:
    """How many columns of a text [N, ..., S] have a token in or behind them, [N]; else None."""
    mask = columns.get(MASK)
    if mask is None:
        return None
    places = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    return ((mask != 0) * places).flatten(1).amax(1).cpu()


def shortened(columns: Tensors, width: int) -> Tensors:
    """The inverse of `lengthened`."""
    shape = columns[MASK].shape
    found = {n: t[..., :width] if t.shape == shape else t for n, t in columns.items()}
    if "features" in columns:
        found["features"] = columns["features"][..., :width, :]
    return found


def clip(grads: Sequence[Tensor], largest: float) -> None:
    """`clip_grad_norm_` of each client: grads [K, ...] each, in place."""
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads])
    shares = (largest / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(shares.view(-1, *[1] * (grad.dim() - 1)))


def narrow(params: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, to: int) -> None:
    """Let an optimiser go on with the first `to` clients of its parameters [K, ...]."""
    for param in params.values():
        if len(param) > to:
            for name, value in optimiser.state[param].items():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    optimiser.state[param][name] = value[:to]
            param.data = param.data[:to]
