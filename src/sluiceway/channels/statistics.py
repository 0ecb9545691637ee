"""What LCIS scores are computed from: smashed data pooled small, and summed class by class.

The sums of one batch are `ClassStatistics.of`; those of several batches are added up by `update`,
so that a batch which lacks classes loses nothing. Everything here is [ours]; the paper's formulas
are not public. Marks: docs/methods.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from sluiceway.channels._shapes import require_shape

_SMALLEST: Final = torch.finfo(torch.float64).tiny


@torch.no_grad()
def pooled(A: Tensor, grid: int = 4) -> Tensor:
    """Smashed data pooled to a small grid, z  [ours]::

        z = A average-pooled to a small grid and flattened, [B, C, g]

    Cells are those of adaptive average pooling; a side shorter than `grid` keeps its own length.

    Args:
        A: smashed data, [B, C, H, W], [B, C, L] or [B, C], any floating type; B may be 0.
        grid: cells along each side, at least 1.

    Returns:
        z, [B, C, g] with g = min(grid, H) * min(grid, W), min(grid, L) or 1; float32, or float64
        where A is; without graph, on the device of A.

    Raises:
        ValueError: A has another number of dimensions, an empty side, or `grid` is below 1.
    """
    if grid < 1:
        raise ValueError(f"grid: expected at least 1, got {grid}")
    require_shape("A", A, "B?", *("C", "H", "W")[: max(1, min(3, A.dim() - 1))])
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    sides = [min(grid, side) for side in A.shape[2:]]
    if sides == list(A.shape[2:]):
        pass
    elif len(sides) == 2:
        height, width = A.shape[2] // sides[0], A.shape[3] // sides[1]
        if (height * sides[0], width * sides[1]) == A.shape[2:]:
            A = functional.avg_pool2d(A, (height, width))  # half the time of the general way
        else:
            A = functional.adaptive_avg_pool2d(A, (sides[0], sides[1]))
    elif len(sides) == 1:
        A = functional.adaptive_avg_pool1d(A, sides[0])
    return A.flatten(2) if sides else A.unsqueeze(-1)


@dataclass(frozen=True)
class ClassStatistics:
    """Sums over weighted examples b of each class k, from which both LCIS forms follow  [ours].

    With v_b the weight of an example (1 when it is new) and u = (z - centre) / ||z - centre||, or 0
    for a zero vector, per channel::

        count          = sum v_b               [K]
        weight_squares = sum v_b^2             [K]
        sums           = sum v_b z_b           [K, C, g]
        squares        = sum v_b ||z_b||^2     [K, C]
        unit_sums      = sum v_b u_b           [K, C, g]
        unit_squares   = sum v_b^2 ||u_b||^2   [K, C]

    All float64, on one device. The squared weights take the pair of an example with itself out of a
    squared sum. Class sums tell a server something of the data, and are K g times as many numbers
    as scores: where either matters, score on the client and merge the scores (`merge_scores`).
    """

    count: Tensor
    weight_squares: Tensor
    sums: Tensor
    squares: Tensor
    unit_sums: Tensor
    unit_squares: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        z: Tensor,
        labels: Tensor,
        classes: int,
        centre: Tensor | None = None,
        cosines: bool = True,
    ) -> "ClassStatistics":
        """The sums of one batch, every example with weight 1. O(K B C g) operations.

        Args:
            z: from `pooled`, [B, C, g], any floating type, magnitudes below 1e150; B may be 0.
                A value that is not finite counts as 0: it must not poison a running sum.
            labels: [B], any integer type, below `classes`, on the device of z, or on the CPU, where
                they are checked without waiting for a GPU; an example with a negative label is
                unlabelled and left out.
            classes: K, at least 1.
            centre: [C, g], subtracted before unit vectors are made, such as `mean` of earlier
                statistics; None subtracts nothing. Behind a ReLU all uncentred cosines are near 1,
                and with g = 1 exactly 1 [ours]. Unit sums with other centres do not add up exactly.
            cosines: False leaves the unit sums at zero, as `fisher` and `between` do not need them.

        Raises:
            ValueError: a shape does not fit, `classes` is below 1, or a label is too large.
        """
        require_shape("z", z, "B?", "C", "g")
        require_shape("labels", labels, z.shape[0])
        if classes < 1:
            raise ValueError(f"classes: expected at least 1, got {classes}")
        if labels.numel() and int(labels.max()) >= classes:
            raise ValueError(f"labels: expected below {classes}, got {int(labels.max())}")
        z, rounding = _finite(z), torch.finfo(z.dtype).eps
        units = _units(z, centre, rounding) if cosines else None
        # A product with 0/1 rows is deterministic on every device; index_add is not.
        member = (labels == torch.arange(classes, device=labels.device).unsqueeze(1)).double()
        member = member.to(z.device, non_blocking=True)
        count = member.sum(1)
        return cls(
            count=count,
            weight_squares=count.clone(),
            sums=_class_sums(member, z),
            squares=member @ z.square().sum(-1),
            unit_sums=z.new_zeros(classes, *z.shape[1:])
            if units is None
            else _class_sums(member, units),
            unit_squares=z.new_zeros(classes, z.shape[1])
            if units is None
            else member @ units.square().sum(-1),
        )

    @property
    def mean(self) -> Tensor:
        """Mean of z over all weighted examples, [C, g], float64; zeros without examples."""
        return self.sums.sum(0) / self.count.sum().clamp(min=_SMALLEST)

    @torch.no_grad()
    def update(self, new: "ClassStatistics", decay: float = 0.9) -> "ClassStatistics":
        """These statistics and a new batch's, as an exponential moving average  [ours]::

            v_b <- decay * v_b      for all earlier examples of a class that the new batch holds

        A class that the batch lacks keeps its statistics. Exact in both forms: scores are those of
        the weighted examples, and of the weighted pairs v_a v_b.

        Args:
            new: statistics of the new batch, of the same sizes.
            decay: in [0, 1]; 1 adds up everything seen, 0 keeps each class's last batch.

        Returns:
            New statistics, on the device of `new`; neither argument is changed.

        Raises:
            ValueError: the sizes differ, or `decay` is outside [0, 1].
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], got {decay}")
        require_shape("new.sums", new.sums, *self.sums.shape)
        keep = torch.ones_like(new.count).masked_fill(new.count > 0, decay)
        merged, batch = {}, new.to_tensors()
        for name, mine in self.to_tensors().items():
            fresh = batch[name]
            factor = keep.square() if name in ("weight_squares", "unit_squares") else keep
            merged[name] = mine.to(fresh.device) * factor.view(-1, *[1] * (mine.dim() - 1)) + fresh
        return ClassStatistics(**merged)

    def to_tensors(self) -> dict[str, Tensor]:
        """The six tensors by name, not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ClassStatistics":
        """What `to_tensors` gave, in float64.

        Raises:
            ValueError: a name is missing or unknown, or shapes do not fit together.
        """
        names = [field.name for field in fields(cls)]
        if set(tensors) != set(names):
            raise ValueError(f"tensors: expected {names}, got {sorted(tensors)}")
        require_shape("sums", tensors["sums"], "K", "C", "g")
        K, C, g = tensors["sums"].shape
        shapes = ((K,), (K,), (K, C, g), (K, C), (K, C, g), (K, C))
        for name, shape in zip(names, shapes, strict=True):
            require_shape(name, tensors[name], *shape)
        return cls(**{name: tensors[name].detach().double() for name in names})


def _finite(z: Tensor) -> Tensor:
    """z in float64, with 0 for what is not finite."""
    return torch.nan_to_num(z.detach().double(), nan=0.0, posinf=0.0, neginf=0.0)


def _class_sums(member: Tensor, z: Tensor) -> Tensor:
    """Sum over the examples of each class, [K, C, g], from member [K, B] and z [B, C, g]."""
    return (member @ z.flatten(1)).view(len(member), *z.shape[1:])


def _units(z: Tensor, centre: Tensor | None, rounding: float) -> Tensor:
    """Vectors of length 1 along z - centre, [B, C, g]; a zero vector stays zero."""
    floor = torch.full(z.shape[1:2], _SMALLEST, dtype=z.dtype, device=z.device)
    if centre is not None:
        require_shape("centre", centre, *z.shape[1:])
        centre = _finite(centre).to(z.device)
        z = z - centre
        # What differs from the centre by rounding alone has no direction.
        floor = floor + 4 * rounding * centre.norm(dim=-1)
    norms = z.norm(dim=-1)
    inverse = torch.where(norms > floor, 1 / norms, torch.zeros_like(norms))
    return z * inverse.unsqueeze(-1)
