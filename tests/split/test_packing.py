"""The wire: what is packed comes back, lengths are exact, and all else is refused."""

import struct
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.split import (
    BatchContext,
    BatchId,
    Expected,
    KeptChannels,
    KeptElements,
    WireError,
    message_bytes,
    pack_gradient,
    pack_smashed,
    unpack_gradient,
    unpack_smashed,
)
from sluiceway.split.packing import encode_smashed
from sluiceway.split.quantise import CODECS, PLAIN, Coding
from sluiceway.split.selection import Selection

some = settings(max_examples=60)
many = settings(max_examples=300)
ID = BatchId(3, 7, 11)


def everything(channels: int) -> KeptChannels:
    return KeptChannels(torch.ones(channels, dtype=torch.bool))


def crossed(A: Tensor, codec: str = "none", selection: Selection | None = None) -> Tensor:
    """What arrives of smashed data."""
    selection = everything(A.shape[1]) if selection is None else selection
    return unpack_smashed(pack_smashed(A, selection, ID, codec)[0]).values


shapes = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 19)),
    st.tuples(st.integers(1, 5), st.integers(1, 19), st.integers(1, 6)),
    st.tuples(st.integers(1, 5), st.integers(1, 19), st.integers(1, 4), st.integers(1, 4)),
)
codecs = st.sampled_from([name for name, codec in CODECS.items() if not codec.budgeted])
integers = st.sampled_from([name for name in CODECS if name.startswith("int")])


