"""The one check that the once-a-round functions make of their arguments."""

from torch import Tensor


def require_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raise ValueError unless `tensor` has the `expected` shape.

    Each expected size is a number, or a letter that stands for any positive size.
    """
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(expected) and all(
        size > 0 if isinstance(want, str) else size == want
        for size, want in zip(sizes, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(want) for want in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(sizes)}")


def as_double(name: str, tensor: Tensor, *expected: int | str) -> Tensor:
    """Check the shape as `require_shape` does; return the values detached, in float64."""
    require_shape(name, tensor, *expected)
    return tensor.detach().double()
