"""The embedded engine: every client on this machine, in one process or in a few."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sluiceway.federated.batches import Batch, Examples
from sluiceway.federated.checkpoints import Checkpoint
from sluiceway.federated.client import Loss, Training, Worker, prepare
from sluiceway.federated.evaluation import Evaluation, label_counts
from sluiceway.federated.features import FeatureCache, Trunk, agrees, find_trunk
from sluiceway.federated.rounds import Loop, Record, Result, Rounds
from sluiceway.federated.wire import read_broadcast, read_update, write_broadcast, write_update
from sluiceway.strategies import Broadcast, Strategy, Update
from sluiceway.strategies import strategy as strategy_of

#: Test examples that a worker is given at a time.
PART = 256

#: The worker of this process, when it is one of several.
_worker: Worker | None = None


class LocalEngine:
    """Plays clients by one or more workers; the number of workers changes no result.

    Messages are packed into files of a temporary folder, so that what is counted is what would
    cross, and so that updates that wait for the others take no memory.

    Args:
        worker: model and data; copied into each process.
        workers: processes, >= 1; with 1 all runs in this one.
        threads: torch threads for each worker; None leaves them as they are. The same number
            gives the same results, whatever the number of workers.
    """

    def __init__(self, worker: Worker, *, workers: int = 1, threads: int | None = None) -> None:
        self.worker = worker
        self.workers = workers
        self.threads = threads
        self._stack = ExitStack()
        self._down = 0

    def __enter__(self) -> Self:
        self.folder = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sluiceway-"))
        )
        self.states = self.folder / "clients"
        self.states.mkdir()
        if self.workers > 1:
            # Forked workers share data and model with this process until they write to them.
            method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
            self._pool: ProcessPoolExecutor | None = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context(method),
                initializer=begin_worker,
                initargs=(self.worker, self.threads or 1, os.getpid()),
            )
            self._stack.callback(self._pool.shutdown, wait=True, cancel_futures=True)
        else:
            self._pool = None
            if self.threads:
                self._stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(self.threads)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._pool is not None:
            # What the clients are doing is lost anyway; without this, stopping waits for them.
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._stack.close()

    def train(
        self, broadcast: Broadcast, clients: Sequence[int], personal: set[int], *, keep: bool
    ) -> Iterator[Update]:
        folder = self.folder / "round"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        down = folder / "broadcast"
        self._down = write_broadcast(down, broadcast)
        jobs = [
            self._do(play, number, down, self.states / f"{number}", number in personal)
            for number in clients
        ]
        try:
            for job in jobs:
                path = job()
                yield read_update(path)
                if not keep:
                    path.unlink()
        finally:
            if not keep:
                shutil.rmtree(folder)

    def broadcast_bytes(self) -> int:
        return self._down

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Evaluation:
        path = self.folder / "global"
        write_broadcast(path, Broadcast(0, tensors))
        # Parts that do not depend on the number of workers make sums that do not either.
        parts = torch.arange(len(self.worker.test)).split(PART)
        jobs = [self._do(judge, path, part.tolist()) for part in parts]
        return sum((job() for job in jobs), start=Evaluation.nothing())

    def _do(self, task: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Start a task on some worker; calling what is returned waits for its result."""
        if self._pool is None:
            return lambda: task(self.worker, *args)
        future: Future[Any] = self._pool.submit(on_worker, task, *args)
        return future.result


def begin_worker(worker: Worker, threads: int, parent: int) -> None:
    """Runs once in each worker process."""
    global _worker
    _worker = worker
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run, once, for all
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()


