"""Memory of a LoRA round against the number of clients.

    python benchmarks/lora_memory.py

A Mixtral-style model of 4 layers with 8 experts, adapters of rank 8, one worker; the same model,
clients of 4 short examples each. Peak resident memory of a fresh process, less that of the same
process before the model was built. PEFT merges adapters into a copy of their matrices in each
forward and autograd keeps those copies until the backward: the second "base" of the first row. From
there the peak must not grow by base weights: FedAvg takes updates one by one, FedAlign-MoE keeps
them until all are in (as mapped files of the size of one message each).
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralModel

from sluiceway.core.settings import Training
from sluiceway.experiment.heads import TextClassifier
from sluiceway.moe import add_lora, moe_layout
from sluiceway.transport.local import federate

CLIENTS = (1, 8, 64)
METHODS = ("fedavg", "fedalign-moe")


class Texts(torch.utils.data.Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Four random texts of 16 tokens."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1000, (4, 16), generator=generator)
        self.labels = torch.arange(4)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, self.labels[index]


def peak() -> float:
    """Peak resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(clients: int, method: str) -> None:
    """One round; prints the memory before, the base weights, the peak, and a message, MB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = peak()
    body = MixtralModel(
        MixtralConfig(
            vocab_size=1000,
            hidden_size=512,
            intermediate_size=1792,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=8,
        )
    )
    model = TextClassifier(body, 512, 4)
    experts = {n: p for n, p in model.named_parameters() if n in moe_layout(model).expert_params}
    base = sum(p.nbytes for p in model.parameters()) / 2**20
    model.requires_grad_(False)
    add_lora(model, experts, 8, 16.0)
    for name, param in model.named_parameters():
        param.requires_grad_(".lora_" in name or name.startswith("head."))
    sets = [Texts(seed) for seed in range(clients)]
    training = Training(batch_size=4)
    result = federate(model, sets, Texts(99), method, rounds=1, training=training, device="cpu")
    print(before, base, peak(), result.bytes_up / clients / 2**20)


def main() -> None:
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), sys.argv[2])
        return
    print("| method | clients | base MB | peak MB | peak / base | growth a client | message MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for method in METHODS:
        first = 0.0
        for clients in CLIENTS:
            command = [sys.executable, __file__, str(clients), method]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            before, base, most, message = (float(word) for word in told.split()[-4:])
            most -= before
            first = first or most
            growth = (most - first) / max(clients - 1, 1)
            print(
                f"| {method} | {clients} | {base:.0f} | {most:.0f} | {most / base:.2f} "
                f"| {growth:.1f} | {message:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
