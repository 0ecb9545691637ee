"""NLLB-MoE: the faults of the installed release, and the repair.

The tests of faults say what transformers 5.23.0 does. Should a later release be right, they
fail, and then the repair can go.
"""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from tests.moe.conftest import as_released
from torch import Tensor, nn

from sluiceway.moe import moe_layout, repair

Make = Callable[[str], nn.Module]


def block_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("encoder.layers.1.ffn")


def rows(block: nn.Module, hidden: Tensor) -> dict[str, int]:
    """Rows that enter each expert."""
    seen: dict[str, int] = {}
    handles = [
        expert.register_forward_hook(
            lambda _m, args, _o, name=name: seen.update({name: len(args[0])})
        )
        for name, expert in block.experts.named_children()
        if name.startswith("expert_")
    ]
    block(hidden)
    for handle in handles:
        handle.remove()
    return seen


def by_definition(block: nn.Module, hidden: Tensor) -> Tensor:
    """Token by token: the sum of the experts' outputs with the router's weights."""
    flat = hidden.reshape(-1, 16)
    _, weights, _ = block.router(flat)
    outputs = []
    for x, w in zip(flat, weights, strict=True):
        terms = [w[e] * block.experts[f"expert_{e}"](x) for e in range(4) if w[e] > 0]
        outputs.append(sum(terms, torch.zeros(16)))
    return torch.stack(outputs).reshape(hidden.shape)


@pytest.fixture
def faulty() -> nn.Module:
    torch.manual_seed(0)
    model = as_released("nllb")
    with torch.no_grad():
        block_of(model).router.classifier.weight.normal_(std=0.5)
    return model


HIDDEN = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(5))


def test_the_release_runs_two_experts_only_and_forgets_its_capacity(faulty: nn.Module) -> None:
    block = block_of(faulty).train()
    assert set(rows(block, HIDDEN)) == {"expert_0", "expert_1"}
    assert not torch.allclose(block(HIDDEN), by_definition(block, HIDDEN), atol=1e-3)
    assert block.router.expert_capacity == 5
    block.eval()(HIDDEN)
    block.train()(HIDDEN)
    assert block.router.expert_capacity == 5  # ceil(0.3 * 14), by chance the same
    block.eval()(HIDDEN[:1])
    block.train()(HIDDEN)
    assert block.router.expert_capacity == 3


@pytest.mark.parametrize("training", [True, False])
def test_repaired_blocks_are_the_definition(faulty: nn.Module, training: bool) -> None:
    block = block_of(repair(faulty)).train(training)
    hidden = HIDDEN.clone().requires_grad_()
    output, expected = block(hidden), by_definition(block, hidden)
    torch.testing.assert_close(output, expected)
    wanted = [hidden, *block.parameters()]
    for got, want in zip(
        torch.autograd.grad(output.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        assert got.abs().sum() > 0  # every expert learns
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    weights = block.router(HIDDEN.reshape(-1, 16))[1]
    assert list(rows(block, HIDDEN).values()) == (weights > 0).sum(0).tolist()
    assert int((weights > 0).sum()) < 28  # some are over capacity


def test_capacity_is_the_configured_one_whatever_ran_before(faulty: nn.Module) -> None:
    block = block_of(faulty)
    fresh = block_of(repair(copy.deepcopy(faulty))).train()(HIDDEN)
    block.eval()(HIDDEN[:1])
    assert block.router.expert_capacity == 3
    repair(faulty)
    for _ in range(2):
        block.eval()(HIDDEN[:1])
        assert block.router.expert_capacity == 5
        assert torch.equal(block.train()(HIDDEN), fresh)
    assert all(r.expert_capacity == 5 for r in routers(faulty))
    routers(faulty)[0].expert_capacity = None  # per batch
    block.train()(HIDDEN)
    assert block.router.expert_capacity is None


def routers(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(block.router) for block in moe_layout(model).blocks]


def test_token_dropout_stays(faulty: nn.Module) -> None:
    block = block_of(repair(faulty))
    plain = block.eval()(HIDDEN)
    block.experts.moe_token_dropout, block.experts.token_dropout.p = 0.5, 0.5
    torch.testing.assert_close(block(HIDDEN), 0.5 * plain)
    torch.manual_seed(0)
    zeros = (block.train()(HIDDEN) == 0).float().mean()
    assert 0.1 < float(zeros) < 0.6


def test_copies_are_repaired_too(faulty: nn.Module) -> None:
    model = repair(faulty).eval()
    with torch.no_grad():
        expected = block_of(model)(HIDDEN)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
            assert torch.equal(block_of(other)(HIDDEN), expected)
            assert repair(other) is other
            assert type(block_of(other).experts) is type(block_of(model).experts)


def test_only_the_instance_is_repaired_once(faulty: nn.Module, make: Make) -> None:
    names = list(faulty.state_dict())
    state = torch.get_rng_state()
    other = copy.deepcopy(faulty)
    repair(faulty)
    kind = type(block_of(faulty).experts)
    repair(faulty)
    assert type(block_of(faulty).experts) is kind
    assert issubclass(kind, type(block_of(other).experts))
    assert kind is not type(block_of(other).experts)
    assert list(faulty.state_dict()) == names
    assert torch.equal(torch.get_rng_state(), state)
    mixtral = make("mixtral")
    kinds = [type(module) for module in mixtral.modules()]
    assert [type(module) for module in repair(mixtral).modules()] == kinds


def test_on_the_meta_device_and_without_a_config(faulty: nn.Module) -> None:
    block = copy.deepcopy(block_of(faulty))
    with torch.device("meta"):
        repair(faulty.to("meta"))
        repair(block)
    torch.testing.assert_close(block(HIDDEN), by_definition(block, HIDDEN))