def leave_with(parent: int) -> None:
    """End this process soon after its parent has gone, however that went."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def on_worker(task: Callable[..., Any], *args: Any) -> Any:
    """Run a task in a worker process."""
    return task(_worker, *args)


def play(worker: Worker, number: int, down: Path, kept: Path, personal: bool) -> Path:
    """Train one client from a packed broadcast to a packed update, whose path is returned."""
    state = load_file(kept) if kept.exists() else {}
    update = worker.train(number, read_broadcast(down), state, personal=personal)
    path = down.with_name(f"update-{number}")
    write_update(path, update)
    if state:
        save_file({name: t.contiguous() for name, t in state.items()}, kept)
    return path


def judge(worker: Worker, path: Path, indices: list[int]) -> Evaluation:
    """Evaluate packed global tensors on a part of the test set."""
    return worker.evaluate(read_broadcast(path).tensors, indices)


def federate(
    model: nn.Module,
    clients: Sequence[Examples],
    test: Examples,
    strategy: Strategy | str = "fedavg",
    *,
    rounds: int = 10,
    participation: float = 1.0,
    seed: int = 0,
    training: Training | None = None,
    loss: Loss = F.cross_entropy,
    device: str = "auto",
    workers: int = 1,
    threads: int | None = None,
    features: FeatureCache | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_round: Callable[[Record], None] = lambda record: None,
    on_update: Callable[[int, int], None] = lambda done, of: None,
    checkpoint: Checkpoint | None = None,
) -> Result:
    """Train a model across clients on this machine.

    Args:
        model: any module whose output is logits [B, C] or has them as `.logits`. Parameters with
            `requires_grad` are trained and exchanged. The trained global values are in it at the
            end. Mixture-of-experts blocks are found by themselves (`sluiceway.moe`).
        clients: each client's data set of (inputs, label); may be empty for some.
        test: the global test set, of the same form.
        strategy: an object from `sluiceway.strategies`, or a name with its default parameters.
        rounds, participation, seed: see `Rounds`.
        training: how a client trains; see `Training`.
        loss: of (logits, labels).
        device: "auto" (CUDA where there is one), "cpu", "cuda", ...
        workers: processes that play clients; results do not depend on it where `threads` is set.
        threads: torch threads for each worker.
        features: keeps what frozen layers make of each example; None for a cache of this run's
            own, of up to 2 GB in memory.
        on_start: called once all is checked and prepared, before the first round.
        on_round, on_update: called with each round's record, and with (updates done, of).
        checkpoint: where to save after every round and to continue from.

    Raises:
        ValueError: nothing to train, no client with examples, several workers on a GPU.
        NoExpertsError: the strategy needs experts and the model has none.
        pydantic.ValidationError: a setting out of range.
    """
    if isinstance(strategy, str):
        strategy = strategy_of(strategy)
    plan = Rounds(rounds=rounds, participation=participation, seed=seed)
    place = torch.device(chosen_device(device))
    if workers > 1 and place.type != "cpu":
        raise ValueError(f"{workers} workers need the CPU; one worker runs on {place}")
    model.to(place)
    was_trained = {name: p.requires_grad for name, p in model.named_parameters()}
    prepare(model, strategy, len(clients))
    counts = label_counts(clients)
    with ExitStack() as stack:
        trunk = usable_trunk(model, clients, place)
        if trunk:
            cache = features or FeatureCache(2 << 30)
            *clients, test = cache.wrap(trunk, [*clients, test], place)
            stack.enter_context(trunk.skipped())
        worker = Worker(
            model,
            clients,
            test,
            strategy,
            training or Training(),
            loss=loss,
            device=place,
            seed=seed,
        )
        engine = stack.enter_context(LocalEngine(worker, workers=workers, threads=threads))
        loop = Loop(strategy, engine, plan, counts, on_round=on_round, on_update=on_update)
        if checkpoint:
            checkpoint.attach(loop, engine.states)
        on_start()
        result = loop.run()
        worker.load(strategy.tensors)
    for name, param in model.named_parameters():
        param.requires_grad_(was_trained[name])
    return result


def chosen_device(name: str) -> str:
    """The device that "auto" stands for; any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_trunk(
    model: nn.Module, clients: Sequence[Examples], device: torch.device
) -> Trunk | None:
    """The model's frozen trunk, if passing over it changes nothing."""
    trunk = find_trunk(model)
    filled = next((c for c in clients if len(c)), None)
    if trunk is None or filled is None:
        return None
    few = Batch.of(filled, torch.arange(min(4, len(filled))), device)
    return trunk if agrees(trunk, few) else None
