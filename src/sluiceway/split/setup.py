"""Setting up a split run: the network is cut, and both sides get what they hold."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sluiceway.federated.batches import Batch, Examples
from sluiceway.federated.client import Loss, Optimisation, exchanged, mix
from sluiceway.federated.evaluation import label_counts
from sluiceway.federated.rounds import Rounds
from sluiceway.federated.wire import message_of
from sluiceway.moe import Anatomy
from sluiceway.split.choosing import ALL, Masks
from sluiceway.split.client import ClientSide
from sluiceway.split.compress import Compressor
from sluiceway.split.cut import cut
from sluiceway.split.judging import Judge
from sluiceway.split.methods import ChannelChoice
from sluiceway.split.rounds import Split
from sluiceway.split.server import ServerSide
from sluiceway.split.terms import Terms, client_layers
from sluiceway.strategies import Strategy


class Halves(NamedTuple):
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


def build(
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
) -> Split:
    """Cut the model and set up both sides; see `split_train`."""
    counts = label_counts(sets)
    if not counts.shape[1]:
        raise ValueError("no client holds any example")
    halves = halve(model.to(device), cut_at, tail_at, example_of(sets, device), method)
    require_trainable(halves, training)
    classes = counts.shape[1]
    terms = Terms(training, method, rounding_of(method), loss, halves.shape, classes, device)
    strategy.setup(exchanged_by_clients(halves), Anatomy(()), len(sets))
    sizes = counts.sum(1).tolist()
    taking_part = sorted(sizes, reverse=True)[: len(plan.chosen(1, holders(counts)))]
    choice = method if isinstance(method, ChannelChoice) else None
    cost = round_bytes(terms, halves.tail_shape, taking_part, layer_bytes(strategy, halves.shape))
    masks = Masks(choice, halves.shape[0], sizes, cost, plan.seed)
    clients = client_sides(halves, sets, terms, choice, plan.seed)
    rate_unseen(masks, clients)
    return Split(
        front=halves.front,
        back=halves.back,
        tail=halves.tail,
        clients=clients,
        servers=server_sides(halves, terms, form, len(sets)),
        masks=masks,
        strategy=strategy,
        form=form,
        judge=Judge(test, terms),
        label_counts=counts,
        channels=halves.channels,
        crossing=halves.shape[0],
        seed=plan.seed,
    )


def require_trainable(halves: Halves, training: Optimisation) -> None:
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


def rate_unseen(masks: Masks, clients: Sequence[ClientSide]) -> None:
    """Take the scores of methods that need not see anything to rate channels."""
    for client in clients:
        if client.meter is not None and (scores := client.meter.scores()) is not None:
            masks.rate(client.number, scores)


def holders(counts: Tensor) -> list[int]:
    """The clients that hold examples."""
    found: list[int] = counts.sum(1).nonzero().flatten().tolist()
    return found


def example_of(sets: Sequence[Examples], device: torch.device) -> Batch:
    """A batch of one example of the first client that has any."""
    return Batch.of(next(s for s in sets if len(s)), torch.tensor([0]), device)


def halve(
    model: nn.Module, cut_at: str, tail_at: str | None, example: Batch, method: Compressor
) -> Halves:
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
    return Halves(
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


def exchanged_by_clients(halves: Halves) -> dict[str, Tensor]:
    """The initial values of what clients train, on the CPU."""
    layers = client_layers(halves.front, halves.tail)
    return {name: tensor.detach().cpu() for name, tensor in exchanged(layers).items()}


def client_sides(
    halves: Halves,
    sets: Sequence[Examples],
    terms: Terms,
    choice: ChannelChoice | None,
    seed: int,
) -> list[ClientSide]:
    """Every client with its layers and its meter."""
    own = choice is not None and choice.masks == "client"
    meters = [
        choice.meter(halves.shape[0], terms.classes, mix(seed, i) if own else seed)
        if choice
        else None
        for i in range(len(sets))
    ]
    return [
        ClientSide(i, examples, halves.front, halves.tail, terms, meter, halves.smallest[0])
        for i, (examples, meter) in enumerate(zip(sets, meters, strict=True))
    ]


def server_sides(halves: Halves, terms: Terms, form: str, clients: int) -> dict[int, ServerSide]:
    """The server's side: one for `ALL`, or a copy for each client."""
    smallest = halves.smallest[1]
    if form != "copies":
        return {ALL: ServerSide(halves.back, terms, smallest)}
    return {i: ServerSide(copy.deepcopy(halves.back), terms, smallest) for i in range(clients)}


def layer_bytes(strategy: Strategy, shape: tuple[int, ...]) -> int:
    """Bytes per client and round of the messages that open and close it, at most.

    What a strategy's clients send beside the layers is taken to be as long as what it sends them.
    """
    broadcast = strategy.broadcast(1)
    opening = message_of({"model": broadcast.tensors, "extra": broadcast.extra}, {})
    # Mask and float32 scores, in the first round twice, their names, and facts of this length.
    return 2 * len(opening) + shape[0] + 2 * 4 * shape[0] + 512


def round_bytes(
    terms: Terms, tail_shape: tuple[int, ...], sizes: Sequence[int], per_client: int
) -> Callable[[int], int]:
    """From a number of kept channels to the bytes of a round, both directions, at most.

    Args:
        terms: what both sides know.
        tail_shape: see `Halves`.
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
