"""Bases of channel space in which few components hold what matters  [ours].

Channels are correlated: in the basis of the eigenvectors of their covariance a few components hold
most of the variance (Karhunen-Loeve transform), and a component that is not sent costs its variance
alone. What is sent is z = W U^T D^1/2 (a - mu); the receiver turns it back,
a = D^-1/2 U W^-1 z + mu. W, diagonal, says how an error of each component counts: where all of z is
rounded alike, a component of twice the weight has half the error.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sluiceway.channels._shapes import require_shape


@dataclass(frozen=True, eq=False)
class Basis:
    """A change of basis of channels, for data [B, C, ...].

    Attributes:
        rotation: U, orthogonal, columns are the components, [C, C].
        mean: mu, [C].
        scale: D^1/2, above 0, [C]; ones for a rotation alone.
        weight: W, above 0, [C]; ones where errors of all components count alike.
    """

    rotation: Tensor
    mean: Tensor
    scale: Tensor
    weight: Tensor

    @cached_property
    def matrix(self) -> Tensor:
        """W U^T D^1/2, [C, C]."""
        return (self.rotation * self.weight).T * self.scale

    @cached_property
    def inverse_matrix(self) -> Tensor:
        """D^-1/2 U W^-1, [C, C]."""
        return self.rotation / self.weight / self.scale.unsqueeze(1)

    @cached_property
    def _shift(self) -> Tensor:
        """-W U^T D^1/2 mu, [C]."""
        return -(self.matrix @ self.mean)

    def forward(self, A: Tensor) -> Tensor:
        """Components z = W U^T D^1/2 (a - mu) of smashed data, the shape of A."""
        return _mixed(self.matrix, A, self._shift)

    def inverse(self, z: Tensor) -> Tensor:
        """Channels a = D^-1/2 U W^-1 z + mu, the inverse of `forward`."""
        return _mixed(self.inverse_matrix, z, self.mean)

    def gradient(self, grad: Tensor) -> Tensor:
        """What crosses of a gradient by channels: U^T g, whatever the scale and weight."""
        return _mixed(self.rotation.T, grad)

    def gradient_back(self, crossed: Tensor) -> Tensor:
        """The gradient by channels again, U (U^T g)."""
        return _mixed(self.rotation, crossed)

    @cached_property
    def centred(self) -> "Basis":
        """The same about the mean 0: for what is a difference of smashed data."""
        return replace(self, mean=torch.zeros_like(self.mean))

    def to(self, device: torch.device) -> "Basis":
        """The same in float32 on a device."""
        parts = (self.rotation, self.mean, self.scale, self.weight)
        return Basis(*(part.to(device, torch.float32, non_blocking=True) for part in parts))


def eigenbasis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a covariance, the largest variance first.

    Each has the sign with which its entry of largest magnitude is positive, the first of several.

    Args:
        covariance: [C, C], symmetric up to rounding, finite.

    Returns:
        U, [C, C] orthogonal, and the variances along its columns, [C], at least 0; float64, CPU.

    Raises:
        ValueError: it is not square or not finite.
    """
    require_shape("covariance", covariance, "C", covariance.shape[0])
    covariance = covariance.detach().double().cpu()
    if not bool(covariance.isfinite().all()):
        raise ValueError("covariance: expected finite numbers")
    variances, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0), variances


def label_basis(covariance: Tensor, between: Tensor, weight: float) -> Tensor:
    """Eigenvectors of a covariance with between-class scatter added, S + weight S_b tr S / tr S_b.

    Args:
        covariance: S, [C, C].
        between: S_b, [C, C]; all 0 adds nothing.
        weight: at least 0; at 1 both have as much in sum.

    Returns:
        U, [C, C] orthogonal; float64, CPU.
    """
    require_shape("between", between, *covariance.shape)
    if not weight >= 0:
        raise ValueError(f"weight: expected at least 0, got {weight}")
    inside, across = covariance.double().trace(), between.double().trace()
    share = weight * inside / across if bool(across > 0) else 0.0
    return eigenbasis(covariance + share * between)[0]


def label_weights(covariance: Tensor, between: Tensor, rotation: Tensor, amount: float) -> Tensor:
    """LCIS in the allocation of bits: W by the share of a component's variance between classes.

    f_c = u_c^T S_b u_c / u_c^T S u_c is in [0, 1], and the squared error of a component counts
    1 + amount f_c / mean f times: W_c is the root of it. Reverse water-filling then works on
    W_c^2 var_c.

    Args:
        covariance: S, [C, C].
        between: S_b, [C, C].
        rotation: U, [C, C].
        amount: at least 0; 0 gives ones.

    Returns:
        [C], at least 1; float64, CPU. Ones where nothing is between classes.
    """
    require_shape("between", between, *covariance.shape)
    require_shape("rotation", rotation, *covariance.shape)
    if not amount >= 0:
        raise ValueError(f"amount: expected at least 0, got {amount}")
    U = rotation.double().cpu()
    total, across = (((U.T @ S.double().cpu()) * U.T).sum(1) for S in (covariance, between))
    shares = torch.where(total > 0, across / total.clamp(min=1e-300), 0.0).clamp(0, 1)
    if not bool(shares.mean() > 0):
        return torch.ones_like(shares)
    return (1 + amount * shares / shares.mean()).sqrt()


def gradient_basis(
    covariance: Tensor, squares: Tensor, floor: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Eigenvectors of D^1/2 S D^1/2 with D = E[g^2], so that an error counts by what it changes.

    The loss moves by g^T e in first order; with e's channels weighted by D, equal errors of the
    components of z = U^T D^1/2 (a - mu) cost alike.

    Args:
        covariance: S, [C, C].
        squares: E[g_c^2] of the loss's gradient by each channel, [C], at least 0.
        floor: D is at least this share of its mean, so that the change can be undone.

    Returns:
        U [C, C] orthogonal, and D^1/2 scaled to a mean square of 1, [C]; float64, CPU.
    """
    require_shape("squares", squares, covariance.shape[0])
    squares = squares.detach().double().cpu().clamp(min=0)
    mean = squares.mean()
    weights = squares / mean if bool(mean > 0) else torch.ones_like(squares)
    weights = weights.clamp(min=floor)
    scale = (weights / weights.mean()).sqrt()
    return eigenbasis(covariance.double().cpu() * torch.outer(scale, scale))[0], scale


def _mixed(matrix: Tensor, values: Tensor, shift: Tensor | None = None) -> Tensor:
    """matrix v + shift at every position of every example: values [B, C, ...], matrix [C, C]."""
    flat = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
    matrices = matrix.expand(len(flat), *matrix.shape)
    if shift is None:
        return torch.bmm(matrices, flat).view(values.shape)
    return torch.baddbmm(shift.view(1, -1, 1), matrices, flat).view(values.shape)
