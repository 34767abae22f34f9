"""CSV, JSON lines and text record by record: each is a row that knows its line, or is named by line; none is lost."""

import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sft_jax.config.data import Files
from sft_jax.data import gather, records, store, tables
from sft_jax.data.arrays import is_idx
from sft_jax.data.prepare import read_texts
from sft_jax.data.rows import Rows
from sft_jax.data.sources import READERS, load_files, load_rows
from sft_jax.errors import DataError
from sft_jax.tasks.answer_columns import read_answers

WHERE = "data.source.train"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """`read("name.csv", content)`: its rows, the file being called by its name."""
    monkeypatch.chdir(tmp_path)

    def reader(name: str, content: str | bytes) -> Rows:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return load_files([name], WHERE)

    return reader


def places(rows: Rows) -> list[str]:
    """Where each row stands."""
    return [rows.place(i) for i in range(len(rows))]


def said(rows: Rows) -> list[tuple[str, str]]:
    """Where each piece stands that is no row, and what it is counted as."""
    return [(bad.place, bad.reason) for bad in rows.bad]


# CSV.


def test_rows_of_csv_know_their_lines(read):
    """A row is called by the physical line that it begins on, past blank lines and cells of several lines."""
    rows = read("a.csv", 'text,label\none,1\n\n"two\n\nlines",2\nthree,3\n')
    assert rows.column("text") == ["one", "two\n\nlines", "three"]
    assert places(rows) == ["a.csv, line 2", "a.csv, line 4", "a.csv, line 7"] and not rows.bad
    assert places(rows.select([2, 0])) == ["a.csv, line 7", "a.csv, line 2"], "lost in a selection"


@pytest.mark.parametrize(
    ("content", "bad", "kept"),
    [
        (
            b"a,1\nb,2,3\nc\nd,4\n",
            [("line 3", "wrong number of cells"), ("line 4", "wrong number of cells")],
            ["a", "d"],
        ),
        (b'a,1\n"b,2\nc,3\n', [("line 3", "broken quotes")], ["a", "c"]),
        (b'"b,1\nc,2\n"d",3\ne,4\n', [("line 2", "broken quotes")], ["c", "d", "e"]),
        (b'a "b" c,1\n"d" e,2\nf,3\n', [("line 3", "broken quotes")], ['a "b" c', "f"]),
        (b"caf\xe9,1\nb,2\n", [("line 2", "broken UTF-8")], ["b"]),
        (b'a,1\n"b\n\xff",2\nc,3\n', [("line 3", "broken UTF-8")], ["a", "c"]),
        (b"a\0,1\nb,2\n", [("line 2", "NUL character")], ["b"]),
    ],
)
def test_records_that_are_no_row_are_named(content, bad, kept, read):
    """What is broken in a CSV is named by its line and nothing beside it is lost: an open quote costs its own line."""
    rows = read("a.csv", b"text,label\n" + content)
    assert said(rows) == [(f"a.csv, {line}", reason) for line, reason in bad]
    assert rows.column("text") == kept


def test_what_is_wrong_is_said(read):
    """The text of a bad row says what is wrong there and what was expected."""
    rows = read("a.csv", b'text,label\na,1,2\nb\xe9,1\n"c" d,1\n"e,1\n')
    assert [bad.text for bad in rows.bad] == [
        "cells: 3, expected 2 as in line 1",
        "not UTF-8 (byte 0xe9 at character 2); save the file as UTF-8, or set data.source.encoding (cp1252 where "
        "Windows wrote it)",
        "a quote ends where neither a comma nor the line follows; double those inside",
        "a quote is opened and never closed; close it, or double it",
    ]


def test_a_column_without_a_name_of_its_own_is_said(read):
    """T: a nameless column, as of the index of pandas, and a second one of a name are left out, which stops nothing.

    Only to read the column that stands twice is an error.
    """
    rows = read("a.csv", ",text,text,label\n0,a,b,1\n")
    assert rows.names == ["text", "label"] and rows.column("label") == [1] and not rows.bad
    assert rows.notes == (
        "a.csv: column 1 has no name, as of an index that pandas writes, and is left out",
        "a.csv: column 3 is called 'text' too, and is left out",
    )
    with pytest.raises(DataError, match=r"column 'text' stands twice in a.csv, line 1; give each column a name"):
        rows.texts("text")


