import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.pictures import encoded, random_images, write_pictures

from sluiceway.data import DataError, cache_folder
from sluiceway.data.image_files import read_parquet_images

SHAPE = (3, 4, 5)


@pytest.fixture(autouse=True)
def own_cache(bare_machine: Path) -> None:
    """Nothing is kept outside the test's folder."""


def kept() -> list[Path]:
    return sorted((cache_folder() / "images").rglob("*"))


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (1, 4, 5)])
def test_png_is_exact(
    tmp_path: Path, column: str, nested: bool, shape: tuple[int, int, int]
) -> None:
    images = random_images(7, shape)
    path = tmp_path / "x.parquet"
    write_pictures(path, [encoded(image) for image in images], range(7), column, nested)
    for _ in range(2):  # decoded, then from the cache
        table = read_parquet_images(path, shape)
        np.testing.assert_array_equal(table.images, images)
        assert table.labels.tolist() == list(range(7))
        assert table.labels.dtype == np.int64


def test_more_rows_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(8, SHAPE)
    write_pictures(tmp_path / "x.parquet", [encoded(image) for image in images], [0] * 8)
    found = read_parquet_images(tmp_path / "x.parquet", SHAPE)
    np.testing.assert_array_equal(found.images, images)


def test_jpeg_and_other_colours(tmp_path: Path) -> None:
    grey = np.full((1, 8, 8), 100, dtype=np.uint8)
    flat = np.full((3, 8, 8), 100, dtype=np.uint8)
    path = tmp_path / "x.parquet"
    write_pictures(path, [encoded(flat, "JPEG"), encoded(grey), encoded(grey, "JPEG")], [0, 1, 2])
    assert np.abs(read_parquet_images(path, (3, 8, 8)).images.astype(int) - 100).max() <= 1


def test_the_second_read_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    write_pictures(path, [encoded(random_images(1, SHAPE)[0])], [0])
    first = read_parquet_images(path, SHAPE)
    monkeypatch.setattr(Image, "open", None)
    np.testing.assert_array_equal(read_parquet_images(path, SHAPE).images, first.images)


def test_a_changed_file_is_decoded_anew_and_its_old_images_go(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for seed in (1, 2):
        images = random_images(2, SHAPE, seed)
        write_pictures(path, [encoded(image) for image in images], [0, 1])
        os.utime(path, ns=(seed, seed))
        np.testing.assert_array_equal(read_parquet_images(path, SHAPE).images, images)
    assert [entry.suffix for entry in kept()] == ["", ".npy"]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"broken"])
def test_a_broken_cache_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    images = random_images(2, SHAPE)
    write_pictures(path, [encoded(image) for image in images], [0, 1])
    read_parquet_images(path, SHAPE)
    whole = kept()[-1].read_bytes()
    for bad in (content, whole[:-1]):
        kept()[-1].write_bytes(bad)
        np.testing.assert_array_equal(read_parquet_images(path, SHAPE).images, images)
        assert kept()[-1].read_bytes() == whole


@pytest.mark.parametrize(
    "other", [np.zeros((3, *SHAPE), np.uint8), np.zeros((2, *SHAPE), np.int16)]
)
def test_another_array_in_the_cache_is_replaced(tmp_path: Path, other: np.ndarray) -> None:
    path = tmp_path / "x.parquet"
    images = random_images(2, SHAPE)
    write_pictures(path, [encoded(image) for image in images], [0, 1])
    read_parquet_images(path, SHAPE)
    np.save(kept()[-1], other)
    np.testing.assert_array_equal(read_parquet_images(path, SHAPE).images, images)


def test_pickles_in_the_cache_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_pictures(path, [encoded(random_images(1, SHAPE)[0])], [0])
    images = read_parquet_images(path, SHAPE).images
    np.save(kept()[-1], np.array([{"an": "object"}]), allow_pickle=True)
    np.testing.assert_array_equal(read_parquet_images(path, SHAPE).images, images)


def test_without_a_writable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLUICEWAY_CACHE", str(tmp_path / "file"))
    write_pictures(tmp_path / "x.parquet", [encoded(random_images(1, SHAPE)[0])], [0])
    assert len(read_parquet_images(tmp_path / "x.parquet", SHAPE)) == 1


GOOD = encoded(random_images(1, SHAPE)[0])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "row 2: the picture is missing"),
        (b"", "row 2: the picture is no PNG or JPEG"),
        (b"not a picture", "row 2: the picture is no PNG or JPEG"),
        (GOOD[:-50], "row 2: "),
        (GOOD[:20], "row 2: "),
        (encoded(random_images(1, (3, 5, 4))[0]), "row 2: the picture is 4x5: it must be 5x4"),
        (encoded(random_images(1, SHAPE)[0], "BMP"), "row 2: the picture is no PNG or JPEG"),
    ],
)
def test_bad_pictures(tmp_path: Path, picture: bytes | None, message: str) -> None:
    write_pictures(tmp_path / "x.parquet", [GOOD, picture], [0, 1])
    with pytest.raises(DataError, match=message) as caught:
        read_parquet_images(tmp_path / "x.parquet", SHAPE)
    assert "\n" not in str(caught.value)
    assert kept() == []


def test_deep_greys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 5), 60000, dtype=np.uint16)).save(path)
    write_pictures(tmp_path / "x.parquet", [path.read_bytes()], [0])
    with pytest.raises(DataError, match="has the mode I;16: it must be 8-bit grey or RGB"):
        read_parquet_images(tmp_path / "x.parquet", (1, 4, 5))


@pytest.mark.parametrize(
    ("column", "labels", "message"),
    [
        ("photo", [0], "has no column 'img' or 'image': the columns are photo, label"),
        ("img", ["cat"], "column 'label' must hold integers"),
        ("img", [None], "column 'label' must hold integers"),
    ],
)
def test_bad_columns(tmp_path: Path, column: str, labels: list[object], message: str) -> None:
    write_pictures(tmp_path / "x.parquet", [GOOD], labels, column)
    with pytest.raises(DataError, match=message):
        read_parquet_images(tmp_path / "x.parquet", SHAPE)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(DataError, match="there is no file"):
        read_parquet_images(path, SHAPE)
    path.write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be read"):
        read_parquet_images(path, SHAPE)
    write_pictures(path, [], [])
    with pytest.raises(DataError, match="has no rows"):
        read_parquet_images(path, SHAPE)
