from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sluiceway.moe import Observer, moe_layout, received_logits

Make = Callable[[str], nn.Module]
LENGTHS = ((7, 4), (5, 7))  # tokens that count, per sequence, for each batch


def batches(left: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for lengths in LENGTHS:
        ids = torch.randint(2, 50, (len(lengths), 7), generator=generator)
        mask = torch.stack([torch.arange(7) < n for n in lengths]).long()
        found.append((ids, mask.flip(1) if left else mask))
    return found


def run(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    more = {}
    if hasattr(model, "decoder"):
        more = {"decoder_input_ids": ids[:, :5]}
    output = model(input_ids=ids, attention_mask=mask, **more)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def recorded(model: nn.Module, inputs: list[tuple[Tensor, Tensor]]) -> list[list[tuple]]:
    """Per block: (hidden state, probabilities, choices, entered experts) of counted tokens."""
    tokens: list[list[tuple]] = []
    handles = []
    masks: list[Tensor] = []
    for block in moe_layout(model).blocks:
        seen: list[tuple] = []
        row = block.family
        decoder = block.name.startswith("decoder")

        def hook(_m, args, output, seen=seen, block=block, row=row, decoder=decoder) -> None:
            hidden = args[0].reshape(-1, 16)
            keep = [True] * len(hidden) if decoder else masks[-1].flatten().bool().tolist()
            logits = output[row.logits].reshape(-1, 4)
            if row.selected is None:
                k = block.top_k
                raw = torch.tensor([sorted(range(4), key=lambda e: -z[e])[:k] for z in logits])
            else:
                raw = output[row.selected].reshape(len(hidden), -1)
            for t, counts in enumerate(keep):
                if counts:
                    entered = raw[t].nonzero().flatten() if row.one_hot else raw[t]
                    p = logits[t].softmax(0).double()
                    seen.append((hidden[t].double(), p, entered.tolist()))

        tokens.append(seen)
        handles.append(model.get_submodule(block.router).register_forward_hook(hook))
    with torch.no_grad():
        for ids, mask in inputs:
            masks.append(mask)
            run(model, ids, mask)
    for handle in handles:
        handle.remove()
    return tokens


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_counts_equal_a_loop_over_tokens(model: nn.Module, left: bool) -> None:
    inputs = batches(left)
    expected = recorded(model, inputs)
    with Observer(model, moe_layout(model)) as observer, torch.no_grad():
        for ids, mask in inputs:
            with observer.observing(mask):
                run(model, ids, mask)
    for routing, tokens in zip(observer.routing(), expected, strict=True):
        load, soft, margin, first = (torch.zeros(4, dtype=torch.float64) for _ in range(4))
        region = torch.zeros(4, 16, dtype=torch.float64)
        for hidden, p, entered in tokens:
            best, second = p.sort(descending=True).values[:2].tolist()
            soft += p
            margin[p.argmax()] += best - second
            first[p.argmax()] += 1
            for e in entered:
                load[e] += 1
                region[e] += hidden
        close = {"rtol": 1e-5, "atol": 1e-6}
        assert routing.tokens == len(tokens)
        assert torch.equal(routing.load, load)
        torch.testing.assert_close(routing.routing, soft / len(tokens), **close)
        torch.testing.assert_close(routing.margin, margin / first.clamp(min=1), **close)
        assert routing.region is not None
        torch.testing.assert_close(routing.region, region / load.clamp(min=1)[:, None], **close)
        assert float(routing.routing.sum()) == pytest.approx(1, abs=1e-12)


def test_decoder_mask_and_dropped_tokens(make: Make) -> None:
    model = make("switch").eval()
    ids, mask = batches()[0]
    decoder_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    with Observer(model, moe_layout(model)) as observer, torch.no_grad():
        with observer.observing(mask, decoder_mask):
            run(model, ids, mask)
        encoder, decoder = observer.routing()
        assert (encoder.tokens, decoder.tokens) == (11, 6)
        assert encoder.load.sum() <= 11
        assert encoder.load.max() <= 2  # capacity 1 in each of two sequences
        step = observer.last[0]
        assert step is not None
        assert torch.equal(step.selected[:, 0], step.logits.argmax(1))
        with pytest.raises(ValueError, match="mask"), observer.observing(mask, mask):
            run(model, ids, mask)


def test_last_step_carries_the_graph(make: Make) -> None:
    model = make("mixtral").train()
    ids, mask = batches()[0]
    found = moe_layout(model)
    with Observer(model, found, regions=False) as observer:
        with observer.observing(mask):
            run(model, ids, mask)
        assert observer.routing()[0].region is None
        for block, step in zip(found.blocks, observer.last, strict=True):
            assert step is not None
            assert step.hidden.shape == (14, 16)
            assert step.selected.shape == (14, 2)
            assert step.mask is not None
            assert torch.equal(step.mask, mask.flatten().bool())
            gate = model.get_parameter(block.gate[0])
            (gradient,) = torch.autograd.grad(
                step.logits.logsumexp(1).sum(), gate, retain_graph=True
            )
            assert gradient.abs().sum() > 0
        observer.reset()
        assert observer.last == [None, None]
        assert observer.routing()[0].tokens == 0
        assert observer.routing()[0].routing.sum() == 0


def step(model: nn.Module, observer: Observer, backward_inside: bool = False) -> None:
    ids, mask = batches()[0]
    with observer.observing(mask):
        loss = run(model, ids, mask).pow(2).mean()
        for block in observer.last:
            assert block is not None
            loss = loss + 0.1 * block.logits.log_softmax(1).pow(2).mean()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "upcycled", "nllb"])
