"""Messages as safetensors bytes: any float type, absent experts, never pickle.

A message is one safetensors file. Names say what a tensor is (`model/...`, `extra/...`,
`routing/<block>/...`); the header's metadata holds the few numbers beside them. Reading is lazy:
a tensor is taken from the file when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from sluiceway.federated.checkpoints import StorageError
from sluiceway.moe import BlockRouting
from sluiceway.strategies import Broadcast, Update

#: Of the message layout; a reader refuses any other.
VERSION = 1


class WireError(ValueError):
    """A message that cannot be read."""


class StoredTensors(Mapping[str, Tensor]):
    """The tensors below one prefix of a safetensors file, read when asked for."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._file = safe_open(str(path), framework="pt")
        self._prefix = prefix
        keys: list[str] = list(self._file.keys())
        self._names = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._names[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_tensors(
    path: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, object]
) -> int:
    """Write named tensors under prefixes, and a few facts; returns the length in bytes.

    Raises:
        StorageError: there is no room for them.
    """
    tensors, metadata = laid_out(parts, facts)
    try:
        save_file(tensors, str(path), metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write a message to {path} ({error})") from error
    return path.stat().st_size


def message_of(parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, object]) -> bytes:
    """The same message in memory."""
    return save(*laid_out(parts, facts))


def parts_of(message: bytes) -> dict[str, dict[str, Tensor]]:
    """The tensors of a message in memory, by prefix and name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load(message).items():
        prefix, _, name = key.partition("/")
        parts.setdefault(prefix, {})[name] = tensor
    return parts


def laid_out(
    parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their names in the message, and its metadata."""
    tensors = {
        f"{prefix}/{name}": tensor.detach().cpu().contiguous()
        for prefix, part in parts.items()
        for name, tensor in part.items()
    }
    return tensors, {"sluiceway": json.dumps({"version": VERSION, **facts}, sort_keys=True)}


def read_facts(path: Path) -> dict[str, object]:
    """The facts that `write_tensors` put beside the tensors.

    Raises:
        WireError: not a message of ours, damaged, or of another version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            facts: dict[str, object] = json.loads((file.metadata() or {})["sluiceway"])
    except Exception as error:
        raise WireError(f"{path.name} is not a readable message ({error})") from error
    if facts.get("version") != VERSION:
        raise WireError(
            f"{path.name} has message version {facts.get('version')}, this side reads {VERSION}"
        )
    return facts


def write_broadcast(path: Path, broadcast: Broadcast) -> int:
    """Pack a broadcast; returns its length in bytes."""
    parts = {"model": broadcast.tensors, "extra": broadcast.extra}
    return write_tensors(path, parts, {"round": broadcast.round})


def read_broadcast(path: Path) -> Broadcast:
    """Unpack a broadcast, lazily. Raises WireError."""
    facts = read_facts(path)
    return Broadcast(
        int(str(facts["round"])), StoredTensors(path, "model/"), StoredTensors(path, "extra/")
    )


def write_update(path: Path, update: Update) -> int:
    """Pack an update; returns its length in bytes."""
    parts = {
        "model": update.tensors,
        "extra": update.extra,
        "routing": pack_routing(update.routing),
    }
    facts = {
        "client": update.client,
        "round": update.round,
        "examples": update.examples,
        "metrics": dict(update.metrics),
    }
    return write_tensors(path, parts, facts)


def read_update(path: Path) -> Update:
    """Unpack an update, its model tensors lazily. Raises WireError."""
    facts = read_facts(path)
    metrics = facts["metrics"]
    assert isinstance(metrics, dict)
    return Update(
        client=int(str(facts["client"])),
        round=int(str(facts["round"])),
        examples=int(str(facts["examples"])),
        tensors=StoredTensors(path, "model/"),
        routing=unpack_routing(StoredTensors(path, "routing/")),
        extra=StoredTensors(path, "extra/"),
        metrics=metrics,
        nbytes=path.stat().st_size,
    )


def pack_routing(routing: Sequence[BlockRouting]) -> dict[str, Tensor]:
    """A routing report as named tensors; region means in float32, the rest in float64."""
    packed: dict[str, Tensor] = {}
    for block, report in enumerate(routing):
        packed[f"{block}/load"] = report.load.double()
        packed[f"{block}/routing"] = report.routing.double()
        packed[f"{block}/margin"] = report.margin.double()
        packed[f"{block}/tokens"] = torch.tensor(report.tokens)
        if report.region is not None:
            packed[f"{block}/region"] = report.region.float()
    return packed


def unpack_routing(packed: Mapping[str, Tensor]) -> list[BlockRouting]:
    """The inverse of `pack_routing`."""
    blocks = sorted({int(key.split("/")[0]) for key in packed})
    return [
        BlockRouting(
            load=packed[f"{block}/load"],
            routing=packed[f"{block}/routing"],
            margin=packed[f"{block}/margin"],
            region=packed.get(f"{block}/region"),
            tokens=int(packed[f"{block}/tokens"]),
        )
        for block in blocks
    ]
