"""Compression as a pipeline: select what crosses, quantise it, pack it; and the gradient back.

A compressor is both ends of it: the client calls `up` and `open_gradient`, the server `open` and
`down`. What crosses is decided by one method, `select`; all else is common.

Rounding is straight-through: the gradient of a rounded value is taken as that of the value itself.
A value that did not cross is zero on the server, and its gradient zero on the client: that is the
exact derivative of the network with the mask in it.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from sluiceway.split.feedback import ErrorFeedback
from sluiceway.split.packing import (
    LIMIT,
    BatchContext,
    BatchId,
    Encoded,
    Expected,
    Message,
    Smashed,
    encode_gradient,
    encode_smashed,
    message_bytes,
    unpack_gradient,
    unpack_smashed,
)
from sluiceway.split.quantise import TRANSFORMING, Coding, is_coded
from sluiceway.split.selection import KeptChannels, Selection, every_channel
from sluiceway.strategies.parameters import PARAMETERS

Quantize = Literal["none", "fp16", "int8", "int4", "bits", "step", "dct", "slfac"]
#: Those that fill a budget of bytes.
BUDGETED = ("bits", "step", "dct", "slfac")


@dataclass(config=PARAMETERS, kw_only=True)
class Compressor:
    """Every channel crosses; with `quantize` "none" exactly. The base of all compressors.

    Args:
        quantize: of smashed data: float32, half precision, 8 or 4 bits with a scale per channel
            (of elements: per example); or as `ratio` allows: whole bits a channel by reverse
            water-filling ("bits"), or one step for all channels, coded by frequencies ("step"),
            after a cosine transform over positions ("dct"; not of elements); or low frequencies
            with bits by energy ("slfac", of arXiv 2604.07316; likewise).
        quantize_gradient: of the gradient; None is as `quantize`.
        affine: integers of smashed data count from a channel's smallest value: half the step
            behind a ReLU, for four more bytes a channel. Gradients are always symmetric.
        ratio: with these four, values take so many times fewer bytes than all of the smashed data
            in float32, whatever is left out (of "step" and "dct" to a few percent), in [1, 10^4].
            ratio_gradient: of the gradient; None is as `ratio`.
        stochastic: with these four gradients are rounded up by chance, so that their mean has no
            error.
        coder: "range" codes the integers of all rounding by their frequencies, without loss; "step"
            and "dct" always do.
        error_feedback: what rounding took from a client's gradient goes into its next one.
        delta: of every example what changed since it last crossed is rounded and sent (after
            AQ-SGD, arXiv 2206.01299), so that behind layers that stay, and of images that are not
            augmented, rounding dies out. Both ends keep each example's smashed data in float32.
            Where the trained model is used nothing crossed before.
        noise: Gaussian noise on smashed data, relative to their standard deviation, >= 0: a defence
            against rebuilding inputs. In training and in evaluation; run.seed decides it.
        deployed_quantize, deployed_ratio: `quantize` and `ratio` of the trained model's use, in
            evaluation, predictions and exported models; None is as in training. Layers that learn
            from coarse values can do with finer ones, which cross once there, not in every step.
        limit: in bytes, of a message and of the dense float32 tensor it opens to, in [1, 2^40].
    """

    name: ClassVar[str] = "sl"
    #: Single elements cross, not channels.
    elements: ClassVar[bool] = False

    quantize: Quantize = "none"
    quantize_gradient: Quantize | None = None
    affine: bool = True
    ratio: float = Field(default=32.0, ge=1, le=10_000)
    ratio_gradient: float | None = Field(default=None, ge=1, le=10_000)
    stochastic: bool = False
    coder: Literal["none", "range"] = "none"
    error_feedback: bool = False
    delta: bool = False
    noise: float = Field(default=0.0, ge=0)
    deployed_quantize: Quantize | None = None
    deployed_ratio: float | None = Field(default=None, ge=1, le=10_000)
    limit: int = Field(default=LIMIT, ge=1, le=1 << 40)

    def __post_init__(self) -> None:
        self._feedback = ErrorFeedback()
        codecs = {self.codec, self.gradient_codec, self.deployed_quantize or "none"}
        for codec in codecs & set(TRANSFORMING):
            if self.elements:
                raise ValueError(
                    f"quantize = {codec!r}: {self.name} sends elements, which have no positions"
                )
        if self.deployed_ratio and (self.deployed_quantize or self.quantize) not in BUDGETED:
            raise ValueError(
                f"deployed_ratio: only {', '.join(BUDGETED)} fill a budget; choose one as "
                "deployed_quantize"
            )

    @property
    def deployed(self) -> Self:
        """The compressor where the trained model is used: as the keys deployed_... say."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {k: v for k, v in values.items() if k.startswith("deployed_") and v is not None}
        changed = {k.removeprefix("deployed_"): v for k, v in given.items()} | dict.fromkeys(given)
        return replace(self, **changed) if given else self

    @property
    def codec(self) -> str:
        """Codec of smashed data."""
        integers = self.quantize in ("int8", "int4")
        return f"{self.quantize}-affine" if self.affine and integers else self.quantize

    @property
    def gradient_codec(self) -> str:
        """Codec of gradients."""
        return self.quantize_gradient or self.quantize

    @property
    def narrowed(self) -> float:
        """The share of the network's channels that layers of this method leave at the cut."""
        return 1.0

    @property
    def coding(self) -> Coding:
        """How the numbers of smashed data are written."""
        return Coding(self.coder == "range", self.ratio * self.narrowed)

    @property
    def gradient_coding(self) -> Coding:
        """How the numbers of gradients are written."""
        ratio = self.ratio if self.ratio_gradient is None else self.ratio_gradient
        return Coding(self.coder == "range", ratio * self.narrowed, self.stochastic)

    def attach(
        self, front: nn.Sequential, back: nn.Sequential, channels: int, dims: int
    ) -> tuple[nn.Sequential, nn.Sequential]:
        """Front and back as this method trains them; most leave them as they are.

        Args:
            front, back: from `cut`.
            channels: C of the smashed data.
            dims: its number of dimensions, the batch included: 2 to 4.
        """
        return front, back

    def kept(self, shape: tuple[int, ...]) -> int:
        """Channels, or elements of an example, that cross of [B, C, ...] without a mask."""
        return shape[1]

    def select(self, A: Tensor, batch: BatchId, mask: Tensor | None, training: bool) -> Selection:
        """What of A crosses. The one thing that a new method must define."""
        if mask is not None:
            raise ValueError(f"mask: {self.name} chooses no channels")
        return every_channel(A.shape[1])

    def up(
        self,
        A: Tensor,
        batch: BatchId,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        training: bool = True,
        rows: Tensor | None = None,
    ) -> tuple[Encoded, BatchContext]:
        """The client's message: tensors where they are, of known length; `bytes` packs it.

        Args:
            A: smashed data, [B, C], [B, C, L] or [B, C, H, W]; its graph is left alone.
            batch: whose it is.
            labels: [B], in [0, 65535]; None where they stay with the client.
            mask: keep mask, [C] bool, for methods that choose channels.
            training: False makes the selection deterministic.
            rows: numbers of the client's examples that they are of, [B] int64, for `delta`.

        Returns:
            The message, and the context of its gradient.

        Raises:
            ValueError: a shape does not fit, or a number is out of range.
        """
        selection = self.select(A, batch, mask, training)
        return encode_smashed(A, selection, batch, self.codec, labels, self.coding, rows)

    def open(
        self,
        message: Message,
        shape: tuple[int | None, ...] | None = None,
        batch: BatchId | None = None,
        labels: bool | None = None,
        classes: int | None = None,
        examples: int | None = None,
        device: str | torch.device = "cpu",
    ) -> Smashed:
        """What the server reads from it: dense values with zeros, labels, and the context.

        `shape`, `batch`, `labels`, `classes`, `examples`: what the server knows, see `Expected`.

        Raises:
            WireError: it is no such message, another method's, or not the one expected.
        """
        coded = is_coded(self.codec, self.coding)
        known = (shape, batch, self.codec, self.elements, labels, classes, coded, examples)
        return unpack_smashed(message, self.limit, Expected(*known), device)

    def down(self, grad: Tensor, context: BatchContext) -> Encoded:
        """The server's message: the gradient by what crossed, and by nothing else.

        Args:
            grad: of the loss by the values that `open` gave, their shape.
            context: that `open` gave.

        Raises:
            ValueError: the shape does not fit, or a value to be quantised is not finite.
        """
        if not self.error_feedback:
            return encode_gradient(grad, context, self.gradient_codec, self.gradient_coding)
        return self._feedback.send(
            grad,
            context,
            lambda corrected: encode_gradient(
                corrected, context, self.gradient_codec, self.gradient_coding
            ),
            lambda message: self.open_gradient(message, context, grad.device),
        )

    def open_gradient(
        self, message: Message, context: BatchContext, device: str | torch.device = "cpu"
    ) -> Tensor:
        """What the client reads from it, for `A.backward(gradient)`.

        Returns:
            The shape of A, float32, zero where nothing crossed.

        Raises:
            WireError: it is no such message, or a gradient of another batch.
        """
        codec, coded = self.gradient_codec, is_coded(self.gradient_codec, self.gradient_coding)
        return unpack_gradient(message, context, self.limit, codec, device, coded)

    def bytes_up(
        self,
        shape: tuple[int, ...],
        kept: int | None = None,
        label_bytes: int = 0,
        row_bytes: int = 0,
    ) -> int:
        """Length of the client's message for [B, C, ...]; `kept` channels if there is a mask."""
        kept, elements = kept or self.kept(shape), self.elements
        return message_bytes(
            shape,
            kept,
            self.codec,
            elements=elements,
            label_bytes=label_bytes,
            row_bytes=row_bytes,
            ratio=self.coding.ratio,
        )

    def bytes_down(self, shape: tuple[int, ...], kept: int | None = None) -> int:
        """Length of the server's message for [B, C, ...]."""
        kept, elements = kept or self.kept(shape), self.elements
        ratio = self.gradient_coding.ratio
        return message_bytes(
            shape, kept, self.gradient_codec, elements=elements, gradient=True, ratio=ratio
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What the next message depends on but the settings: residuals of error feedback."""
        return self._feedback.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        self._feedback.load_state_dict(state)


@dataclass(config=PARAMETERS, kw_only=True)
class Quantized(Compressor):
    """Every channel crosses, rounded to 8 or 4 bits."""

    name: ClassVar[str] = "quantize"
    quantize: Quantize = "int8"


@dataclass(config=PARAMETERS, kw_only=True)
class Channels(Compressor):
    """The channels of a mask cross, chosen by `sluiceway.channels`; without a mask all of them."""

    name: ClassVar[str] = "channels"

    def select(self, A: Tensor, batch: BatchId, mask: Tensor | None, training: bool) -> Selection:
        return every_channel(A.shape[1]) if mask is None else KeptChannels(mask)