def test_gradient_checkpointing_counts_once(make: Make, name: str, backward_inside: bool) -> None:
    plain, checkpointed = make(name).train(), make(name).train()
    checkpointed.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    results = []
    for model in (plain, checkpointed):
        with Observer(model, moe_layout(model)) as observer:
            step(model, observer, backward_inside)
            results.append(observer.routing())
    assert results[0][0].tokens == 11
    for one, two in zip(*results, strict=True):
        assert one.tokens == two.tokens
        assert torch.equal(one.load, two.load)
        assert torch.equal(one.margin, two.margin)
    for name_, parameter in plain.named_parameters():
        other = checkpointed.get_parameter(name_)
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-8)
    for gate in moe_layout(plain).gate_params:
        assert plain.get_parameter(gate).grad.abs().sum() > 0  # type: ignore[union-attr]


def test_reentrant_checkpointing_is_refused(make: Make) -> None:
    model = make("mixtral").train()
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    ids, mask = batches()[0]
    with Observer(model, moe_layout(model)) as observer:
        with pytest.raises(RuntimeError, match=r'"use_reentrant": False'), observer.observing(mask):
            run(model, ids, mask)
        with torch.no_grad(), observer.observing(mask):  # no gradient wanted: fine
            run(model, ids, mask)


def test_forwards_outside_are_not_counted_and_close_leaves_no_hook(make: Make) -> None:
    model = make("qwen3").eval()
    ids, mask = batches()[0]
    observer = Observer(model, moe_layout(model))
    run(model, ids, mask)
    assert observer.routing()[0].tokens == 0
    with observer.observing(), pytest.raises(RuntimeError, match="already"), observer.observing():
        pass
    observer.close()
    observer.close()
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="closed"), observer.observing():
        pass


def test_wrong_mask_is_refused(make: Make) -> None:
    model = make("olmoe").eval()
    ids, mask = batches()[0]
    with (
        Observer(model, moe_layout(model)) as observer,
        pytest.raises(ValueError, match=r"mask: has 12 entries, but 14 tokens"),
        observer.observing(mask[:, :6]),
    ):
        run(model, ids, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make: Make, dtype: torch.dtype) -> None:
    for name in ("mixtral", "switch_encoder", "upcycled"):
        model = make(name).eval().to(dtype)
        ids, mask = batches()[0]
        # Switch turns its router to float32 in the first forward: in inference mode the model
        # itself would be left with a parameter that cannot be trained.
        guard = torch.no_grad if name == "switch_encoder" else torch.inference_mode
        with Observer(model, moe_layout(model)) as observer:
            with guard(), observer.observing(mask):
                run(model, ids, mask)
            with observer.observing(mask):
                run(model, ids, mask)
        routing = observer.routing()[0]
        assert routing.load.dtype == torch.float64
        assert routing.tokens == 22
        assert float(routing.routing.sum()) == pytest.approx(1, abs=1e-9)


def test_nan_in_padding_does_not_spread(make: Make) -> None:
    model = make("upcycled").eval()
    found = moe_layout(model)
    block = found.blocks[0]
    hidden = torch.randn(1, 5, 16)
    hidden[0, 4] = float("nan")
    with Observer(model, found) as observer, torch.no_grad():
        with observer.observing(torch.tensor([[1, 1, 1, 1, 0]])):
            model.get_submodule(block.router)(hidden)
        routing = observer.routing()[0]
    assert routing.region is not None
    assert routing.region.isfinite().all()
    assert routing.routing.isfinite().all()
    assert routing.load.sum() == 8


def test_received_logits_follow_the_received_gate(make: Make, family: str) -> None:
    model = make(family).train()
    found = moe_layout(model)
    ids, mask = batches()[0]
    received = {name: torch.randn_like(model.get_parameter(name)) for name in found.gate_params}
    with Observer(model, found) as observer, observer.observing(mask):
        run(model, ids, mask)
        for block, step in zip(found.blocks, observer.last, strict=True):
            assert step is not None
            router = model.get_submodule(block.router)
            counted = observer.routing()[block.position].tokens
            own = {name: model.get_parameter(name) for name in block.gate}
            torch.testing.assert_close(
                received_logits(block, router, own, step.hidden), step.logits
            )
            logits = received_logits(block, router, received, step.hidden)
            expected = nn.functional.linear(step.hidden, *(received[n] for n in block.gate))
            torch.testing.assert_close(logits, expected)
            assert observer.routing()[block.position].tokens == counted
            assert router.training
            assert torch.equal(model.get_parameter(block.gate[0]), own[block.gate[0]])
            kept = received_logits(block, router, {}, step.hidden)  # what is not trained stays
            torch.testing.assert_close(kept, step.logits)
