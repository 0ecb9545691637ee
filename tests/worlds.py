"""Small real models and data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from sluiceway.moe import upcycle

WORDS = [f"w{i}" for i in range(40)]


def slow(*values: object) -> list[object]:
    """Parameters of a test that `make quick` leaves out."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class TinyText:
    """Texts of 3 to 8 tokens; the label is told by the first token's class."""

    def __init__(self, size: int, seed: int, classes: int = 3) -> None:
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(classes, (size,), generator=g)
        lengths = torch.randint(3, 9, (size,), generator=g)
        self.mask = (torch.arange(8) < lengths[:, None]).long()
        self.ids = torch.randint(10, 40, (size, 8), generator=g) * self.mask
        self.ids[:, 0] = self.labels + 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        inputs = {"input_ids": self.ids[index], "attention_mask": self.mask[index]}
        return inputs, self.labels[index]


def tiny_bert(layers: int = 2, width: int = 16) -> BertModel:
    """A random BERT, the same at every call."""
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=64,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        ),
        add_pooling_layer=False,
    )


class TinyClassifier(nn.Module):
    """Mean-pooled tiny BERT, its last layer a mixture of 4 experts, and a head."""

    def __init__(self, layers: int = 2, experts: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.backbone = tiny_bert(layers)
        if experts:
            upcycle(self.backbone, 1, experts, 2, noise=0.5, router_std=0.5)
        torch.manual_seed(1)
        self.head = nn.Linear(16, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        weights = attention_mask.unsqueeze(-1).to(out.last_hidden_state.dtype)
        pooled = (out.last_hidden_state * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.head(pooled)
        return logits
