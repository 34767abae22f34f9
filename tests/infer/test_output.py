"""Records in files: what is read back is what was said, and a file is there whole or not at all."""

import json
from pathlib import Path

import pandas
import pyarrow.parquet as pq
import pytest

from sft_jax.errors import ConfigError
from sft_jax.infer.output import check_output, record_file

RECORDS = [
    {"id": 7, "label": "a, b", "scores": {"a, b": 0.25, "c": 0.75}, "tags": ["x", "y\n"], "logits": [0.5, -1.0]},
    {"line": 3, "error": "no text: a blank line"},
    {
        "id": "8",
        "label": "“c”",
        "scores": {"a, b": 1.0, "c": 0.0},
        "truncated": True,
        "more": {"k": [1, None]},
        "n": 2**70,
    },
]


def written(out: Path) -> Path:
    """The records in a file."""
    with record_file(out) as take:
        for record in RECORDS:
            take(record)
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    return out


def test_json_lines(tmp_path):
    """They are the records, word by word."""
    assert [json.loads(line) for line in written(tmp_path / "out.jsonl").read_text("utf-8").splitlines()] == RECORDS


def test_csv(tmp_path):
    """A column for each field and each score, as pandas reads it; what is nested is JSON."""
    table = pandas.read_csv(written(tmp_path / "out.csv"), dtype=str, keep_default_na=False)
    assert list(table.columns[:6]) == ["id", "label", "scores.a, b", "scores.c", "tags", "logits"]
    assert table["label"].tolist() == ["a, b", "", "“c”"] and table["scores.c"].tolist() == ["0.75", "", "0.0"]
    assert json.loads(table["tags"][0]) == ["x", "y\n"] and json.loads(table["more"][2]) == {"k": [1, None]}
    assert table["truncated"].tolist() == ["", "", "true"] and table["n"][2] == str(2**70)


def test_parquet(tmp_path):
    """A column has the type of its values; text where these are of several, or of none that Arrow has."""
    table = pq.read_table(written(tmp_path / "out.parquet"))
    types = {field.name: str(field.type) for field in table.schema}
    assert types["scores.c"] == "double" and types["tags"] == "list<element: string>" and types["truncated"] == "bool"
    assert types["line"] == "int64" and types["id"] == types["more"] == types["n"] == "string"
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == ["7", None, "8"] and rows[0]["logits"] == [0.5, -1.0]
    assert [row["line"] for row in rows] == [None, 3, None] and json.loads(rows[2]["more"]) == {"k": [1, None]}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_nothing_is_left_of_what_failed(ending, tmp_path):
    """A file that is there stays as it was where an error comes in between; where none was, there is none."""
    out = tmp_path / f"out.{ending}"
    for before in (None, b"kept"):
        if before:
            out.write_bytes(before)
        with pytest.raises(ZeroDivisionError), record_file(out) as take:
            take(RECORDS[0])
            raise ZeroDivisionError
        assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_no_records_are_a_file_too(tmp_path):
    """Of nothing there is an empty file, which can be read."""
    for ending in ("jsonl", "csv", "parquet"):
        with record_file(tmp_path / f"out.{ending}"):
            pass
    assert (tmp_path / "out.jsonl").read_bytes() == b"" and pq.read_table(tmp_path / "out.parquet").num_rows == 0


def test_what_cannot_be_written_is_said_first(tmp_path):
    """Another ending, a file that is there, and a directory that is not are refused before anything is computed."""
    (tmp_path / "out.csv").touch()
    with pytest.raises(
        ConfigError, match=r"out\.xlsx: ends in '\.xlsx'; give a name that ends in \.jsonl, \.csv, \.parq"
    ):
        check_output(tmp_path / "out.xlsx", replace=True)
    with pytest.raises(ConfigError, match=r"out\.csv: is there already; give another name, or --force"):
        check_output(tmp_path / "out.csv", replace=False)
    with pytest.raises(ConfigError, match=r"there is no directory .*nowhere; make it first"):
        check_output(tmp_path / "nowhere" / "out.csv", replace=False)
    check_output(tmp_path / "out.csv", replace=True)
