"""`sluiceway predict`: a trained model on a file of texts, or on images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sluiceway.data import is_missing, read_columns, read_image_files
from sluiceway.errors import InputError
from sluiceway.experiment.trained import Predictions, TrainedModel
from sluiceway.files import replacing

#: Endings of images that a folder is searched for.
IMAGES = (".png", ".jpg", ".jpeg")
#: Endings of files of predictions.
FORMS = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Inputs:
    """What is predicted on.

    Attributes:
        names: of each row, the text or the path of its image.
        values: N texts, or images uint8 [N, C, H, W].
        labels: of each row as text, where the file has them.
    """

    names: Sequence[str]
    values: Any
    labels: Sequence[str] | None = None


def read_inputs(path: Path, model: TrainedModel) -> Inputs:
    """Texts of a file (csv, jsonl, parquet), or images: a file, or all below a folder by name.

    Raises:
        DataError: it cannot be read, or has no text in a row.
        InputError: there is no such file, the model takes no such inputs, or there are none.
    """
    if not path.exists():
        raise InputError(f"there is no {path}")
    if model.pretrained is not None:
        return texts_of(path, model)
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
    files = found if path.is_dir() else [path]
    if not files:
        raise InputError(f"there is no image ({', '.join(IMAGES)}) in {path}")
    assert model.input is not None
    channels, height, width = model.input["shape"]
    images = read_image_files(files, (channels, height, width))
    # Folders named like the classes are labels.
    labels = [file.parent.name for file in files]
    known = path.is_dir() and set(labels) <= set(model.label_names)
    return Inputs([str(file) for file in files], images, labels if known else None)


def texts_of(path: Path, model: TrainedModel) -> Inputs:
    """Texts of a file, and their labels if it has any. Raises as `read_inputs`."""
    columns, data = read_columns(path), model.recipe.data
    texts = columns[data.text_column]
    for row, text in enumerate(texts, 1):
        if is_missing(text):
            raise InputError(f"{path}, row {row}: column {data.text_column!r} has no text")
    if not texts:
        raise InputError(f"{path} has no rows")
    labels = None
    if data.label_column in columns.values:
        labels = [str(value) for value in columns[data.label_column]]
    return Inputs([str(text) for text in texts], [str(text) for text in texts], labels)


def table(inputs: Inputs, found: Predictions) -> pd.DataFrame:
    """A row an input: the input, its label, that label's probability, and that of every class."""
    best = found.probabilities.max(1).values
    columns: dict[str, Any] = {
        "input": list(inputs.names),
        "predicted": found.labels,
        "probability": best.tolist(),
    }
    each = found.probabilities.T.tolist()
    return pd.DataFrame(
        columns | {f"p({n})": p for n, p in zip(found.label_names, each, strict=True)}
    )


def require_form(path: Path | None) -> None:
    """Raise InputError for a file of predictions of another form."""
    if path is not None and path.suffix not in FORMS:
        raise InputError(f"--out {path}: its ending must be one of {', '.join(FORMS)}")


def write(frame: pd.DataFrame, path: Path | None) -> str:
    """Write predictions as the ending says; without a path they are returned as csv."""
    if path is None:
        return frame.to_csv(index=False)
    with replacing(path) as draft:
        if path.suffix == ".parquet":
            frame.to_parquet(draft)
        elif path.suffix == ".csv":
            frame.to_csv(draft, index=False)
        else:
            rows = frame.to_dict("records")
            draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ""


def agreement(inputs: Inputs, found: Predictions) -> str | None:
    """How many of the labels that the inputs came with were predicted, as one line."""
    if inputs.labels is None:
        return None
    right = sum(a == b for a, b in zip(inputs.labels, found.labels, strict=True))
    count = len(inputs.labels)
    return f"{right} of {count} labels predicted: accuracy {right / count:.4f}"
