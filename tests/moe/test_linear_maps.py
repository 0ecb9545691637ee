"""Which pieces are the linear maps of experts and gates, and what they read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.moe.test_observe import batches, run
from torch import Tensor, nn

from sluiceway.moe import (
    Observer,
    UpcycledExperts,
    add_lora,
    inner_activation,
    linear_maps,
    moe_layout,
    upcycle,
)

Make = Callable[[str], nn.Module]


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_an_expert_is_its_maps(model: nn.Module, family: str) -> None:
    """The expert computed from its maps and inner activation is the model's own."""
    layout, params = moe_layout(model), params_of(model)
    maps = [one for one in linear_maps(layout, params) if one.block == 0]
    for e in range(4):
        own = [one for one in maps if one.expert == e]
        matrices = {p.key for p in layout.expert(0, e) if p.of(params).ndim == 2}
        biases = {p.key for p in layout.expert(0, e)} - matrices
        assert {one.weight.key for one in own} == matrices
        assert {one.bias.key for one in own if one.bias} == biases
        assert {one.reads for one in own} == {"hidden", "inner"}
        for one in own:
            by_key = {p.key: p.of(params) for p in one.pieces}
            assert one.of(by_key).shape[1] == one.inputs
            if one.reads == "hidden":
                assert one.width == 16
            else:
                assert len(one.of(by_key)) == 16
    (gate,) = (one for one in maps if one.expert is None)
    assert gate.weight.key in layout.blocks[0].gate
    assert (gate.width, gate.reads) == (16, "hidden")


def expert_output(model: nn.Module, rows: Tensor) -> Tensor:
    """Expert 1 of the first block on rows, by the block's own code."""
    block = moe_layout(model).blocks[0]
    experts = model.get_submodule(block.experts)
    if isinstance(experts, nn.ModuleDict | nn.ModuleList):
        child = block.pieces[1][0].param.removeprefix(f"{block.experts}.").partition(".")[0]
        return model.get_submodule(f"{block.experts}.{child}")(rows)
    chosen = torch.ones(len(rows), 1, dtype=torch.long)
    return experts(rows, chosen, torch.ones(len(rows), 1))


def test_the_projection_down_of_the_inner_activation_is_the_expert(
    model: nn.Module, family: str
) -> None:
    layout, params = moe_layout(model), params_of(model)
    (down,) = (
        one
        for one in linear_maps(layout, params)
        if (one.block, one.expert, one.reads) == (0, 1, "inner")
    )
    rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    inner = inner_activation(model, layout.blocks[0], down, rows)
    if family == "jetmoe":  # its experts have no code of their own to ask
        assert inner is None
        return
    assert inner is not None
    inner = inner if down.bias is None else torch.cat([inner, inner.new_ones(6, 1)], 1)
    computed = inner @ down.of({p.key: p.of(params) for p in down.pieces}).T
    with torch.no_grad():
        torch.testing.assert_close(computed, expert_output(model, rows), atol=1e-5, rtol=1e-5)


def test_dropout_is_off_for_the_inner_activation_and_modes_stay(make: Make) -> None:
    model = make("switch_encoder").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    layout = moe_layout(model)
    down = next(m for m in linear_maps(layout, params_of(model)) if m.reads == "inner")
    rows = torch.randn(6, 16)
    first, second = (inner_activation(model, layout.blocks[0], down, rows) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules())


def test_gated_experts_and_square_matrices(dense: Make) -> None:
    gated = upcycle(dense("llama"), 1, 4, 2)
    maps = linear_maps(moe_layout(gated), params_of(gated))
    assert sorted(m.weight.param.rpartition(".")[2] for m in maps if m.expert == 0) == [
        "down_proj",
        "gate_proj",
        "up_proj",
    ]
    # An inner width that is the hidden width: told by names.
    square = UpcycledExperts(torch.randn(4, 16, 16), torch.randn(4, 16, 16), nn.GELU())
    model = upcycle(dense("bert"), 1, 4, 2)
    block = moe_layout(model).blocks[0]
    model.get_submodule(block.name).experts = square
    reads = {
        m.weight.param.rpartition(".")[2]: m.reads
        for m in linear_maps(moe_layout(model), params_of(model))
        if m.expert == 2
    }
    assert reads == {"up_proj": "hidden", "down_proj": "inner"}


