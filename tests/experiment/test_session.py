from pathlib import Path

import pandas as pd

from sluiceway.experiment.recipe import Data
from sluiceway.experiment.session import load_pictures, load_texts


def test_a_validation_part_leaves_the_test_set_alone(tmp_path: Path) -> None:
    for part, size in (("train", 40), ("test", 12)):
        frame = pd.DataFrame(
            {"text": [f"{part} {i}" for i in range(size)], "label": [0, 1] * (size // 2)}
        )
        frame.to_parquet(tmp_path / f"{part}.parquet")
    paths = {"path": f"{tmp_path}/train.parquet", "test_path": f"{tmp_path}/test.parquet"}
    plain = load_texts(Data(alpha=1.0, **paths))
    assert sorted(plain.test.texts) == sorted(f"test {i}" for i in range(12))
    tuned = load_texts(Data(alpha=1.0, validation=0.25, limit=20, **paths))
    assert (len(tuned.train), len(tuned.test)) == (20, 10)
    assert not set(tuned.train.texts) & set(tuned.test.texts)
    assert {text.split()[0] for text in tuned.test.texts} == {"train"}


def test_a_validation_part_of_images(tmp_path: Path) -> None:
    plain, tuned = (load_pictures(Data(name="digits", alpha=1.0, validation=v)) for v in (0, 0.5))
    assert len(tuned.train) + len(tuned.test) == len(plain.train)