@pytest.mark.parametrize("name", ["text", "label"])
def test_cells_of_digits_are_texts_for_who_reads_texts(name, read):
    """T: a text of digits in a CSV is a text, as is the one row 911 of a file, and a number only as label or score."""
    rows = read("a.csv", "text,label\n911,7\n")
    assert rows.texts(name) == [{"text": "911", "label": "7"}[name]]
    assert rows.column(name) == [{"text": 911, "label": 7}[name]]
    assert read_texts(rows, [name])[1] == {}


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "-2", "0"], [1, -2, 0]),
        (["1", "", "3"], [1, None, 3]),
        (["1", "2.5", "-1e3"], [1.0, 2.5, -1000.0]),
        (["01", "2", "3"], ["01", "2", "3"]),
        (["+1", "2", "3"], ["+1", "2", "3"]),
        (["1", "NA", ""], ["1", "NA", ""]),
        (["nan", "inf", "1"], ["nan", "inf", "1"]),
        (["1e999", "2", "3"], ["1e999", "2", "3"]),
        (["1", "9223372036854775808", "3"], ["1", "9223372036854775808", "3"]),
        (["9223372036854775807", "-9223372036854775808", "0"], [2**63 - 1, -(2**63), 0]),
        (["", "", ""], ["", "", ""]),
        (["١", "2", "3"], ["١", "2", "3"]),
        (["1\n", "2", "3"], ["1\n", "2", "3"]),
    ],
)
def test_cells_are_numbers_where_the_whole_column_is(cells, values, read):
    """A column of CSV is whole numbers, numbers or the texts as they stand; an empty cell is None among numbers."""
    lines = "".join(f'x,"{cell}"\n' for cell in cells)
    assert read("a.csv", "text,label\n" + lines).column("label") == values


def test_types_hold_over_files_and_blocks(monkeypatch, tmp_path):
    """A column has one type in all files, in however many blocks they are read, and columns go by their names."""
    monkeypatch.setattr(gather, "BLOCK", 2)
    (tmp_path / "one.csv").write_text("text,label\n" + "a,1\n" * 5)
    (tmp_path / "two.csv").write_text("label,text\nx,b\n")
    files = [str(tmp_path / "one.csv"), str(tmp_path / "two.csv")]
    assert load_files(files, WHERE).column("label") == ["1"] * 5 + ["x"]
    assert load_files(files[:1], WHERE).column("label") == [1] * 5
    assert load_files(files, WHERE).column("text") == ["a"] * 5 + ["b"]


# JSON.


def test_rows_of_json_know_their_lines(read):
    """Each object is called by its line, of lines and of a list."""
    rows = read("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert places(rows) == ["a.jsonl, line 1", "a.jsonl, line 3"]
    rows = read("a.json", '[{"text": "a"},\n\n{"text":\n"b"}, {"text": "c"}]\n')
    assert places(rows) == ["a.json, line 1", "a.json, line 3", "a.json, line 4"]
    assert rows.column("text") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "reason", "text"),
    [
        (b'{"text": ', "broken JSON", "not JSON (Expecting value at character"),
        (b'{"text": "b"} x', "broken JSON", "not JSON (Extra data at character 15)"),
        (b"[1, 2]", "no JSON object", "holds a list, expected an object"),
        (b"null", "no JSON object", "holds a NoneType"),
        (b"{}", "no JSON object", "without any value"),
        (b'{"text": "b", "text": "c"}', "broken JSON", "key 'text' stands twice"),
        (b'{"text": "b\xff"}', "broken UTF-8", "byte 0xff"),
        (b'{"\\ud800": "b"}', "broken UTF-8", "half of a pair"),
        (b'{"text": ' + b"[" * 100_000, "broken JSON", "nested too deep"),
        (b'{"score": ' + b"9" * 5000 + b"}", "broken JSON", "a number of thousands of digits"),
    ],
)
def test_lines_that_are_no_row_are_named(line, reason, text, read):
    """What is broken in JSON lines is named by its line, with what most rows have; the other rows stay."""
    content = b'{"text": "a", "score": 1}\n' + line + b'\n{"text": "d", "score": 0.5}\n'
    rows = read("a.jsonl", content)
    assert said(rows) == [("a.jsonl, line 2", reason)]
    assert text in rows.bad[0].text and len(rows.bad[0].text) < 200
    assert rows.column("text") == ["a", "d"] and rows.column("score") == [1.0, 0.5]


