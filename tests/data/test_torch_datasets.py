import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.helpers import random_images
from torch import Tensor
from torch.utils.data import DataLoader

from sluiceway.data import (
    DataError,
    ImageData,
    ImageDataset,
    ImageTable,
    TextDataset,
    image_datasets,
)
from sluiceway.data.augment import Augmentation, normalise

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SHAPE = (3, 6, 5)


def texts(lengths: list[int]) -> TextDataset:
    """Row i has `lengths[i]` tokens and label i."""
    mask = (torch.arange(max(lengths, default=0)) < torch.tensor(lengths)[:, None]).long()
    return TextDataset({"input_ids": mask * 7, "attention_mask": mask}, np.arange(len(lengths)))


def images(count: int = 20, augmentation: Augmentation | None = None) -> ImageDataset:
    labels = np.arange(count) % 4
    return ImageDataset(random_images(count, SHAPE), labels, MEAN, STD, augmentation)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 6), st.integers(2, 4), st.data())
def test_a_batch_is_a_slice_without_needless_padding(
    rows: int, choices: int, data: st.DataObject
) -> None:
    def padded(*shape: int) -> tuple[Tensor, Tensor]:
        """Ids and mask whose rows have 1 to 9 tokens."""
        drawn = data.draw(st.lists(st.integers(1, 9), min_size=rows * choices, max_size=24))
        lengths = torch.tensor(drawn[: int(np.prod(shape))]).reshape(shape)
        mask = (torch.arange(9) < lengths[..., None]).long()
        return torch.arange(1, mask.numel() + 1).reshape(mask.shape) * mask, mask

    ids, mask = padded(rows, choices) if data.draw(st.booleans()) else padded(rows)
    labels, label_mask = padded(rows, choices)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "ending_mask": mask.clone(),
        "decoder_labels": labels,
        "decoder_attention_mask": label_mask,
    }
    whole = TextDataset(inputs, torch.arange(rows))
    picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=8))
    batch, found = whole.gather(picked)
    assert found.tolist() == picked
    for name, tensor in inputs.items():
        its_mask = label_mask if name.startswith("decoder_") else mask
        width = int(its_mask[picked].sum(-1).max())
        assert torch.equal(batch[name], tensor[picked][..., :width])
        assert not tensor[picked][..., width:].any()


def test_a_batch_keeps_what_lies_before_the_last_token() -> None:
    mask = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]])
    rows = TextDataset({"input_ids": mask * 7, "attention_mask": mask}, torch.tensor([0, 1]))
    assert rows.gather([0, 1])[0]["attention_mask"].tolist() == [[0, 0, 1], [0, 1, 0]]


def test_texts_that_fill_what_is_read_are_counted() -> None:
    dataset = texts([1, 4, 3, 4])
    assert (dataset.filled(4), dataset.filled(5), dataset.subset([0, 1]).filled(4)) == (2, 0, 1)
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 0], [1, 0]]])  # of two options each
    pairs = TextDataset({"input_ids": mask, "attention_mask": mask}, np.array([0, 1]))
    assert pairs.filled(2) == 1


def test_no_rows() -> None:
    for whole in (texts([3, 4]), texts([])):
        inputs, labels = whole.gather([])
        assert (inputs["input_ids"].shape, labels.shape) == ((0, 0), (0,))
    whole = images(0)
    assert whole.subset([]).base is whole
    assert whole.gather([])[0].shape == (0, *SHAPE)


def test_parts_share_storage_and_nest() -> None:
    whole = texts([3, 9, 4, 5])
    part = whole.subset(np.array([3, 0, 2])).subset([2, 0])
    assert (len(part), part.labels.tolist(), part.indices.tolist()) == (2, [2, 3], [2, 3])
    assert part.base is whole.base is whole
    inputs, labels = part.gather(torch.tensor([1, 0]))
    assert labels.tolist() == [3, 2]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [5, 4]
    whole[2][0]["input_ids"][1] = 6
    assert part[0][0]["input_ids"][1] == 6
    pictures = images(augmentation=Augmentation())
    again = pictures.subset([5, 2, 7, 2]).subset(torch.tensor([2, 0]))
    assert (again.indices.tolist(), again.labels.tolist()) == ([7, 5], [3, 1])
    assert again.augmentation is pictures.augmentation
    assert again._images.data_ptr() == pictures._images.data_ptr()
    assert torch.equal(again.gather([1])[0], pictures.gather([5])[0])


