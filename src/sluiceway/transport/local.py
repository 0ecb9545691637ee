"""The embedded engine: every client on this machine, in one process or in a few."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, Loss
from sluiceway.core.checkpoints import Checkpoint, StorageError
from sluiceway.core.device import chosen_device
from sluiceway.core.evaluation import Evaluation, Metric, label_counts, usable_examples
from sluiceway.core.guards import Failure
from sluiceway.core.head_start import (
    HeadStart,
    HeadSums,
    read_sums,
    require_head,
    sums_length,
    write_sums,
)
from sluiceway.core.memory import keep_freed_memory
from sluiceway.core.messages import (
    WireError,
    broadcast_length,
    read_broadcast,
    read_update,
    received_update,
    write_broadcast,
    write_update,
)
from sluiceway.core.privacy import arrange_privacy, told
from sluiceway.core.round_loop import MAX_STEP, Loop, Record, Result, Rounds
from sluiceway.core.settings import Training
from sluiceway.core.signals import check_stop
from sluiceway.core.trial import try_model
from sluiceway.errors import InputError, described, line
from sluiceway.federated.client import Worker, prepare
from sluiceway.federated.frozen_prefix import FeatureCache, FrozenPrefix, agrees, find_frozen_prefix
from sluiceway.federated.head_sums import head_sums, test_feature_size
from sluiceway.federated.stacked import StackedTrainer
from sluiceway.files import scratch_folder
from sluiceway.strategies import Broadcast, Strategy, Update
from sluiceway.strategies import strategy as strategy_of
from sluiceway.transport.protocol import TaskFailure
from sluiceway.transport.worker_pool import Pool

#: Test examples that a worker is given at a time.
PART = 256
#: Bytes of updates that wait for others, and of what clients keep, that may be in memory.
MEMORY = 2 << 30


class EngineFolder:
    """The temporary folder of an engine, and the length of its last broadcast.

    Args:
        worker: model and data.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._stack = ExitStack()
        self._down = 0

    def __enter__(self) -> Self:
        self.folder = self._stack.enter_context(scratch_folder())
        self.states = self.folder / "clients"
        self.states.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def broadcast_bytes(self) -> int:
        return self._down

    def feature_size(self) -> float:
        return test_feature_size(self.worker)

    def packed(self, broadcast: Broadcast) -> Path:
        """The file of a broadcast, in a new folder for the round. Raises StorageError."""
        folder = self.folder / "round"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        down = folder / "broadcast"
        self._down = write_broadcast(down, broadcast)
        return down


