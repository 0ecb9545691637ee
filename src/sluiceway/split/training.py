"""Split training in one call, with a user's own network and data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from sluiceway.core.batches import Batch, Examples, Loss
from sluiceway.core.checkpoints import Checkpoint, Snapshot
from sluiceway.core.device import chosen_device
from sluiceway.core.evaluation import Metric, label_counts, usable_examples
from sluiceway.core.guards import Diverged, TooFewUpdates, finite
from sluiceway.core.memory import keep_freed_memory
from sluiceway.core.parameters import exchanged
from sluiceway.core.round_loop import Result, Rounds
from sluiceway.core.seeds import derive_seed
from sluiceway.core.settings import Optimisation, SplitTraining
from sluiceway.core.signals import check_stop
from sluiceway.core.trial import try_model
from sluiceway.split.compress import Compressor
from sluiceway.split.methods import METHODS
from sluiceway.split.rounds import SplitLoop, SplitRecord
from sluiceway.split.setup import SharedSetup, SplitSettings
from sluiceway.split.state import restore, state_of
from sluiceway.strategies import FedAvg, Strategy

__all__ = ["SplitRecord", "split_train"]


def split_train(
    model: nn.Module,
    cut_at: str,
    clients: Sequence[Examples],
    test: Examples,
    method: Compressor | str = "sl",
    *,
    schedule: str = "parallel",
    tail_at: str | None = None,
    client_aggregation: Strategy | None = None,
    rounds: int = 10,
    participation: float = 1.0,
    seed: int = 0,
    training: Optimisation | None = None,
    loss: Loss = F.cross_entropy,
    device: torch.device | str = "auto",
    threads: int | None = 1,
    on_start: Callable[[], None] = lambda: None,
    on_round: Callable[[SplitRecord], None] = lambda record: None,
    checkpoint: Checkpoint | None = None,
    min_clients: int = 1,
    patience: int = 0,
    metric: str | Metric = "accuracy",
    form: str | None = None,
    fronts: Strategy | None = None,
) -> Result:
    """Train a network that is cut between clients and a server, on this machine.

    The network whose accuracy is reported is `result.model`: front, the newest mask and rounding,
    layers that the method adds (as `Bottleneck` does), and the server's half, as one module. The
    model itself holds its layers, the averaged front and the server's, with nothing dropped or
    rounded between them: its accuracy is `accuracy_full`.
    A batch of one example is left out where layers cannot train on it (BatchNorm of [B, C]): a
    client's by itself, the server's only if no other client has a batch in that step.

    Args:
        model: a chain of float32 layers (see `sluiceway.split.cut`); trained in place, and left in
            evaluation mode. Its memory layout stays: convolutions are faster in
            `model.to(memory_format=torch.channels_last)`, and equal up to rounding.
        cut_at: name of the last layer that clients hold.
        clients: each client's data set of (input tensor, label); may be empty for some. Examples of
            the label -100 are left out.
        test: the global test set.
        method: what crosses the cut: an object from `sluiceway.split.METHODS`, or its name.
        schedule: "sequential", "parallel" (or "splitfed-v2"), "copies" (or "splitfed-v1") or "u";
            see `schedules`.
        tail_at: in a U-shape, name of the last layer that the server holds. What crosses there is
            rounded as `method` says, and never pruned.
        client_aggregation: how the clients' layers are averaged after a round; FedAvg if None.
            Sequential training hands one front on and averages nothing.
        rounds, participation, seed: as of `sluiceway.federate`.
        training: of all layers; AdamW at 0.001 with batches of 64 if None. The optimisers live as
            long as the run, each where its layers are. `SplitTraining(front=False)` freezes the
            layers before the cut, and leaves them frozen.
        loss: of (logits, labels), a mean over the batch.
        device: where everything runs: "auto" (CUDA where there is one), "cpu", "cuda", ...
        threads: torch threads while it runs, >= 1; None leaves them as they are. Their number
            changes how sums are rounded, and beside a busy process many wait for each other.
        on_start, on_round: called before the first round, and after each with its record.
        checkpoint: where the run is saved, and continued from.
        min_clients: clients of a round whose layers must be usable, >= 1. With fewer the run ends:
            the server has learned from the others' batches, so that the round cannot be repeated.
        patience, metric: as of `sluiceway.federate`.
        form, fronts: old names of `schedule` and `client_aggregation`.

    Returns:
        Records (of type `SplitRecord`), the trained tensors of the whole network by name, and the
        network that was measured.

    Raises:
        ValueError: a cut that is not there, a schedule or a method that is not known, a strategy
            that the schedule cannot use, a budget below one channel, too few clients with examples.
        TooFewUpdates: see `min_clients`. Diverged: the server's layers are not finite any more.
        CheckpointError, StorageError: see `Checkpoint`.
    """
    plan = Rounds(
        rounds=rounds,
        participation=participation,
        seed=seed,
        min_clients=min_clients,
        max_retries=0,
        patience=patience,
        metric=metric,
    )
    settings = SplitSettings(
        cut_at=cut_at,
        method=named_method(method),
        schedule=form or schedule,
        tail_at=tail_at,
        client_aggregation=fronts or client_aggregation or FedAvg(),
        training=training or SplitTraining(batch_size=64),
        loss=loss,
        device=torch.device(chosen_device(device)),
        seed=seed,
    )
    clients, test, _ = usable_examples(clients, test)
    model.to(settings.device)
    try_model(model, clients, test, metric, settings.device, own_loss=False)
    counts = label_counts(clients)
    if not counts.shape[1]:
        raise ValueError("no client holds any example")
    keep_freed_memory()
    devices = [settings.device] if settings.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch_threads(threads):
        first = next(examples for examples in clients if len(examples))
        example = Batch.of(first, torch.tensor([0]), settings.device)
        setup = SharedSetup(model, settings, example, counts.shape[1], len(clients))
        here = [setup.client(client_id, examples) for client_id, examples in enumerate(clients)]
        loop = SplitLoop(setup, plan, test, counts, here)
        return run_rounds(loop, plan, on_start, on_round, checkpoint)


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """So many torch threads in the block, and as many as before after it; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_rounds(
    loop: SplitLoop,
    plan: Rounds,
    on_start: Callable[[], None],
    on_round: Callable[[SplitRecord], None],
    checkpoint: Checkpoint | None,
) -> Result:
    """Run the rounds that are left."""
    plan.check(loop.eligible)
    result = Result(
        empty=[client_id for client_id, size in enumerate(loop.sizes) if not size],
        label_counts=loop.label_counts.tolist(),
    )
    if saved := checkpoint.newest() if checkpoint else None:
        restore(loop, saved)
        result.take(saved, SplitRecord)
        result.tensors = trained(loop)
    on_start()
    with checkpoint.guarding() if checkpoint else contextlib.nullcontext():
        while not plan.over(result.records):
            check_stop()
            round = len(result.records) + 1
            torch.manual_seed(derive_seed(plan.seed, round))
            record = loop.run_round(round, plan.chosen(round, loop.eligible))
            tensors = trained(loop)
            require_usable(record, tensors, plan.min_clients)
            result.records.append(record)
            result.tensors, result.confusion = tensors, loop.confusion
            if checkpoint:
                now = Snapshot(
                    round,
                    state_of(loop),
                    result.facts(),
                    records=result.records,
                    model=loop.deployed().state_dict(),
                )
                checkpoint.after(now, ends=plan.over(result.records))
            on_round(record)
    result.model = loop.deployed()
    return result


