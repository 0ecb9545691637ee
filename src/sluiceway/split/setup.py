"""Setting up a split run: the network is cut, and both sides make what they must agree on."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, Loss, is_alone
from sluiceway.core.handshake import ModelSignature
from sluiceway.core.messages import message_of
from sluiceway.core.parameters import exchanged, frozen_values
from sluiceway.core.seeds import derive_seed
from sluiceway.core.settings import Optimisation, SplitTraining
from sluiceway.moe import MoELayout
from sluiceway.split.client import SplitClient
from sluiceway.split.compress import BUDGETED, Compressor, Quantize
from sluiceway.split.config import SplitConfig, SplitModel, batch_counts
from sluiceway.split.cut import cut
from sluiceway.split.mask_selector import ALL
from sluiceway.split.memory import ExampleMemory
from sluiceway.split.methods import ACPSL, ChannelChoice
from sluiceway.split.packing import fewest_bytes
from sluiceway.split.schedules import SCHEDULE_ALIASES, SCHEDULES
from sluiceway.split.scorers import ChannelScorer
from sluiceway.split.server import SplitServer
from sluiceway.split.traced import Traced
from sluiceway.strategies import FedAvg, Strategy


@dataclass
class SplitSettings:
    """The settings of a split run; see `split_train`.

    Raises:
        ValueError: a schedule that is not known, or settings that exclude each other.
    """

    cut_at: str
    method: Compressor
    schedule: str
    tail_at: str | None
    client_aggregation: Strategy
    training: Optimisation
    loss: Loss
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        self.schedule = SCHEDULE_ALIASES.get(self.schedule, self.schedule)
        if self.schedule not in SCHEDULES:
            allowed = ", ".join(SCHEDULES)
            raise ValueError(f"schedule {self.schedule!r} is not known; allowed: {allowed}")
        if (self.schedule == "u") != (self.tail_at is not None):
            raise ValueError(
                "a U-shape, and it alone, needs a second cut: schedule = 'u' with tail_at"
            )
        if self.schedule == "sequential" and type(self.client_aggregation) is not FedAvg:
            raise ValueError(
                "sequential training hands one front on and averages none: "
                "client_aggregation = fedavg"
            )


class SharedSetup:
    """What both sides of a run make alike, each for itself.

    Args:
        network: what is trained; its layers are used, not copied.
        settings: of the run.
        example: a batch of one, of any client or of the test set.
        classes: labels are below it.
        clients: how many there are.

    Attributes:
        model: the cut network.
        config: what both sides know.
        strategy: averages what clients hold; set up.
        choice: the method, or None for one that chooses no channels.
        mixing: the method, or None for one that sends channels.
        schedule: one of `SCHEDULES`.
        seed: of the whole run.

    Raises:
        ValueError: a cut that is not there, what crosses is not float32, or no batch is large
            enough for the layers.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: SplitSettings,
        example: Batch,
        classes: int,
        clients: int,
    ) -> None:
        training, strategy = settings.training, settings.client_aggregation
        train_front = not isinstance(training, SplitTraining) or training.front
        # A copy for this run: error feedback remembers what a method did before.
        method = replace(settings.method)
        network = network.to(settings.device)
        model = cut_model(network, settings.cut_at, settings.tail_at, example, method, train_front)
        if not any(p.requires_grad for part in model.parts() for p in part.parameters()):
            raise ValueError("the network has nothing to train: every parameter is frozen")
        trained = any(p.requires_grad for p in model.front.parameters())
        if isinstance(training, SplitTraining) and training.nopeek and not trained:
            raise ValueError("train.nopeek needs layers before the cut that are trained")
        if training.batch_size < max(model.smallest):
            raise ValueError(
                f"batch_size = {training.batch_size}: BatchNorm of [B, C] needs at least "
                f"{max(model.smallest)} examples"
            )
        if isinstance(method, ChannelChoice) and method.at_server and settings.tail_at is not None:
            raise ValueError(f"{method.name} needs the labels at the server: not schedule = 'u'")
        rounding = tail_compressor(method)
        self.model, self.schedule, self.seed = model, settings.schedule, settings.seed
        mixes = isinstance(method, ACPSL) and method.basis != "channels"
        self.choice = method if isinstance(method, ChannelChoice) and not mixes else None
        self.mixing = method if isinstance(method, ACPSL) and mixes else None
        self.config = SplitConfig(
            training,
            method,
            rounding,
            settings.loss,
            model.shape,
            classes,
            settings.device,
            trained
            or (self.choice is not None and self.choice.of_gradient)
            or (self.mixing is not None and self.mixing.basis == "gradient"),
        )
        self.strategy, self.clients = strategy, clients
        strategy.setup(self.exchanged(), MoELayout(()), clients)

    def exchanged(self) -> dict[str, Tensor]:
        """The values of what clients train, on the CPU."""
        tensors = exchanged(self.model.client_layers())
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def signature(self) -> ModelSignature:
        """What both sides must agree on: what is exchanged, and the values of frozen layers."""
        return ModelSignature.of(self.exchanged(), still=frozen_values(self.model.front))

    def scorer(self, client_id: int) -> ChannelScorer | None:
        """A client's scorer; None for a method that measures nothing."""
        method = self.choice or self.mixing
        if method is None or method.at_server:
            return None
        own = method.masks == "client"
        seed = derive_seed(self.seed, client_id) if own else self.seed
        return method.scorer(self.model.shape[0], self.config.classes, seed)

    def client(self, client_id: int, examples: Examples) -> SplitClient:
        """A client with its layers."""
        scorer = self.scorer(client_id)
        return SplitClient(
            client_id, examples, self.model, self.config, self.strategy, scorer, self.seed
        )

    def servers(self, memory: ExampleMemory | None = None) -> dict[int, SplitServer]:
        """The server's side: one for `ALL`, or a copy for each client; all with one memory."""
        back = self.model.back
        if self.schedule != "copies":
            return {ALL: self.server(back, memory)}
        copies = (copy.deepcopy(back) for _ in range(self.clients))
        return {i: self.server(own, memory) for i, own in enumerate(copies)}

    def server(self, back: nn.Module, memory: ExampleMemory | None) -> SplitServer:
        """A server with these layers, which rates channels where the method does so there."""
        config, smallest, choice = self.config, self.model.smallest[1], self.choice
        scorer = None
        if choice is not None and choice.at_server:
            scorer = choice.scorer(self.model.shape[0], config.classes, self.seed)
        return SplitServer(back, config, smallest, scorer, memory)

    def round_bytes(self, sizes: Sequence[int]) -> Callable[[int], int]:
        """From a number of kept channels to the bytes of a round, both directions, at most.

        Args:
            sizes: examples of the clients that take part.
        """
        config, tail_shape = self.config, self.model.tail_shape
        batches, finer = Counter[int](), Counter[int]()
        for size in sizes:
            each = config.epoch_batches(size, epochs=config.training.local_epochs)
            batches.update(each.counts())
            finer.update(each[max(0, len(each) - config.recalibrate) :])
        row_bytes = fewest_bytes(max(sizes, default=1) - 1) if config.link.delta else 0
        label_bytes = 0 if tail_shape else fewest_bytes(config.classes - 1)
        # At the start and end of a round: layers, what the strategy sends with them (clients as
        # much as the server), a mask, float32 scores (in the first round twice), names and facts.
        broadcast = self.strategy.broadcast(1)
        layers = message_of({"model": broadcast.tensors, "extra": broadcast.extra}, {})
        counts = len(batch_counts(self.model.client_layers()))
        per_client = 2 * len(layers) + 9 * self.model.shape[0] + 512 + 256 * counts

        def nbytes(kept: int) -> int:
            total = per_client * len(sizes)
            for size, count in batches.items():
                shape = (size, *config.shape)
                one = config.link.bytes_up(shape, kept, label_bytes, row_bytes)
                if config.gradients:
                    one += config.link.bytes_down(shape, kept)
                if tail_shape:
                    shape = (size, *tail_shape)
                    one += config.tail_link.bytes_up(shape) + config.tail_link.bytes_down(shape)
                total += count * one
            for size, count in finer.items():
                batch = (size, *config.shape), kept, label_bytes, row_bytes
                more = config.finer_link.bytes_up(*batch) - config.link.bytes_up(*batch)
                total += count * more
            return total

        return nbytes