class LocalEngine(EngineFolder):
    """Trains clients in this process, one after the other; messages stay tensors in memory.

    Bytes are the computed length of the packed messages. Updates that must wait for others are
    copied, to the CPU, up to `memory` bytes in a round; the rest are packed into files and read
    when they are needed. What clients keep is in memory too where the run is not saved, and
    changes with `commit` only: a round that is given up leaves no trace.

    A client whose training raises has failed; the others go on.

    Args:
        worker: model and data.
        threads: torch threads while the engine is open; None leaves them as they are.
        saved: what clients keep is also written into files, which a checkpoint copies.
        memory: bytes of waiting updates, and of what clients keep, that may be in memory.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        threads: int | None = None,
        saved: bool = False,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(worker)
        self.threads = threads
        self.saved = saved
        self.memory = memory
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._kept_bytes = 0
        self._fresh: dict[int, dict[str, Tensor]] = {}
        self._files: set[str] = set()

    def __enter__(self) -> Self:
        super().__enter__()
        if self.threads:
            self._stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.threads)
        return self

    def head_sums(self, kind: HeadStart, clients: Sequence[int]) -> Iterator[HeadSums | Failure]:
        for number in clients:
            try:
                found = head_sums(self.worker, number, kind)
            except InputError:
                raise
            except Exception as error:
                yield Failure(number, described(error), error=error)
                continue
            yield replace(found, nbytes=sums_length(found))

    def train(
        self, broadcast: Broadcast, clients: Sequence[int], personal: set[int], *, keep: bool
    ) -> Iterator[Update | Failure]:
        self._down = broadcast_length(broadcast)
        self._fresh = {}
        self._files = set(os.listdir(self.states))
        room = self.memory
        for answer in self.answers(broadcast, clients, personal):
            if keep and isinstance(answer, Update):
                room -= answer.nbytes
                yield copied(answer) if room >= 0 else self.stored(answer)
            else:
                yield answer

    def answers(
        self, broadcast: Broadcast, clients: Sequence[int], personal: set[int]
    ) -> Iterator[Update | Failure]:
        """What each client answers; its tensors may be overwritten by the next one's."""
        for number in clients:
            check_stop()
            state = self.kept(number)
            try:
                trained = self.worker.train(number, broadcast, state, personal=number in personal)
                update = received_update(trained)
            except StorageError:
                raise
            except Exception as error:
                yield Failure(number, described(error), error=error)
                continue
            if state:
                self._fresh[number] = state
            yield update

    def kept(self, number: int) -> dict[str, Tensor]:
        """What a client keeps, to be changed in place; tensors themselves are never changed."""
        if number in self._kept:
            return dict(self._kept[number])
        return load_file(self.states / f"{number}") if f"{number}" in self._files else {}

    def stored(self, update: Update) -> Update:
        """The update with its tensors in a file. Raises StorageError."""
        path = self.folder / f"update-{update.client}"
        write_update(path, update)
        return read_update(path)

    def commit(self, clients: Sequence[int]) -> None:
        for number in clients:
            state = self._fresh.get(number)
            if state is None:
                continue
            self._kept_bytes -= size_of(self._kept.pop(number, {}))
            if fits := self._kept_bytes + size_of(state) <= self.memory:
                self._kept[number] = state
                self._kept_bytes += size_of(state)
            if self.saved or not fits:
                path = self.states / f"{number}"
                contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
                save_file(contiguous, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
        self._fresh = {}

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Evaluation:
        total = Evaluation.nothing()
        for part in test_parts(self.worker):
            check_stop()
            total += self.worker.evaluate(tensors, part)
        return total


class StackedEngine(LocalEngine):
    """Trains `stacked` clients at a time in this process; see `StackedTrainer`.

    Raises:
        InputError: the model, the strategy or the way it trains does not allow that.
    """

    def __init__(self, worker: Worker, *, stacked: int, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self.stacked = stacked
        self.trainer = StackedTrainer(worker)

    def answers(
        self, broadcast: Broadcast, clients: Sequence[int], personal: set[int]
    ) -> Iterator[Update | Failure]:
        for first in range(0, len(clients), self.stacked):
            check_stop()
            group = clients[first : first + self.stacked]
            states = {number: self.kept(number) for number in group}
            for answer in self.trainer.train(broadcast, group, personal, states):
                if isinstance(answer, Failure):
                    yield answer
                    continue
                if states[answer.client]:
                    self._fresh[answer.client] = states[answer.client]
                yield received_update(answer)


class PoolEngine(EngineFolder):
    """Trains clients in worker processes; their number changes no result.

    Messages are files of a temporary folder, packed as they would cross a wire. What clients keep
    is in files too, and changes with `commit` only: a round that is given up leaves no trace.

    A client whose training raises, whose process dies or who takes too long has failed; the others
    go on.

    Args:
        worker: model and data; copied into each process.
        workers: processes, >= 1.
        threads: torch threads for each worker. The same number gives the same results, whatever
            the number of workers.
        timeout: seconds that a client may train, 0 for any; needs the CPU.
        devices: where each process runs; the CPU if there are none.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        workers: int,
        threads: int = 1,
        timeout: float = 0,
        devices: Sequence[torch.device] = (),
    ) -> None:
        super().__init__(worker)
        self.timeout = timeout
        if devices:
            worker.move("cpu")  # a process that begins anew takes it from there to its own device
        settle = partial(move_to, devices) if devices else None
        self.pool = Pool(worker, workers, threads, settle)

    def __enter__(self) -> Self:
        super().__enter__()
        self._stack.callback(self.pool.close)
        return self

    def head_sums(self, kind: HeadStart, clients: Sequence[int]) -> Iterator[HeadSums | Failure]:
        jobs = [(number, kind, self.folder / f"sums-{number}") for number in clients]
        done = self.pool.map(sums_of_client, jobs, self.timeout)
        for number, found in zip(clients, done, strict=True):
            yield sums_in(number, found)

    def train(
        self, broadcast: Broadcast, clients: Sequence[int], personal: set[int], *, keep: bool
    ) -> Iterator[Update | Failure]:
        down = self.packed(broadcast)
        jobs = [(number, down, self.states / f"{number}", number in personal) for number in clients]
        done = self.pool.map(train_client, jobs, self.timeout)
        for number, found in zip(clients, done, strict=True):
            yield report_of(number, found)
            if not keep and isinstance(found, Path):
                found.unlink()

    def commit(self, clients: Sequence[int]) -> None:
        for number in clients:
            fresh = self.folder / "round" / f"state-{number}"
            if fresh.exists():
                os.replace(fresh, self.states / f"{number}")

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Evaluation:
        path = self.folder / "global"
        write_broadcast(path, Broadcast(0, tensors))
        total = Evaluation.nothing()
        for found in self.pool.map(evaluate_part, [(path, p) for p in test_parts(self.worker)]):
            if isinstance(found, TaskFailure):
                raise found.error or RuntimeError(f"evaluation: {found.why}")
            total += found
        return total


def test_parts(worker: Worker) -> list[list[int]]:
    """The test set in parts that do not depend on the number of workers, as sums of floats do."""
    return [part.tolist() for part in torch.arange(len(worker.test)).split(PART)]


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all the tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def copied(update: Update) -> Update:
    """The update with tensors of its own, on the CPU, which the next client does not overwrite."""
    return replace(
        update,
        tensors={name: tensor.cpu().clone() for name, tensor in update.tensors.items()},
        extra={name: tensor.cpu().clone() for name, tensor in update.extra.items()},
    )


def report_of(number: int, done: Path | TaskFailure) -> Update | Failure:
    """A client's update from the file it was packed to; a failure if there is none of it.

    Raises:
        StorageError: this machine has no room for it, which is no failure of the client.
    """
    if isinstance(done, TaskFailure) and isinstance(done.error, StorageError):
        raise done.error
    if isinstance(done, TaskFailure):
        return Failure(number, done.why, error=done.error)
    try:
        update = read_update(done)
    except WireError as error:
        return Failure(number, line(str(error)), done.stat().st_size, error)
    if update.client != number:
        return Failure(number, f"it calls itself client {update.client}", update.nbytes)
    return update


def sums_in(number: int, done: Path | TaskFailure) -> HeadSums | Failure:
    """A client's sums from the file they were packed to, which is removed; a failure without.

    Raises:
        InputError, StorageError: the model has no such head, or this machine no room.
    """
    if isinstance(done, TaskFailure) and isinstance(done.error, InputError | StorageError):
        raise done.error
    if isinstance(done, TaskFailure):
        return Failure(number, done.why, error=done.error)
    size = done.stat().st_size
    try:
        sums = read_sums(done)
        if sums.client != number:
            return Failure(number, f"it calls itself client {sums.client}", size)
        return HeadSums(number, {name: sums.tensors[name] for name in sums.tensors}, size)
    except WireError as error:
        return Failure(number, line(str(error)), size, error)
    finally:
        done.unlink()


def sums_of_client(worker: Worker, number: int, kind: HeadStart, path: Path) -> Path:
    """Pack one client's sums for the head's start into a file."""
    write_sums(path, head_sums(worker, number, kind))
    return path


def move_to(devices: Sequence[torch.device], worker: Worker, place: int) -> None:
    """Put the worker of this process on its device."""
    worker.move(devices[place])


def pool_devices(device: torch.device, workers: int, visible: int) -> list[torch.device]:
    """One device for each worker process; none on a CPU, where they need not be told.

    Args:
        device: of the run; "cuda" stands for every visible GPU, "cuda:1" for that one alone.
        workers: how many processes.
        visible: GPUs that PyTorch sees.

    Raises:
        InputError: there are more workers than such GPUs.
    """
    if device.type == "cpu":
        return []
    places = range(visible) if device.index is None else [device.index]
    if device.type != "cuda" or workers > len(places):
        raise InputError(
            f"run.workers = {workers}: on {device} there can be "
            f"{max(len(places), 1) if device.type == 'cuda' else 1}, one a GPU"
        )
    return [torch.device("cuda", place) for place in places[:workers]]


#: Of a GPU's memory, what copies of what is trained may take, with gradients and optimiser.
STACK_SHARE = 0.25
#: Most clients at once where nobody said how many.
STACK_LIMIT = 64


def clients_at_once(params: Iterable[Tensor], clients: int, memory: int) -> int:
    """How many clients of a round are trained at once where nobody said how many, >= 1.

    Args:
        params: what is trained; each client has a copy, its gradient, and two moments and a copy
            while it is sent.
        clients: of a round.
        memory: of the GPU, in bytes.
    """
    copy = 5 * sum(param.nbytes for param in params)
    return max(1, min(clients, STACK_LIMIT, int(STACK_SHARE * memory) // max(copy, 1)))


def in_process(
    worker: Worker, stacked: int, clients: int, memory: int, **kwargs: Any
) -> LocalEngine:
    """The engine for clients in this process.

    Args:
        worker: model and data.
        stacked: clients at once; 1 for one after the other; 0 for as many as `memory` allows
            where model, method and training do, else one after the other.
        clients: of a round.
        memory: of the GPU, in bytes; 0 on a CPU.
        kwargs: of the engine.

    Raises:
        InputError: several at once were asked for and cannot be.
    """
    number = stacked or clients_at_once(worker.params.values(), clients, memory)
    if number > 1:
        try:
            return StackedEngine(worker, stacked=number, **kwargs)
        except InputError:
            if stacked:
                raise
    return LocalEngine(worker, **kwargs)


def train_client(worker: Worker, number: int, down: Path, kept: Path, personal: bool) -> Path:
    """Train one client from a packed broadcast to a packed update, whose path is returned.

    What the client keeps is read from `kept`, and written next to the update.
    """
    state = load_file(kept) if kept.exists() else {}
    update = worker.train(number, read_broadcast(down), state, personal=personal)
    path = down.with_name(f"update-{number}")
    write_update(path, update)
    if state:
        fresh = down.with_name(f"state-{number}")
        save_file({name: t.contiguous() for name, t in state.items()}, fresh)
    return path


def evaluate_part(worker: Worker, path: Path, indices: list[int]) -> Evaluation:
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
    stacked: int = 0,
    min_clients: int = 1,
    max_retries: int = 1,
    max_step: float = MAX_STEP,
    leave_one_out: bool = False,
    evaluate_every: int = 1,
    patience: int = 0,
    metric: str | Metric = "accuracy",
    personal_examples: int = 500,
    local_tests: Sequence[Examples] | None = None,
    head_start: HeadStart = "random",
    timeout: float = 0,
    features: FeatureCache | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_round: Callable[[Record], None] = lambda record: None,
    on_update: Callable[[int, int], None] = lambda done, of: None,
    checkpoint: Checkpoint | None = None,
) -> Result:
    """Train a model across clients on this machine.

    Args:
        model: any module whose output is logits [B, C], has them as `.logits`, or is a tuple
            (logits, auxiliary loss), whose loss, a number, is added in training. Parameters with
            `requires_grad` are trained and exchanged. The global values are in it at the end,
            whether the run ended well or not. Mixture-of-experts blocks are found by themselves
            (`sluiceway.moe`).
        clients: each client's data set of (inputs, label), see `Examples`; may be empty for some.
            Examples of the label -100 are left out.
        test: the global test set, of the same form.
        strategy: an object from `sluiceway.strategies`, or a name with its default parameters.
        rounds, participation, seed, min_clients, max_retries: see `Rounds`.
        max_step, leave_one_out, evaluate_every, patience, metric: see `Rounds`.
        personal_examples, local_tests: see `Worker`.
        head_start: how a linear head starts: "random", as the model has it; "means" or "ridge", in
            closed form from sums that every client sends once (see docs/methods.md).
        training: how a client trains; see `Training`.
        loss: of (logits, labels).
        device: "auto" (CUDA where there is one), "cpu", "cuda", ...
        workers: processes that train clients, on GPUs at most one each; results do not depend on it
            where `threads` is set.
        threads: torch threads for each worker.
        stacked: clients that are trained at once in this process, see `StackedTrainer`; 1 for one
            after the other, with which results agree up to rounding. 0: on a GPU as many as its
            memory holds, up to 64, where that can be done; on a CPU one after the other.
        timeout: seconds that a client may train before the round goes on without it, 0 for any;
            its process is ended, so this needs the CPU. Results then depend on the machine.
        features: keeps what frozen layers make of each example; None for a cache of this run's
            own, of up to 2 GB in memory.
        on_start: called once all is checked and prepared, before the first round.
        on_round, on_update: called with each round's record, and with (updates done, of).
        checkpoint: where the run is saved, and continued from.

    Raises:
        ValueError: nothing to train, too few clients with examples, a timeout on a GPU.
            InputError, which is one: more workers than GPUs; `stacked` with several workers, a
            timeout, or a model, strategy or training that it is not for; a closed-form start of a
            model without a linear head.
        TooFewUpdates: a round had fewer than `min_clients` usable updates, however often it was
            tried; CheckpointError, StorageError: see `Checkpoint`.
        NoExpertsError: the strategy needs experts and the model has none.
        pydantic.ValidationError: a setting out of range.
    """
    if isinstance(strategy, str):
        strategy = strategy_of(strategy)
    plan = Rounds(
        rounds=rounds,
        participation=participation,
        seed=seed,
        min_clients=min_clients,
        max_retries=max_retries,
        max_step=max_step,
        leave_one_out=leave_one_out,
        evaluate_every=evaluate_every,
        patience=patience,
        metric=metric,
    )
    place = torch.device(chosen_device(device))
    if timeout and place.type != "cpu":
        raise ValueError(f"a timeout needs the CPU; this runs on {place}")
    devices = pool_devices(place, workers, torch.cuda.device_count()) if workers > 1 else []
    if stacked > 1 and (workers > 1 or timeout):
        with_what = "several workers" if workers > 1 else "a timeout"
        raise InputError(f"run.stacked = {stacked} cannot be used with {with_what}")
    keep_freed_memory()
    model.to(place)
    was_trained = {name: p.requires_grad for name, p in model.named_parameters()}
    prepare(model, strategy, len(clients))
    require_head(head_start, strategy)
    if local_tests is not None and len(local_tests) != len(clients):
        raise ValueError(f"{len(local_tests)} local test sets for {len(clients)} clients")
    clients, test, usable = usable_examples(clients, test, local_tests or ())
    local_tests = None if local_tests is None else usable
    training = training or Training()
    try_model(
        model,
        clients,
        test,
        metric,
        place,
        layout=strategy.layout,
        training=training,
        local_tests=usable,
    )
    arrange_privacy(strategy, model, rounds, head_start)
    counts = told(label_counts(clients), strategy)
    with ExitStack() as stack:
        worker = stack.enter_context(
            standing(
                model,
                clients,
                test,
                strategy,
                training,
                loss=loss,
                device=place,
                seed=seed,
                features=features,
                personal_examples=personal_examples,
                local_tests=local_tests,
            )
        )
        engine: LocalEngine | PoolEngine
        if workers > 1 or timeout:
            engine = PoolEngine(
                worker, workers=workers, threads=threads or 1, timeout=timeout, devices=devices
            )
            stack.callback(model.to, place)
        else:
            memory = 0
            if place.type == "cuda":
                memory = torch.cuda.get_device_properties(place).total_memory
            taking_part = plan.count([i for i, held in enumerate(counts.sum(1).tolist()) if held])
            saved = checkpoint is not None
            engine = in_process(worker, stacked, taking_part, memory, threads=threads, saved=saved)
        stack.enter_context(engine)
        loop = Loop(
            strategy,
            engine,
            plan,
            counts,
            on_round=on_round,
            on_update=on_update,
            checkpoint=checkpoint,
            states=engine.states,
            head_start=head_start,
        )
        try:
            return run_loop(loop, worker, on_start)
        finally:
            for name, param in model.named_parameters():
                param.requires_grad_(was_trained[name])


def run_loop(loop: Loop, worker: Worker, on_start: Callable[[], None]) -> Result:
    """Run what is left of a run; at its end the worker's model has the global values."""
    loop.restore()
    on_start()
    loop.result.model = worker.model
    try:
        return loop.run()
    finally:
        worker.load(loop.strategy.tensors)


@contextlib.contextmanager
def standing(
    model: nn.Module,
    clients: Sequence[Examples],
    test: Examples,
    strategy: Strategy,
    training: Training,
    *,
    loss: Loss,
    device: torch.device,
    seed: int,
    features: FeatureCache | None = None,
    personal_examples: int = 500,
    local_tests: Sequence[Examples] | None = None,
) -> Iterator[Worker]:
    """A worker of the model, with what its frozen trunk makes of each example kept.

    Args:
        model, strategy: see `federated.client.prepare`, which has been called.
        clients, test: may be empty, as they are for those who do not hold them.
        features: None for a cache of its own, of up to 2 GB in memory.
        loss, device, seed, personal_examples, local_tests: see `Worker`.
    """
    with ExitStack() as stack:
        sets = [*clients, test, *(local_tests or ())]
        trunk = usable_prefix(model, sets, device)
        if trunk:
            cache = features or FeatureCache(2 << 30)
            sets = cache.wrap(trunk, sets, device)
            clients, test = sets[: len(clients)], sets[len(clients)]
            local_tests = None if local_tests is None else sets[len(clients) + 1 :]
            stack.enter_context(trunk.skipped())
        yield Worker(
            model,
            clients,
            test,
            strategy,
            training,
            loss=loss,
            device=device,
            seed=seed,
            personal_examples=personal_examples,
            local_tests=local_tests,
        )


def usable_prefix(
    model: nn.Module, clients: Sequence[Examples], device: torch.device
) -> FrozenPrefix | None:
    """The model's frozen trunk, if passing over it changes nothing."""
    trunk = find_frozen_prefix(model)
    filled = next((c for c in clients if len(c)), None)
    if trunk is None or filled is None:
        return None
    few = Batch.of(filled, torch.arange(min(4, len(filled))), device)
    return trunk if agrees(trunk, few) else None
