"""Hooks of the site: pages that are made when it is built, from the code or a page above docs/."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from sluiceway.experiment.reference import reference

ROOT = Path(__file__).parents[1]
#: Pages of the repository's root that the site has too, in lower case.
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference of every recipe key, and the pages of the repository's root."""
    made = {"recipe-keys.md": reference()}
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        made[page.lower()] = text.replace("](docs/", "](")
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to pages of the root lead to their copies in the site."""
    for page in PAGES:
        markdown = markdown.replace(f"](../{page}", f"]({page}").replace(
            f"]({page}", f"]({page.lower()}"
        )
    return markdown
