"""The coder and the codecs that fill a budget: lossless, near the entropy, within their bytes."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.core.messages import WireError
from sluiceway.split import BatchId, Channels, Compressor, TopK, coder
from sluiceway.split.bitted import Bitted, encode_bits
from sluiceway.split.cosines import transformed
from sluiceway.split.stepped import Stepped, encode_step

some = settings(max_examples=60)
CPU = torch.device("cpu")
ID = BatchId(1, 2, 3)


def values(seed: int, shape: tuple[int, int, int], spread: float = 3.0) -> Tensor:
    """Laplace-like, of sizes that fall over the components."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.rand(shape, generator=g)
    return x * torch.exp(-spread * torch.arange(shape[1]) / shape[1]).view(-1, 1)


class TestCoder:
    @given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=40), min_size=1, max_size=9))
    @some
    def test_without_loss(self, groups: list[list[int]]) -> None:
        integers = np.concatenate([np.array(one, dtype=np.uint8) for one in groups])
        sizes = [len(one) for one in groups]
        data = coder.encode(integers, sizes)
        assert len(data) == coder.size(coder.counts_of(integers, sizes))
        assert np.array_equal(coder.decode(memoryview(data), sizes), integers)

    @pytest.mark.parametrize("scale", [0.1, 0.5, 3.0])
    def test_near_the_entropy(self, scale: float) -> None:
        drawn = np.random.default_rng(0).laplace(0, scale, (8, 5000))
        groups = np.abs(np.rint(drawn)).astype(np.uint8)
        counts = np.unique(groups, return_counts=True)[1] / groups.size
        entropy = -(counts * np.log2(counts)).sum() * groups.size / 8
        data = coder.encode(groups.ravel(), [5000] * 8)
        assert len(data) < 1.02 * entropy + 40
        assert len(data) == coder.size(coder.counts_of(groups.ravel(), [5000] * 8))

    def test_classes_by_hand(self) -> None:
        # Means 0, 1, 1/2, 3/4: half octaves from 2^-4.5 on are 1, 2, ...
        integers = np.array([0, 0, 1, 1, 0, 1, 0, 1, 1, 1], dtype=np.uint8)
        counts = coder.counts_of(integers, [2, 2, 2, 4])
        assert counts.tolist() == [[2, 0], [0, 2], [1, 1], [1, 3]]
        assert coder.classes_of(counts).tolist() == [0, 12, 10, 11]
        assert coder.tables_of(np.array([8, 0, 4, 1])).tolist() == [0, 255, 8, 24]

    def test_refusals(self) -> None:
        integers = np.random.default_rng(0).integers(0, 4, 50).astype(np.uint8)
        data = coder.encode(integers, [20, 30])
        for broken, why in (
            (data[:-1], "whole words"),
            (data + b"\1\0\0\0" * 2, "longer"),
            (data + b"\0\0\0\0" * 4, "longer"),
            (data[:-12], "shorter"),
            (data[:1], "ends within"),
            (data[:1] + b"\0" + data[2:], "frequencies"),
        ):
            with pytest.raises(WireError, match=why):
                coder.decode(memoryview(broken), [20, 30])


class TestTransform:
    @pytest.mark.parametrize("sides", [(5, 7), (8,), ()])
    def test_is_the_cosine_transform(self, sides: tuple[int, ...]) -> None:
        from scipy.fft import dctn

        x = values(0, (3, 4, int(np.prod(sides, dtype=int))))
        found = transformed(x, sides)
        if sides:
            axes = tuple(range(2, 2 + len(sides)))
            expected = dctn(x.double().view(3, 4, *sides).numpy(), axes=axes, norm="ortho")
            np.testing.assert_allclose(found.view(3, 4, *sides), expected, atol=1e-5)
        torch.testing.assert_close(transformed(found, sides, inverse=True), x)


