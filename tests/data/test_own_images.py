"""Own images: folders, parquet with bytes, tables of paths."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sluiceway.data import DataError, load_own, load_own_images
from sluiceway.data.own_images import Form

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def save(path: Path, pixels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def png(pixels: Any) -> bytes:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, format="PNG")
    return held.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images: three of class 2, two of class 9 (one deeper), one of class 10."""
    places = ("2/a", "2/b", "2/c", "9/deep/a", "9/b", "10/a")
    for place, pixels in zip(places, PIXELS, strict=True):
        save(tmp_path / "pics" / f"{place}.png", pixels)
    return tmp_path / "pics"


def test_a_folder_of_classes(folder: Path) -> None:
    data = load_own_images(folder, test_path=folder)
    assert data.label_names == ("2", "9", "10")
    assert data.source == "folder pics and folder pics"
    order = [5, 0, 1, 2, 4, 3]  # by path: 10/a, 2/a, 2/b, 2/c, 9/b, 9/deep/a
    assert data.train.labels.tolist() == [2, 0, 0, 0, 1, 1]
    assert np.array_equal(data.train.images[:, 0], PIXELS[order])
    assert (data.mean, data.std, data.augmentation.mirror) == ((0.5,), (0.25,), False)
    held = load_own_images(folder, test_fraction=0.34)
    assert (len(held.train), len(held.test)) == (4, 2)
    assert held.source == "folder pics (1 class has one row, never tested)"
    with pytest.raises(DataError, match=r"has 1 labels that the train rows lack \(10\)"):
        load_own_images(folder, label_names=("2", "9"))


def test_rows_of_some_classes(folder: Path, tmp_path: Path) -> None:
    data = load_own_images(folder, test_path=folder, classes=("10", "9", "7"))
    assert data.label_names == ("9", "10")
    assert data.train.labels.tolist() == [1, 0, 0]
    assert data.source.startswith("folder pics (3 of 6 rows of other classes left out) and ")
    with pytest.raises(DataError, match=r"no row has one of the 1 classes that are taken \(7\)"):
        load_own_images(folder, classes=("7",))
    (tmp_path / "notes.csv").write_text("text,label\na,1\nb,\nc,2\nd,1\ne,3\n")
    notes = tmp_path / "notes.csv"
    texts = load_own(notes, test_path=notes, classes=("2", "1"), label_names=("3", "2", "1"))
    assert texts.train.texts == ["a", "c", "d"]
    assert texts.train.labels.tolist() == [2, 1, 2]
    assert "(1 of 5 rows without text or label left out) (1 of 4 rows of other" in texts.source


def test_parquet_and_tables_of_paths_give_what_a_folder_gives(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    wanted = load_own_images(folder, test_path=folder)
    labels = [int(file.relative_to(folder).parts[0]) for file in files]
    raw = [file.read_bytes() for file in files]
    structs = [{"bytes": data, "path": None} for data in raw]
    for name, images in (("scan", raw), ("image", structs)):
        table = pa.table({name: [*images, None], "digit": [*labels, 2]})
        pq.write_table(table, tmp_path / "own.parquet")
        form = Form(image_column=name if name == "scan" else None, label_column="digit")
        data = load_own_images(tmp_path / "own.parquet", form, test_path=tmp_path / "own.parquet")
        assert np.array_equal(data.train.images, wanted.train.images)
        assert data.train.labels.tolist() == wanted.train.labels.tolist()
        assert f"1 of 7 rows without {name} or digit left out" in data.source
    lines = [
        f"{file.relative_to(tmp_path)},{label}" for file, label in zip(files, labels, strict=1)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["image,label", *lines]))
    data = load_own_images(tmp_path / "list.csv", test_path=folder)
    assert np.array_equal(data.train.images, wanted.train.images)
    (tmp_path / "list.csv").write_text("image,label\nnosuch.png,1\n")
    with pytest.raises(DataError, match=r"list\.csv, row 1: there is no file nosuch\.png"):
        load_own_images(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("photo,label\nnosuch.png,1\n")
    with pytest.raises(DataError, match=r"data\.image_column names another"):
        load_own_images(tmp_path / "list.csv")


def test_kinds_of_images_become_one_shape(tmp_path: Path) -> None:
    grey, pics = PIXELS[0], tmp_path / "pics"
    save(pics / "a" / "grey.png", grey)
    save(pics / "a" / "deep.png", grey.astype(np.uint16) * 256 + 7)
    save(pics / "a" / "clear.png", np.dstack([grey] * 3 + [np.full_like(grey, 9)]))
    save(pics / "b" / "big.png", np.full((40, 20), 77, dtype=np.uint8))
    with pytest.raises(DataError, match=r"deep\.png: is 1x8x8 and the first 3x8x8; data\.image"):
        load_own_images(pics)
    data = load_own_images(pics, Form(shape=(1, 8, 8)), test_path=pics)
    big, clear, deep = data.train.images[[3, 0, 1], 0]
    assert (big == 77).all()
    assert np.array_equal(deep, grey)
    assert np.array_equal(clear, grey)
    colour = save(tmp_path / "colour" / "a" / "x.png", COLOUR).parents[1]
    both = load_own_images([colour, pics], Form(shape=(3, 8, 8), mean=(0.1, 0.2, 0.3)), colour)
    assert np.array_equal(both.train.images[0].transpose(1, 2, 0), COLOUR)
    assert (both.mean, both.std) == ((0.1, 0.2, 0.3), (0.25,) * 3)


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda at: None, "there is no folder .*pics: images are in a folder for each class"),
        (
            lambda at: at.mkdir(),
            r"has no image \(\.png, \.jpg, \.jpeg\) in a folder for each class$",
        ),
        (lambda at: save(at / "x.png", PIXELS[0]), "1 images are in no such folder"),
        (lambda at: save(at / "a" / "x.png", PIXELS[0]).write_bytes(b"x"), r"x\.png is no PNG"),
        (
            lambda at: save(at / "a" / "x.png", PIXELS[0]).write_bytes(png(PIXELS[0])[:60]),
            r"x\.png: ",
        ),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, build: Any, line: str) -> None:
    build(tmp_path / "pics")
    with pytest.raises(DataError, match=line) as caught:
        load_own_images(tmp_path / "pics")
    assert "\n" not in str(caught.value)
