"""Reading images from parquet, IDX and comma-separated files."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sluiceway.data.download import cache_folder
from sluiceway.data.errors import DataError
from sluiceway.data.tables import ByteArray, ImageTable
from sluiceway.errors import first_line
from sluiceway.files import replacing

Shape = tuple[int, int, int]
"""(C, H, W) of an image."""

#: What data sets call their column of images.
IMAGE_COLUMNS = ("img", "image")
#: Images that are read at once.
_BATCH = 1000
_IDX_BYTES = 0x08
#: No IDX file here is nearly as large; a header that claims more is broken.
_IDX_MOST = 1 << 30


def read_parquet_images(path: Path, shape: Shape) -> ImageTable:
    """Read a parquet file with a column of images and one of integer labels.

    The images are PNG or JPEG bytes, alone or in the struct {bytes, path} of Hugging Face, in the
    column `img` or `image`; labels are in `label`. What was decoded is kept in the cache folder
    and read from there as long as the file keeps its size and time of change.

    Args:
        path: the file.
        shape: (C, H, W) that every image must have, C being 1 or 3.

    Raises:
        DataError: no such file, unreadable, no rows, a missing column or one of another type, or an
            image that cannot be decoded or has another size (the line gives its row).
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with pq.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise DataError(f"{path} has no rows")
            names = file.schema_arrow.names
            if "label" not in names:
                raise DataError(f"{path} has no column 'label': the columns are {', '.join(names)}")
            labels = file.read(columns=["label"])["label"]
            if not pa.types.is_integer(labels.type) or labels.null_count:
                raise DataError(f"{path}: column 'label' must hold integers without gaps")
            cached = _cached_at(path, shape)
            images = _load_cached(cached, (len(labels), *shape))
            if images is None:
                images = _decode_all(_encoded_images(file, path), len(labels), path, shape)
                _save_cached(cached, images)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    return ImageTable(images, labels.to_numpy().astype(np.int64))


def read_image_files(paths: Sequence[Path], shape: Shape) -> ByteArray:
    """Read PNG or JPEG files: uint8 [N, C, H, W], 0 is black.

    Raises:
        DataError: unreadable, or another size.
    """
    from PIL import UnidentifiedImageError

    images = np.empty((len(paths), *shape), dtype=np.uint8)
    for row, path in enumerate(paths):
        try:
            images[row] = _decode(path.read_bytes(), shape)
        except UnidentifiedImageError as error:
            raise DataError(f"{path} is no PNG or JPEG") from error
        except Exception as error:
            raise DataError(f"{path}: {first_line(error)}") from error
    return images


def read_own_image(data: bytes, shape: Shape) -> ByteArray:
    """A PNG or JPEG of any size and kind as uint8 [C, H, W].

    It is turned as its camera says, its grey or colour is made what C says, 16 bits become the
    upper 8, transparency is dropped, and it is resized (bilinear) where it has another size.

    Raises:
        Exception: whatever Pillow raises for what it cannot decode.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
        image: Any = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "I;16", "I;16B"):
            image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).astype(np.uint8))
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def shape_of(data: bytes) -> Shape:
    """(C, H, W) of a PNG or JPEG, C being 1 for grey. Raises whatever Pillow raises."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        width, height = ImageOps.exif_transpose(image).size
        return (1 if image.mode in ("1", "L", "I", "I;16", "I;16B", "LA") else 3), height, width


def read_csv_images(path: Path, shape: Shape) -> ImageTable:
    """Read lines of C*H*W pixels 0..255 and a label, separated by commas; gzipped if named so.

    Raises:
        DataError: unreadable, another number of columns, or a value out of range.
    """
    import pandas as pd

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


def _idx(stream: Any, path: Path) -> ByteArray:
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


def _encoded_images(file: pq.ParquetFile, path: Path) -> Iterable[bytes | None]:
    schema = file.schema_arrow
    name = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if name is None:
        raise DataError(
            f"{path} has no column {' or '.join(map(repr, IMAGE_COLUMNS))}: "
            f"the columns are {', '.join(schema.names)}"
        )
    kind = schema.field(name).type
    nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not (nested or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{path}: column {name!r} holds {kind}: it must hold PNG or JPEG bytes")
    for batch in file.iter_batches(_BATCH, columns=[f"{name}.bytes" if nested else name]):
        column = batch.column(0)
        yield from (column.field("bytes") if nested else column).to_pylist()


def _decode_all(encoded: Iterable[bytes | None], count: int, path: Path, shape: Shape) -> ByteArray:
    from PIL import UnidentifiedImageError

    images = np.empty((count, *shape), dtype=np.uint8)
    for row, data in enumerate(encoded):
        try:
            images[row] = _decode(data, shape)
        except UnidentifiedImageError as error:  # its message is the stream's address
            raise DataError(f"{path}, row {row + 1}: the image is no PNG or JPEG") from error
        # Pillow's decoders raise many types on broken images, SyntaxError among them.
        except Exception as error:
            raise DataError(f"{path}, row {row + 1}: {first_line(error)}") from error
    return images


def _decode(data: bytes | None, shape: Shape) -> ByteArray:
    """uint8 of `shape`. Raises whatever Pillow raises, and ValueError for what does not fit."""
    from PIL import Image

    channels, height, width = shape
    if data is None:
        raise ValueError("the image is missing")
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        # Before any pixel is decoded: the size is in the header.
        if image.size != (width, height):
            found = f"{image.size[0]}x{image.size[1]}"
            raise ValueError(f"the image is {found}: it must be {width}x{height}")
        if image.mode not in ("1", "L", "P", "RGB"):
            raise ValueError(f"the image has the mode {image.mode}: it must be 8-bit grey or RGB")
        mode = "L" if channels == 1 else "RGB"
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _cached_at(path: Path, shape: Shape) -> Path:
    place = hashlib.sha256(f"{path.resolve()} {shape}".encode()).hexdigest()[:16]
    state = path.stat()
    return cache_folder() / "images" / place / f"{state.st_size}-{state.st_mtime_ns}.npy"


def _load_cached(cached: Path, shape: tuple[int, ...]) -> ByteArray | None:
    """What `_save_cached` wrote, or None where it is not there or not whole."""
    try:
        images = np.load(cached, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return images if images.dtype == np.uint8 and images.shape == shape else None


def _save_cached(cached: Path, images: ByteArray) -> None:
    try:
        with replacing(cached) as draft, draft.open("wb") as file:
            np.save(file, images)
        for other in cached.parent.glob("*.npy"):
            if other != cached:  # of an older state of the same file
                other.unlink(missing_ok=True)
    except OSError:
        return  # without a cache the next run decodes again
