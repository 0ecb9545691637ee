"""Frozen layers are run once per example, and rounds train on what comes out of them.

The layers below the first trained one never change, so their output for an example does not
either. `find_frozen_prefix` finds them, `FeatureStore` keeps their output (in memory up to a limit,
then in a memory-mapped file), and the model then runs with those layers passed over.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from sluiceway.core.batches import FEATURES, Batch, Examples, labels_of
from sluiceway.core.waits import counted
from sluiceway.federated.feature_files import FeatureFiles, feature_key

#: Largest difference, relative to the largest value, between a run through and one past the trunk;
#: a rounding of the parameters' type where that is more, for sums depend on a batch's shape.
TOLERANCE = 1e-4
#: Examples a forward pass when features are computed.
BATCH = 64


class _Reached(Exception):
    """Raised to stop a forward pass at the end of the trunk."""


class FrozenPrefix:
    """The frozen layers of a stack that lie below its first trained one.

    Args:
        model: the whole model.
        stack: the layers, each called with hidden states first.
        depth: how many of them are frozen, >= 1.
    """

    def __init__(self, model: nn.Module, stack: Sequence[nn.Module], depth: int) -> None:
        self.model = model
        self.layers = list(stack)[:depth]
        self.top = list(stack)[depth]
        self._hidden: Tensor | None = None

    @torch.no_grad()
    def compute(self, batch: Batch) -> Tensor:
        """Hidden states that enter the first trained layer, [B, ...]; padding is zeroed.

        Of texts they are [*mask, d], whatever the shape of the mask that comes with them.
        """
        found: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        hook = self.top.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            batch.run(self.model)
        except _Reached:
            pass
        finally:
            hook.remove()
        hidden = found[0].detach()
        if batch.mask is None:
            return hidden
        hidden = hidden.view(*batch.mask.shape, -1)
        return hidden * batch.mask.unsqueeze(-1).to(hidden)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Inside, a batch that carries features runs past the frozen layers."""

        hook = self.model.register_forward_pre_hook(self._take, with_kwargs=True)
        try:
            for position, layer in enumerate(self.layers):
                layer.forward = _passed_on if position else self._inject
            yield
        finally:
            hook.remove()
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    # Methods and not closures: a model in use is pickled for worker processes that begin anew.

    def _take(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        known: Tensor = kwargs.pop(FEATURES)
        # The layers see each option of an example as a sequence of its own.
        options = kwargs["attention_mask"].ndim == 3 if "attention_mask" in kwargs else False
        self._hidden = known.flatten(0, 1) if options else known
        return args, kwargs

    def _inject(self, *_: Any, **__: Any) -> Tensor:
        assert self._hidden is not None
        return self._hidden

    def fingerprint(self) -> str:
        """Equal for trunks that compute the same; a hash over their parameters and those before."""
        digest = hashlib.sha256(str(self.layers).encode())
        for name, param in self.model.named_parameters():
            if not param.requires_grad:
                digest.update(name.encode())
                digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _passed_on(*args: Any, **kwargs: Any) -> Any:
    """What enters a layer that is passed over."""
    return args[0] if args else kwargs["hidden_states"]


def find_frozen_prefix(model: nn.Module) -> FrozenPrefix | None:
    """The largest run of frozen layers at the bottom of a stack of layers, if there is one.

    A stack is an nn.ModuleList or nn.Sequential whose first layers are frozen and a later one is
    trained. Whether passing over them is sound for this model is for `agrees` to say.
    """
    best: tuple[int, FrozenPrefix] | None = None
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        layers = list(module)
        trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
        depth = trained.index(True) if True in trained else 0
        size = sum(p.numel() for layer in layers[:depth] for p in layer.parameters())
        if size and (best is None or size > best[0]):
            best = size, FrozenPrefix(model, layers, depth)
    return best[1] if best else None


def agrees(trunk: FrozenPrefix, batch: Batch) -> bool:
    """Whether passing over the trunk changes neither logits nor any trained gradient.

    It does where something else feeds the trained part: a layer below that returns more than
    hidden states, trained embeddings, a skip connection around the trunk.
    """
    model = trunk.model
    was_training = model.training
    model.eval()
    params = [p for p in model.parameters() if p.requires_grad]
    try:
        plain = batch.run(model)
        wanted = torch.autograd.grad(plain.float().pow(2).sum(), params, allow_unused=True)
        known = Batch(batch.inputs, batch.labels, trunk.compute(batch))
        with trunk.skipped():
            past = known.run(model)
        got = torch.autograd.grad(past.float().pow(2).sum(), params, allow_unused=True)
    except Exception:  # a model that cannot run like this is trained as it is
        return False
    finally:
        model.train(was_training)
    coarsest = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    slack = max(TOLERANCE, coarsest)
    pairs = [(plain, past), *zip(wanted, got, strict=True)]
    return all(close(one, other, slack) for one, other in pairs)


def close(a: Tensor | None, b: Tensor | None, slack: float) -> bool:
    """Equal up to `slack`, relative to the largest value; None only equals None."""
    if a is None or b is None:
        return a is b
    scale = a.detach().float().abs().max().clamp_min(1.0)
    return bool((a.detach() - b.detach()).float().abs().max() <= slack * scale)


@dataclass
class FeatureStore:
    """The trunk's output for the examples of a data set.

    Attributes:
        flat: [R, ...]: a row a token for texts (padding is not kept), else a row an example.
        starts, lengths: first row and number of rows of each example, [N].
        where: what holds `flat`, "memory" or "file".
    """

    flat: Tensor
    starts: Tensor
    lengths: Tensor
    where: str

    @staticmethod
    def of(
        trunk: FrozenPrefix, examples: Examples, rows: Tensor, device: torch.device, limit: int
    ) -> FeatureStore:
        """Run the trunk over the examples at `rows`; more than `limit` bytes go to a file."""
        trunk.model.eval()
        lengths = torch.zeros(len(examples), dtype=torch.int64)
        lengths[rows] = token_counts(examples, rows)
        starts = lengths.cumsum(0) - lengths
        flat, where = torch.empty(0), ""
        parts = rows[torch.argsort(lengths[rows], stable=True)].split(BATCH)
        for part in counted("outputs of frozen layers", parts, len(parts)):
            batch = Batch.of(examples, part, device)
            hidden = trunk.compute(batch)
            found = (hidden if batch.mask is None else hidden[batch.mask.bool()]).cpu()
            if not where:
                shape = (int(lengths.sum()), *found.shape[1:])
                flat, where = allocate(shape, found.dtype, limit)
            flat[ranges(starts[part], lengths[part])] = found
        return FeatureStore(flat, starts, lengths, where)

    def gather(self, indices: Tensor, mask: Tensor | None) -> Tensor:
        """Features of these examples: [*mask, ...] with zeros for padding, or [B, ...]."""
        found = self.flat[ranges(self.starts[indices], self.lengths[indices])]
        if mask is None:
            return found
        out = found.new_zeros(*mask.shape, *found.shape[1:])
        out[mask.cpu().bool()] = found
        return out


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """starts[0] .. starts[0] + lengths[0] - 1, then those of the next, ... as one index vector."""
    ends = lengths.cumsum(0)
    step = torch.repeat_interleave(starts - (ends - lengths), lengths)
    return torch.arange(int(lengths.sum())) + step


def token_counts(examples: Examples, rows: Tensor) -> Tensor:
    """Tokens of each of these texts, [len(rows)]; 1 for everything that is not a text."""
    counts = []
    for part in rows.split(256):
        mask = Batch.of(examples, part, torch.device("cpu")).mask
        counts.append(torch.ones_like(part) if mask is None else mask.flatten(1).sum(1))
    return torch.cat(counts).to(torch.int64)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, limit: int) -> tuple[Tensor, str]:
    """Room for features, in memory within the limit (bytes), else in an unnamed file."""
    size = torch.Size(shape).numel()
    if size * dtype.itemsize <= limit:
        return torch.empty(shape, dtype=dtype), "memory"
    with tempfile.TemporaryDirectory(prefix="sluiceway_features-") as folder:
        path = Path(folder) / "features"
        # The mapping outlives the name; the space is given back when the tensor goes.
        flat = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    return flat.reshape(shape), "file"


