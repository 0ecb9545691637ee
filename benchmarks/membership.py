"""Which texts does a client hold? An attack on the regions of one report.

    python benchmarks/membership.py [--least 0,8192] [--seeds 0,1,2] [--moments]

AG News, MiniLM with 8 experts in its last layer, as the recipe agnews. A client trains one epoch on
a few texts and tells its regions (`experts = "semantic"`). The server knows 1,200
candidates, those texts among them, and its own model: for each candidate the sum of the hidden
states that enter each expert. It explains load times region by non-negative counts of candidates
(least squares) and names as many candidates as the client has texts. Prints how many of them are
right, of the texts of clients that tell any region, by `method.least_tokens`.

With `--moments` the clients tell the second moments of what enters each expert instead (`experts =
"region"`, `moments = "full"`), of up to 1,024 of their tokens, and the server explains the mean
squares along `PROBES` random directions, in which moments are sums over texts as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from sluiceway.core.batches import Batch, Examples
from sluiceway.core.settings import Training
from sluiceway.experiment.builders import language_model
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.session import Session
from sluiceway.fedalign.moments import unpacked_triangle
from sluiceway.federated.client import Worker, prepare
from sluiceway.moe import Observer
from sluiceway.strategies import FedAlignMoE
from sluiceway.strategies.fedalign_moe import SAMPLE

CANDIDATES = 1200
#: Directions along which second moments are compared: as many numbers of each expert as a region.
PROBES = 384


@torch.no_grad()
def signatures(worker: Worker, texts: Examples) -> Tensor:
    """Of each text the sums of hidden states that enter each expert, [N, E * d]."""
    worker.model.eval()
    found = []
    with Observer(worker.model, worker.layout) as seen:
        for index in range(len(texts)):
            batch = Batch.of(texts, torch.tensor([index]), torch.device("cpu"))
            with seen.observing(batch.mask, batch.decoder_mask):
                batch.run(worker.model)
            report = seen.routing()[0]
            assert report.region is not None
            found.append(report.region * report.load.unsqueeze(1))
            seen.reset()
    return torch.stack(found)


@torch.no_grad()
def squares(worker: Worker, texts: Examples, probes: Tensor) -> Tensor:
    """Of each text and expert the sums of squares along the probes, weighted as moments, [N, E, P].

    Args:
        probes: [d, P].
    """
    worker.model.eval()
    found = []
    with Observer(worker.model, worker.layout, regions=False, sample=SAMPLE) as seen:
        for index in range(len(texts)):
            batch = Batch.of(texts, torch.tensor([index]), torch.device("cpu"))
            with seen.observing(batch.mask, batch.decoder_mask):
                batch.run(worker.model)
            sample = seen.samples()[0]
            assert sample is not None
            weights = sample.weights.clamp_min(0)
            found.append(weights.T @ (sample.hidden.float() @ probes).square())
            seen.reset()
    return torch.stack(found)


def probed(strategy: FedAlignMoE, extra: Mapping[str, Tensor], probes: Tensor) -> Tensor:
    """Of the moments that a client tells the mean squares along the probes, [E, P], else zeros."""
    block = strategy.layout.blocks[0]
    found = torch.zeros(block.num_experts, probes.shape[1])
    for source, (one, _) in strategy.sources.items():
        packed = extra.get(f"moment/{source}")
        if packed is not None and one.reads == "hidden" and one.expert is not None:
            matrix = unpacked_triangle(packed.float())[: len(probes), : len(probes)]
            found[one.expert] = ((matrix @ probes) * probes).sum(0)
    return found


def named(known: Tensor, region: Tensor, load: Tensor, texts: int) -> set[int]:
    """The candidates that explain a report best.

    Args:
        known: [N, E, d]. region: [E, d], zeros where it is not told. load: [E].
        texts: how many are named.
    """
    told = (region != 0).any(1)
    if not told.any():
        return set()
    matrix = known[:, told].flatten(1)
    scale = matrix.norm() / len(matrix) ** 0.5
    target = (region * load.unsqueeze(1))[told].flatten()
    counts, _ = nnls((matrix / scale).T.numpy(), (target / scale).numpy(), maxiter=20_000)
    return set(np.argsort(-counts, kind="stable")[:texts].tolist())


def main() -> None:
    """Attack a client of each size at each limit."""
    arguments = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    arguments.add_argument("--least", default="0,2048,4096,8192")
    arguments.add_argument("--seeds", default="0,1,2")
    arguments.add_argument("--sizes", default="16,64,145,200,290", help="texts of a client")
    arguments.add_argument("--moments", action="store_true", help="second moments, not regions")
    args = arguments.parse_args()
    least = [int(each) for each in args.least.split(",")]
    seeds = [int(each) for each in args.seeds.split(",")]
    torch.set_num_threads(1)
    recipe = load_recipe("agnews", [f"data.limit={CANDIDATES}", "data.test_limit=8"])
    session = Session()
    data = session.data(recipe.data, lambda line: None)
    model, train, test, _ = language_model(recipe, data, session)
    strategy = (
        FedAlignMoE(experts="region", moments="full", least_tokens=0)
        if args.moments
        else FedAlignMoE(experts="semantic", least_tokens=0)
    )
    prepare(model, strategy, 1)
    training = Training(lr=1e-3, batch_size=16)
    worker = Worker(model, [train], test, strategy, training, personal_examples=0)
    width = strategy.layout.blocks[0].hidden
    probes = torch.randn(width, PROBES, generator=torch.Generator().manual_seed(0)) / width**0.5
    known = squares(worker, train, probes) if args.moments else signatures(worker, train)
    print(f"| texts | tokens an expert | {' | '.join(f'least {each}' for each in least)} |")
    print("|---|---|" + "---|" * len(least))
    for size in [int(each) for each in args.sizes.split(",")]:
        right, clients = dict.fromkeys(least, 0), dict.fromkeys(least, 0)
        loads = []
        for seed in seeds:
            rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:size]
            worker.clients = [train.subset(rows)]
            worker.seed = seed
            update = worker.train(0, strategy.broadcast(1), {}, personal=False)
            report = update.routing[0]
            loads.append(report.load)
            means = probed(strategy, update.extra, probes) if args.moments else report.region
            counts = torch.full_like(report.load, report.tokens) if args.moments else report.load
            assert means is not None
            for each in least:
                strategy.least_tokens = each
                told = means.masked_fill(strategy.few(report, 1.0).unsqueeze(1), 0.0)
                strategy.least_tokens = 0
                clients[each] += bool(told.any())
                right[each] += len(named(known, told, counts, size) & set(rows.tolist()))
        all_loads = torch.cat(loads)
        cells = " | ".join(f"{right[each]} of {size * clients[each]}" for each in least)
        print(f"| {size} | {all_loads.min():.0f} to {all_loads.max():.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
