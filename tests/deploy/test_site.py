"""Site files, and sites with data of their own."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tests.nearby import NearbyTransport

from sluiceway.core.guards import RunFailed
from sluiceway.deploy.site import open_site
from sluiceway.errors import InputError
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run
from sluiceway.transport.protocol import Request
from sluiceway.transport.site import SiteError, whole


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "data is missing"),
        ("[data]\n", "give one of path, name and share"),
        ('[data]\npath = "a.csv"\nshare = true\n', "give one of path, name and share"),
        ("[data]\nshare = true\nwhat = 1\n", "unknown key data.what; allowed"),
        ("nonsense", "is not TOML"),
        ('[data]\nshare = "perhaps"\n', "data.share = 'perhaps'"),
    ],
)
def test_a_bad_site_file_is_one_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        open_site(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_site_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        open_site(tmp_path / "none.toml")


def test_nothing_is_done_before_joining(tmp_path: Path) -> None:
    site = open_site(written(tmp_path, "[data]\nshare = true\n"))
    with pytest.raises(SiteError, match="has not joined"):
        site.handle(Request("train"), tmp_path)


@pytest.mark.parametrize("facts", [{}, {"recipe": {}}, {"recipe": 3, "label_names": ["a"]}])
def test_an_invitation_that_is_none(tmp_path: Path, facts: dict[str, object]) -> None:
    site = open_site(written(tmp_path, "[data]\nshare = true\n"))
    with pytest.raises(InputError):
        site.handle(Request("join", facts), tmp_path)


@pytest.mark.parametrize("value", [None, -1, 1.0, True, "1"])
def test_facts_that_are_no_whole_numbers(value: object) -> None:
    with pytest.raises(SiteError, match="based must be an integer"):
        whole({"based": value}, "based")


def split_up(csv_file: Path, place: Path) -> tuple[list[Path], Path]:
    """The file's rows as two sites' files, of which the first lacks a class, and the test file."""
    with csv_file.open() as file:
        header, *rows = list(csv.reader(file))
    column = header.index("label")
    absent = sorted({row[column] for row in rows})[0]
    parts = [[r for r in rows[:40] if r[column] != absent], rows[40:80], rows[80:]]
    paths = []
    for number, part in enumerate(parts):
        path = place / f"part-{number}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *part])
        paths.append(path)
    return paths[:2], paths[2]


def test_sites_train_on_files_of_their_own(recipe: Path, csv_file: Path, tmp_path: Path) -> None:
    parts, test = split_up(csv_file, tmp_path)
    sites = {
        f"site-{i}": open_site(
            written(tmp_path / f"{i}", f'device = "cpu"\n[data]\npath = "{path}"\n')
        )
        for i, path in enumerate(parts)
    }
    chosen = load_recipe(
        recipe, ["data.clients=2", "run.rounds=2", f"data.path={test}", f"data.test_path={test}"]
    )
    found, _ = run(chosen, transport=NearbyTransport(sites, tmp_path / "rooms"))
    with parts[0].open() as file:
        held = len(list(csv.reader(file))) - 1
    assert sum(found.label_counts[0]) == held
    assert found.label_counts[0][0] == 0
    assert found.label_counts[1][0] > 0
    assert found.rejected == found.failed == 0


def test_a_class_that_the_run_does_not_have(recipe: Path, csv_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    own.write_text("text,label\na b,strange\n")
    site = open_site(written(tmp_path / "s", f'[data]\npath = "{own}"\n'))
    chosen = load_recipe(recipe, ["data.clients=1"])
    with pytest.raises(RunFailed, match=r"site s did not join: DataError: .*strange"):
        run(chosen, transport=NearbyTransport({"s": site}, tmp_path / "rooms"))


def test_as_many_sites_as_clients(recipe: Path, tmp_path: Path) -> None:
    site = open_site(written(tmp_path, "[data]\nshare = true\n"))
    with pytest.raises(InputError, match=r"data\.clients = 4, but there are 1 sites"):
        run(load_recipe(recipe), transport=NearbyTransport({"s": site}, tmp_path / "rooms"))
