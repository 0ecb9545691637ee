"""Own images: folders of PNG and JPEG files, parquet with their bytes, tables that name files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sluiceway.data.augment import Augmentation
from sluiceway.data.columns import (
    TABLES,
    Columns,
    class_names,
    code_labels,
    form_of,
    name_integers,
    of_labels,
    read_all,
    title_of,
    without_gaps,
)
from sluiceway.data.errors import DataError
from sluiceway.data.image_files import IMAGE_COLUMNS, Shape, read_own_image, shape_of
from sluiceway.data.own import Paths, found_files, own_parts
from sluiceway.data.tables import ImageData, ImageTable
from sluiceway.errors import first_line

#: Endings of images.
IMAGE_FILES = (".png", ".jpg", ".jpeg")
#: By channel, of pixels scaled to 0..1: the same for everybody, so that no client's pixels decide
#: another's input.
MEAN, STD = 0.5, 0.25


@dataclass(frozen=True)
class Form:
    """How own images are to be read.

    Attributes:
        shape: (C, H, W) that all are given; None for that of the first, which all must have.
        image_column: of tables; None for `img` or `image`.
        label_column: of tables.
        encoding: of tables that are not parquet.
        mean, std: of pixels scaled to 0..1, one number or one for each channel.
    """

    shape: Shape | None = None
    image_column: str | None = None
    label_column: str = "label"
    encoding: str = "utf-8"
    mean: Sequence[float] = (MEAN,)
    std: Sequence[float] = (STD,)


def is_table(path: str | Path) -> bool:
    """Whether a path is that of a table, by its ending, and not a folder or an image."""
    return form_of(Path(path)) in TABLES


def load_own_images(
    path: Paths,
    form: Form | None = None,
    test_path: Paths | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    label_names: Sequence[str] | None = None,
    classes: Collection[str] | None = None,
) -> ImageData:
    """Load labelled images of one's own.

    A folder has a folder for each class, named like it, with PNG and JPEG files at any depth.
    Tables have a column of images (`img`, `image` or as `form` says) and one of labels: parquet
    with PNG or JPEG bytes, alone or in the struct {bytes, path} of Hugging Face, or any table with
    paths of files, relative to the table. Rows without an image or label are left out, and
    `source` counts them.

    Args:
        path: to train on: a folder, a file, a pattern, or several of them.
        form: see `Form`.
        test_path: to evaluate on; without it images are held out of `path`.
        test_fraction, seed, label_names, classes: as of `load_own`.

    Raises:
        DataError: nothing is there, no class has an image, an image cannot be decoded or has
            another shape (the line names it), and what `load_own` raises for tables.
    """
    form = form or Form()
    named = [found_files(each) for each in (path, test_path) if each is not None]
    splits, images, notes = [], [], []
    for files in named:
        columns, read, note = _listed(files, form)
        columns, other = of_labels(columns, _LABEL, classes)
        splits.append(columns)
        images.append(read)
        notes.append(note + (f" ({other})" if other else ""))
    codes, names = code_labels(splits, _LABEL, label_names)
    shape = form.shape or _shape_of_first(splits[0], images[0])
    tables = [
        ImageTable(_decoded(columns, read, shape, form.shape is None), labels)
        for columns, read, labels in zip(splits, images, codes, strict=True)
    ]
    train, test, note = own_parts(tables, test_fraction, seed)
    mean, std = (by_channel(values, shape[0]) for values in (form.mean, form.std))
    # Left and right may matter, as in digits and X-rays: images are shifted, not mirrored.
    augmentation = Augmentation(padding=min(shape[1:]) // 8, mirror=False)
    source = " and ".join(notes) + note
    return ImageData(named[0][0].stem, source, train, test, names, mean, std, augmentation)


#: Columns of what is listed: the image (bytes, or the path of its file) and its label.
_IMAGE, _LABEL = "image", "label"
Read = Callable[[Any], bytes]


def _listed(files: Sequence[Path], form: Form) -> tuple[Columns, Read, str]:
    """Images and labels as columns, how an image's bytes are read, and what the source is."""
    tables = [path for path in files if is_table(path)]
    if tables and len(tables) < len(files):
        raise DataError(f"{title_of(files)}: give folders of images or tables, not both")
    return _of_tables(tables, form) if tables else _of_folders(files)


