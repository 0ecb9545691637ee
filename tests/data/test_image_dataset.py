import numpy as np
import pytest
import torch
from tests.data.pictures import random_images
from torch.utils.data import DataLoader

from sluiceway.data import (
    DataError,
    ImageData,
    ImageDataset,
    ImageTable,
    holdout,
    image_datasets,
    limit,
)
from sluiceway.data.augment import Augmentation, normalise

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SHAPE = (3, 6, 5)


def dataset(count: int = 20, augmentation: Augmentation | None = None) -> ImageDataset:
    labels = np.arange(count) % 4
    return ImageDataset(random_images(count, SHAPE), labels, MEAN, STD, augmentation)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_items_and_batches_agree() -> None:
    examples = dataset()
    assert (len(examples), examples.shape) == (20, SHAPE)
    images, labels = examples.gather([3, 0, 19])
    raw = torch.from_numpy(random_images(20, SHAPE))
    assert torch.equal(images, normalise(raw[[3, 0, 19]], MEAN, STD))
    assert labels.tolist() == [3, 0, 3]
    for position, row in enumerate([3, 0, 19]):
        image, label = examples[row]
        assert torch.equal(image, images[position])
        assert label == labels[position]
    collated = next(iter(DataLoader(examples, batch_size=20)))
    assert torch.equal(collated[0], examples.gather(range(20))[0])
    assert torch.equal(collated[1], examples.labels)


def test_subsets_share_their_images() -> None:
    whole = dataset(augmentation=Augmentation())
    part = whole.subset([5, 2, 7, 2])
    again = part.subset(torch.tensor([2, 0]))
    assert part.base is whole
    assert again.base is whole
    assert whole.base is whole
    assert part.indices.tolist() == [5, 2, 7, 2]
    assert again.indices.tolist() == [7, 5]
    assert again.labels.tolist() == [3, 1]
    assert again._images.data_ptr() == whole._images.data_ptr()
    assert again.augmentation is whole.augmentation
    assert torch.equal(again.gather([1])[0], whole.gather([5])[0])
    assert len(whole.subset([])) == 0
    assert whole.subset([]).gather([])[0].shape == (0, *SHAPE)


def test_an_empty_whole_is_the_base_of_its_parts() -> None:
    whole = dataset(0)
    assert whole.subset([]).base is whole


def test_images_are_shared_not_copied() -> None:
    images = random_images(2, SHAPE)
    examples = ImageDataset(images, np.array([0, 1]), MEAN, STD)
    assert examples._images.data_ptr() == images.ctypes.data


def test_augments_only_with_an_augmentation_and_a_generator() -> None:
    plain = dataset().gather(range(20))[0]
    whole = dataset(augmentation=Augmentation(padding=2))
    assert torch.equal(whole.gather(range(20))[0], plain)
    assert torch.equal(dataset().gather(range(20), generator())[0], plain)
    augmented, labels = whole.gather(range(20), generator())
    assert not torch.equal(augmented, plain)
    assert torch.equal(labels, whole.labels)
    assert torch.equal(augmented, whole.gather(range(20), generator())[0])
    assert torch.equal(whole.gather(range(20))[0], plain)


def test_padding_is_black() -> None:
    white = np.full((50, *SHAPE), 255, dtype=np.uint8)
    examples = ImageDataset(white, np.zeros(50), MEAN, STD, Augmentation(padding=2))
    images, _ = examples.gather(range(50), generator())
    black, full = (normalise(torch.full((1, 3, 1, 1), v).byte(), MEAN, STD) for v in (0, 255))
    assert ((images == black) | (images == full)).all()
    assert (images == black).any()


@pytest.mark.parametrize(
    ("images", "labels", "mean", "message"),
    [
        (np.zeros((2, 3, 4, 4)), [0, 1], MEAN, r"images are torch.float64 \[2, 3, 4, 4\]"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], MEAN, r"must be uint8 \[N, C, H, W\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), [0], MEAN, "there are 2 images for 1 labels"),
        (np.zeros((2, 3, 4, 4), np.uint8), [0, 1], (0.5,), "the images need 3 of each"),
    ],
)
def test_refused(
    images: np.ndarray, labels: list[int], mean: tuple[float, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ImageDataset(images, np.array(labels), mean, STD)


def test_only_train_images_are_augmented() -> None:
    table = ImageTable(random_images(4, SHAPE), np.arange(4))
    names = ("a", "b", "c", "d")
    data = ImageData("x", "here", table, table, names, MEAN, STD, Augmentation(1))
    train, test = image_datasets(data)
    assert (train.augmentation, test.augmentation) == (Augmentation(1), None)
    assert image_datasets(data, augment=False)[0].augmentation is None


def table(counts: list[int]) -> ImageTable:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(labels), 1, 2, 2), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    return ImageTable(images, labels)


def test_limit_is_stratified() -> None:
    part = limit(table([40, 20, 10]), 14, seed=1)
    assert isinstance(part, ImageTable)
    assert np.bincount(part.labels).tolist() == [8, 4, 2]
    rows = part.images[:, 0, 0, 0]
    assert (np.diff(rows.astype(int)) > 0).all()
    assert (table([40, 20, 10]).labels[rows] == part.labels).all()


def test_holdout_is_stratified() -> None:
    train, test = holdout(table([40, 20, 10]), 0.2, seed=0)
    assert np.bincount(test.labels).tolist() == [8, 4, 2]
    rows = np.concatenate([train.images[:, 0, 0, 0], test.images[:, 0, 0, 0]])
    assert sorted(rows.tolist()) == list(range(70))


def test_tables_take_rows_in_order() -> None:
    part = table([2, 2]).take([3, 0])
    assert part.images[:, 0, 0, 0].tolist() == [3, 0]
    assert part.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((1, 2, 2), np.uint8), np.zeros(1, np.int64), "images are uint8"),
        (np.zeros((1, 1, 2, 2)), np.zeros(1, np.int64), "images are float64"),
        (np.zeros((1, 1, 2, 2), np.uint8), np.zeros(2, np.int64), r"must be int64 \[1\]"),
        (np.zeros((1, 1, 2, 2), np.uint8), np.zeros(1), "labels are float64"),
    ],
)
def test_tables_refuse(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageTable(images, labels)
