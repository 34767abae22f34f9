"""What `predict` reads: lines, JSON lines, text files and tables, with whatever is in them."""

import json

import datasets
import pytest

from sft_jax.config.tasks import SequenceClassification
from sft_jax.errors import DataError
from sft_jax.infer.inputs import read_inputs, windows
from sft_jax.tasks.task import build_task

ODD = ["naïve café", "漢字 かな", "🎉 party", "a\u2028b", "c\x85d", "e\x0bf", "NA", "null", "None", '"quoted"', "007"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Prepared rows go to a directory of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def task():
    """A task whose text column is not called text."""
    section = SequenceClassification(kind="sequence_classification", text="sentence", labels=["no", "yes"])
    return build_task(section, {})


def test_lines_are_texts(task):
    """Lines of standard input are texts under the name that the task reads, in order and to the character."""
    assert read_inputs("", task, ODD).column("sentence") == ODD


def test_blank_lines_have_their_places(task):
    """S: empty lines and lines of spaces are no rows, and stand between them; a line break at the end makes no line."""
    rows = read_inputs("", task, ["one", "", "  \t", "two", ""])
    assert rows.column("sentence") == ["one", "two"] and [rows.place(row) for row in (0, 1)] == ["line 1", "line 4"]
    (window,) = windows(rows)
    assert [one if isinstance(one, int) else one.place for one in window.order] == [0, "line 2", "line 3", 1]
    assert len(read_inputs("", task, [])) == 0 and not [*windows(read_inputs("", task, []))]
    assert [bad.place for bad in read_inputs("", task, ["", " "]).bad] == ["line 1", "line 2"]


def test_json_lines_are_rows(task):
    """Lines that are all JSON objects are rows with those columns, spaces around them allowed."""
    rows = [{"sentence": text, "id": n} for n, text in enumerate(ODD)]
    lines = [f"  {json.dumps(row, ensure_ascii=False)} " for row in rows]
    assert read_inputs("", task, [*lines, ""]).table.to_list() == rows


def test_a_brace_among_texts_is_a_text(task):
    """Lines of which only some begin with a brace are texts."""
    lines = ["{unclosed", "plain"]
    assert read_inputs("", task, lines).column("sentence") == lines


@pytest.mark.parametrize("line", ['{"sentence": "a"', "{braces} of a text"])
def test_broken_json_lines_are_named(line, task):
    """Lines that look like JSON and are not are no rows, and their neighbours are."""
    rows = read_inputs("", task, ['{"sentence": "b"}', line])
    assert rows.column("sentence") == ["b"]
    (bad,) = rows.bad
    assert (bad.place, bad.reason) == ("line 2", "broken JSON") and bad.text.endswith("; mend the line")


def test_one_stray_line_makes_no_texts_of_json_lines(task):
    """Lines of which most are JSON objects are rows, and what is none among them is said, not taken for a text."""
    rows = read_inputs("", task, ['{"sentence": "a"}', "oops", '{"sentence": "b"}'])
    assert rows.column("sentence") == ["a", "b"] and [bad.place for bad in rows.bad] == ["line 2"]


@pytest.mark.parametrize("name", ["texts.txt", "TEXTS.TXT", "texts"])
def test_a_text_file_has_a_text_on_each_line(name, task, tmp_path):
    """A file called .txt, or without an ending, is lines that only line breaks divide, on Windows as well."""
    for ending in ("\n", "\r\n"):
        (tmp_path / name).write_bytes((ending.join(["one", "", *ODD]) + ending).encode())
        assert read_inputs(str(tmp_path / name), task).column("sentence") == ["one", *ODD]


def test_json_lines_in_a_text_file_are_rows(task, tmp_path):
    """The content of a text file is understood as that of standard input."""
    (tmp_path / "rows.txt").write_text('{"sentence": "a\u2028b"}\n{"sentence": "c"}\n', encoding="utf-8")
    assert read_inputs(str(tmp_path / "rows.txt"), task).table.to_list() == [
        {"sentence": "a\u2028b"},
        {"sentence": "c"},
    ]


def test_tables_are_rows(task, tmp_path):
    """CSV, JSON lines and Parquet files are rows, read as training reads them."""
    rows = [{"sentence": text, "id": str(n)} for n, text in enumerate(["a, b", "NA", "漢字\nかな"])]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(str(tmp_path / "rows.csv"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ending in ("csv", "parquet", "jsonl"):
        assert read_inputs(str(tmp_path / f"rows.{ending}"), task).column("sentence") == [
            row["sentence"] for row in rows
        ]


def test_a_text_file_that_cannot_be_read_is_named(task, tmp_path):
    """S: a missing file is one clear line, and a byte that is not UTF-8 costs the line that it is in."""
    file = tmp_path / "texts.txt"
    with pytest.raises(DataError, match=r"texts\.txt cannot be read \(No such file or directory\); check"):
        read_inputs(str(file), task)
    file.write_bytes(b"one\ncaf\xe9\ntwo")
    rows = read_inputs(str(file), task)
    assert rows.column("sentence") == ["one", "two"]
    assert [bad.place.rpartition("/")[2] for bad in rows.bad] == ["texts.txt, line 2"]


def test_a_file_of_an_unknown_kind_is_refused(task, tmp_path):
    """Other endings are refused with those that are known."""
    with pytest.raises(DataError, match=r"^input: files ending in \.docx; give files of one kind among \.csv, "):
        read_inputs(str(tmp_path / "rows.docx"), task)
