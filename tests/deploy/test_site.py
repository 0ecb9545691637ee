"""Site files, and sites with data of their own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.nearby import NearbyTransport

from sluiceway.core.guards import RunFailed
from sluiceway.data import DataError
from sluiceway.deploy.site import open_site
from sluiceway.deploy.site_file import Invitation, OwnData, require_allowed, write_site_file
from sluiceway.deploy.site_images import images_of_files, named_data
from sluiceway.errors import InputError
from sluiceway.experiment.recipe import load_recipe, recipe_from
from sluiceway.experiment.run import run
from sluiceway.experiment.session import load_texts
from sluiceway.transport.protocol import Request
from sluiceway.transport.site import SiteError, whole


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.toml"
    path.write_text(text)
    return path


#: Of a site that takes the recipe's model from this machine.
ANY = 'recipe_files = ["/"]\n'


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


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[data]\npath = "none.csv"\n', "data.path = 'none.csv': there is no such file"),
        ('model = "none"\n[data]\nshare = true\n', "model = 'none': there is no such file"),
        ('device = "cuda:77"\n[data]\nshare = true\n', "cannot be used here"),
        ("[data]\nshare = true\n[policy]\nleast = 3\n", "unknown key policy.least; allowed"),
    ],
)
def test_what_a_site_file_names_is_looked_for_at_once(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        open_site(written(tmp_path, text))


@pytest.mark.parametrize(
    ("policy", "settings", "why"),
    [
        ("least_examples = 1000", [], "least number of examples"),
        ('methods = ["fedavg"]', [], "does not allow method.name = 'fedalign-moe'"),
        ("epsilon = 4", [], "this run's is inf"),
        ("epsilon = 4", ["epsilon=5"], "this run's is 5"),
        ("epsilon = 4", ["epsilon=4"], None),
        ("epsilon = 4", ["epsilon=1", "where=server"], "this run's is inf"),
    ],
)
def test_a_site_takes_part_as_its_policy_allows(
    recipe: Path, tmp_path: Path, policy: str, settings: list[str], why: str | None
) -> None:
    private = ["name=gaussian", "clip=1", "where=client", *settings] if settings else []
    method = ["method.name=fedavg"] if private else []
    keys = [f"method.privacy.{one}" for one in private]
    chosen = load_recipe(recipe, ["data.clients=1", "run.rounds=1", *method, *keys])
    text = f'device = "cpu"\nrecipe_files = ["/"]\n[data]\nshare = true\n[policy]\n{policy}\n'
    site = open_site(written(tmp_path / "site", text))
    transport = NearbyTransport({"one": site}, tmp_path)
    if why is None:
        run(chosen, transport=transport)
        log = (tmp_path / "site" / "kept" / "sent.jsonl").read_text().splitlines()
        assert [json.loads(entry)["asked"] for entry in log] == ["join", "head-sums", "train"]
        assert json.loads(log[-1])["bytes"] > 1000
        assert json.loads(log[0])["facts"]["label_counts"] == [1] * 3
    else:
        with pytest.raises(RunFailed, match=why):
            run(chosen, transport=transport)


def test_a_recipe_names_no_files_of_a_site(recipe: Path, tmp_path: Path) -> None:
    text = 'device = "cpu"\n[data]\nshare = true\n'
    site = open_site(written(tmp_path / "site", text))
    chosen = load_recipe(recipe, ["data.clients=1", "run.rounds=1"])
    with pytest.raises(RunFailed, match="names a file of this machine"):
        run(chosen, transport=NearbyTransport({"one": site}, tmp_path))


def test_files_that_a_recipe_may_name(recipe: Path, tmp_path: Path) -> None:
    chosen = load_recipe(recipe, [])
    place = Path(str(chosen.data.path)).parent
    require_allowed(chosen, [place, chosen.model.name])
    with pytest.raises(InputError, match=r"data\.path = .* names a file"):
        require_allowed(chosen, [place / "below", chosen.model.name])
    up = chosen.data.model_copy(update={"path": str(place / "below" / ".." / "secret.csv")})
    with pytest.raises(InputError, match=r"data\.path"):
        require_allowed(
            chosen.model_copy(update={"data": up}), [place / "below", chosen.model.name]
        )


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
            written(tmp_path / f"{i}", f'device = "cpu"\n{ANY}[data]\npath = "{path}"\n')
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


def classes_of(site: str, path: Path) -> list[str]:
    """The lines of a site file whose data are at a path, with data.classes where `site` has it."""
    return [f'device = "cpu"\n{ANY}[data]\npath = "{path}"', *([site] if site else []), ""]


@pytest.mark.parametrize(
    ("settings", "site"),
    [
        (['data.classes=["topic2","topic0"]'], ""),
        (['data.classes=["topic2","topic0"]'], 'classes = ["topic0", "topic1", "topic2"]'),
        ([], 'classes = ["topic0", "topic2"]'),
    ],
)
def test_sites_leave_out_rows_of_other_classes_and_number_as_the_run_does(
    recipe: Path, csv_file: Path, tmp_path: Path, settings: list[str], site: str
) -> None:
    parts, test = split_up(csv_file, tmp_path)
    if not settings:  # the server's own rows have the run's classes and no others
        lines = [row for row in test.read_text().splitlines() if "topic1" not in row]
        test.write_text("\n".join(lines))
    sites = {}
    for i, path in enumerate(parts):
        file = written(tmp_path / f"{i}", "\n".join(classes_of(site, path)))
        sites[f"site-{i}"] = open_site(file)
    keys = ["data.clients=2", "run.rounds=1", f"data.path={test}", f"data.test_path={test}"]
    chosen = load_recipe(recipe, [*keys, *settings])
    transport = NearbyTransport(sites, tmp_path / "rooms")
    found, summary = run(chosen, transport=transport)
    names = ["topic2", "topic0"] if settings else ["topic0", "topic2"]
    assert list(summary["label_names"]) == names
    for path, counts in zip(parts, found.label_counts, strict=True):
        held = [row["label"] for row in csv.DictReader(path.open())]
        assert list(counts) == [held.count(name) for name in names]


def test_classes_of_a_site_file_that_the_run_does_not_have(
    recipe: Path, csv_file: Path, tmp_path: Path
) -> None:
    for number, (lines, why) in enumerate(
        [
            ('classes = ["topic0", "topik1"]', "data.classes has 'topik1', which is no class"),
            ('classes = ["topic0"]\ntext_column = "none"', "no column 'none'"),
        ]
    ):
        text = "\n".join(classes_of(lines, csv_file))
        site = open_site(written(tmp_path / f"{number}", text))
        with pytest.raises(RunFailed, match=why):
            run(
                load_recipe(recipe, ["data.clients=1"]),
                transport=NearbyTransport({"s": site}, tmp_path / f"rooms-{number}"),
            )
    with pytest.raises(InputError, match=r"data\.classes of a site file needs data\.path"):
        open_site(written(tmp_path / "s", '[data]\nshare = true\nclasses = ["a"]\n'))


def test_merged_labels_at_sites() -> None:
    """Of a data set that has a name they are merged here as there; own files are refused."""
    tables = {
        "data": {"name": "20newsgroups", "alpha": 1, "coarse": 3, "seed": 4, "limit": 60},
        "method": {"name": "fedavg"},
    }
    recipe = recipe_from(tables)
    there = load_texts(recipe.data)
    invited = Invitation(recipe, there.label_names, 0, None)
    here = load_texts(named_data(OwnData(name="20newsgroups", limit=60), invited))
    assert here.label_names == there.label_names
    assert len(here.label_names) == 3
    with pytest.raises(InputError, match=r"data\.coarse merges labels of a data set"):
        OwnData(path="a.csv").taken(invited)


def test_images_of_a_site_by_class(tmp_path: Path) -> None:
    pixels = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8)
    for place, image in zip(("ant/a", "bee/a", "bee/b", "cat/a", "cat/b"), pixels, strict=True):
        path = tmp_path / "pics" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    tables = {
        "run": {"kind": "split"},
        "data": {"path": "pics", "alpha": 1, "classes": ["cat", "ant"]},
        "model": {"name": "conv4", "cut": "conv2"},
        "method": {"name": "sl"},
    }
    own = OwnData(path="pics")
    invited = Invitation(recipe_from(tables), ("cat", "ant"), 0, None)
    found = images_of_files(own, tmp_path, invited)
    assert found.train.labels.tolist() == [1, 0, 0]
    assert np.array_equal(found.train.images[:, 0], pixels[[0, 3, 4]])
    tables["data"] = {"path": "pics", "alpha": 1}
    invited = Invitation(recipe_from(tables), ("bee", "cat"), 0, None)
    with pytest.raises(DataError, match=r"labels that the train rows lack \(ant\)"):
        images_of_files(own, tmp_path, invited)
    found = images_of_files(OwnData(path="pics", classes=("bee",)), tmp_path, invited)
    assert found.train.labels.tolist() == [0, 0]


#: A network for images of 9x9, that of a site whose images are 8x8, and one with a logit too few.
UNFIT = """
from torch import nn
def narrow(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(81, classes))
def short(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes - 1))
"""


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ("narrow", "the model cannot be run on these examples: RuntimeError: mat1 and mat2 shapes"),
        ("short", "client 1 has the label 2, and the model gives 2 logits"),
    ],
)
def test_a_split_site_tries_its_network_before_it_joins(
    tmp_path: Path, made: str, why: str
) -> None:
    for number in range(6):
        path = tmp_path / "pics" / f"c{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * number).save(path)
    (tmp_path / "net.py").write_text(UNFIT)
    text = f'device = "cpu"\nmodel = "net.py:{made}"\n[data]\npath = "pics"\n'
    keys: Any = "not used before the network is tried"
    site = open_site(written(tmp_path, text), keys)
    tables = {
        "run": {"kind": "split"},
        "data": {"path": "pics", "alpha": 1, "clients": 2, "image_shape": "1x8x8"},
        "model": {"name": made, "cut": "0"},
        "method": {"name": "sl"},
    }
    facts = {"recipe": tables, "label_names": ["c0", "c1", "c2"], "client": 1}
    address = {"endpoint": {"host": "localhost", "port": 1}}
    with pytest.raises(InputError, match=why):
        site.handle(Request("join", facts | address), tmp_path)


def test_a_site_tries_its_model_before_it_joins(recipe: Path, tmp_path: Path) -> None:
    code = """
