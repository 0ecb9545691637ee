"""Parquet files of tiny pictures, for tests."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def random_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """uint8 [count, *shape]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    """The bytes of one picture, uint8 [C, H, W]."""
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_pictures(
    path: Path,
    pictures: Sequence[bytes | None],
    labels: Sequence[object],
    column: str = "img",
    nested: bool = True,
    names: Sequence[str] | None = None,
) -> None:
    """A file as Hugging Face writes it, or with plain bytes where not `nested`."""
    cells = [{"bytes": picture, "path": None} for picture in pictures] if nested else pictures
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if nested else pa.binary()
    table = pa.table({column: pa.array(cells, type=kind), "label": list(labels)})
    if names is not None:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        metadata = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def label_counts(parts: Sequence[np.ndarray], labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Rows of each label that each client holds, int64 [clients, num_labels]."""
    return np.array([np.bincount(labels[part], minlength=num_labels) for part in parts])
