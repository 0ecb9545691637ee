import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sluiceway.data import DataError, load_own

Rows = list[dict[str, object]]


def write_csv(path: Path, rows: Rows) -> None:
    header = list(rows[0])
    quoted = [",".join('"' + str(row[name]) + '"' for name in header) for row in rows]
    path.write_text("\n".join([",".join(header), *quoted]), encoding="utf-8")


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".csv": write_csv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}
every_format = pytest.mark.parametrize("suffix", WRITERS)


def write(path: Path, rows: Rows) -> Path:
    WRITERS[path.suffix](path, rows)
    return path


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
    assert (data.name, data.source) == ("mine", f"files {train} and {test}")
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


def test_numbers_that_would_not_survive_stay_strings(tmp_path: Path) -> None:
    rows: Rows = [{"text": "a", "label": "007"}, {"text": "b", "label": "7"}]
    path = write(tmp_path / "codes.csv", rows)
    assert load_own(path, test_path=path).label_names == ("007", "7")


def test_words_for_missing_are_values(tmp_path: Path) -> None:
    rows: Rows = [{"text": "null", "label": "NA"}, {"text": "nan", "label": "None"}]
    path = write(tmp_path / "words.csv", rows)
    data = load_own(path, test_path=path)
    assert data.train.texts == ["null", "nan"]
    assert data.label_names == ("NA", "None")


def test_missing_group_values_are_a_group(tmp_path: Path) -> None:
    rows: Rows = [
        {"text": "a", "label": "x", "site": "s", "year": 1},
        {"text": "b", "label": "x", "site": None, "year": None},
    ]
    path = write(tmp_path / "gaps.jsonl", rows)
    groups = load_own(path, test_path=path).train.groups
    assert groups["site"].tolist() == [1, 0]
    assert groups["year"].tolist() == [1, 0]


def test_without_a_test_file_rows_are_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", rows_of(50))
    data = load_own(path, test_fraction=0.2, seed=1)
    assert data.source == f"file {path}"
    assert (len(data.train), len(data.test)) == (40, 10)
    assert sorted(data.train.texts + data.test.texts) == sorted(str(r["text"]) for r in rows_of(50))
    assert load_own(path, seed=1).test.texts == data.test.texts
    assert load_own(path, seed=2).test.texts != data.test.texts
    with pytest.raises(DataError, match=r"test fraction of 1\.5"):
        load_own(path, test_fraction=1.5)


@every_format
def test_a_missing_column_lists_the_columns_there_are(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mine{suffix}", [{"body": "a", "y": "b"}])
    with pytest.raises(DataError, match=r"mine.* has no column 'text': the columns are body, y"):
        load_own(path)
    with pytest.raises(DataError, match="no column 'label'"):
        load_own(path, text_column="body")


@every_format
@pytest.mark.parametrize("column", ["text", "label"])
def test_empty_values_are_counted(tmp_path: Path, suffix: str, column: str) -> None:
    rows: Rows = [{"text": "a", "label": "x"} for _ in range(5)]
    rows[1][column] = ""
    rows[3][column] = "  "
    path = write(tmp_path / f"gaps{suffix}", rows)
    line = rf"2 of 5 rows have an empty '{column}' \(the first is row 2\)"
    with pytest.raises(DataError, match=line):
        load_own(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_null_and_nan_are_empty(tmp_path: Path, suffix: str) -> None:
    rows: Rows = [{"text": "a", "label": 1.0}, {"text": None, "label": float("nan")}]
    path = write(tmp_path / f"gaps{suffix}", rows)
    with pytest.raises(DataError, match="1 of 2 rows have an empty 'text'"):
        load_own(path)
    with pytest.raises(DataError, match="1 of 2 rows have an empty 'label'"):
        load_own(write(tmp_path / f"full{suffix}", [{**row, "text": "t"} for row in rows]))


def test_short_csv_rows_are_empty_values(tmp_path: Path) -> None:
    path = tmp_path / "short.csv"
    path.write_text("text,label\na,x\nb\n")
    with pytest.raises(DataError, match="1 of 2 rows have an empty 'label'"):
        load_own(path)


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


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("mine.txt", "a", r"suffix '.txt': it must be one of .parquet, .csv, .jsonl"),
        ("empty.csv", "", "is empty: it needs a header line"),
        ("header.csv", "text,label\n", "has no rows"),
        ("empty.jsonl", "\n\n", "has no rows"),
        ("empty.parquet", "", "cannot be read"),
        ("wide.csv", "text,label\na,b\na,b,c\n", "cannot be read"),
        ("shifted.csv", "text,label\na,b,c\na,b,c\n", "more fields than its header"),
        ("bad.parquet", "no parquet at all", "cannot be read"),
        ("bad.jsonl", '{"text": "a"}\n{"text":\n', "line 2 of .* is not JSON"),
        ("list.jsonl", '["a"]\n', "line 1 of .* holds list: it must be an object"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: str, line: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=line) as caught:
        load_own(path)
    assert "\n" not in str(caught.value)


@every_format
def test_bytes_that_are_no_utf8(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"latin{suffix}"
    path.write_bytes(b"text,label\n\xe9t\xe9,x\n")
    with pytest.raises(DataError, match="cannot be read"):
        load_own(path)


@every_format
def test_a_missing_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=f"there is no file .*gone{suffix}"):
        load_own(tmp_path / f"gone{suffix}")
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(DataError, match=f"there is no file .*folder{suffix}"):
        load_own(folder)