@st.composite
def contexts(draw: st.DrawFn) -> BatchContext:
    """Any shape, and any channels or elements of it."""
    shape = draw(shapes)
    if draw(st.booleans()):
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=shape[1], max_size=shape[1])))
        mask[draw(st.integers(0, shape[1] - 1))] = True
        return BatchContext(ID, shape, KeptChannels(mask))
    size = prod(shape[1:])
    count = draw(st.integers(1, size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rows = [
        torch.randperm(size, generator=generator)[:count].sort().values for _ in range(shape[0])
    ]
    return BatchContext(ID, shape, KeptElements(torch.stack(rows)))


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Values of very different sizes from channel to channel, some constant, some one-sided."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    A = torch.randn(shape, generator=generator)
    scale = 10.0 ** torch.randint(-12, 12, (shape[1],), generator=generator)
    shift = torch.randint(-1, 2, (shape[1],), generator=generator) * scale
    sizes = (1, shape[1], *[1] * (len(shape) - 2))
    A = A * scale.view(sizes) + shift.view(sizes)
    A[:, draw(st.integers(0, shape[1] - 1))] = draw(st.sampled_from([0.0, -3.5, 1e-40]))
    return A.relu() if draw(st.booleans()) else A


def kept_mask(context: BatchContext) -> Tensor:
    """True where something crosses, by another way than the code's."""
    if isinstance(context.selection, KeptChannels):
        chosen = torch.zeros(context.shape, dtype=torch.bool)
        chosen[:, context.selection.mask] = True
        return chosen
    assert isinstance(context.selection, KeptElements)
    flat = torch.zeros(context.shape[0], prod(context.shape[1:]), dtype=torch.bool)
    for b, row in enumerate(context.selection.indices.tolist()):
        flat[b, row] = True
    return flat.view(context.shape)


def elements(context: BatchContext) -> bool:
    return isinstance(context.selection, KeptElements)


class TestRoundTrip:
    @given(st.data(), contexts())
    @some
    def test_identity_on_what_is_kept_and_zero_elsewhere(
        self, data: st.DataObject, context: BatchContext
    ) -> None:
        A = data.draw(tensors(context.shape))
        labels = torch.arange(context.shape[0]) * data.draw(st.sampled_from([1, 300]))
        message, mine = pack_smashed(A, context.selection, ID, "none", labels)
        opened = unpack_smashed(message, expected=Expected(shape=context.shape, batch=ID))
        assert torch.equal(opened.values, A * kept_mask(context))
        assert torch.equal(opened.labels, labels)
        theirs = opened.context
        assert (theirs.batch, theirs.shape) == (mine.batch, mine.shape) == (ID, context.shape)
        grad = data.draw(tensors(context.shape))
        back = unpack_gradient(pack_gradient(grad, theirs), mine)
        assert torch.equal(back, grad * kept_mask(context))

    @given(st.data(), contexts(), integers)
    @some
    def test_integers_within_half_a_step(
        self, data: st.DataObject, context: BatchContext, name: str
    ) -> None:
        A = data.draw(tensors(context.shape))
        opened = crossed(A, name, context.selection)
        kept = kept_mask(context)
        assert bool((opened[~kept] == 0).all())
        levels = {"int8": 127, "int4": 7, "int8-affine": 255, "int4-affine": 15}[name]
        rows = A.flatten(1).unbind(0) if elements(context) else A.transpose(0, 1).unbind(0)
        theirs = opened.flatten(1) if elements(context) else opened.transpose(0, 1)
        chosen = kept.flatten(1) if elements(context) else kept.transpose(0, 1)
        for x, y, which in zip(rows, theirs, chosen, strict=True):
            if not which.any():
                continue
            x, y = x.reshape(-1)[which.reshape(-1)].double(), y.reshape(-1)[which.reshape(-1)]
            reach = x.max() - x.min() if "affine" in name else x.abs().max()
            rounding = 1e-6 * float(x.abs().max()) + 1.2e-38
            assert float((x - y).abs().max()) <= float(reach) / levels / 2 * 1.0001 + rounding

    @given(st.data(), contexts())
    @some
    def test_half_precision(self, data: st.DataObject, context: BatchContext) -> None:
        A = data.draw(tensors(context.shape))
        opened = crossed(A, "fp16", context.selection)
        kept = kept_mask(context)
        largest = A.abs().amax([0, *range(2, A.dim())], keepdim=True)
        largest = A.abs().max() if elements(context) else largest
        error = (A * kept - opened).abs().double()
        assert bool((error <= A.abs() * 2.0**-11 + largest.double() * 2.0**-38 + 1e-38).all())

    def test_values_that_a_codec_can_say_come_back_exactly(self) -> None:
        halves = torch.tensor([[1.0, -2.5, 0.125, 1024.0], [3e-5, 0.0, 2.0**-20, 1.0]]).half()
        for codec in ("fp16", "none"):
            assert torch.equal(crossed(halves, codec), halves.float())
        column = torch.arange(-7, 8).float().view(-1, 1) * 0.5
        assert torch.equal(crossed(column, "int4"), column)
        assert torch.equal(crossed(column[1:], "int4"), column[1:])
        assert float((crossed(column[1:], "int4-affine") - column[1:]).abs().max()) <= 0.24
        bits = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-45]])
        assert torch.equal(crossed(bits).view(torch.int32), bits.view(torch.int32))

    @pytest.mark.parametrize("codec", [name for name, one in CODECS.items() if not one.budgeted])
    def test_the_smallest_floats(self, codec: str) -> None:
        A = torch.tensor([[1e-45, -1e-40, 0.0], [0.0, 1e-38, 0.0]])
        assert torch.allclose(crossed(A, codec), A, rtol=0, atol=0.5 * 1.2e-38)

    def test_memory_layout_does_not_matter(self) -> None:
        A = torch.randn(3, 4, 5, 6)
        selection = KeptChannels(torch.tensor([True, False, True, True]))
        last = A.contiguous(memory_format=torch.channels_last)
        assert (
            pack_smashed(A, selection, ID, "int8")[0]
            == pack_smashed(last, selection, ID, "int8")[0]
        )

    @pytest.mark.parametrize("codec", ["int8", "int8-affine", "int4", "int4-affine"])
    def test_large_batches_are_encoded_in_pieces_alike(self, codec: str) -> None:
        A = torch.randn(40, 8, 32, 32)  # more than one piece
        whole = crossed(A, codec)
        for first in range(0, 40, 7):  # the extremes in every part: the same step
            part = A[first : first + 7]
            alone = crossed(torch.cat([part, A]), codec)
            assert torch.equal(alone[: len(part)], whole[first : first + 7])

    def test_a_context_does_not_follow_the_mask(self) -> None:
        mask = torch.tensor([True, False])
        _, context = pack_smashed(torch.ones(1, 2), KeptChannels(mask), ID)
        mask.logical_not_()
        message = pack_gradient(torch.ones(1, 2), context)
        assert unpack_gradient(message, context).tolist() == [[1.0, 0.0]]


