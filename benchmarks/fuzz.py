"""Broken recipes, messages and checkpoints: each is read, or refused in a line.

    python benchmarks/fuzz.py                          20,000 inputs, in turn of every kind
    python benchmarks/fuzz.py --only update --inputs 500 --seed 7

Besides what is broken: updates that are well formed and lie in one number, smashed data headed as
another batch, frames, and what sites say when they join.

Limits: nothing but the one error that a reader promises, with a message of one line; at most 15 s
an input; and no allocation beyond 1 GiB, which is more than any valid input here takes by a
thousand times. A failure is printed with what makes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sluiceway.core.aggregation import aggregate
from sluiceway.core.checkpoints import Checkpoint, CheckpointError, checksum
from sluiceway.core.guards import fault
from sluiceway.core.handshake import HandshakeError, ModelSignature
from sluiceway.core.messages import (
    WireError,
    message_of,
    read_broadcast,
    read_update,
    take_values,
    write_broadcast,
    write_update,
)
from sluiceway.core.parameters import exchanged
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.experiment.recipe import load_recipe, recipe_from
from sluiceway.experiment.tables import read_tables, shipped_recipes
from sluiceway.federated.client import Worker, prepare
from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE, UpcycledRouter
from sluiceway.split import (
    SLFAC,
    BatchId,
    Channels,
    Compressor,
    Conv4,
    Quantized,
    TopK,
    split_train,
)
from sluiceway.split.messages import read_round_end, read_round_start
from sluiceway.strategies import Broadcast, FedAlignMoE, Strategy, Update
from sluiceway.transport.framing import (
    BODY_LIMIT,
    FACTS_LIMIT,
    HEADER,
    MAGIC,
    FrameError,
    lengths,
    parse,
)
from sluiceway.transport.local import federate
from sluiceway.transport.protocol import Response
from sluiceway.transport.remote import COUNT_LIMIT, counts_of

#: Seconds an input may take, and bytes it may allocate.
SECONDS, BYTES = 15.0, 1 << 30

#: What a hostile sender might write into a field.
NUMBERS = (0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(0.0, -0.5, 0.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"), True, False, None),
    *("", "x", "fedavg", "sl", "auto", "../..", "\0", "\n\r\x1b[31m", "é\udcff", "a" * 5000),
    *("{text}", "{text!r:>999999999}", "{0}", "{text}{text}", [], {}, [[]], [1, "a"]),
    {"name": "median"},
    *({"name": []}, {"a": {"b": {"c": 1}}}, [0] * 1000, [float("nan")], ["{"]),
)


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        make: from a generator to a broken input.
        read: the reader; returns whatever it likes.
        error: what it may raise.
    """

    make: Callable[[random.Random], Any]
    read: Callable[[Any], object]
    error: type[Exception] | tuple[type[Exception], ...]


# -- breaking things -------------------------------------------------------------------------------


