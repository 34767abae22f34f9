"""What `predict` reads: lines, JSON lines, text files and tables, with whatever is in them."""

import json

import datasets
import pytest

from sft_jax.config.tasks import SequenceClassification
from sft_jax.errors import DataError
from sft_jax.infer.predict import read_inputs
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


def test_blank_lines_are_no_inputs(task):
    """Empty lines and lines of spaces, such as after the last line break, are passed over."""
    assert read_inputs("", task, ["one", "", "  \t", "two", ""]).column("sentence") == ["one", "two"]
    assert len(read_inputs("", task, [])) == len(read_inputs("", task, ["", " "])) == 0


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
def test_broken_json_lines_are_one_clear_line(line, task):
    """Lines that look like JSON and are not get named, with both forms that are understood."""
    with pytest.raises(DataError) as caught:
        read_inputs("", task, [line])
    message = str(caught.value)
    assert message.startswith("input: not JSON lines (") and "\n" not in message
    assert message.endswith("; give a text or a JSON object on each line")


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


@pytest.mark.parametrize("content", [None, b"caf\xe9\n"])
def test_a_text_file_that_cannot_be_read_is_one_clear_line(content, task, tmp_path):
    """A missing file, or one that is not UTF-8, is named in one line."""
    file = tmp_path / "texts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_inputs(str(file), task)
    assert str(caught.value).startswith(f"{file}: cannot be read as UTF-8 text (") and "\n" not in str(caught.value)


def test_a_file_of_an_unknown_kind_is_refused(task, tmp_path):
    """Other endings are refused with those that are known."""
    with pytest.raises(DataError, match=r"^input: files ending in \.docx; give files of one kind among \.csv, "):
        read_inputs(str(tmp_path / "rows.docx"), task)
