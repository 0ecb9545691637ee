"""Compressors: what crosses, what returns, and what a half may trust of the other."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from sluiceway.split import (
    BatchId,
    Bottleneck,
    Channels,
    Compressor,
    Conv4,
    KeptElements,
    Quantized,
    RandTopK,
    TopK,
    WireError,
    cut,
)

ID = BatchId(0, 1, 2)
SHAPE = (6, 8, 4, 4)
MASK = torch.arange(8) % 3 == 0
METHODS = [
    Compressor(),
    Compressor(quantize="fp16"),
    Quantized(),
    Quantized(quantize="int4", quantize_gradient="int8", affine=False),
    Channels(),
    Channels(quantize="int8", quantize_gradient="none"),
    Channels(quantize="int4", error_feedback=True),
    TopK(share=0.05),
    TopK(share=0.5, quantize="int4"),
    RandTopK(share=0.2, alpha=0.3, quantize="int8"),
    RandTopK(share=0.02, quantize="fp16", error_feedback=True),
    Bottleneck(quantize="int8"),
]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.quantize}")


def smashed(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).relu()


def mask_of(method: Compressor) -> Tensor | None:
    return MASK if isinstance(method, Channels) else None


def returned(method: Compressor, A: Tensor, grad: Tensor, batch: BatchId = ID) -> Tensor:
    """The gradient that comes back for smashed data that crossed."""
    message, context = method.up(A, batch)
    return method.open_gradient(method.down(grad, method.open(message).context), context)


@methods
def test_bytes_are_the_formula_both_ways(method: Compressor) -> None:
    message, _ = method.up(smashed(), ID, torch.arange(6), mask_of(method))
    opened = method.open(message, SHAPE, ID, labels=True, classes=6)
    kept = int(MASK.sum()) if isinstance(method, Channels) else None
    assert len(message) == method.bytes_up(SHAPE, kept, label_bytes=1)
    gradient = method.down(torch.randn(SHAPE), opened.context)
    assert len(gradient) == method.bytes_down(SHAPE, kept)
    without, _ = method.up(smashed(), ID, mask=mask_of(method))
    assert len(message) - len(without) == 6


@methods
def test_gradients_return_where_values_crossed(method: Compressor) -> None:
    A, grad = smashed() + 1, torch.randn(SHAPE) + 9
    message, context = method.up(A, ID, mask=mask_of(method))
    opened = method.open(message)
    back = method.open_gradient(method.down(grad, opened.context), context)
    crossed = opened.values != 0
    assert torch.equal(back != 0, crossed)
    assert torch.allclose(back[crossed], grad[crossed], atol=1.1)
    assert torch.allclose(opened.values[crossed], A[crossed], atol=0.6)
    if isinstance(method, Channels):
        assert torch.equal(crossed.any(0).any(-1).any(-1), MASK)


@methods
def test_a_gradient_of_another_batch_is_refused(method: Compressor) -> None:
    sent = {}
    for client in (0, 1):
        for number in (0, 1):
            batch = BatchId(client, 1, number)
            sent[batch] = method.up(smashed(client + 2 * number), batch, mask=mask_of(method))
    gradients = {
        batch: method.down(torch.full(SHAPE, 1.0), method.open(message).context)
        for batch, (message, _) in reversed(sent.items())
    }
    for mine, (_, context) in sent.items():
        for theirs, gradient in gradients.items():
            if mine == theirs:
                assert method.open_gradient(gradient, context).sum() > 0
            else:
                with pytest.raises(WireError, match=r"^batch: expected"):
                    method.open_gradient(gradient, context)


def test_uncompressed_step_is_the_whole_networks_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, x, y = Conv4(3, 10, width=4), torch.randn(5, 3, 16, 16), torch.arange(5)
    functional.cross_entropy(model(x), y).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    front, back = cut(model, "conv2")
    for method in (Compressor(), Channels()):
        A = front(x)
        message, context = method.up(A, ID, y)
        opened = method.open(message)
        values = opened.values.requires_grad_()
        assert opened.labels is not None
        functional.cross_entropy(back(values), opened.labels).backward()
        assert values.grad is not None
        A.backward(method.open_gradient(method.down(values.grad, opened.context), context))
        grads = [p.grad for p in model.parameters()]
        assert len(whole) == len(grads)
        assert all(torch.equal(a, b) for a, b in zip(whole, grads, strict=True) if b is not None)
        model.zero_grad()


def test_straight_through_gradient_of_a_masked_network() -> None:
    """Without rounding, the split step is the derivative of the network with the mask in it."""
    torch.manual_seed(0)
    front, back = nn.Sequential(nn.Conv2d(1, 8, 3)), nn.Sequential(nn.Flatten(), nn.Linear(128, 3))
    x = torch.randn(4, 1, 6, 6)
    back(front(x) * MASK.view(1, -1, 1, 1)).square().sum().backward()
    assert front[0].weight.grad is not None
    expected = front[0].weight.grad.clone()
    front.zero_grad()
    method, A = Channels(), front(x)
    message, context = method.up(A, ID, mask=MASK)
    opened = method.open(message)
    values = opened.values.requires_grad_()
    back(values).square().sum().backward()
    assert values.grad is not None
    A.backward(method.open_gradient(method.down(values.grad, opened.context), context))
    assert torch.allclose(front[0].weight.grad, expected, rtol=1e-5)
    assert bool((front[0].weight.grad[~MASK] == 0).all())


def test_affine_halves_the_step_behind_a_relu_and_is_not_for_gradients() -> None:
    A = smashed()
    errors = [
        float((method.open(method.up(A, ID)[0]).values - A).abs().max())
        for method in (Quantized(quantize="int4", affine=affine) for affine in (False, True))
    ]
    assert errors[1] < 0.6 * errors[0]
    assert Quantized().codec == "int8-affine"
    assert Quantized(affine=False).codec == "int8"
    assert Compressor(quantize="fp16").codec == "fp16"
    assert Quantized(quantize="int4").gradient_codec == "int4"
    assert Quantized(quantize_gradient="none").gradient_codec == "none"


class TestElements:
    def test_top_k_keeps_the_largest_magnitudes(self) -> None:
        A = torch.tensor([[[0.1, -5.0], [3.0, 0.0]], [[1.0, 2.0], [-4.0, 3.0]]])
        method = TopK(share=0.5)
        assert method.open(method.up(A, ID)[0]).values.tolist() == [
            [[0.0, -5.0], [3.0, 0.0]],
            [[0.0, 0.0], [-4.0, 3.0]],
        ]

    @pytest.mark.parametrize(("share", "kept"), [(1e-6, 1), (0.3, 3), (1.0, 10)])
    def test_share(self, share: float, kept: int) -> None:
        method = TopK(share=share)
        message, context = method.up(torch.randn(2, 10), ID)
        assert context.selection.count == kept == method.kept((2, 10))
        assert method.open(message).context.selection.count == kept

    def test_randtopk_picks_outside_with_chance_alpha(self) -> None:
        A = torch.randn(400, 60, generator=torch.Generator().manual_seed(1))
        top = A.abs() >= A.abs().topk(10).values[:, -1:]
        picks = torch.zeros(400, 60)
        for number in range(20):
            _, context = RandTopK(share=1 / 6, alpha=0.2).up(A, BatchId(0, 1, number))
            assert isinstance(context.selection, KeptElements)
            picks.scatter_add_(1, context.selection.indices, torch.ones(400, 10))
        share = picks / 20
        # 80,000 picks: three standard errors are below 0.005
        assert float(share[~top].sum()) / float(share.sum()) == pytest.approx(0.2, abs=0.005)
        ranks = A.abs().argsort(dim=1, descending=True)
        by_rank = share.gather(1, ranks).mean(0)
        assert torch.allclose(by_rank[:10], torch.tensor(0.8), atol=0.02)
        assert torch.allclose(by_rank[10:], torch.tensor(0.04), atol=0.01)

    @pytest.mark.parametrize(("alpha", "size"), [(0.0, 30), (1.0, 30), (1.0, 12), (0.9, 12)])
    def test_randtopk_at_the_ends_of_alpha(self, alpha: float, size: int) -> None:
        A = torch.randn(50, size, generator=torch.Generator().manual_seed(2))
        _, context = RandTopK(share=10 / size, alpha=alpha).up(A, ID)
        assert isinstance(context.selection, KeptElements)
        picked, best = context.selection.indices.tolist(), A.abs().topk(10).indices.tolist()
        for row, top in zip(picked, best, strict=True):
            assert len(set(row)) == 10
            outside = len(set(row) - set(top))
            # With chance 0.9 ten picks hardly ever leave fewer than two to the outside.
            assert outside == (0 if alpha == 0 else min(10, size - 10))

    def test_randtopk_chance_is_of_the_batch_and_of_training(self) -> None:
        A = smashed()
        method = RandTopK(share=0.2, alpha=0.5)

        def picks(batch: BatchId, training: bool = True, seed: int = 0) -> bytes:
            made = RandTopK(share=0.2, alpha=0.5, seed=seed) if seed else method
            return bytes(made.up(A, batch, training=training)[0])[44:]

        assert picks(ID) == picks(ID)
        others = [BatchId(1, 1, 2), BatchId(0, 2, 2), BatchId(0, 1, 3)]
        assert all(picks(ID) != picks(other) for other in others)
        assert picks(ID) != picks(ID, seed=1)
        assert picks(ID, training=False) == bytes(TopK(share=0.2).up(A, ID)[0])[44:]
        before = torch.random.get_rng_state()
        picks(ID)
        assert torch.equal(torch.random.get_rng_state(), before)


class TestBottleneck:
    @pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 4, 4)])
    def test_narrows_and_widens(self, shape: tuple[int, ...]) -> None:
        method = Bottleneck(share=0.25, seed=1)
        front, back = method.attach(
            nn.Sequential(nn.Tanh()), nn.Sequential(nn.Tanh()), 8, len(shape)
        )
        x = torch.randn(shape)
        A = front(x)
        assert A.shape == (3, 2, *shape[2:])
        message, _ = method.up(A, ID)
        assert len(message) == method.bytes_up(tuple(A.shape)) == 44 + 4 * A.numel()
        assert back(method.open(message).values).shape == shape
        assert [*front.state_dict(), *back.state_dict()] == [
            f"{half}.{part}" for half in ("narrow", "widen") for part in ("weight", "bias")
        ]

    def test_begins_as_a_projection(self) -> None:
        x = torch.randn(5, 8, 3, 3)
        for share, identical in ((1.0, True), (0.5, False)):
            front, back = Bottleneck(share=share).attach(nn.Sequential(), nn.Sequential(), 8, 4)
            once = back(front(x))
            assert torch.allclose(back(front(once)), once, atol=1e-5)
            assert torch.allclose(once, x, atol=1e-5) == identical

    def test_trains_with_the_halves(self) -> None:
        torch.manual_seed(0)
        model = Conv4(1, 3, width=4)
        front, back = Bottleneck(share=0.5).attach(*cut(model, "conv2"), 4, 4)
        back(front(torch.randn(6, 1, 16, 16))).square().sum().backward()
        added = [*front.narrow.parameters(), *back.widen.parameters()]
        assert len(added) == 4
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in added)

    def test_is_decided_by_its_seed_alone(self) -> None:
        before = torch.random.get_rng_state()
        weights = [
            Bottleneck(seed=seed).attach(nn.Sequential(), nn.Sequential(), 8, 4)[0].narrow.weight
            for seed in (1, 1, 2)
        ]
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_bad_dimensions(self) -> None:
        with pytest.raises(ValueError, match="dims: expected 2, 3 or 4, got 5"):
            Bottleneck().attach(nn.Sequential(), nn.Sequential(), 8, 5)


class TestErrorFeedback:
    def run(self, method: Compressor, masks: list[Tensor | None], batches: list[int]) -> Tensor:
        """Sum over steps and examples of what was lost, [C, ...]."""
        lost = torch.zeros(SHAPE[1:])
        for step, (mask, count) in enumerate(zip(masks, batches, strict=True)):
            A = smashed(step)[:count] + 0.1
            grad = torch.randn(A.shape, generator=torch.Generator().manual_seed(step))
            message, context = method.up(A, BatchId(4, 1, step), mask=mask)
            opened = method.open(message)
            back = method.open_gradient(method.down(grad, opened.context), context)
            lost += (grad * (opened.values != 0) - back).sum(0)
        return lost

    @pytest.mark.parametrize(
        ("method", "masks"),
        [
            (Quantized(quantize="int4", error_feedback=True), [None] * 4),
            (Channels(quantize="int4", error_feedback=True), [None, MASK, ~MASK, MASK]),
            (TopK(share=0.2, quantize="int4", affine=False, error_feedback=True), [None] * 4),
        ],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_what_was_lost_is_what_is_owed(
        self, method: Compressor, masks: list[Tensor | None]
    ) -> None:
        lost = self.run(method, masks, [6, 6, 5, 3])
        owed = method.state_dict()["4"]
        assert torch.allclose(lost, owed, atol=1e-5)
        assert float(owed.abs().max()) > 0.01

    def test_small_gradients_arrive_in_the_end(self) -> None:
        grad = torch.full((2, 1, 3), 0.02)
        grad[0, 0, 0] = 1.0  # a step of 1/7: all the others round to zero
        sums = []
        for feedback in (False, True):
            method, total = Quantized(quantize="int4", error_feedback=feedback), torch.zeros(1, 3)
            for number in range(100):
                total += returned(method, torch.ones(2, 1, 3), grad, BatchId(0, 1, number)).sum(0)
            sums.append(total[0, 1:])
        assert bool((sums[0] == 0).all())
        assert torch.allclose(sums[1], torch.full((2,), 4.0), atol=0.3)

    def test_clients_owe_nothing_to_each_other_and_state_continues(self) -> None:
        first = Quantized(quantize="int4", error_feedback=True)
        torch.manual_seed(0)
        grads = torch.randn(4, *SHAPE)

        def send(method: Compressor, client: int, number: int) -> bytes:
            message, _ = method.up(smashed(), BatchId(client, 1, number))
            return bytes(method.down(grads[number], method.open(message).context))

        alone = Quantized(quantize="int4", error_feedback=True)
        for number in range(2):
            mine = send(first, 0, number)
            send(first, 1, 3 - number)
            assert send(alone, 0, number) == mine
        resumed = Quantized(quantize="int4", error_feedback=True)
        resumed.load_state_dict(first.state_dict())
        fresh = Quantized(quantize="int4", error_feedback=True)
        expected = send(first, 0, 2)
        assert send(resumed, 0, 2) == expected
        assert send(fresh, 0, 2) != expected

    def test_off_by_default(self) -> None:
        method = Quantized(quantize="int4")
        self.run(method, [None], [6])
        assert method.state_dict() == {}


class TestRefusals:
    def test_a_server_takes_no_other_methods_form(self) -> None:
        A = smashed()
        for sender, receiver, why in (
            (Quantized(), Compressor(), "codec: expected none, got int8-affine"),
            (Quantized(affine=False), Quantized(), "codec"),
            (Compressor(), TopK(), "kind: expected elements"),
            (TopK(), Compressor(), "kind: expected channels"),
        ):
            with pytest.raises(WireError, match=why):
                receiver.open(sender.up(A, ID)[0])
        with pytest.raises(WireError, match="the limit is"):
            Compressor(limit=1000).open(Compressor().up(A, ID)[0])

    def test_a_client_takes_no_other_codec(self) -> None:
        message, context = Quantized().up(smashed(), ID)
        sender = Quantized(quantize_gradient="none")
        gradient = sender.down(torch.ones(SHAPE), sender.open(message).context)
        with pytest.raises(WireError, match="codec: expected int8, got none"):
            Quantized().open_gradient(gradient, context)

    @pytest.mark.parametrize("method", [Compressor(), TopK(), RandTopK(), Bottleneck()])
    def test_a_mask_where_none_is_chosen(self, method: Compressor) -> None:
        for training in (True, False):
            with pytest.raises(ValueError, match=f"mask: {method.name} chooses no channels"):
                method.up(smashed(), ID, mask=MASK, training=training)

    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            (TopK, {"share": 0.0}),
            (TopK, {"share": 1.1}),
            (RandTopK, {"alpha": 1.5}),
            (RandTopK, {"seed": -1}),
            (Bottleneck, {"share": 0}),
            (Compressor, {"limit": 0}),
            (Compressor, {"quantize": "int2"}),
            (Compressor, {"shar": 1}),
        ],
    )
    def test_settings(self, method: type[Compressor], settings: dict[str, object]) -> None:
        with pytest.raises(ValidationError, match=next(iter(settings))):
            method(**settings)  # type: ignore[arg-type]
