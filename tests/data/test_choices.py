import os
from pathlib import Path

import numpy as np
import pytest
from tests.data.helpers import hub_cache, label_counts, write_parquet

from sluiceway.data import (
    CHOICE_NAMES,
    ChoiceData,
    DataError,
    load_choices,
    partition,
)

FOUR = ["one", "two", "three", "four"]


def mmlu_columns(rows: int = 10) -> dict[str, list[object]]:
    return {
        "question": [f" What is {row}? " for row in range(rows)],
        "subject": ["zoology" if row % 2 else "algebra" for row in range(rows)],
        "choices": [[f"{word} {row}" for word in FOUR] for row in range(rows)],
        "answer": [row % 4 for row in range(rows)],
    }


def hellaswag_columns(rows: int = 10) -> dict[str, list[object]]:
    return {
        "ctx": [f"Sailing: boat {row}: she" for row in range(rows)],
        "endings": [[f"{word} {row}" for word in FOUR] for row in range(rows)],
        "label": [row % 4 for row in range(rows)],
    }


def rows_of(data: ChoiceData) -> list[tuple[str, tuple[str, ...], int]]:
    return [
        row
        for part in (data.train, data.test)
        for row in zip(part.contexts, part.endings, part.labels.tolist(), strict=True)
    ]


def test_mmlu_from_the_data_folder(data_folder: Path) -> None:
    write_parquet(data_folder / "mmlu" / "test.parquet", mmlu_columns())
    data = load_choices("mmlu")
    assert (data.name, data.label_names) == ("mmlu", ("A", "B", "C", "D"))
    assert data.source == "SLUICEWAY_DATA/mmlu (80/20 split of our own)"
    assert (len(data.train), len(data.test)) == (8, 2)
    expected = [
        (f"Question: What is {row}?\nAnswer:", tuple(f"{word} {row}" for word in FOUR), row % 4)
        for row in range(10)
    ]
    assert sorted(rows_of(data)) == expected
    # Sorted names, one row of each subject held out.
    assert data.test.groups["subject"].tolist() in ([0, 1], [1, 0])
    for context, subject in zip(data.train.contexts, data.train.groups["subject"], strict=True):
        assert int(context.split()[3][0]) % 2 == subject


def test_mmlu_from_the_hubs_cache_is_the_same(data_folder: Path) -> None:
    file = hub_cache("cais/mmlu", "all/test-00000-of-00001.parquet")
    write_parquet(file, mmlu_columns())
    cached = load_choices("mmlu")
    assert cached.source == "hub cais/mmlu (80/20 split of our own)"
    write_parquet(data_folder / "mmlu" / "test.parquet", mmlu_columns())
    assert rows_of(load_choices("mmlu")) == rows_of(cached)


def test_hellaswag_from_the_data_folder(data_folder: Path) -> None:
    columns = hellaswag_columns()
    columns["ctx"][3] = "Rowing: an oar. he"
    write_parquet(data_folder / "hellaswag" / "validation.parquet", columns)
    data = load_choices("hellaswag")
    assert data.source == "SLUICEWAY_DATA/hellaswag (80/20 split of our own)"
    assert ("Sailing: boat 7: she", ("one 7", "two 7", "three 7", "four 7"), 3) in rows_of(data)
    groups = dict(zip(data.train.contexts, data.train.groups["activity"], strict=True))
    assert groups.pop("Rowing: an oar. he") == 0
    assert set(groups.values()) == {1}


def test_hellaswag_from_the_hubs_cache_reads_as_its_evaluation_does(bare_machine: Path) -> None:
    columns = hellaswag_columns(5) | {
        "ctx": [
            "[header] How to sail [title] Get a boat. [step] This costs.",
            *(f"boat {row}" for row in range(4)),
        ],
        "label": ["3", "0", "1", "2", "3"],
        "activity_label": ["Hobbies", "Sailing", "Sailing", "Sailing", "Sailing"],
        "split_type": ["indomain"] * 5,
    }
    columns["endings"][0] = ["Swim [title] Dive. [substeps] Deep.", "[your town]", "c", "d"]
    file = hub_cache("Rowan/hellaswag", "data/validation-00000-of-00001.parquet")
    write_parquet(file, columns)
    data = load_choices("hellaswag")
    assert data.source == "hub Rowan/hellaswag (80/20 split of our own)"
    assert sorted(rows_of(data))[0] == (
        "Hobbies: How to sail. Get a boat. This costs.",
        ("Swim. Dive. Deep.", "[your town]", "c", "d"),
        3,
    )
    assert sorted(data.train.contexts + data.test.contexts)[1] == "Sailing: boat 0"
    assert set(data.train.groups) == {"activity"}


