"""The checks that the functions of this package make of their arguments."""

import torch
from torch import Tensor


def require_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raise ValueError unless `tensor` has the `expected` shape.

    Each expected size is a number, or a letter that stands for any positive size; with "?" the size
    may be 0 too.
    """
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(expected) and all(
        size > 0 or want.endswith("?") if isinstance(want, str) else size == want
        for size, want in zip(sizes, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(want).rstrip("?") for want in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(sizes)}")


def as_scores(scores: Tensor, *expected: int | str, name: str = "scores") -> Tensor:
    """Check shape and finiteness; return the values detached, in float64."""
    require_shape(name, scores, *expected)
    scores = scores.detach().double()
    if not bool(scores.isfinite().all()):
        # Ranking NaN would keep channels by accident of the sort.
        raise ValueError(f"{name}: expected finite numbers")
    return scores


def shifted(scores: Tensor) -> Tensor:
    """Scores moved up so that none is negative, as mass: s - min(min s, 0)."""
    return scores - torch.clamp(scores.min(), max=0.0)
