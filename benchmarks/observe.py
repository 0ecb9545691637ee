"""What observing the routing costs a training step.

    python benchmarks/observe.py

The quickstart's model: MiniLM with 8 experts top-2 in its last layer; its frozen layers are
computed beforehand, so that the step is as short as it gets. Steps with and without the observer
alternate. Limit: 3 %.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext

import torch
from torch import nn

from sluiceway.core.batches import Batch
from sluiceway.experiment.models import classifier, load_pretrained
from sluiceway.experiment.recipe import Model
from sluiceway.federated.frozen_prefix import find_frozen_prefix
from sluiceway.moe import Observer, moe_layout

PAIRS = 60


def step(model: nn.Module, batch: Batch, observer: Observer | None) -> float:
    """One forward and backward pass, in seconds."""
    began = time.perf_counter()
    with observer.observing(batch.mask) if observer else nullcontext():
        logits = batch.run(model)
    nn.functional.cross_entropy(logits, batch.labels).backward()
    spent = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return spent


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = classifier(load_pretrained("minilm"), Model(), classes=20, seed=0).train()
    ids = torch.randint(1000, 20000, (16, 64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = Batch(inputs, torch.randint(20, (16,)))
    trunk = find_frozen_prefix(model)
    assert trunk is not None
    batch = Batch(inputs, plain.labels, trunk.compute(plain))
    print("| region means | step ms | observed step ms | cost | limit |")
    print("|---|---:|---:|---:|---:|")
    with trunk.skipped():
        for regions in (False, True):
            times: list[tuple[float, float]] = []
            with Observer(model, moe_layout(model), regions=regions) as observer:
                for number in range(PAIRS + 5):
                    if number % 2:  # which of the two comes first alternates
                        plain_time = step(model, batch, None)
                        times.append((plain_time, step(model, batch, observer)))
                    else:
                        observed_time = step(model, batch, observer)
                        times.append((step(model, batch, None), observed_time))
            without, with_it = zip(*times[5:], strict=True)
            cost = statistics.median(b / a for a, b in times[5:]) - 1
            print(
                f"| {'yes' if regions else 'no'} | {1e3 * statistics.median(without):.1f} "
                f"| {1e3 * statistics.median(with_it):.1f} | {cost:+.2%} | 3 % |"
            )


if __name__ == "__main__":
    main()
