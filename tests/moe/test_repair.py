"""NLLB-MoE: the faults of the installed release, and the mend.

The tests of faults say what transformers 5.23.0 does. Should a later release mend itself, they
fail, and then the mend can go.
"""

import copy
import io
import multiprocessing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sluiceway.moe import Observer, moe_layout, repair

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
def unmended() -> nn.Module:
    from tests.moe.conftest import nllb_unmended

    torch.manual_seed(0)
    model = nllb_unmended()
    with torch.no_grad():
        block_of(model).router.classifier.weight.normal_(std=0.5)
    return model


HIDDEN = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(5))


def test_the_release_runs_two_experts_only_and_forgets_its_capacity(unmended: nn.Module) -> None:
    block = block_of(unmended).train()
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
def test_mended_blocks_are_the_definition(unmended: nn.Module, training: bool) -> None:
    block = block_of(repair(unmended)).train(training)
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


def test_capacity_is_the_configured_one_whatever_ran_before(unmended: nn.Module) -> None:
    block = block_of(unmended)
    fresh = block_of(repair(copy.deepcopy(unmended))).train()(HIDDEN)
    block.eval()(HIDDEN[:1])
    assert block.router.expert_capacity == 3
    repair(unmended)
    for _ in range(2):
        block.eval()(HIDDEN[:1])
        assert block.router.expert_capacity == 5
        assert torch.equal(block.train()(HIDDEN), fresh)
    assert all(r.expert_capacity == 5 for r in routers(unmended))
    routers(unmended)[0].expert_capacity = None  # per batch
    block.train()(HIDDEN)
    assert block.router.expert_capacity is None


def routers(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(block.router) for block in moe_layout(model).blocks]


def test_token_dropout_stays(unmended: nn.Module) -> None:
    block = block_of(repair(unmended))
    plain = block.eval()(HIDDEN)
    block.experts.moe_token_dropout, block.experts.token_dropout.p = 0.5, 0.5
    torch.testing.assert_close(block(HIDDEN), 0.5 * plain)
    torch.manual_seed(0)
    zeros = (block.train()(HIDDEN) == 0).float().mean()
    assert 0.1 < float(zeros) < 0.6


def in_another_process(model: nn.Module, queue) -> None:
    with torch.no_grad():
        queue.put(block_of(model).eval()(HIDDEN).numpy())


def test_the_mend_goes_along_with_copies(unmended: nn.Module) -> None:
    model = repair(unmended).eval()
    with torch.no_grad():
        expected = block_of(model)(HIDDEN)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
            assert torch.equal(block_of(other)(HIDDEN), expected)
            assert repair(other) is other
            assert type(block_of(other).experts) is type(block_of(model).experts)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=in_another_process, args=(model, queue))
    process.start()
    got = queue.get(timeout=60)
    process.join(60)
    torch.testing.assert_close(torch.from_numpy(got), expected)


def test_only_the_instance_is_mended_once(unmended: nn.Module, make: Make) -> None:
    names = list(unmended.state_dict())
    state = torch.get_rng_state()
    other = copy.deepcopy(unmended)
    repair(unmended)
    kind = type(block_of(unmended).experts)
    repair(unmended)
    assert type(block_of(unmended).experts) is kind
    assert issubclass(kind, type(block_of(other).experts))
    assert kind is not type(block_of(other).experts)
    assert list(unmended.state_dict()) == names
    assert torch.equal(torch.get_rng_state(), state)
    mixtral = make("mixtral")
    kinds = [type(module) for module in mixtral.modules()]
    assert [type(module) for module in repair(mixtral).modules()] == kinds


def test_on_the_meta_device_and_without_a_config(unmended: nn.Module) -> None:
    block = copy.deepcopy(block_of(unmended))
    with torch.device("meta"):
        repair(unmended.to("meta"))
        repair(block)
    torch.testing.assert_close(block(HIDDEN), by_definition(block, HIDDEN))


def test_gradient_checkpointing(make: Make) -> None:
    results = []
    ids = torch.randint(2, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    for checkpointed in (False, True):
        model = make("nllb").train()
        if checkpointed:
            model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        with Observer(model, moe_layout(model)) as observer, observer.observing():
            output = model(input_ids=ids, decoder_input_ids=ids[:, :5]).last_hidden_state
            output.pow(2).mean().backward()
        results.append((observer.routing(), {n: p.grad for n, p in model.named_parameters()}))
    for one, two in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one.load, two.load)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-5, atol=1e-8)
