"""Hooks of the site: pages that are made when it is built, from the code or a page above docs/."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from sluiceway.experiment.reference import reference

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference of every recipe key, and the pages of the repository's root."""
    made = {"recipe-keys.md": reference()}
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8").replace("](docs/", "](")
        for other in PAGES:
            text = text.replace(f"]({other}", f"]({other.lower()}")
        made[page.lower()] = text
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files