@dataclass
class FeatureExamples:
    """A data set whose batches carry the frozen prefix's output along with the inputs."""

    examples: Examples
    rows: Tensor
    store: FeatureStore
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.labels = labels_of(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]

    def gather(self, indices: Tensor) -> tuple[Any, Any]:
        """Inputs and labels at these positions."""
        batch = Batch.of(self.examples, indices, torch.device("cpu"))
        return batch.inputs, batch.labels

    def features(self, indices: Tensor, mask: Tensor | None) -> Tensor:
        """The trunk's output at these positions."""
        return self.store.gather(self.rows[indices], mask)


class FeatureCache:
    """Feature stores by trunk and data set, so that runs that share both compute them once.

    Args:
        limit: bytes of features that may be held in memory.
        files: keeps features that fit into memory for later runs too; None keeps none.
    """

    def __init__(self, limit: int, files: FeatureFiles | None = None) -> None:
        self.limit = limit
        self.files = files
        self.stores: dict[tuple[str, int], FeatureStore] = {}
        self._kept: list[Examples] = []  # keeps ids from being used again

    def wrap(
        self, trunk: FrozenPrefix, sets: Sequence[Examples], device: torch.device
    ) -> list[Examples]:
        """The data sets with their features; sets that are parts of one are computed together."""
        parts = [base_of(examples) for examples in sets]
        bases = {id(base): base for base, _ in parts}
        fingerprint = trunk.fingerprint()
        for number, base in bases.items():
            rows = torch.cat([r for b, r in parts if b is base]).unique()
            store = self.stores.get((fingerprint, number))
            if len(rows) and (store is None or bool((store.lengths[rows] == 0).any())):
                held = sum(s.flat.nbytes for s in self.stores.values() if s.where == "memory")
                left = max(self.limit - held, 0)
                self.stores[fingerprint, number] = self.store(
                    trunk, fingerprint, base, rows, device, left
                )
                self._kept.append(base)
        return [
            FeatureExamples(examples, rows, self.stores[fingerprint, id(base)])
            if len(examples)
            else examples
            for examples, (base, rows) in zip(sets, parts, strict=True)
        ]

    def store(
        self,
        trunk: FrozenPrefix,
        fingerprint: str,
        examples: Examples,
        rows: Tensor,
        device: torch.device,
        left: int,
    ) -> FeatureStore:
        """The features of these rows, from a file of an earlier run or computed."""
        if self.files is None or not self.files.limit:
            return FeatureStore.of(trunk, examples, rows, device, left)
        key = feature_key(fingerprint, trunk.model, examples, rows)
        found = self.files.load(key)
        if found is not None and found["flat"].nbytes <= left:
            return FeatureStore(**found, where="memory")
        store = FeatureStore.of(trunk, examples, rows, device, left)
        if store.where == "memory":
            tensors = {"flat": store.flat, "starts": store.starts, "lengths": store.lengths}
            self.files.save(key, tensors)
        return store


def base_of(examples: Examples) -> tuple[Examples, Tensor]:
    """The data set that this one is a part of, and the rows it takes; itself if it is whole."""
    if isinstance(examples, Subset):
        base, rows = base_of(cast(Examples, examples.dataset))
        return base, rows[torch.as_tensor(examples.indices, dtype=torch.int64)]
    whole: Examples = getattr(examples, "base", examples)
    return whole, torch.as_tensor(getattr(examples, "indices", range(len(examples))))