class TestBudgets:
    @given(st.integers(0, 99), st.sampled_from([8.0, 16.0, 64.0]), st.booleans())
    @some
    def test_steps_fit_and_come_back(self, seed: int, ratio: float, spatial: bool) -> None:
        x = values(seed, (16, 8, 36))
        budget, sides = 4 * x.numel() / ratio, (6, 6) if spatial else None
        found = encode_step(x, budget, sides)
        assert 0.7 * budget - 40 < len(found.payload) < 1.06 * budget + 40
        again = Stepped.read(memoryview(found.payload), (16, 8, 36), sides, CPU)
        assert torch.equal(again.numbers, found.numbers)
        assert torch.equal(again.values(), found.values())

    @given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([(), (4,), (3, 3), (8, 9)]))
    @some
    def test_every_shape_comes_back_to_the_bit(
        self, n: int, g: int, sides: tuple[int, ...]
    ) -> None:
        x = values(n, (n, g, int(np.prod(sides, dtype=int))))
        found = encode_step(x, 4 * x.numel() / 8, sides)
        again = Stepped.read(memoryview(found.payload), tuple(x.shape), sides, CPU)
        assert len(found.payload) == found.nbytes
        assert torch.equal(again.values(), found.values())

    @given(st.integers(0, 99), st.floats(1.0, 100.0), st.booleans())
    @some
    def test_bits_fit_and_come_back(self, seed: int, ratio: float, coded: bool) -> None:
        x = values(seed, (6, 5, 9))
        budget = 4 * x.numel() / ratio
        found = encode_bits(x, budget, coded)
        if not coded:
            assert len(found.payload) <= max(budget, 3 + 10)
        assert len(found.payload) == found.nbytes
        again = Bitted.read(memoryview(found.payload), (6, 5, 9), coded, CPU)
        assert torch.equal(again.values(), found.values())
        assert torch.equal(again.bits, found.bits)

    def test_integers_are_within_their_bounds(self) -> None:
        x = values(1, (16, 8, 36))
        found = encode_step(x, 4 * x.numel() / 8, None)
        inside = found.numbers.abs() < 127
        assert float((found.values() - x).abs()[inside].max()) <= found.step * 0.9
        eight = encode_bits(x, 1.2 * x.numel(), False)
        assert eight.bits.tolist() == [8] * 8
        error = (eight.values() - x).square().mean((0, 2)) / x.var((0, 2))
        assert float(error.max()) < 2e-3

    def test_more_bytes_are_less_error(self) -> None:
        x = values(2, (32, 8, 36))
        for kind in ("bits", "step", "dct"):
            errors = []
            for ratio in (8, 16, 32, 64):
                budget = 4 * x.numel() / ratio
                one: Stepped | Bitted = (
                    encode_bits(x, budget, True)
                    if kind == "bits"
                    else encode_step(x, budget, (6, 6) if kind == "dct" else None)
                )
                errors.append(float((one.values() - x).square().mean()))
            assert errors == sorted(errors)

    @pytest.mark.parametrize("kind", ["bits", "step", "dct"])
    def test_chance_leaves_no_error_in_the_mean(self, kind: Literal["bits", "step", "dct"]) -> None:
        g = torch.Generator().manual_seed(0)
        grad = torch.randn(4, 3, 4, 4, generator=g)
        link = Channels(quantize=kind, ratio=8, stochastic=True)
        total = torch.zeros_like(grad)
        rounds = 300
        for number in range(rounds):
            _, context = link.up(grad, BatchId(0, 0, number))
            total += link.open_gradient(link.down(grad, context), context)
        # Within what chance alone leaves; and for "bits" what lies beyond the clipped range.
        error = (total / rounds - grad).abs()
        assert float(error.median()) < 0.1
        again = link.down(grad, context)
        assert bytes(again) == bytes(link.down(grad, context))

    def test_coded_bits_are_fewer_bytes_in_any_basis(self) -> None:
        x = values(6, (32, 8, 36)) + torch.arange(8).view(8, 1)
        for ratio in (6, 12, 24):
            packed, coded = (encode_bits(x, 4 * x.numel() / ratio, c) for c in (False, True))
            assert len(coded.payload) < len(packed.payload)
            assert torch.equal(coded.values(), packed.values())

    def test_zeros_cost_next_to_nothing(self) -> None:
        x = torch.zeros(16, 8, 36)
        for found in (encode_step(x, 500, None), encode_step(x, 500, (6, 6))):
            assert len(found.payload) < 30
            assert not found.values().any()
        assert not encode_bits(x, 500, False).values().any()


def links(quantize: Any) -> tuple[Channels, Channels]:
    """Without and with the coder."""
    plain = Channels(quantize=quantize, ratio=8)
    return plain, Channels(quantize=quantize, ratio=8, coder="range")


class TestMessages:
    @pytest.mark.parametrize("quantize", ["int8", "int4", "bits", "step", "dct"])
    @pytest.mark.parametrize("coded", ["none", "range"])
    @pytest.mark.parametrize("affine", [True, False])
    def test_both_forms_are_the_same(
        self,
        quantize: Literal["int8", "dct"],
        coded: Literal["none", "range"],
        affine: bool,
    ) -> None:
        kinds: list[Compressor] = [
            Channels(quantize=quantize, coder=coded, affine=affine, ratio=12, error_feedback=True)
        ]
        if quantize != "dct":
            kinds.append(TopK(share=0.3, quantize=quantize, coder=coded, affine=affine, ratio=12))
        for link in kinds:
            A = values(3, (6, 8, 12)).view(6, 8, 3, 4)
            message, context = link.up(A, ID, torch.arange(6))
            packed = bytes(message)
            assert len(packed) == len(message)
            one, other = link.open(message), link.open(packed)
            assert torch.equal(one.values, other.values)
            down = link.down(A, one.context)
            assert len(bytes(down)) == len(down)
            back = [link.open_gradient(form, context) for form in (down, bytes(down))]
            assert torch.equal(*back)

    def test_coding_loses_nothing_and_saves_bytes(self) -> None:
        A = values(4, (32, 8, 36)).view(32, 8, 6, 6).relu()
        for quantize in ("int8", "int4", "bits"):
            plain, coded = (
                Channels(quantize=quantize, coder=c, ratio=8) for c in ("none", "range")
            )  # type: ignore[arg-type]
            (one, _), (other, _) = plain.up(A, ID), coded.up(A, ID)
            assert torch.equal(plain.open(one).values, coded.open(other).values)
            assert len(other) < 0.9 * len(one)

    def test_other_forms_are_refused(self) -> None:
        A = values(5, (4, 8, 9)).view(4, 8, 3, 3)
        plain, coded = links("int8")
        with pytest.raises(WireError, match="coder: expected range, got none"):
            coded.open(bytes(plain.up(A, ID)[0]))
        with pytest.raises(ValueError, match="have no positions"):
            TopK(quantize="dct")
        message = bytearray(bytes(Channels(quantize="dct").up(A, ID)[0]))
        message[10] = 1
        with pytest.raises(WireError, match="not coded, or always"):
            Channels(quantize="dct").open(bytes(message))
