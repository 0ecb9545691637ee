"""What a client's examples are, and how they become batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from sluiceway.errors import InputError

#: From (logits [B, C], labels [B]) to a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]
#: Keyword under which a model is handed the output of its frozen layers (see features.py).
FEATURES = "sluiceway_features"
#: Why a model is refused where only its logits are looked at.
OWN_LOSS = (
    "the model returns (logits, auxiliary loss), which federated training takes one client after "
    "the other (run.stacked = 1), and split training not at all"
)
#: The label of an example that nothing is trained or tested on; PyTorch's losses ignore it too.
IGNORED = -100


class Examples(Protocol):
    """Any map-style data set of (inputs, label).

    Inputs are a tensor, a tuple of tensors that become the model's arguments, or a mapping of
    tensors that become its keyword arguments; the label is a class number, or -100 for an example
    to leave out. Optional: `gather(indices)` returns a whole batch at once (rows of different
    lengths need one, which pads them), `labels` is a tensor of all labels,
    `features(indices, mask)` the output of frozen layers.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """Some examples on the model's device.

    Attributes:
        inputs: one tensor, or arguments or keyword arguments for the model.
        labels: class numbers, [B] int64.
        features: what the frozen layers made of the inputs, where it was computed before.
    """

    inputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor]
    labels: Tensor
    features: Tensor | None = None

    @staticmethod
    def of(
        examples: Examples,
        indices: Tensor,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """The examples at these positions; a generator augments those of a set that can be."""
        if generator is not None and getattr(examples, "augmentation", None) is not None:
            inputs, labels = examples.gather(indices, generator)  # type: ignore[attr-defined]
        elif hasattr(examples, "gather"):
            inputs, labels = examples.gather(indices)
        elif isinstance(examples, TensorDataset):
            inputs, labels = (tensor[indices] for tensor in examples.tensors)
        else:
            inputs, labels = collated([examples[i] for i in indices.tolist()])
        held = dict(inputs) if isinstance(inputs, Mapping) else inputs
        held = tuple(held) if isinstance(held, list) else held
        batch = Batch(held, torch.as_tensor(labels, dtype=torch.int64))
        if hasattr(examples, "features"):
            batch = replace(batch, features=examples.features(indices, batch.mask))
        return batch.to(device)

    def to(self, device: torch.device) -> Batch:
        """The same on another device; from the CPU without waiting for it."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=tensor.device.type == "cpu")

        held = self.inputs
        here = isinstance(held, Tensor) and held.device == self.labels.device == device
        if here and self.features is None:
            return self
        inputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor]
        if isinstance(held, dict):
            inputs = {name: moved(tensor) for name, tensor in held.items()}
        elif isinstance(held, tuple):
            inputs = tuple(moved(tensor) for tensor in held)
        else:
            inputs = moved(held)
        features = None if self.features is None else moved(self.features)
        return Batch(inputs, moved(self.labels), features)

    @property
    def mask(self) -> Tensor | None:
        """The attention mask [B, S] (or [B, C, S], of C options), where there is one."""
        return self.inputs.get("attention_mask") if isinstance(self.inputs, dict) else None

    @property
    def decoder_mask(self) -> Tensor | None:
        """The mask of an encoder-decoder's decoder, [B, C, T], where there is one."""
        return self.inputs.get("decoder_attention_mask") if isinstance(self.inputs, dict) else None

    def run(self, model: Callable[..., Any]) -> Tensor:
        """The model's logits [B, C] of `outcome`, where nothing is to be trained on its loss.

        Raises:
            InputError: the model returns a loss of its own, and gradients are wanted.
        """
        logits, own = self.outcome(model)
        if own is not None and own.requires_grad:
            raise InputError(OWN_LOSS)
        return logits

    def outcome(self, model: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
        """The model's logits [B, C], and the auxiliary loss that it returns beside them, or None.

        It may return a tensor, an object that has one as `.logits`, or a tuple (logits, auxiliary
        loss). Half precision is widened to float32, so that no loss is summed in it.

        Raises:
            InputError: it returns anything else.
        """
        known = {} if self.features is None else {FEATURES: self.features}
        if isinstance(self.inputs, dict):
            out = model(**self.inputs, **known)
        elif isinstance(self.inputs, tuple):
            out = model(*self.inputs, **known)
        else:
            out = model(self.inputs, **known)
        own = None
        if isinstance(out, tuple | list) and len(out) == 2 and _is_scalar(out[1]):
            out, own = out
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor):
            raise InputError(
                f"the model returns {_shown(out)}: expected logits [B, C], an object that has them "
                "as .logits, or a tuple (logits, auxiliary loss) with a loss of one number"
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), own


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()


def _shown(out: Any) -> str:
    """What a model returned, for an error."""
    if not isinstance(out, tuple | list):
        return f"a {type(out).__name__}"
    items = [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in out]
    return f"a {type(out).__name__} of {len(out)} ({', '.join(map(str, items))})"


def collated(rows: list[Any]) -> Any:
    """Examples as a batch. Raises InputError where their tensors differ in shape."""
    try:
        return default_collate(rows)
    except RuntimeError:
        parts = [tensors_of(inputs) for inputs, _ in rows]
        for name in parts[0]:
            shapes = dict.fromkeys(tuple(part[name].shape) for part in parts if name in part)
            if len(shapes) > 1:
                few = " and ".join(str(list(shape)) for shape in list(shapes)[:2])
                raise InputError(
                    f"examples of different shapes ({f'{name}: ' if name else ''}{few}) make no "
                    "batch: pad them, or give the data set a gather(indices) that returns a whole "
                    "batch (inputs, labels)"
                ) from None
        raise


def tensors_of(inputs: Any) -> dict[str, Tensor]:
    """The tensors of an example's or a batch's inputs, by name or place; "" of a single one."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, tuple | list):
        return {str(place): tensor for place, tensor in enumerate(inputs)}
    return {"": inputs}


class Rows:
    """Some rows of a data set, as a data set.

    Args:
        examples: has more rows.
        rows: which, int64.
    """

    def __init__(self, examples: Examples, rows: Tensor) -> None:
        self.examples, self.rows = examples, rows
        self.labels = labels_of(examples)[rows]
        if hasattr(examples, "gather"):
            self.gather = self._gather
            self.augmentation = getattr(examples, "augmentation", None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.examples[int(self.rows[index])]

    def _gather(self, indices: Tensor, *more: Any) -> Any:
        return self.examples.gather(self.rows[indices], *more)  # type: ignore[attr-defined]


def without_ignored(examples: Examples) -> Examples:
    """The examples whose label is not -100. Raises ValueError for labels that are no numbers."""
    labels = labels_of(examples) if len(examples) else torch.zeros(0)
    if not bool((labels == IGNORED).any()):
        return examples
    rows = (labels != IGNORED).nonzero().flatten()
    if isinstance(examples, TensorDataset):
        return TensorDataset(*(tensor[rows] for tensor in examples.tensors))
    return Rows(examples, rows)


def is_alone(error: ValueError) -> bool:
    """Whether a layer refused to train on a batch of one, as BatchNorm of [B, C] does."""
    return "more than 1 value per channel" in str(error)


def whole_labels(labels: Tensor) -> Tensor:
    """Labels [N] as int64. Raises ValueError for one that is no whole number."""
    if labels.is_floating_point() and (odd := labels[labels != labels.round()]).numel():
        raise ValueError(f"a label is {float(odd[0]):g}; expected class numbers, as 0 or 1")
    return labels.to(torch.int64)


#: Labels of data sets that have no `labels`, by the data set, with its length.
_LABELS: WeakKeyDictionary[Any, tuple[int, Tensor]] = WeakKeyDictionary()


def labels_of(examples: Examples) -> Tensor:
    """All labels, [N] int64. Of a data set without `labels` each example is read, once."""
    labels = getattr(examples, "labels", None)
    if labels is not None:
        return whole_labels(torch.as_tensor(labels))
    with contextlib.suppress(TypeError):  # a list cannot be a key
        size, known = _LABELS.get(examples, (-1, torch.empty(0)))
        if size == len(examples):
            return known
    every: Iterable[Any] = (examples[i][1] for i in range(len(examples)))
    found = whole_labels(torch.as_tensor([float(label) for label in every], dtype=torch.float64))
    with contextlib.suppress(TypeError):
        _LABELS[examples] = (len(examples), found)
    return found