class TestFormat:
    """Bytes by hand from the table in `header`, so that no change of format goes unnoticed."""

    def test_channels(self) -> None:
        A = torch.zeros(3, 10)
        A[:, 0] = torch.tensor([0.0, 30.0, 14.0])
        A[:, 9] = torch.tensor([-1.0, 2.0, 0.2])
        selection = KeptChannels(torch.tensor([True, *[False] * 8, True]))
        message, context = pack_smashed(A, selection, ID, "int4-affine", torch.tensor([5, 0, 300]))
        header = struct.pack(
            "<4sBBBBBBH3I4II", b"SLWY", 2, 1, 5, 1, 2, 2, 0, 3, 7, 11, 3, 10, 0, 0, 2
        )
        scales = struct.pack("<4f", 2.0, 0.2, 0.0, -1.0)
        numbers = bytes([0 | 0 << 4, 15 | 15 << 4, 7 | 6 << 4])
        assert message == header + struct.pack("<3H", 5, 0, 300) + b"\x01\x02" + scales + numbers
        gradient = pack_gradient(A, context, "int8")
        header = struct.pack(
            "<4sBBBBBBH3I4II", b"SLWY", 2, 3, 2, 0, 0, 2, 0, 3, 7, 11, 3, 10, 0, 0, 2
        )
        scales = (A.abs().amax(0)[[0, 9]] / 127).numpy().tobytes()
        assert gradient == header + scales + struct.pack("6b", 0, -64, 127, 127, 59, 13)

    def test_elements(self) -> None:
        A = torch.arange(600.0).view(2, 3, 100)
        selection = KeptElements(torch.tensor([[1, 299], [0, 256]]))
        message, _ = pack_smashed(A, selection, ID, "none", torch.tensor([5, 255]))
        header = struct.pack(
            "<4sBBBBBBH3I4II", b"SLWY", 2, 2, 0, 2, 1, 3, 0, 3, 7, 11, 2, 3, 100, 0, 2
        )
        indices = struct.pack("<4H", 1, 299, 0, 256)
        values = struct.pack("<4f", 1, 299, 300, 556)
        assert message == header + b"\x05\xff" + indices + values


class TestLength:
    @given(st.data(), contexts(), codecs, st.sampled_from([0, 1, 2]))
    @some
    def test_is_the_formula(
        self, data: st.DataObject, context: BatchContext, codec: str, label_bytes: int
    ) -> None:
        A = data.draw(tensors(context.shape))
        labels = torch.full((len(A),), 256 if label_bytes == 2 else 255) if label_bytes else None
        message, _ = pack_smashed(A, context.selection, ID, codec, labels)
        count, single = context.selection.count, elements(context)
        assert len(message) == message_bytes(
            context.shape, count, codec, elements=single, label_bytes=label_bytes
        )
        gradient = pack_gradient(A, context, codec)
        assert len(gradient) == message_bytes(
            context.shape, count, codec, elements=single, gradient=True
        )

    def test_by_hand(self) -> None:
        shape = (64, 32, 16, 16)
        assert message_bytes(shape, 32) == 44 + 64 * 32 * 256 * 4
        assert message_bytes(shape, 8, label_bytes=1) == 44 + 64 + 4 + 64 * 8 * 256 * 4
        assert message_bytes(shape, 8, "int8", label_bytes=1) == 44 + 64 + 4 + 32 + 64 * 8 * 256
        assert message_bytes(shape, 8, "int4-affine") == 44 + 4 + 64 + 64 * 8 * 128
        assert message_bytes(shape, 8, "int4", gradient=True) == 44 + 32 + 64 * 8 * 128
        assert message_bytes((3, 5), 3, "int4") == 44 + 1 + 12 + 5
        # 8,192 elements: 1,024 bytes of bits or 2 bytes an index; above 65,536 four bytes
        assert message_bytes(shape, 600, elements=True) == 44 + 64 * (1024 + 4 * 600)
        assert message_bytes(shape, 500, "fp16", elements=True) == 44 + 64 * (4 + 4 * 500)
        assert message_bytes((2, 65536), 9, elements=True) == 44 + 2 * 6 * 9
        assert message_bytes((2, 65537), 9, elements=True) == 44 + 2 * 8 * 9
        with pytest.raises(ValueError, match=r"^codec: expected one of none, fp16"):
            message_bytes(shape, 8, "int3")