def test_empty_and_repeated_rows_are_left_out_and_counted(data_folder: Path) -> None:
    columns = mmlu_columns(12)
    columns["question"][1] = "  "
    columns["choices"][2] = ["one", " ", "three", "four"]
    columns["choices"][3] = ["one", "two", None, "four"]
    # The same question and right choice, though in another place.
    columns["question"][8] = columns["question"][4]
    columns["choices"][8] = ["x", "one 4", "y", "z"]
    columns["answer"][8] = 1
    # The same question with another right choice is another question.
    columns["question"][9] = columns["question"][5]
    write_parquet(data_folder / "mmlu" / "test.parquet", columns)
    data = load_choices("mmlu")
    assert data.source == (
        "SLUICEWAY_DATA/mmlu (3 rows with an empty text left out; 1 repeated rows left out; "
        "80/20 split of our own)"
    )
    endings = sorted(row[1][-1] for row in rows_of(data))
    assert endings == sorted(f"four {row}" for row in (0, 4, 5, 6, 7, 9, 10, 11))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("answer", 4, r"'answer' is 4 in row 3: it must be 0\.\.3"),
        ("answer", None, r"'answer' is None in row 3: it must be 0\.\.3"),
        ("choices", ["a", "b"], r"'choices' is \['a', 'b'\] in row 3: it must be a list of 4 "),
        ("choices", None, "'choices' is None in row 3"),
    ],
)
def test_values_that_do_not_fit(
    data_folder: Path, column: str, value: object, message: str
) -> None:
    columns = mmlu_columns()
    columns[column][2] = value
    write_parquet(data_folder / "mmlu" / "test.parquet", columns)
    with pytest.raises(DataError, match=message):
        load_choices("mmlu")


def test_columns_of_another_type_or_name(data_folder: Path) -> None:
    path = data_folder / "mmlu" / "test.parquet"
    path.parent.mkdir(parents=True)
    with pytest.raises(DataError, match=r"there is no file .*mmlu/test\.parquet"):
        load_choices("mmlu")
    write_parquet(path, mmlu_columns() | {"question": list(range(10))})
    with pytest.raises(DataError, match=r"test\.parquet: 'question' holds int in row 1: texts"):
        load_choices("mmlu")
    columns = mmlu_columns()
    del columns["subject"]
    write_parquet(path, columns)
    with pytest.raises(DataError, match=r"no column 'subject': the columns are question, choices"):
        load_choices("mmlu")


@pytest.mark.parametrize(
    ("name", "repo", "file"),
    [("mmlu", "cais/mmlu", "test"), ("hellaswag", "Rowan/hellaswag", "validation")],
)
def test_nowhere_names_every_place(bare_machine: Path, name: str, repo: str, file: str) -> None:
    with pytest.raises(DataError) as caught:
        load_choices(name)
    assert str(caught.value) == (
        f"data set '{name}' was found nowhere; looked in SLUICEWAY_DATA (not set), "
        f"the Hugging Face cache (no {repo}), the hub (HF_HUB_OFFLINE is set); "
        f"set SLUICEWAY_DATA to a folder that holds {name}/{file}.parquet"
    )


def test_unknown_names(bare_machine: Path) -> None:
    with pytest.raises(DataError, match="no multiple-choice data set 'arc': known are mmlu, hella"):
        load_choices("arc")
    assert CHOICE_NAMES == ("mmlu", "hellaswag")


REAL = os.environ.get("SLUICEWAY_DATA", "")


@pytest.mark.parametrize(
    ("name", "sizes", "repeats", "group", "groups"),
    [
        ("mmlu", (11134, 2783), 125, "subject", 57),
        ("hellaswag", (8015, 2004), 23, "activity", 192),
    ],
)
def test_real_data(
    name: str, sizes: tuple[int, int], repeats: int, group: str, groups: int
) -> None:
    if not REAL or not (Path(REAL) / name).is_dir():
        pytest.skip(f"SLUICEWAY_DATA has no {name}")
    data = load_choices(name)
    notes = f"{repeats} repeated rows left out; 80/20 split of our own"
    assert data.source == f"SLUICEWAY_DATA/{name} ({notes})"
    assert (len(data.train), len(data.test)) == sizes
    for part in (data.train, data.test):
        assert {len(endings) for endings in part.endings} == {4}
        assert set(part.labels) == set(range(4))
        texts = [*part.contexts, *(text for endings in part.endings for text in endings)]
        assert all(text and text == text.strip() for text in texts)
    asked = [(context, endings[label]) for context, endings, label in rows_of(data)]
    assert len(set(asked)) == len(asked)
    assert rows_of(load_choices(name)) == rows_of(data)
    train, test = (np.bincount(part.groups[group]) for part in (data.train, data.test))
    test = np.pad(test, (0, len(train) - len(test)))
    assert len(train) == groups
    # A fifth of every group, to within a row.
    assert (np.abs(test - (train + test) / 5) < 1).all()
    if name == "mmlu":
        assert (test > 0).all()


def test_a_natural_partition_of_real_subjects() -> None:
    if not REAL or not (Path(REAL) / "mmlu").is_dir():
        pytest.skip("SLUICEWAY_DATA has no mmlu")
    train = load_choices("mmlu").train
    parts = partition(
        "natural", train.labels, 10, seed=0, groups=train.groups, column="subject", alpha=0.1
    )
    assert sorted(np.concatenate(parts)) == list(range(len(train)))
    counts = label_counts(parts, train.groups["subject"], 57)
    assert (counts.max(axis=0) > counts.sum(axis=0) / 3).mean() > 0.9
