"""Pictures out of parquet files, decoded once and kept."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from sluiceway.data.cache import cache_folder, replacing
from sluiceway.data.errors import DataError, first_line
from sluiceway.data.image_tables import ByteArray, ImageTable, Shape
from sluiceway.data.tables import IntArray

IMAGE_COLUMNS = ("img", "image")
"""What data sets call their column of pictures."""
_MODES = {1: "L", 3: "RGB"}
_BATCH = 1000


def read_parquet_images(path: Path, shape: Shape) -> ImageTable:
    """Read a parquet file with a column of pictures and one of integer labels.

    The pictures are PNG or JPEG bytes, alone or in the struct {bytes, path} of Hugging Face, in the
    column `img` or `image`; labels are in `label`. What was decoded is kept in the cache folder
    and read from there as long as the file keeps its size and time of change.

    Args:
        path: the file.
        shape: (C, H, W) that every picture must have, C being 1 or 3.

    Raises:
        DataError: no such file, unreadable, no rows, a missing column or one of another type, or a
            picture that cannot be decoded or has another size (the line gives its row).
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with pq.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise DataError(f"{path} has no rows")
            labels = _labels(file, path)
            kept = _kept_at(path, shape)
            images = _kept(kept, (len(labels), *shape))
            if images is None:
                images = _decoded(file, path, shape)
                _keep(kept, images)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    return ImageTable(images, labels)


def _labels(file: pq.ParquetFile, path: Path) -> IntArray:
    names = file.schema_arrow.names
    if "label" not in names:
        raise DataError(f"{path} has no column 'label': the columns are {', '.join(names)}")
    column = file.read(columns=["label"])["label"]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(f"{path}: column 'label' must hold integers without gaps")
    labels: IntArray = column.to_numpy().astype(np.int64)
    return labels


def _decoded(file: pq.ParquetFile, path: Path, shape: Shape) -> ByteArray:
    images = np.empty((file.metadata.num_rows, *shape), dtype=np.uint8)
    for row, picture in enumerate(_pictures(file, path)):
        try:
            images[row] = _pixels(picture, shape)
        except UnidentifiedImageError as error:  # its message is the stream's address
            raise DataError(f"{path}, row {row + 1}: the picture is no PNG or JPEG") from error
        # Pillow's decoders raise many types on broken pictures, SyntaxError among them.
        except Exception as error:
            raise DataError(f"{path}, row {row + 1}: {first_line(error)}") from error
    return images


def _pictures(file: pq.ParquetFile, path: Path) -> Iterator[bytes | None]:
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


def _pixels(picture: bytes | None, shape: Shape) -> ByteArray:
    """uint8 of `shape`. Raises whatever Pillow raises, and ValueError for what does not fit."""
    channels, height, width = shape
    if picture is None:
        raise ValueError("the picture is missing")
    with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
        # Before any pixel is decoded: the size is in the header.
        if image.size != (width, height):
            found = f"{image.size[0]}x{image.size[1]}"
            raise ValueError(f"the picture is {found}: it must be {width}x{height}")
        if image.mode not in ("1", "L", "P", "RGB"):
            raise ValueError(f"the picture has the mode {image.mode}: it must be 8-bit grey or RGB")
        mode = _MODES[channels]
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _kept_at(path: Path, shape: Shape) -> Path:
    place = hashlib.sha256(f"{path.resolve()} {shape}".encode()).hexdigest()[:16]
    state = path.stat()
    return cache_folder() / "images" / place / f"{state.st_size}-{state.st_mtime_ns}.npy"


def _kept(kept: Path, shape: tuple[int, ...]) -> ByteArray | None:
    """What `_keep` wrote, or None where it is not there or not whole."""
    try:
        images = np.load(kept, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return images if images.dtype == np.uint8 and images.shape == shape else None


def _keep(kept: Path, images: ByteArray) -> None:
    try:
        with replacing(kept) as file:
            np.save(file, images)
        for other in kept.parent.glob("*.npy"):
            if other != kept:  # of an older state of the same file
                other.unlink(missing_ok=True)
    except OSError:
        return  # without a cache the next run decodes again
