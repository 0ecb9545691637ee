import pytest
import torch
from torch import Tensor

from sluiceway.data import DataError
from sluiceway.data.augment import Augmentation, crop, flip, normalise


def batch(count: int = 6, shape: tuple[int, int, int] = (3, 8, 10), seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, *shape), dtype=torch.uint8, generator=g)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_crop_shifts_and_fills_with_zeros() -> None:
    images = batch()
    top, left = torch.tensor([[0, 4, 8, 1, 4, 7], [4, 0, 8, 7, 4, 2]])
    found = crop(images, 4, top, left)
    for i in range(len(images)):
        padded = torch.nn.functional.pad(images[i], (4, 4, 4, 4))
        t, w = int(top[i]), int(left[i])
        assert torch.equal(found[i], padded[:, t : t + 8, w : w + 10])
    assert torch.equal(found[4], images[4])


def test_a_crop_of_a_constant_image_adds_zeros_at_the_border_only() -> None:
    images = torch.full((200, 3, 8, 10), 9, dtype=torch.uint8)
    found = Augmentation(padding=2, mirror=False)(images, generator())
    assert torch.equal(found[:, :, 2:-2, 2:-2], images[:, :, 2:-2, 2:-2])
    for i, image in enumerate(found[:, 0]):
        filled = image != 0
        # A rectangle: its zeros are whole rows and columns at the edges.
        assert torch.equal(filled, filled.any(1)[:, None] & filled.any(0)), i
        assert (~filled.any(1)).sum() <= 2
        assert (~filled.any(0)).sum() <= 2
    assert torch.equal(found[:, 0], found[:, 2])


def test_crops_are_uniform() -> None:
    images = torch.zeros(20000, 1, 3, 3, dtype=torch.uint8)
    images[:, :, 1, 1] = 1
    found = Augmentation(padding=1, mirror=False)(images, generator())
    share = found.float().mean(dim=(0, 1))
    torch.testing.assert_close(share, torch.full((3, 3), 1 / 9), atol=0.01, rtol=0)


def test_flips_follow_their_flags() -> None:
    images = batch()
    flags = torch.tensor([True, False, True, False, False, True])
    found = flip(images, flags)
    assert torch.equal(found[flags], images[flags].flip(3))
    assert torch.equal(found[~flags], images[~flags])
    assert torch.equal(flip(found, flags), images)


def test_mirrors_half_of_the_images() -> None:
    images = batch(4000, (1, 2, 5))
    found = Augmentation(padding=0, mirror=True)(images, generator())
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    same = (found == images).flatten(1).all(1)
    assert (mirrored | same).all()
    assert abs(mirrored.float().mean() - 0.5) < 0.05


@pytest.mark.parametrize(("count", "padding"), [(0, 4), (6, 0), (6, 1)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_shape_and_type_stay(count: int, padding: int, kind: torch.dtype) -> None:
    images = batch(count).to(kind)
    before = images.clone()
    found = Augmentation(padding, mirror=True)(images, generator())
    assert (found.shape, found.dtype) == (images.shape, kind)
    assert torch.equal(images, before)
    assert set(found.unique().tolist()) <= {0, *images.unique().tolist()}


def test_nothing_to_do_changes_nothing() -> None:
    assert torch.equal(Augmentation(0, False)(batch(), generator()), batch())


def test_the_generator_decides() -> None:
    augment = Augmentation()
    images = batch(32)
    state = generator(3)
    first, second = augment(images, state), augment(images, state)
    assert not torch.equal(first, second)
    assert torch.equal(first, augment(images, generator(3)))
    assert not torch.equal(first, augment(images, generator(4)))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    augment(images, state)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_image_has_its_own_draw() -> None:
    same = batch(1).expand(64, -1, -1, -1)
    assert len(Augmentation()(same, generator()).unique(dim=0)) > 40


def test_negative_padding() -> None:
    with pytest.raises(DataError, match="padding is -1: it must be 0 or more"):
        Augmentation(padding=-1)


def test_normalise() -> None:
    images = batch()
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    found = normalise(images, mean, std)
    assert found.dtype == torch.float32
    shape = (3, 1, 1)
    exact = (images.double() / 255 - torch.tensor(mean).double().view(shape)) / torch.tensor(
        std
    ).double().view(shape)
    torch.testing.assert_close(found, exact.float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.5, 0.5, 0.5), "the images need 3 of each"),
        ((0.5, 0.5, 0.5), (0.5, 0.5), "the images need 3 of each"),
        ((0.5, 0.5, 0.5), (0.5, 0.0, 0.5), "every number must be above 0"),
        ((0.5, 0.5, 0.5), (0.5, float("nan"), 0.5), "every number must be above 0"),
    ],
)
def test_normalise_refuses(mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        normalise(batch(), mean, std)