def tail_compressor(method: Compressor) -> Compressor:
    """At the second cut of a U-shape values are rounded as by `method`, and all of them cross.

    There are few of them, so that a budget of the first cut means 8 bits here.
    """
    up: Quantize = "int8" if method.quantize in BUDGETED else method.quantize
    down = "int8" if method.quantize_gradient in BUDGETED else method.quantize_gradient
    return Compressor(
        quantize=up,
        quantize_gradient=down,
        affine=method.affine,
        coder=method.coder,
        error_feedback=method.error_feedback,
        limit=method.limit,
    )


def cut_model(
    network: nn.Module,
    cut_at: str,
    tail_at: str | None,
    example: Batch,
    method: Compressor,
    train_front: bool = True,
) -> SplitModel:
    """Cut the network once or twice, and try its parts on an example.

    Args:
        train_front: False freezes the layers before the cut, but not those that the method adds.

    Raises:
        ValueError: a cut that is not there, or what crosses is not float32.
    """
    front, back = cut(network, cut_at)
    if not train_front:
        front.requires_grad_(False)
    tail = None
    if tail_at is not None:
        back, tail = cut(back, tail_at)
    smashed = output_of(front, example)
    if smashed.dtype != torch.float32:
        raise ValueError(f"the network gives {smashed.dtype} at the cut; expected torch.float32")
    channels = smashed.shape[1]
    front, back = attached(method, front, back, channels, smashed.dim())
    values = output_of(front, example)
    at_cut = Batch(values, example.labels)
    onward = output_of(back, at_cut)
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
        (at_client, smallest_batch(back, at_cut)),
    )


