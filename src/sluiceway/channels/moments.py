"""First and second moments of channels: the running sums from which a basis is made  [ours].

Clients sum over examples and positions, the sums add up, so that the merged moments are those of
all clients' data together, whatever the partition. With v a vector of the C channels at one
position of one example, and n of them::

    mean = sum v / n                                  [C]
    cov  = sum (v - mean)(v - mean)^T / n             [C, C]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sluiceway.channels._shapes import require_shape


@dataclass(frozen=True)
class Moments:
    """Sums over the positions of examples, and of each class k; float64, on one device.

    Attributes:
        count: n_k, positions of each class, [K].
        sums: sum of v, [K, C].
        products: sum of (v - mean)(v - mean)^T about the mean of all of them, [C, C].
    """

    count: Tensor
    sums: Tensor
    products: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, A: Tensor, labels: Tensor, classes: int) -> "Moments":
        """The sums of one batch. O(B C^2 H W) operations, in the precision of A.

        Args:
            A: smashed data, [B, C, ...], floating, B at least 1. A value that is not finite counts
                as 0: it must not poison a running sum.
            labels: [B], any integer type, in [0, classes).
            classes: K, at least 1.

        Raises:
            ValueError: a shape does not fit.
        """
        require_shape("A", A, "B", *("C", "H", "W")[: max(1, min(3, A.dim() - 1))])
        require_shape("labels", labels, A.shape[0])
        v = torch.nan_to_num(A.detach(), nan=0.0, posinf=0.0, neginf=0.0)
        v = v.flatten(2) if v.dim() > 2 else v.unsqueeze(2)
        member = (labels == torch.arange(classes, device=labels.device).unsqueeze(1)).double()
        member = member.to(A.device, non_blocking=True)
        sums = member @ v.sum(2).double()
        mean = sums.sum(0) / (len(v) * v.shape[2])
        centred = (v - mean.to(v.dtype).view(-1, 1)).transpose(0, 1).flatten(1)
        products = (centred @ centred.T).double()
        return cls(member.sum(1) * v.shape[2], sums, (products + products.T) / 2)

    @property
    def total(self) -> Tensor:
        """n, []."""
        return self.count.sum()

    @property
    def mean(self) -> Tensor:
        """[C]."""
        return self.sums.sum(0) / self.total

    @property
    def covariance(self) -> Tensor:
        """[C, C], symmetric, positive semidefinite up to rounding."""
        return self.products / self.total

    @property
    def between(self) -> Tensor:
        """Between-class scatter, sum_k n_k (m_k - m)(m_k - m)^T / n, [C, C]; at most `covariance`.

        Classes without examples have no part in it.
        """
        seen = self.count.clamp(min=1).unsqueeze(1)
        offsets = (self.sums / seen - self.mean) * (self.count / self.total).sqrt().unsqueeze(1)
        return offsets.T @ offsets

    def add(self, other: "Moments", decay: float = 1.0) -> "Moments":
        """Moments of both together; those of `self` count `decay` of what they did, in [0, 1].

        The products are about the common mean::

            P = P_1 + P_2 + n_1 n_2 / (n_1 + n_2) (m_1 - m_2)(m_1 - m_2)^T
        """
        require_shape("other.sums", other.sums, *self.sums.shape)
        mine = Moments(self.count * decay, self.sums * decay, self.products * decay)
        n, m = mine.total, other.total
        if not bool(n > 0):
            return other
        apart = mine.mean - other.mean
        products = mine.products + other.products + n * m / (n + m) * torch.outer(apart, apart)
        return Moments(mine.count + other.count, mine.sums + other.sums, products)

    def to_vector(self) -> Tensor:
        """All numbers in one, [K + K C + C (C + 1) / 2]: of the products the upper triangle."""
        upper = torch.triu_indices(*self.products.shape, device=self.products.device)
        return torch.cat([self.count, self.sums.flatten(), self.products[upper[0], upper[1]]])

    @classmethod
    def from_vector(cls, vector: Tensor, channels: int, classes: int) -> "Moments":
        """What `to_vector` gave, in float64.

        Raises:
            ValueError: its length does not fit, or no example was counted.
        """
        require_shape("moments", vector, moments_size(channels, classes))
        sizes = [classes, classes * channels, channels * (channels + 1) // 2]
        count, sums, triangle = vector.detach().double().split(sizes)
        if not bool((count >= 0).all()) or not bool(count.sum() > 0):
            raise ValueError("moments: expected counts of at least 0, not all 0")
        upper = torch.triu_indices(channels, channels, device=vector.device)
        products = torch.zeros(channels, channels, dtype=torch.float64, device=vector.device)
        products[upper[0], upper[1]] = triangle
        products = products + products.triu(1).T
        return cls(count, sums.view(classes, channels), products)

    def to_tensors(self) -> dict[str, Tensor]:
        """The three tensors by name, not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Moments":
        """What `to_tensors` gave."""
        return cls(**{field.name: tensors[field.name].double() for field in fields(cls)})


def moments_size(channels: int, classes: int) -> int:
    """How many numbers `Moments.to_vector` gives."""
    return classes + classes * channels + channels * (channels + 1) // 2


def merge_moments(moments: Sequence[Moments]) -> Moments:
    """The moments of all clients' data together; their order matters up to rounding alone."""
    merged, *others = moments
    for one in others:
        merged = merged.add(one)
    return merged
