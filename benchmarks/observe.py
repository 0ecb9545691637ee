"""What observing the routing costs a training step.

    python benchmarks/observe.py

The quickstart's model: MiniLM with 8 experts top-2 in its last layer; its frozen layers are
computed beforehand, so that the step is as short as it gets. Steps with and without the observer
alternate, in CPU time. Limit: 3 %. Then what the moments of `method.moments = "full"` and
"low-rank" cost a client at the end of a round of STEPS steps, as a share of those steps: at most
5 % with the token sample. The default, "update", measures none.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Literal

import torch
from torch import nn

from sluiceway.core.batches import Batch
from sluiceway.experiment.models import classifier, load_pretrained
from sluiceway.experiment.recipe import Model
from sluiceway.federated.client import prepare
from sluiceway.federated.frozen_prefix import find_frozen_prefix
from sluiceway.moe import Observer, moe_layout
from sluiceway.strategies import FedAlignMoE, LocalContext

PAIRS = 60
STEPS = 8
FORMS_SENT: tuple[Literal["full", "low-rank"], ...] = ("low-rank", "full")
FORMS = {"": (False, 0), "regions": (True, 0), "token sample": (False, 2048)}


def step(model: nn.Module, batch: Batch, observer: Observer | None) -> float:
    """One forward and backward pass, in CPU seconds."""
    began = time.process_time()
    with observer.observing(batch.mask) if observer else nullcontext():
        logits = batch.run(model)
    nn.functional.cross_entropy(logits, batch.labels).backward()
    spent = time.process_time() - began
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
    print("| beside the routing | step ms | observed step ms | cost | limit |")
    print("|---|---:|---:|---:|---:|")
    with trunk.skipped():
        for name, (regions, sample) in FORMS.items():
            times: list[tuple[float, float]] = []
            with Observer(model, moe_layout(model), regions, sample) as observer:
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
                f"| {name or '-'} | {1e3 * statistics.median(without):.1f} "
                f"| {1e3 * statistics.median(with_it):.1f} | {cost:+.2%} | 3 % |"
            )

        print()
        print("| moments | ms a round | share of its steps |")
        print("|---|---:|---:|")
        for form in FORMS_SENT:
            spent = moments_time(model, batch, form)
            share = spent / STEPS / statistics.median(without)
            print(f"| {form} | {1e3 * spent:.0f} | {share:+.1%} |")


def moments_time(model: nn.Module, batch: Batch, form: Literal["full", "low-rank"]) -> float:
    """CPU seconds that a client spends on its moments at the end of a round."""
    made = FedAlignMoE(experts="region", moments=form)
    prepare(model, made, 1)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with Observer(model, made.layout, False, made.wants_samples()) as observer:
        for _ in range(STEPS):
            step(model, batch, observer)
        client = LocalContext(model, params, {}, made.broadcast(1), made.layout, observer, {})
        began = time.process_time()
        made.finish_training(client)
        return time.process_time() - began


if __name__ == "__main__":
    main()
