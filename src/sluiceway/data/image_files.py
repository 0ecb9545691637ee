"""Reading images from IDX and comma-separated files."""

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from sluiceway.data.errors import DataError, first_line
from sluiceway.data.image_tables import ByteArray, ImageTable, Shape

_IDX_BYTES = 0x08
_IDX_MOST = 1 << 30
"""No IDX file here is nearly as large; a header that claims more is broken."""


def read_idx(path: Path) -> ByteArray:
    """Read an IDX file of unsigned bytes, the format of MNIST, gzipped or not.

    It holds two zero bytes, the type 8, the number of dimensions, each of them as a big-endian
    32-bit integer, and then the values.

    Raises:
        DataError: no such file, unreadable, another format or type, or fewer or more values than
            its header says.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _idx(raw, path)
            with gzip.open(raw) as unzipped:
                return _idx(unzipped, path)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def read_csv_images(path: Path, shape: Shape) -> ImageTable:
    """Read lines of C*H*W pixels 0..255 and a label, separated by commas; gzipped if named so.

    Raises:
        DataError: unreadable, another number of columns, or a value out of range.
    """
    pixels = math.prod(shape)
    try:
        values = pd.read_csv(path, header=None, dtype=np.int64).to_numpy()
    except (OSError, EOFError, OverflowError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    if values.shape[1] != pixels + 1:
        raise DataError(
            f"{path} has {values.shape[1]} columns: it must have {pixels} pixels and a label"
        )
    images = values[:, :pixels]
    if images.min() < 0 or images.max() > 255:
        raise DataError(f"{path} has pixels in {images.min()}..{images.max()}: 0..255 are allowed")
    return ImageTable(images.astype(np.uint8).reshape(-1, *shape), values[:, pixels].copy())


def _idx(stream: IO[bytes] | gzip.GzipFile, path: Path) -> ByteArray:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or not 1 <= head[3] <= 4:
        raise DataError(f"{path} starts with {head.hex(' ')}: it is no IDX file")
    if head[2] != _IDX_BYTES:
        raise DataError(f"{path} holds values of IDX type {head[2]}: it must be 8, unsigned bytes")
    sizes = stream.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise DataError(f"{path} ends within its header")
    shape = tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))
    count = math.prod(shape)
    if count > _IDX_MOST:
        raise DataError(f"{path} claims {count} values: at most {_IDX_MOST} are read")
    values = stream.read(count + 1)
    if len(values) != count:
        found = "more" if len(values) > count else str(len(values))
        raise DataError(f"{path} has {found} values: its header says {count}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape).copy()
