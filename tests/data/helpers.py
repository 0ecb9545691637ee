"""Files of tiny data sets, for tests."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants
from PIL import Image


def write_parquet(
    path: Path,
    columns: Mapping[str, object],
    names: Sequence[str] | None = None,
    label: str = "label",
) -> Path:
    """A file as Hugging Face writes it; `names` are those of the label column's integers."""
    table = pa.table(dict(columns))
    if names is not None:
        features = {label: {"names": list(names), "_type": "ClassLabel"}}
        metadata = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def hub_cache(repo: str, file: str) -> Path:
    """Where the Hugging Face cache has a file of a data set repository."""
    root = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text("abc")
    return root / "snapshots" / "abc" / file


def random_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """uint8 [count, *shape]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    """The bytes of one picture, uint8 [C, H, W]."""
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_images(
    path: Path,
    images: Sequence[np.ndarray | bytes | None],
    labels: Sequence[object] | None = None,
    column: str = "img",
    nested: bool = True,
    names: Sequence[str] | None = None,
) -> Path:
    """A file of encoded images, in Hugging Face's struct or as plain bytes where not `nested`."""
    cells = [encoded(image) if isinstance(image, np.ndarray) else image for image in images]
    if nested:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        values = pa.array([{"bytes": cell, "path": None} for cell in cells], type=kind)
    else:
        values = pa.array(cells, type=pa.binary())
    given = list(range(len(cells)) if labels is None else labels)
    return write_parquet(path, {column: values, "label": given}, names)


def label_counts(parts: Sequence[np.ndarray], labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Rows of each label that each client holds, int64 [clients, num_labels]."""
    return np.array([np.bincount(labels[part], minlength=num_labels) for part in parts])
