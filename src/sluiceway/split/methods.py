"""Every way to compress what crosses the cut, by `method.name`.

Methods that choose channels differ in their score alone: each has a scorer that runs on the client,
before anything is dropped, and the same rule, schedule and hysteresis turn scores into masks. So
rivals at the same settings send the same number of bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs
from torch import Tensor, nn

from sluiceway import channels
from sluiceway.channels import ChannelChooser
from sluiceway.core.seeds import LARGEST_SEED
from sluiceway.split.bottleneck import Bottleneck, one_by_one
from sluiceway.split.compress import BUDGETED, Channels, Compressor, Quantize, Quantized
from sluiceway.split.elements import RandTopK, TopK
from sluiceway.split.packing import BatchId
from sluiceway.split.scorers import (
    ChannelScorer,
    ClassGradients,
    FixedScores,
    LabelAware,
    MeanScore,
    MomentScorer,
)
from sluiceway.split.selection import KeptChannels, Selection
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class ChannelChoice(Channels):
    """Channels are rated by a score, and a mask is chosen from the scores in every round.

    rule: how many channels are kept in the end, by `share` ("fraction"), `tau` ("cumulative"),
        `kappa` ("threshold") or `budget_mb` ("budget").
    share: of all channels, kept with rule "fraction".
    tau: with rule "cumulative" the smallest set with this share of the score mass is kept.
    kappa: with rule "threshold" scores of at least mean - kappa * std are kept.
    budget_mb: with rule "budget", megabytes that all messages of a round may take in both
        directions, masks, labels and front averaging included, once the ramp is over.
    warmup: rounds that send everything, >= 0. With 0 clients rate the channels of the untrained
        front on their own examples, before the first round. ramp_rounds: rounds over which the
        share falls to its end. every: rounds between choices of channels. growth: by
        which factor that number grows from choice to choice. Numbers of rounds are at most 10^6.
    margin: a channel is swapped only for one that is better by this share. decay: weight of
        the earlier rounds' scores.
    masks: "merged" for one mask of all clients' merged scores, "client" for one each, chosen where
        the scores are: neither crosses. A client that was not rated yet sends everything.
    """

    rule: Literal["fraction", "cumulative", "threshold", "budget"] = "fraction"
    share: float = Field(default=0.125, gt=0, le=1)
    tau: float = Field(default=0.9, gt=0, le=1)
    kappa: float = Field(default=0.0, allow_inf_nan=False)
    budget_mb: float = Field(default=1.0, gt=0)
    warmup: int = Field(default=1, ge=0, le=1_000_000)
    ramp_rounds: int = Field(default=4, ge=0, le=1_000_000)
    every: int = Field(default=1, ge=1, le=1_000_000)
    growth: float = Field(default=1.5, ge=1, allow_inf_nan=False)
    margin: float = Field(default=0.2, ge=0)
    decay: float = Field(default=0.5, ge=0, lt=1)
    masks: Literal["merged", "client"] = "merged"

    #: Whether the mask comes from scores, which the other side must be sent, or from the seed.
    sends_scores: ClassVar[bool] = True
    #: The server rates channels, by the gradients that it has: no scores cross.
    at_server: ClassVar[bool] = False
    #: Scores [C] of a batch, from its smashed data, or from that and its gradient.
    batch_score: ClassVar[Callable[..., Tensor]]
    of_gradient: ClassVar[bool] = False

    def scorer(self, count: int, classes: int, seed: int) -> ChannelScorer:
        """A client's scorer for `count` channels and `classes` labels."""
        return MeanScore(self.batch_score, self.of_gradient)

    def chooser(self, count: int, nbytes: Callable[[int], int]) -> ChannelChooser:
        """What turns scores into masks.

        Args:
            count: C.
            nbytes: bytes of a round, both directions, all clients, if that many are kept.

        Raises:
            ValueError: the budget does not pay for one channel.
        """
        if self.rule == "budget" and nbytes(1) > self.budget_mb * 1e6:
            raise ValueError(
                f"method.budget_mb = {self.budget_mb}: a round with one channel takes "
                f"{nbytes(1) / 1e6:.3f} MB"
            )
        rules: dict[str, Callable[[Tensor], Tensor]] = {
            "fraction": partial(channels.fraction, share=self.share),
            "cumulative": partial(channels.cumulative, tau=self.tau),
            "threshold": partial(channels.threshold, kappa=self.kappa),
            "budget": partial(
                channels.budget, bytes_available=self.budget_mb * 1e6, round_bytes=nbytes
            ),
        }
        return ChannelChooser(
            count,
            rules[self.rule],
            warmup=self.warmup,
            ramp_rounds=self.ramp_rounds,
            every=self.every,
            growth=self.growth,
            margin=self.margin,
            decay=self.decay,
        )


