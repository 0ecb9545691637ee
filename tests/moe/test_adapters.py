"""LoRA adapters: which part is whose, against PEFT's own merge."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.moe.conftest import zeroed
from torch import nn

from sluiceway.moe import (
    Observer,
    add_lora,
    find_adapters,
    find_layout,
    moe_layout,
    received_logits,
)

peft = pytest.importorskip("peft", reason="the extra [lora] is not installed")
RANK = 3


def experts_of(model: nn.Module) -> dict[str, nn.Parameter]:
    found = moe_layout(model)
    return {n: p for n, p in model.named_parameters() if n in found.expert_params}


def adapted(model: nn.Module, rank: int = RANK, seed: int = 0) -> nn.Module:
    """LoRA on all experts, with a B that is not zero."""
    add_lora(model, experts_of(model), rank, 2.0 * rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".lora_B." in name:
                param.copy_(0.1 * torch.randn(param.shape, generator=generator))
    return model


def merged(model: nn.Module) -> nn.Module:
    """PEFT's own merge of a copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return model


@pytest.mark.parametrize("rank", [1, RANK, 4])  # 4 is E as well: shapes alone cannot tell
def test_an_experts_part_of_the_adapters_is_what_peft_merges(model: nn.Module, rank: int) -> None:
    adapted(model, rank)
    params, wanted = dict(model.named_parameters()), dict(merged(model).named_parameters())
    found = moe_layout(model)
    pairs = find_adapters(model)
    bases = {pair.base.key for pair in pairs}
    matrices = {p.key for b in found.blocks for e in b.pieces for p in e if p.of(params).ndim == 2}
    assert bases <= matrices
    assert found.adapters == pairs
    for pair in pairs:
        assert pair.a.of(params).shape[0] == pair.b.of(params).shape[1] == rank
        got = pair.base.of(params) + pair.delta(pair.a.of(params), pair.b.of(params))
        torch.testing.assert_close(got, pair.base.of(wanted), atol=1e-6, rtol=1e-5)
        assert found.owner(pair.a.key) == found.owner(pair.b.key) == found.owner(pair.base.key)
        assert found.owner(pair.a.key) is not None


def test_pieces_of_an_adapted_model_cover_every_value_once(model: nn.Module) -> None:
    adapted(model, 4)
    params = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    pieces = moe_layout(model).pieces(params)
    assert len({piece.key for piece in pieces}) == len(pieces)
    for piece in pieces:
        piece.of(params).add_(1)
    assert all(bool((p == 1).all()) for p in params.values())


def test_changing_one_experts_adapters_changes_exactly_its_tokens(make) -> None:
    for name in ("mixtral", "gpt_oss", "upcycled"):
        model = adapted(make(name).eval(), 4)
        found, params = moe_layout(model), dict(model.named_parameters())
        hidden = torch.randn(9, 16)
        for block in found.blocks:
            experts = model.get_submodule(block.experts)
            with torch.no_grad():
                _, weights, chosen = model.get_submodule(block.router)(hidden)
                before = experts(hidden, chosen, weights)
                for e in range(4):
                    owner = (block.position, e)
                    owned = [p.b for p in found.adapters if found.owner(p.b.key) == owner]
                    with zeroed(owned, params):
                        after = experts(hidden, chosen, weights)
                    changed = (before != after).any(dim=1)
                    assert torch.equal(changed, (chosen == e).any(dim=1)), (name, e)


def test_layout_is_the_same_with_and_without_adapters(model: nn.Module) -> None:
    plain = moe_layout(model)
    adapted(model)
    found = moe_layout(model)
    for before, after in zip(plain.blocks, found.blocks, strict=True):
        for field in ("position", "name", "family", "router", "num_experts", "top_k", "hidden"):
            assert getattr(before, field) == getattr(after, field)
    assert plain.gate_params == found.gate_params  # routers were not adapted


@pytest.mark.parametrize("how", ["parameter", "whole"])
def test_a_router_may_be_adapted_too(make, how: str) -> None:
    more = (
        {"target_parameters": ["gate.weight"]}
        if how == "parameter"
        else {"target_parameters": ["experts.down_proj"], "modules_to_save": ["gate"]}
    )
    model = peft.get_peft_model(make("mixtral"), peft.LoraConfig(r=4, lora_dropout=0.0, **more))
    found = moe_layout(model)
    assert len(found.blocks) == 2
    block, params = found.blocks[0], dict(model.named_parameters())
    assert all(params[name].shape[0] == 4 for name in block.gate)
    trained = {n for n in found.gate_params if params[n].requires_grad}
    if how == "parameter":
        assert [params[n].shape for n in block.gate] == [(4, 16), (4, 4)]
        assert [params[n].shape for n in block.gate_rest] == [(4, 16)]
        assert trained == {n for n in found.gate_params if "lora" in n}
    else:
        assert trained == {n for n in found.gate_params if "modules_to_save" in n}
    ids = torch.randint(2, 50, (2, 5))
    with torch.no_grad():
        for name in trained:
            params[name].normal_(std=0.5)
        with Observer(model, found) as observer, observer.observing():
            model(input_ids=ids)
        step = observer.last[0]
        assert step is not None
        router = model.get_submodule(block.router)
        now = received_logits(block, router, params, step.hidden)
        torch.testing.assert_close(now, step.logits)
        zero = {n: torch.zeros_like(params[n]) for n in trained}
        other = received_logits(block, router, zero, step.hidden)
        base = nn.functional.linear(step.hidden, params[block.gate[0]])
        torch.testing.assert_close(other, base if how == "parameter" else torch.zeros_like(base))


def test_adapters_on_a_dense_model_are_found_as_well(dense) -> None:
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["query"]), dense("bert")
    )
    assert find_layout(model) is None
    pairs = find_adapters(model)
    assert [pair.base.index for pair in pairs] == [None, None]
    assert pairs[0].base.param == "encoder.layer.0.attention.self.query.base_layer.weight"
    assert pairs[0].scale == 8 / 2


def test_adapters_are_float32_on_a_half_precision_model(make) -> None:
    model = make("mixtral").bfloat16()
    add_lora(model, experts_of(model), 2, 4.0)
    kinds = {n.split(".")[-3]: p.dtype for n, p in model.named_parameters() if ".lora_" in n}
    assert kinds == {"lora_A": torch.float32, "lora_B": torch.float32}
    ids = torch.randint(2, 50, (2, 5))
    assert model(input_ids=ids).last_hidden_state.dtype == torch.bfloat16


def test_nothing_to_adapt_is_an_error(make) -> None:
    model = make("upcycled")
    biases = {n: p for n, p in model.named_parameters() if n.endswith("up_bias")}
    with pytest.raises(ValueError, match="no matrix to adapt"):
        add_lora(model, biases, 2, 4.0)