ODD = [
    9223372036854775808, 9007199254740993, 2.5, 1, 1.0, -0.0, True, "5", "", None, ["b"], ["b", 1], [None], [], {},
    {"a": {"b": "x" * 10_000}}, {"b": 1, "a": None}, {"a": 2.0}, {"a": [{"b": None}, {}]}, "\u2028", "\0", 10**400,
]  # fmt: skip


def exactly(one: Any, other: Any) -> bool:
    """Whether two values are the same with their types, signs and orders of keys."""
    return repr(one) == repr(other)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: str(odd)[:20])
def test_values_of_json_stay_what_they_are(odd, read):
    """F2, F7, H, I: one odd value in a column costs no row and changes neither itself nor those around it."""
    written = [{"text": "a", "n": value} for value in (1, odd, 0.5, float("inf"))]
    rows = read("a.jsonl", "\n".join(map(json.dumps, written)))
    assert not rows.bad and rows.column("text") == ["a"] * 4
    assert exactly(rows.column("n"), [json.loads(json.dumps(row))["n"] for row in written])
    alone = read("b.jsonl", json.dumps({"n": odd}) + "\n" + json.dumps({"n": odd}))
    assert exactly(alone.column("n"), [odd, odd])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("5", "text is 5, expected a text"),
        ('["b"]', "text is ['b'], expected a text"),
        ('"\\ud800"', "text is what holds half of a pair such as"),
        ('{"a": 1, "a": 2}', "text is an object in which the key 'a' stands twice, expected a text"),
        ("[" * 120 + "]" * 120, "text is nested deeper than 100 levels, expected a text"),
    ],
)
def test_what_is_no_text_is_named_by_those_who_read_it(value, said, read):
    """I: a value that cannot be used is a bad row, named by line, where its column is read; elsewhere it is nothing."""
    rows = read("a.jsonl", f'{{"text": "a", "label": 0}}\n{{"text": {value}, "label": 1}}\n')
    assert rows.column("label") == [0, 1] and not rows.bad
    _, bad = read_texts(rows, ["text"])
    assert bad.keys() == {1} and bad[1].place == "a.jsonl, line 2" and bad[1].text.startswith(said)


def test_blocks_of_json_are_one_column(monkeypatch, read):
    """A column may begin late, and may be whole numbers in one block and fractions or texts in the next."""
    monkeypatch.setattr(gather, "BLOCK", 2)
    rows = [{"a": 1}, {"a": 2}, {"a": 0.5, "b": "x"}, {"a": 3, "b": None}, {"b": "z", "a": "?"}, {"a": None, "b": "y"}]
    found = read("a.jsonl", "\n".join(map(json.dumps, rows)))
    assert exactly(found.column("a"), [1, 2, 0.5, 3, "?", None]) and not found.bad
    assert found.column("b") == [None, None, "x", None, "z", "y"]


VALUE = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3)
    | st.integers() | st.sampled_from([2**53 + 1, 2**63, -(2**64), 10**30, float("nan"), float("inf")]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(VALUE, min_size=1, max_size=8), block=st.integers(1, 4), held=st.sampled_from([0, 1 << 28]))
