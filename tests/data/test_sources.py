"""Rows from files, saved directories and the hub: values arrive as written, and what is broken is one clear line."""

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from sft_jax.config.data import Files, Hub
from sft_jax.data.rows import Rows
from sft_jax.data.sources import load_files, load_rows
from sft_jax.errors import DataError

WHERE = "data.source.train"
# Cells that readers of CSV are known to turn into something else.
ODD = [
    "NA", "N/A", "nan", "NaN", "None", "null", "NULL", "n/a", "<NA>", "-", "1.#IND", "True", "false", "inf", "007",
    "1e5", 'say "hi"', '"', "a, b", "line\nbreak", "two\n\nbreaks", "tab\there", "  spaces  ", "é", "ß", "漢字",
    "🎉👩‍👩‍👧", "עברית", "\u200b", "\u2028", "back\\slash", "'", ";", "#no comment", "=1+1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Prepared rows go to a directory of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_table(file: Path, rows: list[dict]) -> str:
    """Write rows in the form that the file's ending names."""
    if file.suffix in (".csv", ".tsv"):
        with open(file, "w", newline="", encoding="utf-8") as sink:
            writer = csv.DictWriter(sink, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    else:
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(file), table.schema) as sink:
            sink.write_table(table)
    return str(file)


def refused(files: list[str]) -> str:
    """The message for files that cannot be read, which is one line with place, file and remedy."""
    with pytest.raises(DataError) as caught:
        load_files(files, WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ") and "\n" not in message and "; " in message and len(message) < 600
    return message


def values(rows: Rows) -> list[dict]:
    """Every row with its values, as those who read columns have them."""
    columns = [rows.column(name) for name in rows.names]
    return [dict(zip(rows.names, row, strict=True)) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow"])
def test_every_kind_of_file_gives_its_rows_in_order(ending, tmp_path):
    """Each of the six kinds reads back the texts and labels that were written, several files one after the other."""
    parts = [[{"text": f"text {n} of {k}", "label": n % 3} for n in range(4)] for k in range(3)]
    files = [write_table(tmp_path / f"part{k}{ending}", part) for k, part in enumerate(parts)]
    assert values(load_files(files, WHERE)) == [row for part in parts for row in part]
    backwards = values(load_files(files[::-1], WHERE))
    assert backwards == [row for part in parts[::-1] for row in part]
    upper = Path(files[0]).rename(tmp_path / f"UPPER{ending.upper()}")
    assert values(load_files([str(upper)], WHERE)) == parts[0]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_words_stay_as_they_were_written(ending, tmp_path):
    """NA, None and null stay words; quotes, commas, newlines and every script arrive to the character."""
    rows = [{"text": text, "label": "NA" if n % 2 else "None"} for n, text in enumerate(ODD)]
    found = load_files([write_table(tmp_path / f"odd{ending}", rows)], WHERE)
    assert found.column("text") == ODD
    assert found.column("label") == [row["label"] for row in rows]


def test_an_empty_cell_stays_an_empty_text(tmp_path):
    """A cell with nothing in it is the empty text, which the task then refuses by its row, and never NaN."""
    file = tmp_path / "gaps.csv"
    file.write_text("text,label\n,x\nb,\n")
    assert load_files([str(file)], WHERE).table.to_list() == [{"text": "", "label": "x"}, {"text": "b", "label": ""}]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(ending, tmp_path):
    """Files as Excel writes them, with a byte order mark, have their first column by its name."""
    file = Path(write_table(tmp_path / f"marked{ending}", [{"text": "a", "label": 1}]))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_files([str(file)], WHERE).names == ["text", "label"]


def test_line_endings_of_windows_are_line_endings(tmp_path):
    """Carriage returns belong to the end of the line, not to the label."""
    file = tmp_path / "windows.csv"
    file.write_bytes(b"text,label\r\none,yes\r\ntwo,no\r\n")
    assert load_files([str(file)], WHERE).column("label") == ["yes", "no"]


def test_names_of_files_are_names_not_patterns(tmp_path):
    """A file called `rows[1].csv` or `rows*.csv` is that one file, whatever lies beside it."""
    for name in ("rows[1].csv", "rows*.csv", "rows1.csv"):
        write_table(tmp_path / name, [{"text": name, "label": 0}])
    for name in ("rows[1].csv", "rows*.csv"):
        assert load_files([str(tmp_path / name)], WHERE).column("text") == [name]


def test_a_changed_file_is_read_anew(tmp_path):
    """C22: rows come from the file as it is now, not from an earlier reading."""
    for text in ("before", "after!"):
        file = write_table(tmp_path / "rows.csv", [{"text": text, "label": 0}])
        assert load_files([file], WHERE).column("text") == [text]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.csv", None, "No such file"),
        ("missing.parquet", None, "Unable to find"),
        ("empty.csv", b"", "is empty; its first line names the columns"),
        ("blank.csv", b"\n\n", "is empty; its first line names the columns"),
        ("nameless.csv", b",\n1,2\n", "line 1: names no column"),
        ("quote.csv", b'"text,label\na,1\n', "line 1: a quote is opened and never closed"),
        ("heading.csv", b"text,label\n", "holds no row"),
        ("wide.csv", "text,label\na,1\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("packed.csv.gz", b"text,label\na,1\n", "gzip"),
        ("empty.jsonl", b"", "holds no row"),
        ("empty.txt", b"", "holds no row"),
        ("none.json", b"[]", "holds no row"),
        ("broken.json", b'[{"text": "a"},\n{"text": "b"', "line 2: the list breaks off"),
        ("after.json", b'[{"text": "a"}] {"text": "b"}', "line 1: the list breaks off (expected a comma, or the end)"),
        ("deep.json", b"[" * 100_000, "line 1: the list breaks off (nested too deep)"),
        ("broken.parquet", b"not parquet at all", "magic bytes"),
        ("broken.arrow", b"not arrow", "rrow"),
    ],
)
def test_a_broken_file_is_one_clear_line(name, content, reason, tmp_path, caplog, capfd):
    """A missing, empty or broken file is named with the reason in one line, and nothing else is printed."""
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    message = refused([str(file)])
    assert str(file) in message and reason in message
    printed = capfd.readouterr()
    assert not caplog.records and not printed.out and not printed.err


def test_files_of_other_columns_are_refused(tmp_path):
    """C21: files that disagree about their columns are an error that names the columns of both."""
    one = write_table(tmp_path / "one.csv", [{"text": "a", "label": 1}])
    two = write_table(tmp_path / "two.csv", [{"sentence": "a", "label": 1}])
    message = refused([one, two])
    assert "text" in message and "sentence" in message


def test_files_of_other_kinds_are_refused():
    """Two kinds of files, an unknown ending, or none: the kinds there are get listed."""
    kinds = ".csv, .tsv, .jsonl, .json, .txt, .conll, .iob, .iob2, .bio, .parquet, .arrow, .npz, .npy"
    packed = ".zip, .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz"
    others = "images in IDX form, or folders of texts or images, also packed"
    remedy = f"give files of one kind among {kinds}, {others} ({packed})"
    assert refused(["a.csv", "b.jsonl"]) == f"{WHERE}: files ending in .csv, .jsonl; {remedy}"
    assert refused(["a.pkl"]) == f"{WHERE}: files ending in .pkl; {remedy}"
    assert refused(["a"]).startswith(f"{WHERE}: files ending in ")


def test_splits_come_from_the_files_that_are_named(tmp_path):
    """Only the splits that the source names are there, one file or a list of files each."""
    files = [write_table(tmp_path / f"{n}.csv", [{"text": f"t{n}", "label": n}]) for n in range(3)]
    found = load_rows(Files(kind="files", train=files[:2], test=files[2]))
    assert {split: rows.column("text") for split, rows in found.items()} == {"train": ["t0", "t1"], "test": ["t2"]}


def test_a_split_without_rows_is_named(monkeypatch):
    """An evaluation split that holds nothing is an error that names it, before a model is read."""
    texts = {"train": ["a", "b"], "held": []}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: Dataset.from_dict({"text": texts[split]}))
    with pytest.raises(DataError, match=r"^data\.source\.test: holds no row; give a source with some$"):
        load_rows(Hub(kind="hub", name="someone/reviews", test="held"))


@pytest.fixture
def saved(tmp_path):
    """A directory that `DatasetDict.save_to_disk` wrote, with label names, and its rows."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    splits = {
        name: Dataset.from_dict({"text": [f"{name} {n}" for n in range(3)], "label": [0, 1, 1]}, features)
        for name in ("train", "validation")
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved", splits


def test_a_saved_directory_gives_its_splits(saved):
    """What `save_to_disk` wrote comes back with its label names, under the names that the source gives the splits."""
    directory, splits = saved
    found = load_rows(Hub(kind="hub", name=str(directory), validation="train", train="validation"))
    assert found["train"].table.to_list() == splits["validation"].to_list()
    assert found["validation"].table.to_list() == splits["train"].to_list()
    assert found["train"].table.features["label"].names == ["bad", "good"]


def test_a_split_that_was_not_saved_is_named(saved):
    """A split that the directory lacks is an error that lists those it has."""
    with pytest.raises(DataError) as caught:
        load_rows(Hub(kind="hub", name=str(saved[0]), test="test"))
    assert str(caught.value) == f"data.source: '{saved[0]}' has no split 'test'; it has train, validation"


def test_one_saved_split_does_not_stand_for_another(saved):
    """A directory of a single split is for training; asked for validation as well it would leak, and is refused."""
    alone = saved[0].parent / "alone"
    saved[1]["train"].save_to_disk(str(alone))
    assert load_rows(Hub(kind="hub", name=str(alone)))["train"].table.to_list() == saved[1]["train"].to_list()
    with pytest.raises(DataError, match=r"has no split 'validation'; it has train$"):
        load_rows(Hub(kind="hub", name=str(alone), validation="validation"))


@pytest.mark.parametrize("damage", ["not saved", "half a state", "empty state", "no files", "no arrow"])
def test_a_damaged_saved_directory_is_one_clear_line(damage, saved):
    """A directory that nobody saved, or that was damaged since, is named in one line with the remedy."""
    directory = saved[0] / "train"
    if damage == "not saved":
        directory = saved[0].parent / "other"
        directory.mkdir()
    elif damage == "half a state":
        (directory / "state.json").write_text("{")
    elif damage == "empty state":
        (directory / "state.json").write_text("{}")
    elif damage == "no files":
        (directory / "state.json").write_text('{"_data_files": [], "_split": "train"}')
    else:
        for file in directory.glob("*.arrow"):
            file.write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        load_rows(Hub(kind="hub", name=str(directory)))
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message
    assert message.endswith("; give a directory that save_to_disk wrote")


@pytest.mark.parametrize("kind", [ConnectionError, OSError, RuntimeError, datasets.exceptions.DatasetNotFoundError])
def test_a_hub_out_of_reach_is_one_clear_line(kind, monkeypatch):
    """Whatever the hub client raises, the user reads one line: which data set, why, and what to do."""

    def offline(*_, **__):
        raise kind("Couldn't reach the Hub\nand a long story\nof many lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError) as caught:
        load_rows(Hub(kind="hub", name="someone/reviews"))
    assert str(caught.value) == (
        "data.source: 'someone/reviews' (split 'train') is not to be had from the hub "
        "(Couldn't reach the Hub and a long story of many lines); check name, split and network, or give local files"
    )


def test_the_hub_is_asked_for_what_the_source_names(monkeypatch):
    """C26: name, configuration, revision and splits reach `datasets`, and code of the data set is never allowed."""
    asked = []

    def recorded(*words, **options):
        asked.append((words, options))
        return Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", recorded)
    source = Hub(kind="hub", name="a/b", config="c", revision="d", train="train[:5%]", validation="dev", test="held")
    assert list(load_rows(source)) == ["train", "validation", "test"]
    assert [words for words, _ in asked] == [("a/b", "c")] * 3
    assert [options["split"] for _, options in asked] == ["train[:5%]", "dev", "held"]
    assert all(options["revision"] == "d" and not options.get("trust_remote_code") for _, options in asked)


def test_a_missing_column_lists_those_there_are():
    """C21: a column that is not there is named beside those that are."""
    rows = Rows(Dataset.from_dict({"sentence": ["a"], "label": [0]}), WHERE)
    assert rows.column("label") == [0]
    with pytest.raises(DataError) as caught:
        rows.column("text")
    assert str(caught.value) == f"{WHERE}: no column 'text'; the rows have: sentence, label"


def test_an_unread_column_of_other_types_stops_no_files(tmp_path, monkeypatch):
    """I: Parquet files of which a column is a number here and a text there are read; only that column is refused."""
    monkeypatch.chdir(tmp_path)
    for name, number in (("a.parquet", 1), ("b.parquet", "x")):
        write_table(Path(name), [{"text": name, "label": 0, "id": number}])
    rows = load_files(["a.parquet", "b.parquet"], WHERE)
    assert rows.column("text") == ["a.parquet", "b.parquet"] and rows.part is None
    assert [rows.place(row) for row in (0, 1)] == ["a.parquet, row 1", "b.parquet, row 1"]
    with pytest.raises(DataError, match=r"column 'id' holds whole numbers in part 'a.parquet', texts in 'b.parquet'"):
        rows.column("id")