def broken(rng: random.Random, whole: bytes) -> bytes:
    """Bytes with one to three faults: flips, cuts, hostile numbers, swaps; or mere noise."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = max(len(data), 1)
        # Most headers are at the front, and most readers' mistakes there.
        at = rng.randrange(min(size, rng.choice((8, 64, 512, size))))
        how = rng.randrange(10)
        if how == 0:
            data = data[:at]
        elif how == 1:
            data += rng.randbytes(rng.choice((1, 7, 100, 5000)))
        elif how in (2, 3) and data:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 4:
            width = rng.choice((1, 2, 4, 8))
            data[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
        elif how == 5:
            del data[at : at + rng.choice((1, 4, 30))]
        elif how == 6:
            data[at:at] = data[: rng.randrange(100)]
        elif how == 7:
            data = bytearray(rng.randbytes(rng.choice((0, 1, 8, 44, 300))))
        elif how == 8:
            digits = [i for i, byte in enumerate(data[:2000]) if 48 <= byte <= 57]
            if digits:
                i = rng.choice(digits)
                data[i : i + 1] = str(rng.choice(NUMBERS)).encode()
        else:
            middle = rng.randrange(size)
            data = data[middle:] + data[:middle]
    return bytes(data)


def with_header(
    rng: random.Random, message: bytes, change: Callable[[random.Random, Any], None]
) -> bytes:
    """A safetensors message whose header is changed and fits again: it opens, and lies."""
    size = int.from_bytes(message[:8], "little")
    header = json.loads(message[8 : 8 + size])
    change(rng, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + message[8 + size :]


def lie(rng: random.Random, header: Any) -> None:
    """Change a fact, a name, a type or a shape."""
    names = [name for name in header if name != "__metadata__"]
    facts = json.loads(header["__metadata__"]["sluiceway"])
    how = rng.randrange(6)
    if how == 0:
        facts[rng.choice([*facts, "more"])] = rng.choice(VALUES)
    elif how == 1:
        facts.pop(rng.choice(list(facts)))
    elif how == 2 and names:
        header[rng.choice((*names, "model/x", "", "routing/9/load", "x" * 900))] = header.pop(
            rng.choice(names)
        )
    elif how == 3 and names:
        header[rng.choice(names)]["dtype"] = rng.choice(("F16", "I64", "BOOL", "F8_E4M3", "X", 3))
    elif how == 4 and names:
        entry = header[rng.choice(names)]
        entry["shape"] = rng.choice(
            ([], [0], entry["shape"][::-1], [1, *entry["shape"]], [2**62, 2**62], [-1], "x")
        )
    elif names:
        header.pop(rng.choice(names))
    with contextlib.suppress(ValueError):  # what JSON cannot write
        header["__metadata__"]["sluiceway"] = json.dumps(facts)


def message(rng: random.Random, whole: bytes) -> bytes:
    """A message that is broken, or opens and lies."""
    return broken(rng, whole) if rng.random() < 0.6 else with_header(rng, whole, lie)


def odd_tables(rng: random.Random) -> dict[str, Any]:
    """A shipped recipe with a few keys changed."""
    tables = read_tables(rng.choice(list(shipped_recipes())))
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = tables
        for _ in range(rng.randrange(3)):
            inner = [value for value in where.values() if isinstance(value, dict)]
            where = rng.choice(inner) if inner else where
        key = rng.choice((*where, *where, "name", "robust", "x", "", "a.b", "seed", "ü"))
        if rng.random() < 0.2:
            where.pop(key, None)
        else:
            where[key] = copy.deepcopy(rng.choice(VALUES))
    return tables


def odd_override(rng: random.Random) -> str:
    """A --set of any form."""
    keys = ("run.rounds", "data.clients", "data.alpha", "model.prompt", "method.name", "train.lr")
    odd = ("", ".", "..", "run", "run.", "=", "a.b.c.d", "run.rounds.x", "." * 300)
    value = rng.choice(
        (repr(rng.choice(VALUES)), "[" * 2000, "{a=1}", "1e400", '"', "'''", "0x" * 9)
    )
    return rng.choice((*keys, *odd, "method.robust.x")) + rng.choice(("=", "", "==", " = ")) + value


# -- a small world, from which valid inputs come ---------------------------------------------------


def words(size: int, seed: int) -> TensorDataset:
    """Sequences of vectors with one of three labels."""
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(size, 4, 8, generator=g), torch.randint(3, (size,), generator=g)
    )


class Mixture(nn.Module):
    """One mixture of three experts and a head."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        experts = UpcycledExperts(
            torch.randn(3, 6, 8, generator=g), torch.randn(3, 8, 6, generator=g), nn.GELU()
        )
        self.block = UpcycledMoE(UpcycledRouter(torch.randn(3, 8, generator=g), 2), experts)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(x).mean(1))
        return logits