#: What `acp-sl` sets for channels of a mask, the paper's form, where nothing else is said.
CHANNEL_FORM: dict[str, Any] = {"basis": "channels", "quantize": "none"}
#: What it sets for components that fill a budget.
DEPLOYED_FORM: dict[str, Any] = {"deployed_ratio": 8.0}
#: Keys that say something of masks alone.
CHANNEL_KEYS = {"rule", "share", "tau", "kappa", "budget_mb", "ramp_rounds", "margin", "decay"}
CHANNEL_KEYS |= {"masks", "score", "grid", "memory"}


@dataclass(config=PARAMETERS, kw_only=True)
class ACPSL(ChannelChoice):
    """ACP-SL (arXiv 2603.09792): components of a better basis, each with the bits it is worth.

    Or, the paper's form, channels chosen by label-aware scores.

    preset: "paper": channels of a mask, not rounded: the paper's form as reconstructed. Keys that
        are given besides win. The same are the defaults with `basis = "channels"`, which `score`,
        `grid`, `memory`, `error_feedback` and the keys of masks and their rule imply.
    score: "fisher", "between", "distinct" or "similarity" [ours]. grid: cells a side that channels
        are pooled to, at most 1024. memory: how much of earlier batches' class statistics stays, in
        [0, 1].
    basis: "channels" sends the channels of a mask. The others send all components of a better
        basis, rounded as `quantize` says ("bits", "step" and "dct" with their `ratio` prune by
        bits), and the server turns them back: "eigen", eigenvectors of the channels' covariance
        over all clients; "label", of that with between-class scatter added; "gradient", of the
        covariance with each channel weighted by its mean squared gradient; "learned", 1x1 layers on
        both sides that begin at the eigenvectors and train. It is estimated when a mask would be
        chosen: see `warmup`, in which the channels themselves are sent, rounded alike, `every` and
        `growth`.
    label_weight: with basis "label" between-class scatter counts so many times what the covariance
        does, in sum.
    deployed_ratio: 8 for components that fill a budget.
    label_bits: an error of a component counts 1 + label_bits f / mean f times, f the share of its
        variance that is between classes: such components get more bits; for any other basis than
        "channels".
    """

    name: ClassVar[str] = "acp-sl"
    quantize: Quantize = "dct"
    preset: Literal["paper"] | None = None
    score: Literal["fisher", "between", "distinct", "similarity"] = "fisher"
    grid: int = Field(default=4, ge=1, le=1024)
    memory: float = Field(default=0.9, ge=0, le=1)
    basis: Literal["channels", "eigen", "label", "gradient", "learned"] = "eigen"
    label_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    label_bits: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def measured(self, round: int) -> bool:
        """Whether a basis may be estimated from what is measured in a round."""
        return channels.rechoose(round + 1 - self.warmup, self.every, self.growth)

    @model_validator(mode="before")
    @classmethod
    def with_preset(cls, given: Any) -> Any:
        """The form for channels of a mask below what is given."""
        values = given.kwargs or {} if isinstance(given, ArgsKwargs) else given
        if not isinstance(values, Mapping):
            return given
        # Error feedback is of channels too, but "false" says nothing.
        implied = values.get("preset") == "paper" or bool(values.get("error_feedback"))
        implied |= not CHANNEL_KEYS.isdisjoint(values)
        if values.get("basis", "channels" if implied else "eigen") == "channels":
            return {**CHANNEL_FORM, **values}
        used = values.get("deployed_quantize") or values.get("quantize", cls.quantize)
        return {**DEPLOYED_FORM, **values} if used in BUDGETED else given

    @property
    def by_class(self) -> bool:
        """Whether moments are taken by class."""
        return self.basis == "label" or self.label_bits > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis == "channels" and self.label_bits:
            raise ValueError("label_bits is of components: basis = 'channels' has none")
        if self.basis != "channels" and self.masks == "client":
            raise ValueError(f"basis = {self.basis!r} is one for all clients: masks = 'merged'")
        if self.basis != "channels" and self.error_feedback:
            raise ValueError(
                f"error_feedback is of channels, and basis = {self.basis!r} changes from round to "
                "round"
            )

    def attach(
        self, front: nn.Sequential, back: nn.Sequential, channels: int, dims: int
    ) -> tuple[nn.Sequential, nn.Sequential]:
        if self.basis != "learned":
            return front, back
        mix, unmix = (one_by_one(torch.eye(channels), dims) for _ in range(2))
        return (
            nn.Sequential(OrderedDict([*front._modules.items(), ("mix", mix)])),
            nn.Sequential(OrderedDict([("unmix", unmix), *back._modules.items()])),
        )

    def scorer(self, count: int, classes: int, seed: int) -> ChannelScorer:
        if self.basis != "channels":
            by_class, gradients = classes if self.by_class else 1, self.basis == "gradient"
            return MomentScorer(by_class, gradients, self.measured)
        score = getattr(channels, self.score)
        return LabelAware(score, classes, self.grid, self.memory)


