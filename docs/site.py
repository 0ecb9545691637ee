"""Hooks of the site: pages that are made from the code when it is built."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from sluiceway.experiment.reference import reference


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference of every recipe key."""
    files.append(File.generated(config, "recipe-keys.md", content=reference()))
    return files
