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

#: From (logits [B, C], labels [B]) to a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]
#: Keyword under which a model is handed the output of its frozen layers (see features.py).
FEATURES = "sluiceway_features"


class Examples(Protocol):
    """Any map-style data set of (inputs, label).

    Inputs are a tensor or a mapping of tensors that become the model's keyword arguments; the
    label is a class number. Optional: `gather(indices)` returns a whole batch at once, `labels`
    is a tensor of all labels, `features(indices, mask)` the output of frozen layers.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """Some examples on the model's device.

    Attributes:
        inputs: one tensor, or keyword arguments for the model.
        labels: class numbers, [B] int64.
        features: what the frozen layers made of the inputs, where it was computed before.
    """

    inputs: Tensor | dict[str, Tensor]
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
            inputs, labels = default_collate([examples[i] for i in indices.tolist()])
        held = dict(inputs) if isinstance(inputs, Mapping) else inputs
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
        return Batch(
            {n: moved(t) for n, t in held.items()} if isinstance(held, dict) else moved(held),
            moved(self.labels),
            None if self.features is None else moved(self.features),
        )

    @property
    def mask(self) -> Tensor | None:
        """The attention mask [B, S] (or [B, C, S], of C options), where there is one."""
        return self.inputs.get("attention_mask") if isinstance(self.inputs, dict) else None

    @property
    def decoder_mask(self) -> Tensor | None:
        """The mask of an encoder-decoder's decoder, [B, C, T], where there is one."""
        return self.inputs.get("decoder_attention_mask") if isinstance(self.inputs, dict) else None

    def run(self, model: Callable[..., Any]) -> Tensor:
        """The model's logits [B, C], whether it returns a tensor or an object that holds one.

        Half precision is widened to float32, so that no loss is summed in it.
        """
        known = {} if self.features is None else {FEATURES: self.features}
        if isinstance(self.inputs, dict):
            out = model(**self.inputs, **known)
        else:
            out = model(self.inputs, **known)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
