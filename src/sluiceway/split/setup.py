"""Setting up a split run: the network is cut, and both sides get what they hold."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, Loss
from sluiceway.core.evaluation import label_counts
from sluiceway.core.messages import message_of
from sluiceway.core.parameters import exchanged
from sluiceway.core.round_loop import Rounds
from sluiceway.core.seeds import derive_seed
from sluiceway.core.settings import Optimisation
from sluiceway.moe import MoELayout
from sluiceway.split.client import SplitClient
from sluiceway.split.client_proxy import ClientProxy, LocalClient
from sluiceway.split.compress import Compressor
from sluiceway.split.config import SplitConfig, client_layers, counts_in
from sluiceway.split.cut import cut
from sluiceway.split.evaluation import Evaluator
from sluiceway.split.mask_selector import ALL, MaskSelector
from sluiceway.split.methods import ChannelChoice
from sluiceway.split.rounds import SplitLoop
from sluiceway.split.scorers import ChannelScorer
from sluiceway.split.server import SplitServer
from sluiceway.strategies import Strategy


class SplitModel(NamedTuple):
    """A cut network, as the method trains it.

    Attributes:
        front, back, tail: its parts; tail None but in a U-shape.
        channels: C at the cut, before the method changed the parts.
        shape: of what crosses, without the batch.
        tail_shape: of what the server hands to the tail, without the batch; () without one.
        smallest: (client's, server's) smallest batch that its layers can train on.
    """

    front: nn.Sequential
    back: nn.Sequential
    tail: nn.Sequential | None
    channels: int
    shape: tuple[int, ...]
    tail_shape: tuple[int, ...]
    smallest: tuple[int, int]


class SharedSetup(NamedTuple):
    """What both sides of a run make alike, each for itself.

    Attributes:
        halves: the cut network.
        terms: what both sides know.
        strategy: averages what clients hold; set up.
        choice: the method, or None for one that chooses no channels.
        seed: of the whole run.
    """

    halves: SplitModel
    terms: SplitConfig
    strategy: Strategy
    choice: ChannelChoice | None
    seed: int

    def meter(self, number: int) -> ChannelScorer | None:
        """A client's meter; None for a method that rates no channels."""
        if self.choice is None:
            return None
        own = self.choice.masks == "client"
        seed = derive_seed(self.seed, number) if own else self.seed
        return self.choice.meter(self.halves.shape[0], self.terms.classes, seed)

    def side(self, number: int, examples: Examples, meter: ChannelScorer | None) -> SplitClient:
        """A client with its layers."""
        h = self.halves
        return SplitClient(number, examples, h.front, h.tail, self.terms, meter, h.smallest[0])


def ground(
    model: nn.Module,
    cut_at: str,
    tail_at: str | None,
    example: Batch,
    classes: int,
    clients: int,
    method: Compressor,
    *,
    strategy: Strategy,
    seed: int,
    training: Optimisation,
    loss: Loss,
    device: torch.device,
) -> SharedSetup:
    """Cut the model and settle what both sides know.

    Args:
        example: a batch of one, of any client or of the test set.
        classes: labels are below it.
        clients: how many there are.
        method: the run's own.
    """
    halves = halve(model.to(device), cut_at, tail_at, example, method)
    require_trainable(halves, training)
    terms = SplitConfig(training, method, rounding_of(method), loss, halves.shape, classes, device)
    strategy.setup(exchanged_by_clients(halves), MoELayout(()), clients)
    choice = method if isinstance(method, ChannelChoice) else None
    return SharedSetup(halves, terms, strategy, choice, seed)


def build(
    made: SharedSetup,
    plan: Rounds,
    form: str,
    test: Examples,
    counts: Tensor,
    parties: Sequence[ClientProxy],
    meters: Sequence[ChannelScorer | None],
) -> SplitLoop:
    """The server's side of a run.

    Args:
        made: what both sides make alike.
        plan: how many rounds there are, and who takes part.
        form: one of `SCHEDULES`.
        test: the global test set.
        counts: who holds what, [clients, classes].
        parties: the clients.
        meters: of each client, for methods that need not see anything to rate channels.
    """
    halves, terms = made.halves, made.terms
    sizes = counts.sum(1).tolist()
    taking_part = sorted(sizes, reverse=True)[: len(plan.chosen(1, eligible(counts)))]
    per_client = layer_bytes(made.strategy, halves)
    cost = round_bytes(terms, halves.tail_shape, taking_part, per_client)
    masks = MaskSelector(made.choice, halves.shape[0], sizes, cost, plan.seed)
    for number, meter in enumerate(meters):
        if meter is not None and (scores := meter.scores()) is not None:
            masks.rate(number, scores)
    return SplitLoop(
        front=halves.front,
        back=halves.back,
        tail=halves.tail,
        parties=parties,
        servers=server_sides(halves, terms, form, len(parties)),
        masks=masks,
        strategy=made.strategy,
        form=form,
        judge=Evaluator(test, terms),
        label_counts=counts,
        channels=halves.channels,
        crossing=halves.shape[0],
        smallest=halves.smallest[0],
    )


def here(
    model: nn.Module,
    cut_at: str,
    tail_at: str | None,
    sets: Sequence[Examples],
    test: Examples,
    method: Compressor,
    *,
    form: str,
    strategy: Strategy,
    plan: Rounds,
    training: Optimisation,
    loss: Loss,
    device: torch.device,
) -> SplitLoop:
    """A run whose clients are all in this process; see `split_train`."""
    counts = label_counts(sets)
    if not counts.shape[1]:
        raise ValueError("no client holds any example")
    made = ground(
        model,
        cut_at,
        tail_at,
        example_of(sets, device),
        counts.shape[1],
        len(sets),
        method,
        strategy=strategy,
        seed=plan.seed,
        training=training,
        loss=loss,
        device=device,
    )
    meters = [made.meter(number) for number in range(len(sets))]
    parties = [
        LocalClient(made.side(i, examples, meter), strategy, plan.seed)
        for i, (examples, meter) in enumerate(zip(sets, meters, strict=True))
    ]
    return build(made, plan, form, test, counts, parties, meters)