def test_columns_are_what_json_says(values, block, held, tmp_path, monkeypatch):
    """F1, F2, H, I: however rows fall into blocks, in memory or on the disk, a column is what `json.loads` says."""
    monkeypatch.setattr(gather, "BLOCK", block)
    monkeypatch.setattr(store, "MOST_HELD", held)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lines = [json.dumps({"x": value} if n % 3 else {"x": value, "late": [n]}) for n, value in enumerate(values, 1)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = load_files([str(tmp_path / "a.jsonl")], WHERE)
    assert exactly(rows.column("x"), [json.loads(line)["x"] for line in lines]) and not rows.bad
    if len(values) > 2:
        assert rows.column("late") == [[n] if not n % 3 else None for n in range(1, len(values) + 1)]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"], "a file is left behind"


ORDERED = """
import json, sys
from sft_jax.data import gather
from sft_jax.data.sources import load_files
gather.BLOCK = 2
rows = load_files([sys.argv[1]], "w")
print(rows.names, json.dumps(rows.column("calls")), rows.table.features)
"""


def test_a_file_is_one_text_in_every_process(tmp_path):
    """F1: whatever PYTHONHASHSEED is, the same file gives the same columns, values and orders of keys."""
    calls = [{"a": 1}, {"b": 2}, {"a": "text"}, {"a": 1, "b": 2}, {"c": None, "b": 2.0}]
    lines = [json.dumps({"calls": call, f"x{n}": n}) for n, call in enumerate(calls)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said = set()
    for seed in ("0", "1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", ORDERED, str(tmp_path / "a.jsonl")],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        said.add(ran.stdout)
    assert len(said) == 1 and json.dumps(calls) in said.pop()


def test_columns_beyond_the_first_are_left_out(monkeypatch, read):
    """I: objects with very many keys stop no run: the first are columns, that there are more is said, and which."""
    monkeypatch.setattr(tables, "MOST_COLUMNS", 20)
    rows = read("a.jsonl", "".join(json.dumps({"text": "a", f"key{i}": i}) + "\n" for i in range(30)))
    assert rows.column("text") == ["a"] * 30 and rows.column("key3")[3] == 3 and len(rows.names) == 20
    assert rows.notes == ("a.jsonl: more than 20 columns, such as 'key19', are left out",)
    with pytest.raises(DataError, match="column 'key25' is beyond the first 20 columns; give objects of fewer"):
        rows.column("key25")


WHOLE = [{"text": "a b", "label": 0}, {"text": "c", "label": 1}]
FRAME = pandas.DataFrame(WHOLE)


@pytest.mark.parametrize(
    "content",
    [
        *(FRAME.to_json(orient=orient) for orient in ("columns", "index", "split", "table", "records")),
        json.dumps({"version": "1", "data": WHOLE}),
        json.dumps({"data": WHOLE}, indent=2),
        json.dumps({"text": ["a b", "c"], "label": [0, 1]}),
        "\n".join(json.dumps(row, indent=2) for row in WHOLE),
        "\ufeff" + json.dumps(WHOLE, indent=1),
        "\ufeff" + FRAME.to_json(orient="records", lines=True),
    ],
    ids=lambda content: content[:25],
)
def test_rows_of_json_are_read_in_the_forms_that_others_write(content, read):
    """T: a `.json` of one object is the rows in it, as pandas and `datasets` write them; objects may go over lines."""
    rows = read("a.json", content)
    assert not rows.bad and rows.column("text") == ["a b", "c"] and rows.column("label") == [0, 1]
    assert len(set(places(rows))) == 2, "rows are called by one line"


def test_one_object_of_json_may_be_a_row(read):
    """T: an object that holds no rows is a row; one of lists that may be either is refused with what to write."""
    chat = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}
    for content in (json.dumps(chat), json.dumps(chat, indent=2)):
        assert read("a.json", content).column("messages") == [chat["messages"]]
    assert read("a.jsonl", json.dumps(chat, indent=2) + "\n" + json.dumps(chat)).column("messages")[1:] == [
        chat["messages"]
    ]
    words = {"tokens": ["John", "lives"], "tags": ["B-PER", "O"]}
    with pytest.raises(DataError, match=r"a.json is one object of lists, which may be one row or a list for each col"):
        read("a.json", json.dumps(words))
    assert read("a.jsonl", json.dumps(words)).column("tokens") == [words["tokens"]]


def test_a_bad_object_of_a_list_costs_itself_alone(read):
    """One object of a list that is no UTF-8 is named by its line; the others are rows."""
    rows = read("a.json", b'[{"text": "a"},\n{"text":\n"b\xe9"},\n{"text": "c"}]')
    assert rows.column("text") == ["a", "c"] and said(rows) == [("a.json, line 2", "broken UTF-8")]
    assert "on line 3" in rows.bad[0].text


def test_nested_squad_is_read_as_it_is(read, monkeypatch):
    """The official file of SQuAD is a row for each question, with its context and its answers."""
    asked = [
        {"id": "1", "question": "Who?", "answers": [{"text": "Bo", "answer_start": 0}], "is_impossible": False},
        {"id": "2", "question": "When?", "answers": [], "is_impossible": True, "plausible_answers": []},
    ]
    data = [{"title": "T", "paragraphs": [{"context": "Bo is here.", "qas": asked}]}] * 2
    rows = read("train-v2.0.json", json.dumps({"version": "v2.0", "data": data}))
    assert rows.column("question") == ["Who?", "When?"] * 2 and set(rows.column("context")) == {"Bo is here."}
    assert places(rows)[1] == "train-v2.0.json, row 2" and set(rows.column("title")) == {"T"}
    found = read_answers(rows, "answers", "context", none=True)
    assert found.values == [((0, "Bo"),), ()] * 2 and not found.bad
    assert read("articles.json", json.dumps(data, indent=1)).column("id") == ["1", "2"] * 2
    monkeypatch.setattr(records, "MOST_CHARS", 100)
    assert len(read("train-v2.0.json", json.dumps({"version": "v2.0", "data": data}))) == 4, "one long line"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "latin-1"])