def example(
    codec: str = "int8", single: bool = False, coding: Coding = PLAIN
) -> tuple[bytes, BatchContext]:
    """A message whose every section is there: B = 3, C = 10, 2 x 2."""
    A = torch.randn(3, 10, 2, 2, generator=torch.Generator().manual_seed(0))
    channels = KeptChannels(torch.arange(10) % 3 == 0)
    points = KeptElements(torch.tensor([[0, 7], [3, 39], [5, 6]]))
    chosen, labels = points if single else channels, torch.tensor([1, 0, 9])
    message, context = encode_smashed(A, chosen, ID, codec, labels, coding)
    return bytes(message), context


def patched(message: bytes, offset: int, form: str, *values: float) -> bytes:
    changed = bytearray(message)
    struct.pack_into("<" + form, changed, offset, *values)
    return bytes(changed)


class TestRefusals:
    @pytest.mark.parametrize(
        ("offset", "form", "values", "why"),
        [
            (0, "I", [0], "magic"),
            (4, "B", [1], "version 1, this side reads 2"),
            (5, "B", [0], "unknown kind"),
            (5, "B", [2], "selection code|bytes, its header"),
            (5, "B", [3], "gradient has no labels"),
            (6, "B", [10], "unknown kind, codec"),
            (6, "B", [9], "ends|stream|classes|frequencies|step|bits"),
            (6, "B", [7], "ends|stream|classes|integers|step"),
            (7, "B", [0], "selection code 1, got 0"),
            (8, "B", [3], "label size"),
            (9, "B", [1], "2 to 4 sizes"),
            (9, "B", [3], "2 to 4 sizes"),
            (10, "B", [1], "ends within|classes"),
            (10, "B", [2], "header"),
            (11, "B", [1], "header"),
            (24, "I", [0], "at least 1"),
            (24, "I", [2], "its header asks for"),
            (24, "4I", [2**32 - 1] * 4, "exceed"),
            (24, "4I", [2**16] * 4, "exceed"),  # 2^64, 0 if it wrapped
            (40, "I", [0], "1 to 10 kept"),
            (40, "I", [11], "1 to 10 kept"),
            (47, "B", [0b11], "4 bits set"),
            (48, "B", [0b110], "zeros after the last bit"),
            (49, "f", [float("nan")], "scales"),
            (49, "f", [0.0], "scales"),
            (49, "f", [3.4e38], "scales"),  # finite, but 127 steps are not
        ],
    )
    def test_of_headers_and_sections(
        self, offset: int, form: str, values: list[float], why: str
    ) -> None:
        message, _ = example()
        unpack_smashed(message)
        with pytest.raises(WireError, match=why):
            unpack_smashed(patched(message, offset, form, *values))

    def test_of_selections_of_elements(self) -> None:
        message, _ = example(single=True)
        assert message[7] == 2
        for indices, why in {
            (7, 7): "increasing",
            (7, 0): "increasing",
            (0, 40): "below 40",
        }.items():
            with pytest.raises(WireError, match=why):
                unpack_smashed(patched(message, 47, "HH", *indices))
        points = KeptElements(torch.arange(11).repeat(2, 1))
        message, _ = pack_smashed(torch.randn(2, 12), points, ID)
        assert message[7] == 1
        found = unpack_smashed(message).context.selection
        assert isinstance(found, KeptElements)
        assert torch.equal(found.indices, points.indices)
        for bits, why in {
            (255, 15, 255, 3): "11 bits set",
            (255, 23, 255, 7): "the last bit",
        }.items():
            with pytest.raises(WireError, match=why):
                unpack_smashed(patched(message, 44, "4B", *bits))

    def test_of_affine_scales_padding_and_labels(self) -> None:
        message, _ = pack_smashed(torch.tensor([[-1.0], [1.0]]), everything(1), ID, "int8-affine")
        assert unpack_smashed(patched(message, 44, "ff", 1e36, -2e38)).values.isfinite().all()
        inf, nan = float("inf"), float("nan")
        # The last spans more than float32 holds, though both its ends are finite.
        for step, low in ((1.0, inf), (1.0, nan), (1e36, 2e38), (2.6e36, -3.4e38)):
            with pytest.raises(WireError, match="scales"):
                unpack_smashed(patched(message, 44, "ff", step, low))
        message, _ = pack_smashed(torch.randn(3, 1), everything(1), ID, "int4")
        with pytest.raises(WireError, match="unused half"):
            unpack_smashed(patched(message, len(message) - 1, "B", message[-1] | 16))
        labels = torch.tensor([3, 256])
        message, _ = pack_smashed(torch.randn(2, 1), everything(1), ID, labels=labels)
        with pytest.raises(WireError, match="expected 1 bytes each"):
            unpack_smashed(patched(message, 44, "HH", 3, 255))

    @given(st.integers(0, 10_000), st.booleans())
    @some
    def test_of_truncated_and_longer_messages(self, length: int, single: bool) -> None:
        message, _ = example(single=single)
        with pytest.raises(WireError, match="message: "):
            unpack_smashed(message[: length % len(message)])
        with pytest.raises(WireError, match="its header asks for"):
            unpack_smashed(message + b"\0" * (1 + length % 50))

    def test_of_what_is_over_the_limit(self) -> None:
        message, context = example("int4")
        assert len(message) < 3 * 10 * 4 * 4
        unpack_smashed(message, limit=480)
        with pytest.raises(WireError, match=r"float32 numbers exceed 479 bytes"):
            unpack_smashed(message, limit=479)
        with pytest.raises(WireError, match="the limit is 80"):
            unpack_smashed(message, limit=80)
        with pytest.raises(WireError, match="exceed 479"):
            unpack_gradient(pack_gradient(torch.ones(3, 10, 2, 2), context), context, limit=479)

    @pytest.mark.parametrize(
        ("expected", "why"),
        [
            (
                Expected(shape=(3, 10, 2, 3)),
                r"shape: expected \[3, 10, 2, 3\], got \[3, 10, 2, 2\]",
            ),
            (Expected(shape=(None, 9, 2, 2)), r"shape: expected \[any, 9"),
            (Expected(shape=(None, 10)), "shape"),
            (
                Expected(batch=BatchId(3, 7, 12)),
                r"batch=12\), got BatchId.*batch=11",
            ),
            (Expected(codec="int4"), "codec: expected int4, got int8"),
            (Expected(elements=True), "expected elements"),
            (Expected(labels=False), "labels: expected none"),
            (Expected(classes=9), "labels: expected below 9, got 9"),
        ],
    )
    def test_of_what_is_not_expected(self, expected: Expected, why: str) -> None:
        message, _ = example()
        fits = Expected((None, 10, 2, 2), ID, "int8", False, True, 10)
        unpack_smashed(message, expected=fits)
        with pytest.raises(WireError, match=why):
            unpack_smashed(message, expected=expected)

    def test_of_other_gradients(self) -> None:
        message, context = example()
        gradient = pack_gradient(torch.ones(3, 10, 2, 2), context, "int8")
        unpack_gradient(gradient, context, codec="int8")
        selection = KeptChannels(torch.arange(10) > 0)
        for other, why in (
            (BatchContext(BatchId(3, 7, 12), context.shape, context.selection), "batch: expected"),
            (BatchContext(BatchId(2, 7, 11), context.shape, context.selection), "batch: expected"),
            (BatchContext(ID, (3, 10, 4), context.selection), "shape: expected"),
            (BatchContext(ID, context.shape, selection), "expected 9 kept, got 4"),
            (
                BatchContext(ID, context.shape, example(single=True)[1].selection),
                "expected elements",
            ),
        ):
            with pytest.raises(WireError, match=why):
                unpack_gradient(gradient, other)
        with pytest.raises(WireError, match="expected int4, got int8"):
            unpack_gradient(gradient, context, codec="int4")
        with pytest.raises(WireError, match="expected a gradient"):
            unpack_gradient(message, context)
        with pytest.raises(WireError, match="expected smashed data"):
            unpack_smashed(gradient)

    @pytest.mark.slow
    @given(st.binary(max_size=300))
    @many
    def test_of_random_bytes(self, noise: bytes) -> None:
        for message in (noise, example()[0][:10] + noise, example()[0][:44] + noise):
            if len(message) != len(example()[0]):
                with pytest.raises(WireError):
                    unpack_smashed(message)

    @pytest.mark.slow
    @given(
        st.sampled_from(sorted(CODECS)),
        st.booleans(),
        st.booleans(),
        st.lists(st.integers(0, 10_000), min_size=1, max_size=3),
    )
    @many
    def test_flipped_bits_are_refused_or_do_no_harm(
        self, codec: str, single: bool, coded: bool, flips: list[int]
    ) -> None:
        single &= codec != "dct"
        message = bytearray(example(codec, single, Coding(coded, ratio=2.0))[0])
        for flip in flips:
            message[flip // 8 % len(message)] ^= 1 << flip % 8
        expected = Expected((3, 10, 2, 2), ID, codec, single, True, 10)
        try:
            opened = unpack_smashed(bytes(message), 1 << 20, expected)
        except WireError:
            return
        assert opened.values.shape == (3, 10, 2, 2)
        assert opened.values.dtype == torch.float32
        assert opened.labels is not None
        assert 0 <= int(opened.labels.min()) <= int(opened.labels.max()) < 10
        if codec.startswith("int"):
            assert bool(opened.values.isfinite().all())


class TestBadArguments:
    @pytest.mark.parametrize("codec", [name for name in CODECS if name != "none"])
    def test_not_finite(self, codec: str) -> None:
        for value in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(ValueError, match="values: expected finite"):
                crossed(torch.tensor([[1.0, 1.0], [1.0, value], [1.0, 1.0]]), codec)

    def test_range_beyond_float32(self) -> None:
        A = torch.tensor([[3e38, 1.0], [-3e38, 1.0]])
        for codec in ("int8-affine", "fp16"):
            with pytest.raises(ValueError, match="range"):
                crossed(A, codec)
        assert torch.allclose(crossed(A, "int8"), A)
        assert torch.allclose(crossed(A / 2, "fp16"), A / 2, rtol=2**-11)

    @pytest.mark.parametrize(
        ("A", "batch", "labels", "why"),
        [
            (torch.ones(3), ID, None, "A: expected"),
            (torch.ones(0, 2), ID, None, "A: expected"),
            (torch.ones(1, 2, 1, 1, 1), ID, None, "A: expected"),
            (torch.ones(1, 2).int(), ID, None, "A: expected"),
            (torch.ones(1, 3), ID, None, "selection: does not fit"),
            (torch.ones(1, 2), BatchId(-1, 0, 0), None, "batch: expected"),
            (torch.ones(1, 2), BatchId(0, 0, 2**32), None, "batch: expected"),
            (torch.ones(1, 2), ID, torch.tensor([-1]), "labels: expected"),
            (torch.ones(1, 2), ID, torch.tensor([65536]), "labels: expected"),
            (torch.ones(1, 2), ID, torch.tensor([1.0]), "labels: expected"),
            (torch.ones(1, 2), ID, torch.tensor([1, 2]), "labels: expected"),
        ],
    )
    def test_of_packing(self, A: Tensor, batch: BatchId, labels: Tensor | None, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            pack_smashed(A, everything(2), batch, labels=labels)

    def test_of_places(self) -> None:
        for mask in (torch.zeros(3, dtype=torch.bool), torch.ones(3), torch.ones(2, 2) > 0):
            with pytest.raises(ValueError, match="mask: expected"):
                KeptChannels(mask)
        for indices in ([[1, 1]], [[2, 1]], [[-1, 1]], [[]], [1, 2]):
            with pytest.raises(ValueError, match="indices: expected"):
                KeptElements(torch.tensor(indices, dtype=torch.int64))
        for shape, indices in (((1, 4), [[0, 4]]), ((2, 4), [[0, 3]])):
            with pytest.raises(ValueError, match="selection: does not fit"):
                crossed(torch.ones(shape), selection=KeptElements(torch.tensor(indices)))
        _, context = pack_smashed(torch.ones(1, 2), everything(2), ID)
        with pytest.raises(ValueError, match="grad: expected shape"):
            pack_gradient(torch.ones(2, 1), context)
