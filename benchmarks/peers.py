"""Small clients: one at a time, many at once, and what others take for the same round.

Every contender trains the same clients in turn, in one process with one torch thread, and a round
of each is timed by turns (CPU seconds of the process): how busy the machine is falls on all alike.
Printed is the median time of a round relative to the plain loop's, with the least and the most.

    python benchmarks/peers.py [--clients 100] [--examples 40] [--model cnn] [--pfl]

--pfl also measures pfl 0.6.0 (Apple's pfl-research), which is installed into an environment of
its own in a cache folder and runs in a process of its own, by turns with the others.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

from peers_pfl import Data, clients_of, network
from sluiceway.core.evaluation import label_counts
from sluiceway.core.round_loop import Loop, Rounds
from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import FedAvg
from sluiceway.transport.local import LocalEngine, StackedEngine

BATCH, LR = 10, 0.1
#: Rounds before those that are measured.
WARM = 2


def plain_loop(model: nn.Module, data: Data) -> Callable[[], None]:
    """What one would write by hand: load, train with torch.optim.SGD, average."""
    model = copy.deepcopy(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def one_round() -> None:
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for images, labels in data:
            model.load_state_dict(start)
            model.train()
            optimiser = torch.optim.SGD(model.parameters(), lr=LR)
            for rows in torch.randperm(len(images)).split(BATCH):
                optimiser.zero_grad()
                loss = F.cross_entropy(model(images[rows]), labels[rows])
                loss.backward()
                optimiser.step()
            for name, value in model.state_dict().items():
                total[name] += value / len(data)
        start.update(total)

    return one_round


def by_vmap(model: nn.Module, data: Data) -> Callable[[], None]:
    """The limit: all clients as one tensor already, and nothing but the steps and the mean."""
    model = copy.deepcopy(model)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    images = torch.stack([x for x, _ in data])
    labels = torch.stack([y for _, y in data])

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    step = vmap(grad(loss))
    each = torch.arange(len(data))[:, None]

    def one_round() -> None:
        values = {name: value.expand(len(data), *value.shape) for name, value in start.items()}
        orders = torch.stack([torch.randperm(images.shape[1]) for _ in data])
        for rows in orders.split(BATCH, dim=1):
            grads = step(values, images[each, rows], labels[each, rows])
            values = {name: value - LR * grads[name] for name, value in values.items()}
        start.update({name: value.mean(0) for name, value in values.items()})

    return one_round


def ours(model: nn.Module, data: Data, stacked: int, clipping: float) -> Callable[[], None]:
    """A round of the embedded engine: guards, counted bytes and records included."""
    model = copy.deepcopy(model)
    clients = [TensorDataset(*pair) for pair in data]
    strategy = FedAvg()
    prepare(model, strategy, len(clients))
    training = Training(lr=LR, batch_size=BATCH, optimizer="sgd", max_grad_norm=clipping)
    worker = Worker(model, clients, clients[0], strategy, training, personal_examples=0)
    engine = StackedEngine(worker, stacked=stacked) if stacked else LocalEngine(worker)
    engine.__enter__()
    plan = Rounds(rounds=99_999, evaluate_every=99_999)
    loop = Loop(strategy, engine, plan, label_counts(clients))
    loop.last_rounds = {}  # personal models are not evaluated
    everyone, rounds = loop.eligible(), iter(range(1, 99_999))
    return lambda: void(loop.run_round(next(rounds), everyone))


def void(_: object) -> None:
    return


def pfl_rounds(options: argparse.Namespace) -> Callable[[], float] | None:
    """Runs a round of pfl 0.6.0 in a process of its own and gives its CPU seconds.

    None, with the reason said, where it cannot be installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    home = cache / "sluiceway-benchmarks" / "pfl-0.6.0"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        wanted = ["pfl==0.6.0", f"torch=={torch.__version__.split('+')[0]}"]
        try:
            quiet = {"check": True, "capture_output": True, "text": True}
            subprocess.run([sys.executable, "-m", "venv", "--clear", home], **quiet)  # type: ignore
            subprocess.run([python, "-m", "pip", "install", "-q", *wanted], **quiet)  # type: ignore
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or f"{error}"
            print(f"pfl 0.6.0 is left out, it cannot be installed: {why.strip()[-200:]}\n")
            return None
        (home / "complete").touch()
    given = [options.model, options.clients, options.examples, BATCH, LR]
    process = subprocess.Popen(
        [str(python), str(Path(__file__).with_name("peers_pfl.py")), *map(str, given)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    asks, answers = process.stdin, process.stdout
    answers.readline()  # the first round evaluates

    def one_round() -> float:
        asks.write("\n")
        asks.flush()
        return float(answers.readline())

    return one_round


def cpu_seconds(one_round: Callable[[], None]) -> float:
    began = time.process_time()
    one_round()
    return time.process_time() - began


def profile(one_round: Callable[[], None]) -> None:
    """Where the time of a round goes."""
    profiler = cProfile.Profile()
    for _ in range(5):
        profiler.runcall(one_round)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--profile", choices=["exact", "stacked"])
    parser.add_argument("--pfl", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = network(options.model)
    data = clients_of(options.clients, options.examples)
    rounds: dict[str, Callable[[], Any]] = {
        "plain loop": plain_loop(model, data),
        "ours, exact": ours(model, data, 0, 0.0),
        "ours, exact, clipping": ours(model, data, 0, 1.0),
        f"ours, stacked = {options.clients}": ours(model, data, options.clients, 0.0),
        f"ours, stacked = {options.clients}, clipping": ours(model, data, options.clients, 1.0),
        "vmap by hand": by_vmap(model, data),
    }
    if options.profile:
        profile(next(call for name, call in rounds.items() if options.profile in name))
        return
    timed: dict[str, Callable[[], float]] = {n: partial(cpu_seconds, r) for n, r in rounds.items()}
    if options.pfl and (pfl := pfl_rounds(options)):
        timed["pfl 0.6.0"] = pfl
    for _ in range(WARM):
        for measure in timed.values():
            measure()
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.repetitions):
        for name, measure in timed.items():
            found[name].append(measure())
    print(
        f"{options.clients} clients of {options.examples} examples, {options.model}, batches of "
        f"{BATCH}, 1 local epoch, SGD; torch {torch.__version__}, one thread; "
        f"{options.repetitions} repetitions by turns, load {os.getloadavg()[0]:.1f}\n"
    )
    print("| | ms a round | speed, plain loop = 1 | least to most |\n|---|---:|---:|---|")
    for name, seconds in found.items():
        ratios = [a / b for a, b in zip(found["plain loop"], seconds, strict=True)]
        print(
            f"| {name} | {1000 * statistics.median(seconds):.1f} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
