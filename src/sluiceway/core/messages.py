"""Messages as safetensors bytes: any float type, absent experts, never pickle.

A message is one safetensors file. Names say what a tensor is (`model/...`, `extra/...`,
`routing/<block>/...`); the header's metadata holds a few numbers more. Reading is lazy:
a tensor is taken from the file when it is asked for.

A reader trusts nothing of a message: whatever its bytes, it is read or refused by a `WireError` of
one line. Lengths are checked before anything is allocated from them. Beside its tensors a message
takes up to about 25 times its header in memory while it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from sluiceway.core.checkpoints import StorageError
from sluiceway.errors import line, quoted
from sluiceway.moe import BlockRouting
from sluiceway.strategies import Broadcast, Update

#: Of the message layout; a reader refuses any other.
VERSION: Final = 1
#: Largest message in bytes, 1 TiB: a model of 47 billion float32 parameters has 188 GB.
MESSAGE_LIMIT: Final = 1 << 40
#: Largest header in bytes, 8 MiB: about 50,000 tensors, ten for each expert of a large model.
HEADER_LIMIT: Final = 8 << 20
#: Largest JSON text of the facts in bytes, 1 MiB.
FACTS_LIMIT: Final = 1 << 20

#: What the tensors of a message may be, by the first part of their names.
BROADCAST: Final = ("model", "extra")
UPDATE: Final = ("model", "extra", "routing")

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
#: The types in the order in which safetensors lays them out, the last first.
_ORDER: Final = "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 F16 BF16 I32 F32 F64 I64"
_RANKS: Final = {_DTYPES[name]: rank for rank, name in enumerate(_ORDER.split())}
_DIMENSIONS: Final = 16

Facts = Mapping[str, object]


class WireError(ValueError):
    """A message that cannot be read, or that does not belong here; the text is one line."""


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of an open safetensors file, read when asked for.

    Args:
        file: from `safe_open`.
        names: keys in the file by the names here.
    """

    def __init__(self, file: Any, names: Mapping[str, str]) -> None:
        self._file = file
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._names[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_tensors(path: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Facts) -> int:
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


def message_of(parts: Mapping[str, Mapping[str, Tensor]], facts: Facts) -> bytes:
    """The same message in memory."""
    return save(*laid_out(parts, facts))


def laid_out(
    parts: Mapping[str, Mapping[str, Tensor]], facts: Facts
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their names in the message, and its metadata."""
    tensors = {
        f"{prefix}/{name}": tensor.detach().cpu().contiguous()
        for prefix, part in parts.items()
        for name, tensor in part.items()
    }
    return tensors, metadata_of(facts)


def metadata_of(facts: Facts) -> dict[str, str]:
    """The facts as a message's metadata."""
    return {"sluiceway": json.dumps({"version": VERSION, **facts}, sort_keys=True)}


def packed_length(parts: Mapping[str, Mapping[str, Tensor]], facts: Facts) -> int:
    """The length in bytes of the message that `write_tensors` would write, without packing it.

    It lays the tensors out as safetensors does: by type, the widest first, then by name.
    """
    kinds = tuple(
        (f"{prefix}/{name}", tensor.dtype, tensor.shape)
        for prefix, part in parts.items()
        for name, tensor in part.items()
    )
    header, data = lengths_of(kinds)
    header += len(compact(metadata_of(facts)))
    return 8 + header + -header % 8 + data


@lru_cache(maxsize=256)
def lengths_of(kinds: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> tuple[int, int]:
    """The lengths in bytes of a message's header, without its metadata, and of its tensors."""
    header: dict[str, Any] = {"__metadata__": {}}
    end = 0
    for name, dtype, shape in sorted(kinds, key=lambda kind: (-_RANKS[kind[1]], kind[0])):
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    return len(compact(header)) - len(compact({})), end


def compact(value: object) -> bytes:
    """JSON as safetensors writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def read_tensors(path: Path, prefixes: Sequence[str]) -> tuple[Facts, dict[str, StoredTensors]]:
    """What `write_tensors` wrote: the facts, and the tensors by prefix and name, not read yet.

    Args:
        prefixes: that the names may have; each is a key of what is returned.

    Raises:
        WireError: not a message of ours, damaged, too large, of another version, or with a tensor
            of another prefix.
    """
    where = line(path.name, 80)
    try:
        with path.open("rb") as stream:
            facts, names = contents(stream, path.stat().st_size, prefixes, where)
        file = safe_open(str(path), framework="pt")
    except WireError:
        raise
    except Exception as error:
        raise unreadable(where, error) from None
    return facts, {prefix: StoredTensors(file, names[prefix]) for prefix in prefixes}


def parts_of(
    message: bytes, prefixes: Sequence[str], where: str = "message"
) -> tuple[Facts, dict[str, dict[str, Tensor]]]:
    """The same of a message in memory: the facts, and copies of the tensors by prefix and name.

    Args:
        where: what an error calls the message.

    Raises:
        WireError: as `read_tensors`.
    """
    facts, names = contents(BytesIO(message), len(message), prefixes, where)
    try:
        tensors = load(message)
    except Exception as error:
        raise unreadable(where, error) from None
    return facts, {
        prefix: {name: tensors[key] for name, key in names[prefix].items()} for prefix in prefixes
    }


def contents(
    stream: BinaryIO, size: int, prefixes: Sequence[str], where: str
) -> tuple[Facts, dict[str, dict[str, str]]]:
    """The facts, and by prefix the names of the tensors with their keys in the file.

    What is not checked here, how the tensors lie in the file, safetensors checks when it opens it.
    """
    header = header_of(stream, size, where)
    metadata = header.pop("__metadata__", None)
    names: dict[str, dict[str, str]] = {prefix: {} for prefix in prefixes}
    for key, entry in header.items():
        prefix, _, name = key.partition("/")
        if prefix not in names or not name:
            wanted = ", ".join(f"{known}/..." for known in prefixes)
            raise WireError(f"{where}: tensor {quoted(key)}; expected {wanted}")
        check_entry(key, entry, where)
        names[prefix][name] = key
    return facts_of(metadata, where), names


def header_of(stream: BinaryIO, size: int, where: str) -> dict[str, Any]:
    """The header of a safetensors file of `size` bytes, a JSON object."""
    if size > MESSAGE_LIMIT:
        raise WireError(f"{where} has {size} bytes, the limit is {MESSAGE_LIMIT}")
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise WireError(
            f"{where} is not a readable message: {size} bytes, of which the header takes "
            f"{length + 8 if size >= 8 else 'at least 8'}"
        )
    if length > HEADER_LIMIT:
        raise WireError(f"{where} has a header of {length} bytes, the limit is {HEADER_LIMIT}")
    try:
        header = json.loads(stream.read(length).decode())
    except (ValueError, RecursionError) as error:
        raise unreadable(where, error) from None
    if not isinstance(header, dict):
        raise WireError(f"{where} is not a readable message: its header is no JSON object")
    return header


def check_entry(key: str, entry: object, where: str) -> None:
    """Refuse a tensor of a type or shape that torch cannot make."""
    kind, shape = (entry.get(k) for k in ("dtype", "shape")) if isinstance(entry, dict) else (0, 0)
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise WireError(
            f"{where}: tensor {quoted(key)} has type {quoted(kind)}; expected {', '.join(_DTYPES)}"
        )
    sizes = shape if isinstance(shape, list) and len(shape) <= _DIMENSIONS else [-1]
    # The product with 1 for 0: of an empty tensor too torch computes how far rows are apart.
    if any(type(n) is not int or n < 0 for n in sizes) or prod(n or 1 for n in sizes) >= 1 << 60:
        raise WireError(
            f"{where}: tensor {quoted(key)} has shape {quoted(shape)}; expected at most "
            f"{_DIMENSIONS} sizes from 0, below 2^60 in all"
        )


def facts_of(metadata: object, where: str) -> Facts:
    """The facts of a message of this version."""
    text = metadata.get("sluiceway") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise WireError(f"{where} is not a readable message: it has no facts of Sluiceway")
    if len(text) > FACTS_LIMIT:
        raise WireError(f"{where} has facts of {len(text)} characters, the limit is {FACTS_LIMIT}")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(where, error) from None
    if not isinstance(facts, dict):
        raise WireError(f"{where}: facts are {quoted(facts)}; expected a JSON object")
    version = facts.get("version")
    if type(version) is not int or version != VERSION:
        raise WireError(f"{where} has message version {quoted(version)}, this side reads {VERSION}")
    return facts


def unreadable(where: str, error: Exception) -> WireError:
    """The error for bytes that JSON or safetensors refuse."""
    return WireError(f"{where} is not a readable message: {line(str(error))}")


def integer(facts: Facts, name: str, where: str) -> int:
    """A fact that is an integer of 64 bits. Raises WireError."""
    value = facts.get(name)
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise WireError(f"{where}: {name} is {quoted(value)}; expected an integer of 64 bits")
    return value


def metrics_of(facts: Facts, where: str) -> dict[str, float]:
    """The fact `metrics`: numbers by name, NaN and infinity among them. Raises WireError."""
    metrics = facts.get("metrics")
    if not isinstance(metrics, dict):
        raise WireError(f"{where}: metrics are {quoted(metrics)}; expected numbers by name")
    for name, value in metrics.items():
        if type(value) not in (int, float) or (type(value) is int and abs(value) >= 1 << 63):
            raise WireError(f"{where}: metric {quoted(name)} is {quoted(value)}; expected a number")
    return metrics


def write_broadcast(path: Path, broadcast: Broadcast) -> int:
    """Pack a broadcast; returns its length in bytes."""
    return write_tensors(path, *broadcast_parts(broadcast))


def broadcast_length(broadcast: Broadcast) -> int:
    """The length of a broadcast in bytes, as packed."""
    return packed_length(*broadcast_parts(broadcast))


def broadcast_parts(broadcast: Broadcast) -> tuple[dict[str, Mapping[str, Tensor]], Facts]:
    """What a packed broadcast holds."""
    return {"model": broadcast.tensors, "extra": broadcast.extra}, {"round": broadcast.round}


def read_broadcast(path: Path) -> Broadcast:
    """Unpack a broadcast, lazily. Raises WireError."""
    facts, parts = read_tensors(path, BROADCAST)
    return Broadcast(integer(facts, "round", line(path.name, 80)), parts["model"], parts["extra"])


def write_update(path: Path, update: Update) -> int:
    """Pack an update; returns its length in bytes."""
    return write_tensors(path, *update_parts(update))


def received_update(update: Update) -> Update:
    """The update as the server would read it from its message, without packing its tensors.

    Raises:
        WireError: see `read_update`.
    """
    parts, facts = update_parts(update)
    routing = unpack_routing(parts["routing"])
    return replace(update, routing=routing, nbytes=packed_length(parts, facts))


def update_parts(update: Update) -> tuple[dict[str, Mapping[str, Tensor]], Facts]:
    """What a packed update holds."""
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
    return parts, facts


def read_update(path: Path) -> Update:
    """Unpack an update, its model tensors lazily.

    Whether the numbers make sense to a strategy, the round loop decides.

    Raises:
        WireError: it is no update; the routing report of a block is not as `pack_routing` gives it.
    """
    where = line(path.name, 80)
    facts, parts = read_tensors(path, UPDATE)
    return Update(
        client=integer(facts, "client", where),
        round=integer(facts, "round", where),
        examples=integer(facts, "examples", where),
        tensors=parts["model"],
        routing=unpack_routing(parts["routing"], where),
        extra=parts["extra"],
        metrics=metrics_of(facts, where),
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


def unpack_routing(packed: Mapping[str, Tensor], where: str = "message") -> list[BlockRouting]:
    """The inverse of `pack_routing`.

    Raises:
        WireError: a name is not `<block>/<field>`, blocks are not 0..n-1, a field is missing or of
            another type, shapes within a block do not fit each other, or tokens are negative.
    """
    fields = {"load", "routing", "margin", "tokens", "region"}
    found: dict[str, set[str]] = {}
    for key in packed:
        block, _, part = key.partition("/")
        if part not in fields:
            raise WireError(
                f"{where}: routing/{line(key, 80)}; expected routing/<block>/<field> with a field "
                f"of {', '.join(sorted(fields))}"
            )
        found.setdefault(block, set()).add(part)
    for number in range(len(found)):
        if missing := fields - {"region"} - found.get(str(number), set()):
            raise WireError(
                f"{where}: routing reports of {len(found)} blocks, but {number}/"
                f"{min(missing)} is missing"
            )
    return [report_of(packed, block, where) for block in range(len(found))]


def report_of(packed: Mapping[str, Tensor], block: int, where: str) -> BlockRouting:
    """The routing report of one block, of which only the region may be absent."""
    load, routing, margin, tokens = (
        packed[f"{block}/{part}"] for part in ("load", "routing", "margin", "tokens")
    )
    region = packed.get(f"{block}/region")
    experts = len(load) if load.dim() else 0
    vectors = {"load": load, "routing": routing, "margin": margin}
    for part, tensor in vectors.items():
        if tensor.shape != (experts,) or not experts or tensor.dtype != torch.float64:
            raise WireError(
                f"{where}: routing/{block}/{part} is {described(tensor)}; expected float64 "
                f"[{experts or 'experts'}]"
            )
    if region is not None and (
        region.dim() != 2 or len(region) != experts or region.dtype != torch.float32
    ):
        raise WireError(
            f"{where}: routing/{block}/region is {described(region)}; expected float32 "
            f"[{experts}, width]"
        )
    if tokens.dim() or tokens.dtype != torch.int64 or int(tokens) < 0:
        what = described(tokens) if tokens.dim() or tokens.dtype != torch.int64 else int(tokens)
        raise WireError(
            f"{where}: routing/{block}/tokens is {what}; expected int64 [], not negative"
        )
    return BlockRouting(load, routing, margin, region, int(tokens))


def described(tensor: Tensor) -> str:
    """Type and shape, such as "float32 [4, 16]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {quoted(list(tensor.shape))}"


@torch.no_grad()
def take_values(
    tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], needed: Iterable[str] = ()
) -> None:
    """Write received values into the tensors of the same names; nothing unless all of them fit.

    Args:
        tensors: changed in place.
        values: of some of them.
        needed: names that must be among the values.

    Raises:
        WireError: a name is not known or needed and absent, or a type or shape is another.
    """
    given = dict(values.items())
    for name, value in given.items():
        if name not in tensors:
            raise WireError(f"received {quoted(name)}; no tensor of that name is exchanged")
        if value.shape != tensors[name].shape or value.dtype != tensors[name].dtype:
            raise WireError(
                f"received {name} as {described(value)}; expected {described(tensors[name])}"
            )
    for name in needed:
        if name not in given:
            raise WireError(f"received no {name}; expected {described(tensors[name])}")
    for name, value in given.items():
        tensors[name].copy_(value)