def require_usable(
    record: SplitRecord, tensors: Mapping[str, torch.Tensor], min_clients: int
) -> None:
    """Check that a round left something to go on with.

    Raises:
        TooFewUpdates: fewer than `min_clients` clients' layers could be used.
        Diverged: a layer, which must be the server's, is not finite.
    """
    used = len(record.clients) - len(record.rejected)
    first = "".join(f" (client {c}: {why})" for c, why in sorted(record.rejected.items())[:1])
    if used < min_clients:
        raise TooFewUpdates(
            f"round {record.round}: the layers of {used} of {len(record.clients)} clients could be "
            f"used, run.min_clients = {min_clients}{first}"
        )
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise Diverged(
                f"round {record.round}: NaN or Inf in {name} on the server{first}; "
                "a lower train.lr may help"
            )


def named_method(method: Compressor | str) -> Compressor:
    """A method by its name, or the one given. Raises ValueError for a name that is not known."""
    if isinstance(method, Compressor):
        return method
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; allowed: {', '.join(METHODS)}")
    return METHODS[method]()


def trained(loop: SplitLoop) -> dict[str, torch.Tensor]:
    """The global network's trained tensors by their names in the model, copied to the CPU."""
    parts = loop.model.parts()
    return {n: t.detach().cpu().clone() for part in parts for n, t in exchanged(part).items()}
