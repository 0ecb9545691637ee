"""Class statistics: pooling, running sums, and what may not enter them."""

import math

import pytest
import torch
from torch import Tensor

from sluiceway.channels import ClassStatistics, pooled


def make(seed: int, B: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(B, 4, 3, generator=generator, dtype=torch.float64)
    return z, torch.randint(0, 4, (B,), generator=generator).clamp(min=1)


class TestStatistics:
    def test_absent_class_keeps_its_statistics(self) -> None:
        z, _ = make(3, B=4)
        first = ClassStatistics.of(z, torch.tensor([0, 0, 1, 1]), 3)
        running = first.update(ClassStatistics.of(z, torch.tensor([1, 1, 2, 2]), 3), 0.5)
        for name, tensor in running.to_tensors().items():
            assert torch.equal(tensor[0], first.to_tensors()[name][0])
        assert running.count.tolist() == [2, 3, 2]
        assert running.weight_squares.tolist() == [2, 2.5, 2]

    def test_update_changes_neither(self) -> None:
        z, y = make(4)
        a, b = ClassStatistics.of(z, y, 4), ClassStatistics.of(z + 1, y, 4)
        before = {name: tensor.clone() for name, tensor in a.to_tensors().items()}
        a.update(b, 0.5)
        assert all(torch.equal(before[name], t) for name, t in a.to_tensors().items())

    def test_unlabelled_examples_are_left_out(self) -> None:
        z, y = make(5)
        masked = y.clone()
        masked[4:6] = -1
        keep = masked >= 0
        left_out, gone = ClassStatistics.of(z, masked, 4), ClassStatistics.of(z[keep], y[keep], 4)
        for name, tensor in left_out.to_tensors().items():
            torch.testing.assert_close(tensor, gone.to_tensors()[name])

    def test_diverged_values_do_not_poison(self) -> None:
        z, y = make(6)
        broken = z.clone()
        broken[2, 1, 0] = math.nan
        z[2, 1, 0] = 0.0
        expected, got = ClassStatistics.of(z, y, 4), ClassStatistics.of(broken, y, 4)
        for name, tensor in got.to_tensors().items():
            assert torch.equal(tensor, expected.to_tensors()[name])

    def test_round_trip_and_bad_tensors(self) -> None:
        stats = ClassStatistics.of(*make(7), 4)
        tensors = stats.to_tensors()
        again = ClassStatistics.from_tensors({name: t.clone() for name, t in tensors.items()})
        assert all(torch.equal(t, tensors[name]) for name, t in again.to_tensors().items())
        with pytest.raises(ValueError, match="expected"):
            ClassStatistics.from_tensors({"count": tensors["count"]})
        with pytest.raises(ValueError, match="squares"):
            ClassStatistics.from_tensors({**tensors, "squares": tensors["squares"][:2]})

    def test_mean(self) -> None:
        z, y = make(8)
        torch.testing.assert_close(ClassStatistics.of(z, y, 4).mean, z.mean(0))
        assert ClassStatistics.of(z[:0], y[:0], 4).mean.eq(0).all()

    def test_autocast_does_not_reach_the_sums(self) -> None:
        z, y = make(12)
        expected = ClassStatistics.of(z, y, 4).to_tensors()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = ClassStatistics.of(z, y, 4).to_tensors()
        assert all(torch.equal(t, expected[name]) for name, t in got.items())

    def test_no_graph(self) -> None:
        z, y = make(9)
        stats = ClassStatistics.of(pooled(z.requires_grad_(), 2), y, 4, z.mean(0)[:, :2])
        assert not any(tensor.requires_grad for tensor in stats.to_tensors().values())

    def test_errors(self) -> None:
        z, y = make(10)
        stats = ClassStatistics.of(z, y, 4)
        with pytest.raises(ValueError, match="labels: expected shape"):
            ClassStatistics.of(z, y[:-1], 4)
        with pytest.raises(ValueError, match="labels: expected below 1"):
            ClassStatistics.of(z, y, 1)
        with pytest.raises(ValueError, match="classes"):
            ClassStatistics.of(z, y, 0)
        with pytest.raises(ValueError, match="z: expected shape"):
            ClassStatistics.of(z[:, :, 0], y, 4)
        with pytest.raises(ValueError, match="centre"):
            ClassStatistics.of(z, y, 4, z[0, :2])
        with pytest.raises(ValueError, match="decay"):
            stats.update(stats, 1.5)
        with pytest.raises(ValueError, match="shape"):
            stats.update(ClassStatistics.of(z, y, 5))


class TestPooled:
    def test_cells_are_means(self) -> None:
        A = torch.arange(32.0).view(1, 2, 4, 4)
        z = pooled(A, 2)
        assert z.shape == (1, 2, 4)
        torch.testing.assert_close(z[0, 0], torch.tensor([2.5, 4.5, 10.5, 12.5]))

    @pytest.mark.parametrize(
        ("shape", "grid", "cells"),
        [
            ((3, 2, 8, 6), 4, 16),
            ((3, 2, 8, 2), 4, 8),
            ((3, 2, 1, 1), 4, 1),
            ((3, 2, 9), 4, 4),
            ((3, 2, 3), 4, 3),
            ((3, 2), 4, 1),
            ((0, 2, 8, 8), 4, 16),
        ],
    )
    def test_shapes(self, shape: tuple[int, ...], grid: int, cells: int) -> None:
        assert pooled(torch.ones(shape), grid).shape == (*shape[:2], cells)

    def test_precision(self) -> None:
        A = torch.rand(2, 3, 4, 4)
        assert pooled(A.bfloat16(), 2).dtype == torch.float32
        assert pooled(A.double(), 2).dtype == torch.float64
        torch.testing.assert_close(pooled(A[:, :, 0], 4), A[:, :, 0])

    @pytest.mark.parametrize("shape", [(3,), (3, 0), (3, 2, 0), (3, 2, 4, 4, 4)])
    def test_bad_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="A: expected shape"):
            pooled(torch.ones(shape))

    def test_bad_grid(self) -> None:
        with pytest.raises(ValueError, match="grid"):
            pooled(torch.ones(1, 1), 0)


def test_without_cosines_the_other_sums_are_the_same() -> None:
    z, labels = torch.randn(20, 3, 4), torch.randint(5, (20,))
    whole, part = (ClassStatistics.of(z, labels, 5, cosines=c) for c in (True, False))
    for name in ("count", "weight_squares", "sums", "squares"):
        assert torch.equal(getattr(whole, name), getattr(part, name))
    assert not part.unit_sums.any()
    assert not part.unit_squares.any()


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 4, 4), (2, 3, 8, 12), (2, 3, 7, 8)])
def test_every_way_of_pooling_is_adaptive_average_pooling(shape: tuple[int, ...]) -> None:
    A = torch.randn(shape)
    wanted = torch.nn.functional.adaptive_avg_pool2d(A, (4, 4)).flatten(2)
    torch.testing.assert_close(pooled(A, 4), wanted)