def pictures(size: int, seed: int) -> TensorDataset:
    """Noise of [1, 6, 6] with one of three labels."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 6, 6, generator=g)
    return TensorDataset(images, torch.randint(3, (size,), generator=g))


class World:
    """Valid inputs of every kind, and readers with what they read into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)  # so that a failure's seed and number make it again
        self.model = Mixture()
        self.strategy: Strategy = FedAlignMoE()
        prepare(self.model, self.strategy, 2)
        worker = Worker(self.model, [words(12, 1)], words(6, 2), self.strategy, Training())
        opening = self.strategy.broadcast(1)
        self.update = self.packed(write_update, worker.train(0, opening, {}, personal=True))
        self.honest = read_update(self.file(self.update, "honest"))
        self.broadcast = self.packed(write_broadcast, opening)
        layers = {"model": {"front.weight": torch.ones(4, 3)}, "extra": {"x": torch.ones(2)}}
        mask = {"mask": {"kept": torch.tensor([True, False, True])}}
        scores = {"scores": {"channels": torch.rand(3)}}
        self.opening = message_of(layers | mask, {"round": 1})
        self.closing = message_of(layers | scores, {"round": 1, "client": 0, "examples": 4})
        self.links = (
            Compressor(limit=1 << 20),
            Quantized(limit=1 << 20),
            Quantized(quantize="int4", limit=1 << 20),
            TopK(limit=1 << 20),
            Quantized(coder="range", limit=1 << 20),
            Channels(quantize="bits", ratio=6, limit=1 << 20),
            Channels(quantize="bits", ratio=6, coder="range", limit=1 << 20),
            Channels(quantize="step", ratio=6, limit=1 << 20),
            Channels(quantize="dct", ratio=6, limit=1 << 20),
            SLFAC(ratio=6, limit=1 << 20),
            SLFAC(ratio=6, coder="range", limit=1 << 20),
            Compressor(delta=True, limit=1 << 20),
            TopK(delta=True, limit=1 << 20),
        )
        self.smashed = []
        for link in self.links:
            labels, rows = (
                torch.tensor([0, 1, 2]),
                torch.tensor([300, 0, 8]) if link.delta else None,
            )
            batch = torch.randn(3, 4, 5, 5), BatchId(1, 2, 3)
            sent, ticket = link.up(*batch, labels, rows=rows)
            back = link.down(torch.randn(3, 4, 5, 5), link.open(sent).context)
            self.smashed.append((link, ticket, bytes(sent), bytes(back)))
        self.card = ModelSignature.of(self.strategy.tensors).to_json().encode()
        self.saved = {"federated": folder / "federated", "split": folder / "split"}
        self.train("federated", 2, Checkpoint(self.saved["federated"]))
        self.train("split", 2, Checkpoint(self.saved["split"]))

    def packed(self, write: Callable[[Path, Any], int], what: Broadcast | Update) -> bytes:
        write(self.folder / "message", what)
        return (self.folder / "message").read_bytes()

    def file(self, data: bytes, name: str = "message") -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def train(self, kind: str, rounds: int, checkpoint: Checkpoint) -> None:
        """A small run of either kind, or what is left of one."""
        if kind == "federated":
            given = (Mixture(), [words(9, 1), words(7, 2)], words(6, 3), "scaffold")
            federate(*given, rounds=rounds, checkpoint=checkpoint, device="cpu")
            return
        torch.manual_seed(0)
        split_train(
            *(Conv4(1, 3, width=4), "conv1", [pictures(9, 1), pictures(7, 2)], pictures(6, 3)),
            method="acp-sl",
            rounds=rounds,
            checkpoint=checkpoint,
        )

    # -- readers -----------------------------------------------------------------------------------

    def read_recipe(self, tables: Any) -> None:
        resolved = recipe_from(tables).resolved()
        again = recipe_from(tomllib.loads(tomli_w.dumps(resolved)))
        require(repr(again.resolved()) == repr(resolved), "a recipe reads back as another")

    def read_broadcast(self, data: bytes) -> None:
        found = read_broadcast(self.file(data))
        require_size([*found.tensors.values(), *found.extra.values()], data)
        take_values(exchanged(self.model), found.tensors)

    def read_update(self, data: bytes) -> None:
        found = read_update(self.file(data))
        require_size([*found.tensors.values(), *found.extra.values()], data)
        self.read_report(found)

    def read_report(self, found: Update) -> None:
        """What the schema lets through can be aggregated, and leaves the model finite."""
        why = fault(found, self.strategy, 1, [0, 1], examples=[12, 0])
        if why is not None:
            raise Unfit(why)
        require(0 < found.examples <= 12, f"{found.examples} examples of 12")
        strategy = copy.deepcopy(self.strategy)
        aggregate(strategy, [found])
        for tensor in strategy.state_dict().values():
            require(bool(tensor.isfinite().all()), "a state that is not finite")

    def read_due(self, given: tuple[int, bytes]) -> None:
        """Smashed data are opened only as the batch that is due, and with as many rows."""
        index, data = given
        link, ticket, _, _ = self.smashed[index]
        known, examples = ((3, 4, 5, 5), ticket.batch), 400 if link.delta else 0
        found = link.open(data, *known, labels=True, classes=3, examples=examples)
        if found.rows is not None:
            rows = found.rows.tolist()
            require(len(set(rows)) == 3 and 0 <= min(rows) <= max(rows) < 400, f"examples {rows}")
        require(found.context.batch == ticket.batch, f"opened as {found.context.batch}")
        require(len(found.values) == 3, f"{len(found.values)} rows of 3")

    def read_frame(self, data: bytes) -> None:
        if len(data) < HEADER.size:
            raise FrameError("cut")
        text, body = lengths(data[: HEADER.size])
        require(text <= FACTS_LIMIT and body <= BODY_LIMIT, "a frame beyond its limits")
        parse(data[HEADER.size : HEADER.size + text])

    def read_counts(self, said: Any) -> None:
        counts = counts_of(Response({"label_counts": said}), "site", classes=3)
        require(len(counts) <= 3, f"{len(counts)} classes of 3")
        require(all(type(n) is int and 0 <= n <= COUNT_LIMIT for n in counts), f"{counts}")

    def read_smashed(self, given: tuple[int, bool, bytes]) -> None:
        index, back, data = given
        link, ticket, _, _ = self.smashed[index]
        if back:
            require_size([link.open_gradient(data, ticket)], data, 1 << 20)
        else:
            require_size([link.open(data, classes=3).values], data, 1 << 20)

    def read_checkpoint(self, given: tuple[str, Mapping[str, bytes]]) -> None:
        kind, files = given
        folder = self.folder / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in files.items():
            path = folder / "round-00002" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        shutil.copy(self.saved[kind] / "records.jsonl", folder)
        self.train(kind, 2, Checkpoint(folder, resume=True))

    # -- makers ------------------------------------------------------------------------------------

    def lying_update(self, rng: random.Random) -> Update:
        """A well-formed update with one or two lies: whose it is, a number, a tensor, a report."""
        update = self.honest
        for _ in range(rng.choice((1, 1, 2))):
            how = rng.randrange(6)
            number = rng.choice([x for x in VALUES if type(x) in (int, float)])
            if how == 0:
                name = rng.choice(("client", "round", "examples"))
                lie: dict[str, Any] = {name: rng.choice(NUMBERS)}
                update = replace(update, **lie)
            elif how == 1:
                name = rng.choice(("loss", "personal_accuracy", "\0\x1b[2J" * 99))
                update = replace(update, metrics={**update.metrics, name: number})
            elif how == 2:
                key = rng.choice(list(update.tensors))
                tensors = {**update.tensors, key: spoiled(rng, update.tensors[key], float(number))}
                update = replace(update, tensors=tensors)
            elif how == 3:
                extra = {rng.choice(("x", "\x1b[31m" * 999)): torch.tensor([float(number)])}
                update = replace(update, extra=extra)
            else:
                report = update.routing[0]
                part = rng.choice(("load", "routing", "margin", "region", "tokens"))
                value: Any = getattr(report, part)
                if part == "tokens":
                    value = rng.choice(NUMBERS)
                elif part == "region" and rng.random() < 0.3:
                    value = None
                elif value is not None:
                    value = spoiled(rng, value, float(number))
                update = replace(update, routing=[replace(report, **{part: value})])
        return update

    def headed(self, rng: random.Random) -> tuple[int, bytes]:
        """Smashed data whose header says something else, or that are broken."""
        index = rng.randrange(len(self.smashed))
        data = bytearray(self.smashed[index][2])
        if rng.random() < 0.3:
            return index, broken(rng, bytes(data))
        at = rng.choice((12, 16, 20, 24, 28, 32, 36, 40))
        data[at : at + 4] = (rng.choice(NUMBERS) % 2**32).to_bytes(4, "little")
        return index, bytes(data)

    def frame(self, rng: random.Random) -> bytes:
        facts = json.dumps({"what": "send", "batch": 3, "x": rng.choice(VALUES[:-8])}).encode()
        return broken(rng, HEADER.pack(MAGIC, len(facts), 7) + facts + bytes(7))

    def counts(self, rng: random.Random) -> Any:
        return rng.choice(
            ([rng.choice(VALUES) for _ in range(rng.choice((0, 1, 3, 4)))], [1] * 10**5, *VALUES)
        )

    def recipe_text(self, rng: random.Random) -> Path:
        text = tomli_w.dumps(read_tables(rng.choice(list(shipped_recipes()))))
        return self.file(broken(rng, text.encode()), "recipe.toml")

    def broken_smashed(self, rng: random.Random) -> tuple[int, bool, bytes]:
        index, back = rng.randrange(len(self.smashed)), rng.random() < 0.5
        _, _, sent, gradient = self.smashed[index]
        return index, back, broken(rng, gradient if back else sent)

    def broken_checkpoint(self, rng: random.Random) -> tuple[str, dict[str, bytes]]:
        """A checkpoint with a broken file; by half with a manifest that says it is whole."""
        kind = rng.choice(("federated", "split"))
        newest = self.saved[kind] / "round-00002"
        names = [p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file()]
        files = {name: (newest / name).read_bytes() for name in names}
        name = rng.choice(names)
        if rng.random() < 0.1:
            files.pop(name)
        elif name == "run.json" and rng.random() < 0.7:
            files[name] = json.dumps(odd_facts(rng, json.loads(files[name]))).encode()
        else:
            files[name] = broken(rng, files[name])
        if rng.random() < 0.5 and name in files and name != "manifest.json":
            manifest = json.loads(files["manifest.json"])
            path = self.file(files[name], "part")
            manifest["files"][name] = {"bytes": len(files[name]), "sha256": checksum(path)}
            files["manifest.json"] = json.dumps(manifest).encode()
        return kind, files

    def kinds(self) -> dict[str, Kind]:
        """All kinds of input."""
        return {
            "recipe": Kind(odd_tables, self.read_recipe, InputError),
            "recipe text": Kind(self.recipe_text, load_recipe, InputError),
            "override": Kind(odd_override, lambda o: load_recipe("quickstart", [o]), InputError),
            "broadcast": Kind(lambda r: message(r, self.broadcast), self.read_broadcast, WireError),
            "update": Kind(lambda r: message(r, self.update), self.read_update, (WireError, Unfit)),
            "opening": Kind(
                lambda r: message(r, self.opening), lambda m: read_round_start(m, 1, 3), WireError
            ),
            "closing": Kind(
                lambda r: message(r, self.closing), lambda m: read_round_end(m, 0, 1, 3), WireError
            ),
            "lying update": Kind(self.lying_update, self.read_report, Unfit),
            "header": Kind(self.headed, self.read_due, WireError),
            "frame": Kind(self.frame, self.read_frame, FrameError),
            "label counts": Kind(self.counts, self.read_counts, HandshakeError),
            "smashed": Kind(self.broken_smashed, self.read_smashed, WireError),
            "checkpoint": Kind(self.broken_checkpoint, self.read_checkpoint, CheckpointError),
            "card": Kind(
                lambda r: broken(r, self.card).decode(errors="replace"),
                ModelSignature.from_json,
                HandshakeError,
            ),
        }


