"""SL-FAC's bits: the fewest low frequencies with their share of the energy, within a budget."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from torch import Tensor

from sluiceway.core.messages import WireError
from sluiceway.split import SLFAC, BatchId
from sluiceway.split.slfac import Frequencies, allocation, encode_slfac

CPU = torch.device("cpu")
some = settings(max_examples=40)


def values(seed: int, shape: tuple[int, int, int] = (6, 4, 12)) -> Tensor:
    """Smooth over positions, channels of different sizes."""
    g = torch.Generator().manual_seed(seed)
    smooth = torch.randn(shape, generator=g).cumsum(2)
    return smooth * torch.rand(shape[1], 1, generator=g)


class TestAllocation:
    def test_by_hand(self) -> None:
        # 90 % of the energy: 2 of 3, 1 of 3, 3 of 3, and a channel without any.
        energy = np.array([[8.0, 1, 1], [1000, 0, 0], [1, 1, 1], [0, 0, 0]])
        counts, bits = allocation(energy, examples=8, budget=1e9)
        assert counts.tolist() == [2, 1, 3, 0]
        # Mean energies 4.5, 1000, 1: logarithms from 2 to 8 bits.
        middle = round(2 + 6 * np.log(4.5) / np.log(1000))
        assert bits.tolist() == [middle, 8, 2, 0]

    @given(st.integers(0, 99), st.floats(0, 300))
    @some
    def test_is_the_largest_share_that_fits(self, seed: int, budget: float) -> None:
        energy = np.random.default_rng(seed).exponential(1, (4, 9)) * [[1], [3], [0.1], [9]]
        counts, bits = allocation(energy, 8, budget)
        used = 8 + 2 + 4 * (counts > 0).sum() + ((8 * counts * bits + 7) // 8).sum()
        assert used <= budget or not counts.any()
        if counts.all():
            # Every channel has the fewest that hold one and the same share, at most 0.9.
            parts = energy.cumsum(1) / energy.sum(1, keepdims=True)
            before = [parts[c, k - 2] if k > 1 else 0.0 for c, k in enumerate(counts)]
            at = [parts[c, k - 1] for c, k in enumerate(counts)]
            assert max(before) <= min(*at, 0.9) + 1e-9


class TestMessages:
    def test_keeps_the_low_frequencies(self) -> None:
        x = values(0)
        found = encode_slfac(x, 1e9, coded=False, sides=(3, 4))
        spectrum = dctn(x.view(6, 4, 3, 4).numpy(), axes=(2, 3), norm="ortho").reshape(6, 4, 12)
        order = np.argsort(np.indices((3, 4)).sum(0).ravel(), kind="stable")
        for channel, k in enumerate(found.counts.tolist()):
            spectrum[:, channel, order[k:]] = 0
        kept = dctn(spectrum.reshape(6, 4, 3, 4), axes=(2, 3), norm="ortho", type=3)
        error = float((found.values() - torch.from_numpy(kept).view(6, 4, 12)).square().mean())
        # Of the energy a tenth is left out; rounding adds to that at 2 to 8 bits.
        assert error < 0.1 * float(x.square().mean())

    @given(st.integers(0, 99), st.floats(20, 200), st.booleans())
    @some
    def test_come_back(self, seed: int, budget: float, coded: bool) -> None:
        x = values(seed)
        found = encode_slfac(x, budget, coded, (3, 4))
        again = Frequencies.read(memoryview(found.payload), (6, 4, 12), coded, (3, 4), CPU)
        assert torch.equal(again.values(), found.values())
        assert coded or len(found.payload) <= max(budget, 10)

    @pytest.mark.parametrize("coded", [False, True])
    def test_wrong_ones_are_refused(self, coded: bool) -> None:
        data = encode_slfac(values(1), 150, coded, (3, 4)).payload

        def read(broken: bytes) -> None:
            Frequencies.read(memoryview(broken), (6, 4, 12), coded, (3, 4), CPU)

        cases: list[tuple[bytes, str]] = [
            (data[:5], "ends before"),
            (data[:10], "ends before"),
            (b"\xff\xff" + data[2:], "at most 12"),
            (data[:8] + b"\x11" + data[9:], "2 to 8"),
            (data[:18] + b"\x80\x7f" + data[20:], "finite"),
            (data + b"\0\0\0\0" * 4, "longer" if coded else "bytes of values"),
        ]
        for broken, why in cases:
            with pytest.raises(WireError, match=why):
                read(broken)

    def test_by_the_method_and_without_positions(self) -> None:
        link, shapes = SLFAC(ratio=8), ((6, 4, 3, 4), (6, 4, 12), (6, 4))
        for shape in shapes:
            A = (
                values(2).view(6, 4, 3, 4)
                if shape[-1] != 4 or len(shape) == 4
                else values(2)[..., 0]
            )
            A = A.reshape(shape)
            message, context = link.up(A, BatchId(0, 1, 2))
            opened: Any = link.open(bytes(message))
            assert torch.equal(opened.values, link.open(message).values)
            gradient = link.down(torch.ones(shape), context)
            assert torch.equal(
                link.open_gradient(bytes(gradient), context), link.open_gradient(gradient, context)
            )