@dataclass(config=PARAMETERS, kw_only=True)
class RandomChannels(ChannelChoice):
    """Channels drawn once; both sides know the seed, so no scores cross."""

    name: ClassVar[str] = "random"
    sends_scores: ClassVar[bool] = False

    def scorer(self, count: int, classes: int, seed: int) -> ChannelScorer:
        return FixedScores(count, seed)


@dataclass(config=PARAMETERS, kw_only=True)
class RedrawnChannels(Channels):
    """Channels drawn anew for each batch, in evaluation too: what papers mostly mean by random.

    share: of all channels, in (0, 1]; at least one crosses. seed: with the batch it decides which.
    """

    name: ClassVar[str] = "random-batch"
    share: float = Field(default=0.125, gt=0, le=1)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)

    def kept(self, shape: tuple[int, ...]) -> int:
        return channels.share_count(self.share, shape[1])

    def select(self, A: Tensor, batch: BatchId, mask: Tensor | None, training: bool) -> Selection:
        if mask is not None:
            raise ValueError(f"mask: {self.name} chooses its channels itself")
        # Evaluation has no batch of a client: it draws by what crosses.
        place = batch if training else (int(A.double().sum().view(torch.int64)) & LARGEST_SEED,)
        seed = int(np.random.SeedSequence((self.seed, *place)).generate_state(1, np.uint64)[0] >> 1)
        drawn = channels.random_scores(A.shape[1], torch.Generator().manual_seed(seed))
        return KeptChannels(channels.fraction(drawn, self.share))


@dataclass(config=PARAMETERS, kw_only=True)
class ICSChannels(ChannelChoice):
    """Channels of the largest gradients, each class counting alike (ICS-like, arXiv 2609.39194).

    The server rates them, and one mask of all clients changes slowly: see `decay` and `margin`. It
    needs the labels, and knows no gradient before the first round.
    """

    name: ClassVar[str] = "ics"
    at_server: ClassVar[bool] = True
    warmup: int = Field(default=1, ge=1, le=1_000_000)
    decay: float = Field(default=0.9, ge=0, lt=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks == "client":
            raise ValueError("ics: the server rates channels for all clients: masks = 'merged'")

    def scorer(self, count: int, classes: int, seed: int) -> ChannelScorer:
        return ClassGradients(classes)


@dataclass(config=PARAMETERS, kw_only=True)
class SLFAC(Compressor):
    """Low frequencies of every channel, bits by energy (SL-FAC, arXiv 2604.07316)."""

    name: ClassVar[str] = "sl-fac"
    quantize: Quantize = "slfac"


@dataclass(config=PARAMETERS, kw_only=True)
class Delta(Compressor):
    """What changed of each example since it last crossed (AQ-SGD-like, arXiv 2206.01299)."""

    name: ClassVar[str] = "delta"
    quantize: Quantize = "dct"
    delta: bool = True


@dataclass(config=PARAMETERS, kw_only=True)
class L1Channels(ChannelChoice):
    """Channels of the largest mean absolute value."""

    name: ClassVar[str] = "l1"
    batch_score: ClassVar[Callable[..., Tensor]] = staticmethod(channels.l1)


@dataclass(config=PARAMETERS, kw_only=True)
class StdChannels(ChannelChoice):
    """Channels of the largest standard deviation (SplitFC-like)."""

    name: ClassVar[str] = "std"
    batch_score: ClassVar[Callable[..., Tensor]] = staticmethod(channels.std)


@dataclass(config=PARAMETERS, kw_only=True)
class EntropyChannels(ChannelChoice):
    """Channels of the largest entropy of values (SL-ACC-like)."""

    name: ClassVar[str] = "entropy"
    batch_score: ClassVar[Callable[..., Tensor]] = staticmethod(channels.entropy)


@dataclass(config=PARAMETERS, kw_only=True)
class TaylorChannels(ChannelChoice):
    """Channels of the largest activation times gradient; one that is not sent gets no gradient.

    warmup: as elsewhere, but >= 1: before the first round there is no gradient.
    """

    name: ClassVar[str] = "taylor"
    batch_score: ClassVar[Callable[..., Tensor]] = staticmethod(channels.taylor)
    of_gradient: ClassVar[bool] = True
    warmup: int = Field(default=1, ge=1, le=1_000_000)


#: Every method by the name that `method.name` uses in a split recipe.
METHODS: dict[str, type[Compressor]] = {
    cls.name: cls
    for cls in (
        Compressor,
        ACPSL,
        RandomChannels,
        RedrawnChannels,
        L1Channels,
        StdChannels,
        EntropyChannels,
        TaylorChannels,
        ICSChannels,
        TopK,
        RandTopK,
        Quantized,
        Delta,
        SLFAC,
        Bottleneck,
    )
}