def odd_facts(rng: random.Random, facts: Any) -> Any:
    """The facts of a run with one value anywhere changed."""
    where: Any = facts
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            return facts
        key = rng.choice(keys)
        if rng.random() < 0.4 or not isinstance(where[key], dict | list):
            where[key] = rng.choice([value for value in VALUES if value != "é\udcff"])
            return facts
        where = where[key]


class Unfit(Exception):
    """An update that the schema refuses."""


def spoiled(rng: random.Random, tensor: Tensor, number: float) -> Tensor:
    """A tensor with another number in it, everywhere or once, or of another shape or type."""
    how = rng.randrange(5)
    if how == 0:
        return tensor[:-1] if tensor.dim() else tensor
    if how == 1:
        return tensor.to(rng.choice((torch.float16, torch.float64, torch.int64)))
    changed = tensor.clone().reshape(-1)
    changed[slice(None) if how == 2 else rng.randrange(len(changed))] = torch.tensor(number).to(
        tensor
    )
    return changed.reshape(tensor.shape)


class Wrong(Exception):
    """A reader accepted what it should not have."""


def require(fits: bool, what: str) -> None:
    """Raise `Wrong` unless it fits."""
    if not fits:
        raise Wrong(what)


def require_size(tensors: list[Tensor], data: bytes, least: int = 0) -> None:
    """What was opened must not be larger than what it came from, or than a stated limit."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    require(size <= max(len(data), least), f"{size} bytes of tensors from {len(data)}")


# -- running ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Memory that the process may take: what it has, and `BYTES`."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    now = int(status.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Raise TimeoutError in what takes longer than `SECONDS`."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Row:
    """What became of the inputs of one kind."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    slowest: float = 0.0
    peak: int = 0