def test_files_in_other_encodings_are_read_or_told_what_they_are(encoding, tmp_path, monkeypatch):
    """A file that is not UTF-8 is named with the setting that reads it, and is read with it, of each kind of text."""
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_bytes("text,label\ncafé,1\n".encode(encoding))
    Path("a.jsonl").write_bytes('{"text": "café", "label": 1}\n'.encode(encoding))
    Path("a.txt").write_bytes("café\n".encode(encoding))
    for name in ("a.csv", "a.jsonl", "a.txt"):
        try:
            told = load_files([name], WHERE).bad[0].text
        except DataError as error:
            told = str(error)
        wanted = "cp1252" if not encoding.startswith("utf-16") else f"data.source.encoding={encoding}"
        assert "UTF-16" in told if name == "a.txt" and encoding == "utf-16-le" else wanted in told
        assert load_files([name], WHERE, encoding).column("text") == ["café"]
    with pytest.raises(DataError, match=r"^data.source.encoding: is of files ending in .csv, .*, not .npz; leave it"):
        load_files(["a.npz"], WHERE, encoding)


@pytest.mark.parametrize(("mark", "shown"), [(";", ";"), ("\t", "tab"), ("|", "|")])
def test_other_delimiters_are_told_and_read(mark, shown, read):
    """`;`, which is what Excel writes in half of Europe, is told by the header, and read with the setting."""
    content = f"text{mark}label\na, b{mark}1\n"
    with pytest.raises(DataError) as caught:
        read("a.csv", content)
    assert str(caught.value).endswith(f"set data.source.delimiter='{shown}'")
    source = Files.model_validate({"kind": "files", "train": "a.csv", "delimiter": shown})
    rows = load_rows(source)["train"]
    assert rows.column("text") == ["a, b"] and rows.column("label") == [1]
    assert read("b.csv", "text\na;b\n").column("text") == ["a;b"]


@pytest.mark.parametrize(
    ("key", "value"), [("encoding", "nope"), ("encoding", "rot13"), ("delimiter", ";;"), ("delimiter", "")]
)
def test_settings_of_files_are_checked(key, value):
    """An encoding that Python has not, and a delimiter of several characters, are mistakes of the configuration."""
    with pytest.raises(ValidationError, match="give one such as"):
        Files.model_validate({"kind": "files", "train": "a.csv", key: value})


# Text, and what is common.


