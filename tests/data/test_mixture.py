"""Several sources as one: rows in order with their parts and places, columns that fit together or are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from sft_jax.config.data import Mixture
from sft_jax.data.rows import Rows
from sft_jax.data.sources import load_rows
from sft_jax.errors import DataError

Source = dict[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Prepared rows go to a directory of the test, where the files are called by their names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def csv(name: str, *lines: str, **splits: str) -> Source:
    """A CSV of these lines as the training rows of a source."""
    Path(name).write_text("\n".join(lines) + "\n")
    return {"kind": "files", "train": name, **splits}


def saved(name: str, labels: list[str], **columns: list[Any]) -> Source:
    """A saved data set with named labels as a source."""
    kinds = {"label": ClassLabel(names=labels)} if labels else {}
    found = Dataset.from_dict(columns)
    DatasetDict({"train": found.cast(Features({**found.features, **kinds}))}).save_to_disk(name)
    return {"kind": "hub", "name": name}


def mixed(*sources: Source, column: str | None = None) -> dict[str, Rows]:
    """The rows of parts called a, b, c."""
    parts = [{"name": name, "source": source} for name, source in zip("abc", sources, strict=False)]
    return load_rows(Mixture.model_validate({"kind": "mixture", "parts": parts, "column": column}))


def refused(*sources: Source, column: str | None = None) -> str:
    """What is said of parts that do not fit."""
    with pytest.raises(DataError) as caught:
        mixed(*sources, column=column)
    return str(caught.value)


def test_parts_stand_one_after_the_other():
    """Rows keep their order, part and place; whole numbers beside fractions are numbers; columns go by their names."""
    one, two = csv("one.csv", "text,label", "a,1", "b,2"), csv("two.csv", "label,text", "0.5,c", "", "7,d")
    rows = mixed(one, two)["train"]
    assert rows.column("text") == ["a", "b", "c", "d"] and rows.column("label") == [1.0, 2.0, 0.5, 7.0]
    assert rows.part.tolist() == [0, 0, 1, 1]
    assert [rows.place(i) for i in range(4)] == [
        "one.csv, line 2",
        "one.csv, line 3",
        "two.csv, line 2",
        "two.csv, line 4",
    ]
    assert rows.select([3, 0]).part.tolist() == [1, 0] and rows.select([3]).place(0) == "two.csv, line 4"


def test_rows_without_files_are_called_by_their_part():
    """Rows of a data set without lines are said by part and number; label names that agree stay."""
    sources = [saved(f"set{i}", ["bad", "good"], text=[f"{i}", "x"], label=[0, 1]) for i in range(2)]
    rows = mixed(*sources)["train"]
    assert [rows.place(i) for i in range(4)] == ["a, row 1", "a, row 2", "b, row 1", "b, row 2"]
    assert rows.table.features["label"].names == ["bad", "good"] and rows.column("label") == [0, 1, 0, 1]


def test_the_part_can_be_a_column():
    """`column` makes a column of the names of the parts, and refuses a name that is taken."""
    one, two = csv("one.csv", "text", "a", "b"), csv("two.csv", "text", "c")
    assert mixed(one, two, column="source")["train"].column("source") == ["a", "a", "b"]
    assert "column 'text', which data.source.column would make, is there; choose another" in refused(one, column="text")


def test_splits_are_those_of_the_parts_that_have_them():
    """A split is made of the parts that name it, and their numbers stay those of the parts."""
    csv("held.csv", "text", "x", "y")
    rows = mixed(csv("one.csv", "text", "a"), csv("two.csv", "text", "b", test="held.csv"))
    assert rows.keys() == {"train", "test"} and rows["test"].part.tolist() == [1, 1]
    assert rows["test"].column("text") == ["x", "y"]


def test_a_column_that_a_part_lacks_is_named_when_it_is_asked_for():
    """C21: rows of a part without a column have None there; to read the column names the parts that lack it."""
    rows = mixed(csv("one.csv", "text,label", "a,1"), csv("two.csv", "text", "b"), csv("three.csv", "text", "c"))[
        "train"
    ]
    assert rows.column("text") == ["a", "b", "c"]
    with pytest.raises(DataError) as caught:
        rows.select([0]).column("label")
    assert str(caught.value) == (
        "data.source.train: no column 'label' in part 'b', part 'c', which other parts have; "
        "rename the column that stands for it there"
    )


def test_a_column_that_parts_may_lack_is_none_there():
    """Who reads a column that rows may have or not finds None in a part without it, and what stands in the others."""
    Path("one.jsonl").write_text('{"text": "a", "n": 1, "o": {"x": 1}}\n')
    rows = mixed({"kind": "files", "train": "one.jsonl"}, csv("two.csv", "text,m", "b,2"))["train"]
    optional = replace(rows, lacking={})
    assert optional.column("n") == [1, None] and optional.column("o") == [{"x": 1}, None]
    assert optional.column("m") == [None, 2] and optional.texts("m") == [None, "2"]


def test_what_is_bad_in_a_part_stays_said():
    """Bad rows of every part are kept, with their places."""
    rows = mixed(csv("one.csv", "text,label", "a,1", "b"), csv("two.csv", "text,label", "c,2,3", "d,4"))["train"]
    assert [bad.place for bad in rows.bad] == ["one.csv, line 3", "two.csv, line 2"] and len(rows) == 2


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"label": ["good"]}, "column 'label' holds whole numbers in part 'a', texts in 'b'"),
        ({"label": [True]}, "column 'label' holds whole numbers in part 'a', true or false in 'b'"),
        ({"label": [[1]]}, "column 'label' holds whole numbers in part 'a', lists of whole numbers in 'b'"),
        ({"label": [{"x": 1}]}, "column 'label' holds whole numbers in part 'a', objects in 'b'"),
    ],
)
def test_columns_of_other_types_are_refused(other, said):
    """I: parts whose columns hold other things are an error that names both where the column is read, no sooner."""
    rows = mixed(csv("one.csv", "text,label", "a,1"), saved("set", [], text=["b"], **other))["train"]
    assert rows.column("text") == ["a", "b"]
    with pytest.raises(DataError) as caught:
        rows.column("label")
    assert str(caught.value) == f"data.source.train: {said}; make them alike, or take another column"


def test_labels_of_other_names_are_refused():
    """Numbers of labels that are called otherwise in another part, or not called at all, are never mixed up."""
    one = saved("one", ["bad", "good"], text=["a"], label=[0])
    other = saved("two", ["good", "bad"], text=["a"], label=[0])
    for parts, said in (
        ((one, other), "labels named bad, good in part 'a', labels named good, bad in 'b'"),
        ((csv("n.csv", "label", "1"), one), "whole numbers in part 'a', labels named bad, good in 'b'"),
    ):
        with pytest.raises(DataError, match=f"column 'label' holds {said}"):
            mixed(*parts)["train"].column("label")


def test_types_that_hold_the_same_are_one():
    """Texts, numbers and lists in narrower or wider forms, and columns of nothing, fit together."""
    narrow = Features(
        {"text": Value("large_string"), "n": Value("int32"), "l": List(Value("float32")), "none": Value("null")}
    )
    rows = {"text": ["a"], "n": [1], "l": [[0.5]], "none": [None]}
    DatasetDict({"train": Dataset.from_dict(rows, narrow)}).save_to_disk("narrow")
    wide = saved("wide", [], text=["b"], n=[2], l=[[1.5, 2.0]], none=["x"])
    found = mixed({"kind": "hub", "name": "narrow"}, wide)["train"]
    assert found.table.to_list() == [
        {"text": "a", "n": 1, "l": [0.5], "none": None}, {"text": "b", "n": 2, "l": [1.5, 2.0], "none": "x"}
    ]  # fmt: skip


def test_mistakes_name_the_part(monkeypatch):
    """What is wrong in a part is said at the part: a missing file, no row, and a name that stands twice."""

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    good = csv("one.csv", "text", "a")
    assert refused(good, {"kind": "files", "train": "no.csv"}).startswith("data.source.parts.b.train: no.csv cannot be")
    assert refused(good, {"kind": "hub", "name": "nowhere/x"}).startswith("data.source.parts.b: 'nowhere/x' (split")
    with pytest.raises(DataError, match=r"^data\.source\.parts: a stands twice; give each part a name of its own$"):
        load_rows(Mixture.model_validate({"kind": "mixture", "parts": [{"name": "a", "source": good}] * 2}))