def _of_folders(folders: Sequence[Path]) -> tuple[Columns, Read, str]:
    images: list[object] = []
    labels: list[object] = []
    loose = 0
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"there is no folder {folder}: images are in a folder for each class, "
                f"or in a table ({', '.join(TABLES)})"
            )
        for file in sorted(folder.rglob("*")):
            parts = file.relative_to(folder).parts
            if file.suffix.lower() not in IMAGE_FILES or any(p.startswith(".") for p in parts):
                continue
            if len(parts) == 1:
                loose += 1
                continue
            images.append(str(file))
            labels.append(parts[0])
    where = "folder " + ", ".join(str(folder) for folder in folders)
    if not images:
        raise DataError(
            f"{where} has no image ({', '.join(IMAGE_FILES)}) in a folder for each class"
            + (f"; {loose} images are in no such folder" if loose else "")
        )
    numbers = [_number(label) for label in labels]
    if None not in numbers:  # so that "10" comes after "9"
        labels = list(numbers)
    title = "folder " + ", ".join(folder.name or str(folder) for folder in folders)
    note = f"{title} ({loose} images in no class's folder left out)" if loose else title
    columns = Columns({_IMAGE: images, _LABEL: labels}, where)
    return columns, lambda name: Path(name).read_bytes(), note


def _number(label: object) -> int | None:
    text = str(label)
    return int(text) if text.isdecimal() and str(int(text)) == text else None


def _of_tables(files: Sequence[Path], form: Form) -> tuple[Columns, Read, str]:
    columns = read_all(files, form.encoding)
    names = class_names(files[0], form.label_column)
    name = form.image_column or next((n for n in IMAGE_COLUMNS if n in columns.values), None)
    if name is None:
        raise DataError(
            f"{columns.where} has no column {' or '.join(map(repr, IMAGE_COLUMNS))}: the columns "
            f"are {', '.join(columns.values)}; data.image_column names another"
        )
    columns = columns.having(name, [_bare(value) for value in columns[name]])
    columns, note = without_gaps(columns, name, form.label_column)
    if names is not None:
        columns = name_integers(columns, form.label_column, names)
    listed = Columns({_IMAGE: columns[name], _LABEL: columns[form.label_column]}, columns.where)
    title = title_of(files) + (f" ({note})" if note else "")
    return listed, lambda value: _bytes(value, files[0].parent), title


def _bare(value: object) -> object:
    """Bytes of a struct {bytes, path}, or its path where it has no bytes."""
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


def _bytes(value: object, folder: Path) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"it is {type(value).__name__}, neither bytes nor the path of a file")
    return (folder / value).read_bytes()


def _shape_of_first(columns: Columns, read: Read) -> Shape:
    first = columns[_IMAGE][0]
    try:
        return shape_of(read(first))
    except Exception as error:
        raise DataError(_fault(columns, 0, error)) from error


def _decoded(columns: Columns, read: Read, shape: Shape, strict: bool) -> Any:
    """uint8 [N, C, H, W]. Raises DataError: not decodable, or of another shape where `strict`."""
    values: Iterable[object] = columns[_IMAGE]
    images = np.empty((len(columns[_IMAGE]), *shape), dtype=np.uint8)
    for row, value in enumerate(values):
        try:
            data = read(value)
            if strict and (found := shape_of(data)) != shape:
                raise ValueError(
                    f"is {_said(found)} and the first {_said(shape)}; "
                    f'data.image_shape = "{_said(shape)}" makes all alike'
                )
            images[row] = read_own_image(data, shape)
        # Pillow's decoders raise many types on broken images, SyntaxError among them.
        except Exception as error:
            raise DataError(_fault(columns, row, error)) from error
    return images


def _said(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _fault(columns: Columns, row: int, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    value = columns[_IMAGE][row]
    where = value if isinstance(value, str) else f"{columns.where}, row {row + 1}"
    if isinstance(error, UnidentifiedImageError):  # its message is the stream's address
        return f"{where} is no PNG or JPEG"
    if isinstance(error, FileNotFoundError):
        return f"{columns.where}, row {row + 1}: there is no file {value}"
    return f"{where}: {first_line(error)}"


def by_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number for each channel. Raises DataError: there are neither one nor so many."""
    if len(values) not in (1, channels):
        raise DataError(f"{len(values)} means or deviations for images of {channels} channels")
    return tuple(values) * (channels // len(values))