def test_lines_of_text_are_rows(read):
    """A text file is a row for each line, empty ones too, cut at line ends alone, with its line."""
    rows = read("a.txt", "one\r\n\n two\u2028three \nlast")
    assert rows.column("text") == ["one", "", " two\u2028three ", "last"]
    assert places(rows) == [f"a.txt, line {n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(("name", "row"), [("a.csv", "{},1\n"), ("a.jsonl", '{{"text": "{}"}}\n'), ("a.txt", "{}\n")])
def test_a_line_beyond_the_bound_is_named(name, row, monkeypatch, read):
    """A line of more characters than are read at once is named and skipped, and those around it are rows."""
    monkeypatch.setattr(records, "MOST_CHARS", 100)
    head = "text,label\n" if name.endswith("csv") else ""
    rows = read(name, head + row.format("a") + row.format("b" * 1000) + row.format("c"))
    assert said(rows) == [(f"{name}, line {3 if head else 2}", "line too long")]
    assert len(rows) == 2 and [text[-1] for text in rows.column("text")] in (["a", "c"], [["a"], ["c"]])


def test_a_quote_left_open_in_a_long_file_costs_one_line(monkeypatch, read):
    """Even where the open quote swallows more than a cell may hold, every other line is read, and in one more pass."""
    monkeypatch.setattr(records, "MOST_CHARS", 1 << 17)  # as long as the least that the reader of CSV can be given
    rows = read("a.csv", 'text,label\n"a,1\n' + "b,2\n" * 100_000)
    assert said(rows) == [("a.csv, line 2", "broken quotes")] and len(rows) == 100_000


def test_so_many_bad_lines_are_an_error_at_once(monkeypatch, read):
    """A file of which almost nothing is a row ends the reading before its mistakes fill the memory."""
    monkeypatch.setattr(gather, "MOST_BAD", 10)
    with pytest.raises(DataError, match=r"11 problems\n.*a.csv, line 2: cells: 1, expected 2 as in line 1\n"):
        read("a.csv", "text,label\n" + "a\n" * 50)


def test_packed_files_are_read(tmp_path):
    """`reviews.csv.gz` and its like are read as what they hold, by line."""
    for name, content in (("a.csv.gz", "text,label\na,1\n"), ("a.jsonl.gz", '{"text": "a"}\n'), ("a.txt.gz", "a\n")):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        rows = load_files([str(tmp_path / name)], WHERE)
        assert rows.column("text") == ["a"] and rows.place(0).endswith(f"{name}, line {2 if 'csv' in name else 1}")


def test_a_packed_bomb_is_refused(tmp_path, monkeypatch):
    """R35: a packed file that unpacks to far more than its size is refused, and its line is never held in memory."""
    monkeypatch.setattr(records, "SMALL_BYTES", 1 << 20)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,label\n" + b"x" * (1 << 25)))
    with pytest.raises(DataError, match="unpacks to more than 100 times its size"):
        load_files([str(tmp_path / "a.csv.gz")], WHERE)


def test_a_long_path_is_called_by_its_name(tmp_path, monkeypatch):
    """Messages call a file as the user did, or by its name where that would be long, unless names are the same."""
    monkeypatch.chdir(tmp_path)
    deep = Path("d" * 50, "e" * 50)
    deep.mkdir(parents=True)
    for file in (deep / "a.txt", deep / "b.txt", Path("a.txt")):
        file.write_text("x\n")
    rows = load_files([str(deep / "a.txt"), str(deep / "b.txt")], WHERE)
    assert places(rows) == ["a.txt, line 1", "b.txt, line 1"]
    assert places(load_files(["a.txt", str(deep / "a.txt")], WHERE))[1] == f"{deep / 'a.txt'}, line 1"


def test_a_split_of_nothing_but_bad_rows_is_said(tmp_path):
    """A file of which no record is a row is refused with what is wrong in it, not as an empty one."""
    (tmp_path / "a.csv").write_text("text,label\na\nb\n")
    with pytest.raises(DataError, match=r"data\.source\.train: 2 problems\n.*line 2: cells: 1, expected 2"):
        load_rows(Files(kind="files", train=str(tmp_path / "a.csv")))


# Hostile input.


def numpy_file(save: Any, *arrays: Any, **named: Any) -> bytes:
    """What numpy writes."""
    held = io.BytesIO()
    save(held, *arrays, **named)
    return held.getvalue()


VALID = {
    ".csv": b'text,label\na,1\n"b ""c"" d",2\n\xc3\xa9,3\n',
    ".tsv": b'text\tlabel\na\t1\n"b ""c"" d"\t2\n\xc3\xa9\t3\n',
    ".jsonl": b'{"text": "a", "label": 1}\n{"text": "\\u00e9", "label": [2]}\n{"text": {"x": null}}\n',
    ".json": b'[{"text": "a", "label": 1},\n{"text": "\\u00e9", "label": 2.5}]\n',
    ".txt": b"a\n\nb \xc3\xa9\n",
    **dict.fromkeys((".conll", ".iob", ".iob2", ".bio"), b"-DOCSTART- O\n\na O\n\xc3\xa9\tB-X\n\n# id 7\nb O\n"),
    ".csv.gz": gzip.compress(b"text,label\na,1\nb,2\n"),
    ".parquet": b"PAR1 not really PAR1",
    ".arrow": b"ARROW1\0\0",
    ".zip": b"PK\x05\x06" + b"\0" * 18,
    ".tar": b"pos/1.txt" + b"\0" * 1015,
    ".npz": numpy_file(np.savez, image=np.zeros((2, 3, 4), np.uint8), label=[0, 1]),
    ".npy": numpy_file(np.save, np.zeros((2, 3, 4, 3), np.uint8)),
    "images-idx3-ubyte": b"\0\0\x08\x03\0\0\0\x02\0\0\0\x03\0\0\0\x04" + bytes(24),
}
PIECES = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"1e999",
    b"\\ud800",
]


