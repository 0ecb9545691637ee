"""Every way to compress what crosses the cut, by `method.name`.

Methods that choose channels differ in their score alone: each has a scorer that runs on the client,
before anything is dropped, and the same rule, schedule and hysteresis turn scores into masks. So
rivals at the same settings send the same number of bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from sluiceway import channels
from sluiceway.channels import ChannelChooser
from sluiceway.split.bottleneck import Bottleneck, one_by_one
from sluiceway.split.compress import Channels, Compressor, Quantized
from sluiceway.split.elements import RandTopK, TopK
from sluiceway.split.scorers import ChannelScorer, FixedScores, LabelAware, MeanScore, MomentScorer
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

    #: Whether clients must send their scores for a merged mask.
    sends_scores: ClassVar[bool] = True
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


@dataclass(config=PARAMETERS, kw_only=True)
class ACPSL(ChannelChoice):
    """ACP-SL (arXiv 2603.09792): label-aware scores decide which channels cross.

    score: "fisher", "between", "distinct" or "similarity" [ours]. grid: cells a side that channels
        are pooled to, at most 1024. memory: how much of earlier batches' class statistics stays, in
        [0, 1].
    basis: "channels" sends the channels of a mask. The others send all components of a better
        basis, rounded as `quantize` says ("bits", "step" and "dct" with their `ratio` prune by
        bits), and the server turns them back: "eigen", eigenvectors of the channels' covariance
        over all clients; "label", of that with between-class scatter added; "gradient", of the
        covariance with each channel weighted by its mean squared gradient; "learned", 1x1 layers on
        both sides that begin at the eigenvectors and train. It is estimated when a mask would be
        chosen: see `warmup`, `every` and `growth`.
    label_weight: with basis "label" between-class scatter counts so many times what the covariance
        does, in sum.
    """

    name: ClassVar[str] = "acp-sl"
    score: Literal["fisher", "between", "distinct", "similarity"] = "fisher"
    grid: int = Field(default=4, ge=1, le=1024)
    memory: float = Field(default=0.9, ge=0, le=1)
    basis: Literal["channels", "eigen", "label", "gradient", "learned"] = "channels"
    label_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    def __post_init__(self) -> None:
        super().__post_init__()
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
            return MomentScorer(self.basis, classes)
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
        L1Channels,
        StdChannels,
        EntropyChannels,
        TaylorChannels,
        TopK,
        RandTopK,
        Quantized,
        Bottleneck,
    )
}