from torch import nn
from sluiceway.experiment.models import load_pretrained
class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)
    def forward(self, input_ids, attention_mask):
        raise RuntimeError("no such thing")
def make():
    return Fails(), load_pretrained(MODEL).tokenizer
"""
    chosen = load_recipe(
        recipe, ["data.clients=1", "method.name=fedavg", "model.head_start=random"]
    )
    (tmp_path / "net.py").write_text(code.replace("MODEL", repr(chosen.model.name)))
    own = tmp_path / "own.csv"
    own.write_text("text,label\na b,a\n")
    site = open_site(written(tmp_path, f'model = "net.py:make"\n[data]\npath = "{own}"\n'))
    tables = chosen.resolved()
    tables["model"] = {"name": "make"}
    facts = {"recipe": tables, "label_names": ["a", "b", "c"], "client": 0}
    with pytest.raises(InputError, match=r"cannot be run on these examples: .*no such thing"):
        site.handle(Request("join", facts), tmp_path)


@pytest.mark.slow
def test_sites_hold_out_what_clients_of_one_machine_do(recipe: Path, tmp_path: Path) -> None:
    keys = ["data.clients=2", "run.rounds=2", "model.head_start=random"]
    whole, _ = run(load_recipe(recipe, keys))
    held = load_recipe(recipe, [*keys, "data.local_test=0.4"])
    here, summary = run(held)
    sizes = [round(0.4 * sum(counts)) for counts in whole.label_counts]
    for size, before, after in zip(sizes, whole.label_counts, here.label_counts, strict=True):
        assert sum(before) - sum(after) == size
    for number, size in enumerate(sizes):  # a share of so many examples
        right = here.personal_accuracy[number] * size
        assert right == pytest.approx(round(right), abs=1e-9)
    assert here.personal_accuracy != whole.personal_accuracy
    assert summary["personal_accuracy"] == {str(k): v for k, v in here.personal_accuracy.items()}
    text = f'device = "cpu"\n{ANY}[data]\nshare = true\n'
    sites = {name: open_site(written(tmp_path / name, text)) for name in "ab"}
    there, _ = run(held, transport=NearbyTransport(sites, tmp_path / "rooms"))
    assert there.personal_accuracy == here.personal_accuracy
    assert there.label_counts == here.label_counts
    assert [r.accuracy for r in there.records] == [r.accuracy for r in here.records]


def test_a_site_is_tested_on_a_part_of_its_file_or_on_its_test_path(
    recipe: Path, csv_file: Path, tmp_path: Path
) -> None:
    keys = ["data.clients=2", "run.rounds=1", "data.local_test=0.3", "method.name=fedavg"]
    (first, second), rest = split_up(csv_file, tmp_path)
    files = {"a": f'path = "{first}"', "b": f'path = "{second}"\ntest_path = "{rest}"'}
    sites = {}
    for name, data in files.items():
        text = f'device = "cpu"\n{ANY}[data]\n{data}\n'
        sites[name] = open_site(written(tmp_path / name, text))
    found, _ = run(load_recipe(recipe, keys), transport=NearbyTransport(sites, tmp_path / "rooms"))
    held = [len(list(csv.DictReader(path.open()))) for path in (first, second, rest)]
    assert sum(found.label_counts[0]) == held[0] - round(0.3 * held[0])
    assert sum(found.label_counts[1]) == held[1]
    for number, size in ((0, round(0.3 * held[0])), (1, held[2])):
        right = found.personal_accuracy[number] * size
        assert right == pytest.approx(round(right), abs=1e-9)


def test_a_class_that_the_run_does_not_have(recipe: Path, csv_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    own.write_text("text,label\na b,strange\n")
    site = open_site(written(tmp_path / "s", f'{ANY}[data]\npath = "{own}"\n'))
    chosen = load_recipe(recipe, ["data.clients=1"])
    with pytest.raises(RunFailed, match=r"site s did not join: DataError: .*strange"):
        run(chosen, transport=NearbyTransport({"s": site}, tmp_path / "rooms"))


def test_a_client_without_examples_is_no_obstacle_to_a_trial(recipe: Path, tmp_path: Path) -> None:
    keys = ["data.clients=6", "data.limit=6", "data.alpha=0.05", "run.rounds=1", "run.personal=0"]
    chosen = load_recipe(recipe, keys)
    here, _ = run(chosen)
    assert [0] * 3 in here.label_counts
    sites = {name: open_site(write_site_file(tmp_path / name, "cpu")) for name in "abcdef"}
    there, _ = run(chosen, transport=NearbyTransport(sites, tmp_path / "rooms"))
    assert there.label_counts == here.label_counts
    assert there.records[0].accuracy == here.records[0].accuracy


def test_as_many_sites_as_clients(recipe: Path, tmp_path: Path) -> None:
    site = open_site(written(tmp_path, "[data]\nshare = true\n"))
    with pytest.raises(InputError, match=r"data\.clients = 4, but there are 1 sites"):
        run(load_recipe(recipe), transport=NearbyTransport({"s": site}, tmp_path / "rooms"))