def mutated(content: bytes, seed: int) -> bytes:
    """Some pieces put in, taken out and doubled."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(content))
        cut = at + draw.choice([0, 0, 1, 3, 20])
        put = draw.choice([*PIECES, b"", content[at:cut], bytes([draw.randrange(256)])])
        content = content[:at] + put + content[cut:]
    return content


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ending=st.sampled_from(sorted(VALID)), seed=st.integers(0, 2**32), noise=st.none() | st.binary(max_size=200))
@example(ending=".csv", seed=0, noise=b"\xef\xbb\xbf")
@example(ending=".json", seed=0, noise=b"[")
def test_hostile_files_are_rows_or_one_message(ending, seed, noise, tmp_path, tmp_path_factory, monkeypatch):
    """Whatever is in a file, of any ending: rows that can be read whole come out of it, or a DataError; never more."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / f"hostile{ending}"
    file.write_bytes(mutated(VALID[ending], seed) if noise is None else noise)
    try:
        rows = load_files([str(file)], WHERE)
    except DataError as error:
        assert str(error).startswith(f"{WHERE}: ") and len(str(error)) < 1000
        return
    assert len(rows) == len(rows.file) == len(rows.line) and (len(rows) or rows.bad)
    for name in set(rows.names) - set(rows.unfit):
        assert len(rows.column(name)) == len(rows.texts(name)) == len(rows)
    assert all(len(bad.text) < 300 and bad.place.strip() for bad in rows.bad)
    assert all(map(rows.place, range(len(rows))))


CELL = st.text(st.characters(exclude_characters='\r\n\0"', exclude_categories=["Cs"]), max_size=8)
BROKEN = st.sampled_from(["", '"', '"x" y', "a,b,c,d", "caf\udce9", "\0", '{"a": }', "[]", "{}", "1"])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.tuples(CELL, CELL).map(",".join) | BROKEN, max_size=30))
def test_every_line_of_csv_is_a_row_or_bad(lines, tmp_path):
    """Each line is one row or one bad row, or goes on with the cell that the row before it left open."""
    written = [f"{line}\n" for line in lines]
    (tmp_path / "a.csv").write_bytes("".join(["text,label\n", *written]).encode("utf-8", "surrogateescape"))
    wanted = {n for n, line in enumerate(lines, 2) if line}
    try:
        rows = load_files([str(tmp_path / "a.csv")], WHERE)
    except DataError as error:
        assert not wanted and "holds no row" in str(error)
        return
    numbers = [*rows.line.tolist(), *(int(bad.place.rpartition(" ")[2]) for bad in rows.bad)]
    assert len(set(numbers)) == len(numbers) and wanted >= set(numbers), "said twice"
    for line in wanted - set(numbers):
        begin = max(number for number in numbers if number < line)
        with pytest.raises(csv.Error, match="unexpected end of data"):
            list(csv.reader(written[begin - 2 : line - 2], strict=True))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.dictionaries(st.sampled_from("ab"), st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xy"), inner, max_size=2),
            max_leaves=6,
        ), min_size=1, max_size=2).map(json.dumps) | BROKEN,
        max_size=30,
    )
)  # fmt: skip
def test_every_line_of_json_is_a_row_or_bad(lines, tmp_path):
    """Each line of JSON is one row or one bad row, whatever types its values and those around them have."""
    (tmp_path / "a.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    wanted = [n for n, line in enumerate(lines, 1) if line]
    try:
        rows = load_files([str(tmp_path / "a.jsonl")], WHERE)
    except DataError as error:
        assert not wanted and "holds no row" in str(error)
        return
    numbers = [int(bad.place.rpartition(" ")[2]) for bad in rows.bad]
    assert sorted([*rows.line.tolist(), *numbers]) == wanted
    assert len(rows.table.to_list()) == len(rows)


def test_every_kind_is_attacked():
    """The hostile files are of every kind that is read."""
    assert READERS.keys() - {"folder", "idx"} <= VALID.keys() and any(map(is_idx, VALID))