def require_trainable(halves: SplitModel, training: Optimisation) -> None:
    """Raise ValueError if the layers can train on no batch at all."""
    if training.batch_size < max(halves.smallest):
        raise ValueError(
            f"batch_size = {training.batch_size}: BatchNorm of [B, C] needs at least "
            f"{max(halves.smallest)} examples"
        )


def rounding_of(method: Compressor) -> Compressor:
    """What a method does to values that all cross."""
    return Compressor(
        quantize=method.quantize,
        quantize_gradient=method.quantize_gradient,
        affine=method.affine,
        error_feedback=method.error_feedback,
        limit=method.limit,
    )


def eligible(counts: Tensor) -> list[int]:
    """The clients that hold examples."""
    found: list[int] = counts.sum(1).nonzero().flatten().tolist()
    return found


def example_of(sets: Sequence[Examples], device: torch.device) -> Batch:
    """A batch of one example of the first client that has any."""
    return Batch.of(next(s for s in sets if len(s)), torch.tensor([0]), device)


def halve(
    model: nn.Module, cut_at: str, tail_at: str | None, example: Batch, method: Compressor
) -> SplitModel:
    """Cut the network once or twice, and try its parts on an example.

    Raises:
        ValueError: a cut that is not there, or what crosses is no float32.
    """
    front, back = cut(model, cut_at)
    tail = None
    if tail_at is not None:
        back, tail = cut(back, tail_at)
    smashed = tried(front, example)
    if smashed.dtype != torch.float32:
        raise ValueError(f"the network gives {smashed.dtype} at the cut; expected torch.float32")
    channels = smashed.shape[1]
    front, back = method.attach(front, back, channels, smashed.dim())
    values = tried(front, example)
    behind = Batch(values, example.labels)
    onward = tried(back, behind)
    at_client = smallest_batch(front, example)
    if tail is not None:
        at_client = max(at_client, smallest_batch(tail, Batch(onward, example.labels)))
    return SplitModel(
        front,
        back,
        tail,
        channels,
        tuple(values.shape[1:]),
        () if tail is None else tuple(onward.shape[1:]),
        (at_client, smallest_batch(back, behind)),
    )


@torch.no_grad()
def tried(layers: nn.Module, example: Batch) -> Tensor:
    """What the layers give in evaluation mode; they are left as they are."""
    return example.run(copy.deepcopy(layers).eval()).clone()


@torch.no_grad()
def smallest_batch(layers: nn.Module, example: Batch) -> int:
    """2 if the layers cannot train on a batch of one, as BatchNorm of [B, C] cannot; else 1."""
    layers = copy.deepcopy(layers).train()
    try:
        Batch(copy.deepcopy(example.inputs), example.labels).run(layers)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return 2
        raise
    return 1


def exchanged_by_clients(halves: SplitModel) -> dict[str, Tensor]:
    """The initial values of what clients train, on the CPU."""
    layers = client_layers(halves.front, halves.tail)
    return {name: tensor.detach().cpu() for name, tensor in exchanged(layers).items()}


def server_sides(
    halves: SplitModel, terms: SplitConfig, form: str, clients: int
) -> dict[int, SplitServer]:
    """The server's side: one for `ALL`, or a copy for each client."""
    smallest = halves.smallest[1]
    if form != "copies":
        return {ALL: SplitServer(halves.back, terms, smallest)}
    return {i: SplitServer(copy.deepcopy(halves.back), terms, smallest) for i in range(clients)}


def layer_bytes(strategy: Strategy, halves: SplitModel) -> int:
    """Bytes per client and round of the messages that open and close it, at most.

    What a strategy's clients send beside the layers is taken to be as long as what it sends them.
    """
    broadcast = strategy.broadcast(1)
    opening = message_of({"model": broadcast.tensors, "extra": broadcast.extra}, {})
    counted = len(counts_in(client_layers(halves.front, halves.tail)))
    # Mask and float32 scores, in the first round twice, their names, and facts of this length.
    return 2 * len(opening) + 9 * halves.shape[0] + 512 + 256 * counted


def round_bytes(
    terms: SplitConfig, tail_shape: tuple[int, ...], sizes: Sequence[int], per_client: int
) -> Callable[[int], int]:
    """From a number of kept channels to the bytes of a round, both directions, at most.

    Args:
        terms: what both sides know.
        tail_shape: see `SplitModel`.
        sizes: examples of the clients that take part.
        per_client: bytes of the messages that open and close a client's round.
    """
    epochs, most = terms.training.local_epochs, terms.training.batch_size
    batches: Counter[int] = Counter()
    for size in sizes:
        whole, rest = divmod(size, most)
        batches[most] += epochs * whole
        batches[rest] += epochs
    del batches[0]
    label_bytes = 0 if tail_shape else 1 if terms.classes <= 256 else 2

    def nbytes(kept: int) -> int:
        total = per_client * len(sizes)
        for size, count in batches.items():
            shape = (size, *terms.shape)
            total += count * terms.link.bytes_up(shape, kept, label_bytes)
            total += count * terms.link.bytes_down(shape, kept)
            if tail_shape:
                shape = (size, *tail_shape)
                total += count * terms.tail_link.bytes_up(shape)
                total += count * terms.tail_link.bytes_down(shape)
        return total

    return nbytes