def test_only_what_is_trained_is_a_map(make: Make) -> None:
    model = make("upcycled")
    layout, params = moe_layout(model), params_of(model)
    up = {name: p for name, p in params.items() if name.endswith(("up_proj", "up_bias"))}
    assert {m.weight.param for m in linear_maps(layout, up)} == {
        name for name in up if name.endswith("up_proj")
    }
    without = {name: p for name, p in params.items() if not name.endswith("bias")}
    assert all(one.bias is None for one in linear_maps(layout, without))


@pytest.mark.parametrize("name", ["mixtral", "switch_encoder", "upcycled"])
def test_lora_pairs_are_maps_of_what_a_gives(make: Make, name: str) -> None:
    pytest.importorskip("peft", reason="the extra [lora] is not installed")
    model = make(name)
    experts = moe_layout(model).expert_params
    chosen = {n: p for n, p in model.named_parameters() if n in experts}
    add_lora(model, chosen, 3, 6.0)
    layout = moe_layout(model)
    low_rank = {n: p for n, p in params_of(model).items() if ".lora_" in n}
    maps = [one for one in linear_maps(layout, low_rank) if one.block == 0 and one.expert == 2]
    assert sorted(one.reads for one in maps) == ["hidden", "inner"]
    assert len({one.source for one in maps}) == 2
    for one in maps:
        assert one.pair is not None
        assert (one.width, one.bias, one.weight) == (3, None, one.pair.b)


def test_a_sample_is_of_real_tokens_with_their_weights(model: nn.Module, family: str) -> None:
    """Hidden state times routing weight, summed over experts, by a loop over the batches."""
    inputs = batches()
    layout = moe_layout(model)
    seen: list[tuple[Tensor, Tensor]] = []
    router = model.get_submodule(layout.blocks[0].router)

    def hook(_m: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        read = layout.blocks[0].family.read(output, layout.blocks[0].top_k)
        seen.append((args[0].reshape(-1, 16), read.logits.softmax(-1)))

    handle = router.register_forward_hook(hook)
    with Observer(model, layout, regions=False, sample=100) as observer, torch.no_grad():
        for ids, mask in inputs:
            with observer.observing(mask):
                run(model, ids, mask)
        sample = observer.samples()[0]
        routing = observer.routing()[0]
        handle.remove()
        assert sample is not None
        real = [
            rows[mask.flatten().bool()] for (rows, _), (_, mask) in zip(seen, inputs, strict=True)
        ]
        assert torch.equal(sample.hidden, torch.cat(real))
        assert sample.counted.all()
        assert len(sample.hidden) == routing.tokens
        assert torch.equal((sample.weights != 0).sum(0).double(), routing.load)
        if family in ("mixtral", "upcycled", "gpt_oss", "jetmoe"):
            torch.testing.assert_close(sample.weights.sum(1), torch.ones(routing.tokens))
        observer.reset()
        assert observer.samples() == [None] * len(layout.blocks)


def test_a_sample_is_spread_evenly_and_bounded(make: Make) -> None:
    model = make("upcycled").eval()
    layout = moe_layout(model)
    ids, _ = batches()[0]
    rows: list[Tensor] = []
    router = model.get_submodule(layout.blocks[0].router)
    handle = router.register_forward_hook(lambda m, args, out: rows.append(args[0].detach()))
    with Observer(model, layout, regions=False, sample=10) as observer, torch.no_grad():
        for shift in range(5):
            with observer.observing():
                run(model, ids.roll(shift, 1), torch.ones_like(ids))
        handle.remove()
        sample = observer.samples()[0]
    assert sample is not None
    every = torch.cat([r.reshape(-1, 16) for r in rows])  # 70 tokens: every eighth, 9 of them
    assert torch.equal(sample.hidden, every[::8])
