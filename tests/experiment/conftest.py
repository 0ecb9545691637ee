"""Recipes of a small federated and a small split run."""

from __future__ import annotations

from pathlib import Path

import pytest


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
