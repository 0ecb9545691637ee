import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from sluiceway.data import DataError
from sluiceway.data.image_files import read_csv_images, read_idx


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    head = bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(np.uint8).tobytes()


@pytest.mark.parametrize("shape", [(5,), (3, 2, 4), (0, 2, 2)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...], pack: type) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / "named-as-it-likes"
    path.write_bytes(pack(idx(values)))
    found = read_idx(path)
    assert found.dtype == np.uint8
    assert found.flags.writeable
    np.testing.assert_array_equal(found, values)


WHOLE = idx(np.arange(12).reshape(3, 4))


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
        (gzip.compress(WHOLE, mtime=0)[:-9], "cannot be read: "),
        (gzip.compress(WHOLE, mtime=0)[:-4] + b"abcd", "cannot be read: "),
        (gzip.compress(WHOLE, mtime=0)[:10] + b"\xff" * 20, "cannot be read: "),
    ],
)
def test_broken_idx(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file-idx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_no_idx_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*gone"):
        read_idx(tmp_path / "gone")


def test_csv_rows_end_with_the_label(tmp_path: Path) -> None:
    path = tmp_path / "two.csv.gz"
    path.write_bytes(gzip.compress(b"0,1,2,255,7\n9,8,7,6,0\n", mtime=0))
    table = read_csv_images(path, (1, 2, 2))
    assert table.images.tolist() == [[[[0, 1], [2, 255]]], [[[9, 8], [7, 6]]]]
    assert table.labels.tolist() == [7, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2,3\n", "has 3 columns: it must have 4 pixels and a label"),
        ("1,2,3,256,0\n", r"has pixels in 1\.\.256: 0\.\.255 are allowed"),
        ("1,2,3,-4,0\n", r"has pixels in -4\.\.3"),
        ("1,2,3,x,0\n", "cannot be read"),
        ("1,2,3,,0\n", "cannot be read"),
        ("1,2,3,99999999999999999999,0\n", "cannot be read"),
        ("", "cannot be read: No columns"),
    ],
)
def test_broken_csv(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_csv_images(path, (1, 2, 2))


def test_csv_that_is_no_gzip(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv.gz"
    for content in (b"1,2,3,4,0\n", gzip.compress(b"1,2,3,4,0\n", mtime=0)[:-9]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            read_csv_images(path, (1, 2, 2))