def attached(
    method: Compressor, front: nn.Sequential, back: nn.Sequential, channels: int, dims: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """The halves with the layers that the method adds at the cut."""
    if not isinstance(front, Traced) and not isinstance(back, Traced):
        return method.attach(front, back, channels, dims)
    last, first = method.attach(nn.Sequential(), nn.Sequential(), channels, dims)
    return with_layers(front, last=last), with_layers(back, first=first)


def with_layers(
    half: nn.Sequential, first: nn.Module | None = None, last: nn.Module | None = None
) -> nn.Sequential:
    """A half with the layers of others at its ends."""
    before, behind = (layers_of(each) if each is not None else {} for each in (first, last))
    if isinstance(half, Traced):
        return half.with_layers(before, behind)
    return nn.Sequential(OrderedDict([*before.items(), *layers_of(half).items(), *behind.items()]))


def layers_of(chain: nn.Module) -> dict[str, nn.Module]:
    """All layers of a chain by name, one that is in it twice under both."""
    return {name: layer for name, layer in chain._modules.items() if layer is not None}


@torch.no_grad()
def output_of(layers: nn.Module, example: Batch) -> Tensor:
    """What the layers give in evaluation mode; they are left as they are."""
    return example.run(copy.deepcopy(layers).eval()).clone()


@torch.no_grad()
def smallest_batch(layers: nn.Module, example: Batch) -> int:
    """2 if the layers cannot train on a batch of one, as BatchNorm of [B, C] cannot; else 1."""
    layers = copy.deepcopy(layers).train()
    try:
        Batch(copy.deepcopy(example.inputs), example.labels).run(layers)
    except ValueError as error:
        if is_alone(error):
            return 2
        raise
    return 1