def test_items_batches_and_loaders_agree() -> None:
    whole = texts([3, 4, 5])
    inputs, label = whole[1]
    assert (inputs["input_ids"].tolist(), int(label)) == ([7, 7, 7, 7, 0], 1)
    with pytest.raises(IndexError):
        whole[3]
    batches = list(DataLoader(whole, batch_size=2))
    assert batches[0][0]["input_ids"].shape == (2, 5)
    assert batches[1][1].tolist() == [2]

    raw = random_images(20, SHAPE)
    pictures = ImageDataset(raw, np.arange(20) % 4, MEAN, STD)
    assert (len(pictures), pictures.shape) == (20, SHAPE)
    assert pictures._images.data_ptr() == raw.ctypes.data
    found, labels = pictures.gather([3, 0, 19])
    assert torch.equal(found, normalise(torch.from_numpy(raw[[3, 0, 19]]), MEAN, STD))
    assert labels.tolist() == [3, 0, 3]
    for position, row in enumerate([3, 0, 19]):
        image, label = pictures[row]
        assert torch.equal(image, found[position])
        assert label == labels[position]
    collated = next(iter(DataLoader(pictures, batch_size=20)))
    assert torch.equal(collated[0], pictures.gather(range(20))[0])


def test_augments_only_with_an_augmentation_and_a_generator() -> None:
    plain = images().gather(range(20))[0]
    whole = images(augmentation=Augmentation(padding=2))
    assert torch.equal(whole.gather(range(20))[0], plain)
    assert torch.equal(images().gather(range(20), generator())[0], plain)
    augmented, labels = whole.gather(range(20), generator())
    assert not torch.equal(augmented, plain)
    assert torch.equal(labels, whole.labels)
    assert torch.equal(augmented, whole.gather(range(20), generator())[0])


def test_padding_is_black() -> None:
    white = np.full((50, *SHAPE), 255, dtype=np.uint8)
    examples = ImageDataset(white, np.zeros(50), MEAN, STD, Augmentation(padding=2))
    found, _ = examples.gather(range(50), generator())
    black, full = (normalise(torch.full((1, 3, 1, 1), v).byte(), MEAN, STD) for v in (0, 255))
    assert ((found == black) | (found == full)).all()
    assert (found == black).any()


def test_only_train_images_are_augmented() -> None:
    table = ImageTable(random_images(4, SHAPE), np.arange(4))
    data = ImageData("x", "here", table, table, tuple("abcd"), MEAN, STD, Augmentation(1))
    train, test = image_datasets(data)
    assert (train.augmentation, test.augmentation) == (Augmentation(1), None)
    assert image_datasets(data, augment=False)[0].augmentation is None


IDS = torch.ones(2, 3, dtype=torch.int64)
MASKED = {"input_ids": IDS, "attention_mask": IDS}
PIXELS = np.zeros((2, 3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TextDataset(MASKED, np.arange(3)), "input_ids has 2 rows for 3 labels"),
        (lambda: TextDataset({"input_ids": IDS}, [0, 1]), "comes without its attention_mask"),
        (
            lambda: TextDataset(MASKED | {"attention_mask": IDS[:, :2]}, [0, 1]),
            "input_ids is 3 wide and its attention_mask 2: they",
        ),
        (
            lambda: TextDataset(MASKED | {"decoder_labels": IDS}, [0, 1]),
            "decoder_labels comes without its decoder_attention_mask",
        ),
        (lambda: ImageDataset(PIXELS * 1.0, [0, 1], MEAN, STD), "images are torch.float64"),
        (lambda: ImageDataset(PIXELS[0], [0, 1], MEAN, STD), r"must be uint8 \[N, C, H, W\]"),
        (lambda: ImageDataset(PIXELS, [0], MEAN, STD), "there are 2 images for 1 labels"),
        (lambda: ImageDataset(PIXELS, [0, 1], (0.5,), STD), "the images need 3 of each"),
    ],
)
def test_what_does_not_fit_is_refused(build: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build()  # type: ignore[operator]
