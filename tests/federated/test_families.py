"""One federated round of every family, whole and by adapters, as language models where they are."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.moe.conftest import MIXTURES, seeded
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sluiceway.core.parameters import exchanged
from sluiceway.core.settings import Training
from sluiceway.experiment.heads import Endings, TextClassifier, is_encoder_decoder
from sluiceway.moe import add_lora, moe_layout, repair
from sluiceway.strategies import strategy
from sluiceway.transport.local import federate

ENCODERS = {"upcycled", "switch_encoder"}


class Questions:
    """Contexts of 3 to 6 tokens with 2 endings of 1 to 3, told by a context's first token."""

    def __init__(self, size: int, seed: int, pairs: bool) -> None:
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(2, (size,), generator=g)
        self.rows = [self.row(int(label), pairs, g) for label in self.labels]

    @staticmethod
    def row(label: int, pairs: bool, g: torch.Generator) -> dict[str, Tensor]:
        length = int(torch.randint(3, 7, (), generator=g))
        context = torch.randint(10, 50, (length,), generator=g)
        context[0] = 2 + label
        endings = [torch.tensor([4, 6, 7]), torch.tensor([5])]
        if pairs:
            return {
                "input_ids": nn.functional.pad(context, (0, 6 - length)),
                "attention_mask": (torch.arange(6) < length).long(),
                "decoder_labels": torch.stack(
                    [nn.functional.pad(e, (0, 3 - len(e))) for e in endings]
                ),
                "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
            }
        whole = [torch.cat([context, ending]) for ending in endings]
        at = torch.arange(9)
        return {
            "input_ids": torch.stack([nn.functional.pad(w, (0, 9 - len(w))) for w in whole]),
            "attention_mask": torch.stack([(at < len(w)).long() for w in whole]),
            "ending_mask": torch.stack([((at >= length) & (at < len(w))).long() for w in whole]),
        }

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return self.rows[index], self.labels[index]


def answering(family: str) -> nn.Module:
    """A classifier of an encoder's options, else a language model with scored endings."""
    body = seeded(family)
    if family in ENCODERS:
        return TextClassifier(body, 16, 1)
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder(body) else AutoModelForCausalLM
    lm = repair(kind.from_config(body.config, attn_implementation="eager"))
    with torch.no_grad():
        for name, param in lm.named_parameters():
            if name in moe_layout(lm).gate_params:
                param.normal_(std=0.5)
    return Endings(lm)


def chosen(model: nn.Module, lora: bool) -> nn.Module:
    """Experts and gates are trained; by adapters on the experts if `lora`."""
    found = moe_layout(model)
    head = {n for n, _ in model.named_parameters() if n.startswith("head.")}
    model.requires_grad_(False)
    if lora:
        pytest.importorskip("peft", reason="the extra [lora] is not installed")
        experts = {n: p for n, p in model.named_parameters() if n in found.expert_params}
        add_lora(model, experts, 2, 4.0)
    for name, param in model.named_parameters():
        whole = found.gate_params | head | (frozenset() if lora else found.expert_params)
        param.requires_grad_(name in whole or ".lora_" in name)
    return model


@cache
def data(pairs: bool) -> tuple[list[Questions], Questions]:
    return [Questions(8, 1, pairs), Questions(6, 2, pairs)], Questions(10, 3, pairs)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("method", ["fedavg", "fedalign-moe"])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_round_of_every_family(family: str, method: str, lora: bool) -> None:
    torch.manual_seed(0)
    model = chosen(answering(family), lora)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pairs = is_encoder_decoder(model.lm) if isinstance(model, Endings) else False
    clients, test = data(pairs)
    result = federate(
        model, clients, test, strategy(method), training=Training(lr=0.01), rounds=1, device="cpu"
    )
    assert result.rejected == 0
    assert result.records[0].loss < 20
    found = moe_layout(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= set(exchanged(model))
    for block in found.blocks:
        assert moved & set(block.gate), block.name
        assert moved & {piece.param for pieces in block.pieces for piece in pieces}, block.name
    if lora:
        crossed = set(result.tensors)
        assert not any(n in crossed for n in found.expert_params if ".lora_" not in n)


@pytest.mark.parametrize("family", ["mixtral", "switch"])
def test_scores_are_mean_log_likelihoods(family: str) -> None:
    """Against one forward of the whole model for each ending, by a loop."""
    model = answering(family).eval()
    assert isinstance(model, Endings)
    pairs = family == "switch"
    batch, _ = torch.utils.data.default_collate([Questions(5, 4, pairs)[i] for i in range(5)])
    with torch.no_grad():
        got = model(**batch)
        for b in range(5):
            for c in range(2):
                if pairs:
                    ids = batch["input_ids"][b][batch["attention_mask"][b].bool()]
                    ending = batch["decoder_labels"][b, c][
                        batch["decoder_attention_mask"][b, c].bool()
                    ]
                    start = torch.tensor([model.lm.config.decoder_start_token_id])
                    shifted = torch.cat([start, ending[:-1]])
                    logits = model.lm(input_ids=ids[None], decoder_input_ids=shifted[None]).logits[
                        0
                    ]
                else:
                    ids = batch["input_ids"][b, c][batch["attention_mask"][b, c].bool()]
                    count = int(batch["ending_mask"][b, c].sum())
                    ending = ids[-count:]
                    logits = model.lm(input_ids=ids[None]).logits[0, -count - 1 : -1]
                wanted = logits.log_softmax(-1)[torch.arange(len(ending)), ending].mean()
                torch.testing.assert_close(got[b, c], wanted, atol=1e-5, rtol=1e-5)
