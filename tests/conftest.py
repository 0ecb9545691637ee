"""Fixtures that many tests share."""

from __future__ import annotations

import csv
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small tensors, and processes that fork

import pytest
import torch
from hypothesis import HealthCheck, settings
from tests.worlds import WORDS, TinyClassifier, TinyText, tiny_bert
from transformers import BertTokenizerFast

# On a busy machine any example takes long: no test is about time.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def moe_model() -> TinyClassifier:
    return TinyClassifier()


@pytest.fixture
def text_clients() -> list[TinyText]:
    """Unequal clients: one holds a single example, one none."""
    return [TinyText(30, 1), TinyText(1, 2), TinyText(0, 3), TinyText(17, 4)]


@pytest.fixture
def text_test() -> TinyText:
    return TinyText(60, 99)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny BERT with its tokenizer, for recipes whose model.name is a folder."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(vocab)).save_pretrained(folder)
    tiny_bert().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def csv_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 short texts with one of three labels, which the first word tells."""
    g = torch.Generator().manual_seed(5)
    path = tmp_path_factory.mktemp("own") / "notes.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "site"])
        for _ in range(150):
            label = int(torch.randint(3, (), generator=g))
            rest = [WORDS[int(i)] for i in torch.randint(3, 40, (5,), generator=g)]
            writer.writerow([" ".join([WORDS[label], *rest]), f"topic{label}", f"site{label % 2}"])
    return path


@pytest.fixture
def recipe(tmp_path: Path, model_folder: Path, csv_file: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(
        f"""
        [run]
        rounds = 3
        workers = 1
        device = "cpu"
        [data]
        path = "{csv_file}"
        clients = 4
        alpha = 0.5
        max_tokens = 12
        [model]
        name = "{model_folder}"
        experts = 4
        [method]
        name = "fedalign-moe"
        [train]
        lr = 0.02
        """
    )
    return path


@pytest.fixture
def split_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "digits.toml"
    path.write_text(
        """
        [run]
        kind = "split"
        rounds = 4
        device = "cpu"
        [data]
        name = "digits"
        clients = 3
        alpha = 0.5
        limit = 240
        test_limit = 100
        [model]
        name = "conv4"
        width = 8
        cut = "conv2"
        [method]
        name = "sl"
        [train]
        optimizer = "sgd"
        lr = 0.05
        momentum = 0.9
        batch_size = 16
        """
    )
    return path