def run_round(name: str, kind: Kind, inputs: int, seed: int) -> Row:
    """Read that many inputs of a kind, and tell of each failure on stderr."""
    row = Row()
    for number in range(inputs):
        given = kind.make(random.Random(f"{seed}/{name}/{number}"))
        row.inputs += 1
        held = held_anew()
        began = time.perf_counter()
        try:
            with timed(), limited(), contextlib.redirect_stderr(io.StringIO()):
                kind.read(given)
            row.accepted += 1
        except kind.error as error:
            said = str(error)
            if said and said.isprintable() and len(said) < 2000:
                row.refused += 1
            else:
                report(row, name, seed, number, given, f"its message: {said!r}")
        except BaseException:
            report(row, name, seed, number, given, traceback.format_exc())
        row.slowest = max(row.slowest, time.perf_counter() - began)
        row.peak = max(row.peak, memory("VmHWM") - held)
    return row


def memory(name: str) -> int:
    """A line of this process's memory in KiB; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(one.split()[1]) for one in lines if one.startswith(name)), 0)


def held_anew() -> int:
    """The memory held now in KiB, from which the peak is counted anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def report(row: Row, name: str, seed: int, number: int, given: object, why: str) -> None:
    """Count a failure, and tell the first few."""
    row.failed += 1
    if row.failed <= 3:
        print(f"{name}, seed {seed}, input {number}: {given!r:.600}\n{why}", file=sys.stderr)


def main() -> None:
    """Print a table; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = World(Path(folder)).kinds()
        if args.only:
            kinds = {args.only: kinds[args.only]}
        print("| input | number | accepted | refused | failed | slowest, ms | peak beside, MB |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for name, kind in kinds.items():
            row = run_round(name, kind, -(-args.inputs // len(kinds)), args.seed)
            failed += row.failed
            print(
                f"| {name} | {row.inputs} | {row.accepted} | {row.refused} | {row.failed} "
                f"| {1000 * row.slowest:.0f} | {row.peak / 1024:.1f} |",
                flush=True,
            )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
