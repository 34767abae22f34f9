"""Flat columns: the same values as lists, in blocks of any size, on disk and in memory; many rows take little of it."""

import csv
import json
import os
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import write_tokenizer
from test_prepare import prepared

from sft_jax import inputs
from sft_jax.data import cache, columns, kept, rows
from sft_jax.data.columns import Growing, NumberColumn, TextColumn, digest, flat, numbers, picked, ranges
from sft_jax.data.order import random_bits, sorting
from sft_jax.data.prepare import Prepared
from sft_jax.data.text import load_tokenizer, tokenize

TEXTS = ["a", "", "ébc", "漢字", "a b", "🎉"] * 3


@pytest.fixture
def small(monkeypatch) -> None:
    """Blocks of a few rows, and everything on disk."""
    monkeypatch.setattr(columns, "BLOCK", 4)
    monkeypatch.setattr(columns, "MOST_BLOCK", 12)
    monkeypatch.setattr(rows, "BLOCK", 3)
    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    monkeypatch.setattr(cache, "MAPPED", 8)


def grown(values, size: int):
    """A column of these values, added some at a time."""
    column = Growing()
    for begin in range(0, len(values), size):
        column.add(values[begin : begin + size])
    return column.column()


@pytest.mark.parametrize("size", [1, 3, 99])
@pytest.mark.parametrize("values", [TEXTS, [""] * 9, list(range(9)), [0.5, -0.0, 1e300] * 3], ids=str)
def test_flat_columns_are_lists(values, size, small):
    """Issue 14: a flat column is read, sliced, selected from and compared as the list of its values is."""
    column = grown(values, size)
    assert isinstance(column, TextColumn if isinstance(values[0], str) else NumberColumn)
    assert (
        column == values
        and values == column
        and list(column) == values
        and [*map(type, column)] == [*map(type, values)]
    )
    assert (
        column[-1] == values[-1] and column[2:5] == values[2:5] and column[::-2] == values[::-2] and column[9:3] == []
    )
    assert column != values[:-1] and column != [*values[:-1], "other"]
    with pytest.raises(IndexError):
        column[len(values)]
    chosen = np.array([3, 0, 3, len(values) - 1])
    again = picked(picked(column, chosen), np.array([3, 1]))
    assert again == [values[-1], values[0]] and again[1:] == [values[0]] and len(again) == 2
    assert flat(values) == values and flat(column) is column


@pytest.mark.parametrize(
    "values",
    [
        ["a"] * 5 + [1] * 5,
        [1] * 5 + [2.0] * 5,
        [(1,)] * 9,
        [None] * 9,
        [True] * 9,
        [2**70] * 9,
        ["a", None] * 5 + ["\ud800"],
    ],
    ids=str,
)
def test_what_is_no_flat_column_stays_a_list(values, small):
    """Issue 14: values of several types, or of others, are objects, and none is taken for another one."""
    found = grown(values, 2)
    assert found == values and [*map(type, found)] == [*map(type, values)] and isinstance(found, list)


def test_none_stands_for_nothing(small):
    """Issue 14: rows that lack a value do not keep a column from lying flat; a few rows are a list, as they are."""
    assert grown(["a", None, "b"] * 2, 2) == ["a", "", "b"] * 2 and grown([1, None], 1) == [1, None]
    assert grown([None, 1, 2] * 2, 2) == [-1, 1, 2] * 2


def test_a_digest_is_of_the_texts_alone(small):
    """Issue 14: what a key is made of depends on neither blocks, nor what texts are held in, nor where from."""
    column = grown(["x", *TEXTS], 2)
    some = column.select(np.arange(1, len(column)))
    expected = list(digest(TEXTS))
    assert list(digest(some)) == list(digest(tuple(TEXTS))) == expected
    columns.BLOCK, columns.MOST_BLOCK = 1 << 12, 1 << 22  # set back by the fixture
    assert list(digest(some)) == list(digest(TEXTS)) == expected
    for other in (TEXTS[::-1], TEXTS[:-1], ["ab", "c"], ["a", "bc"]):
        assert list(digest(other)) != expected
    assert list(digest(["ab", "c"])) != list(digest(["a", "bc"]))


def test_blocks_have_a_bound_of_rows_and_of_characters(small):
    """Issue 14: a block is a few rows and not too much text, but for a single text that is more."""
    texts = ["a" * size for size in (1, 1, 1, 1, 5, 6, 7, 30, 1, 12)]
    found = list(ranges(texts))
    assert found == [(0, 4), (4, 6), (6, 7), (7, 8), (8, 9), (9, 10)]
    assert list(ranges([])) == [(0, 0)]


def test_equal_rows_have_equal_numbers(small, monkeypatch):
    """Issue 14: rows are told apart by hashes as they are by themselves, over tables in whatever they are held."""
    draw = np.random.default_rng(0)
    one, two = (draw.choice(["a", "b", "ab", "", "é"], size=30).tolist() for _ in range(2))

    def same(found, expected):
        pairs = set(zip(np.concatenate(found).tolist(), expected, strict=True))
        return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})

    assert same(numbers([(grown(one, 4),), (two[:3],)]), [*one, *two[:3]])
    table = (grown(one, 4), grown(two, 4))
    assert same(numbers([table, (["a"], ["b"])]), [*zip(one, two, strict=True), ("a", "b")])
    assert same(numbers([(grown([2, 1, 2] * 3, 2),), (grown([1, 3] * 3, 2),)]), [2, 1, 2] * 3 + [1, 3] * 3)
    assert same(numbers([(grown([2, 1] * 3, 2),), (["1", (2,)],)]), [2, 1] * 3 + ["1", (2,)])


def test_splits_are_the_same_in_blocks(small, monkeypatch):
    """Issue 14: what is dropped, cut, drawn and reported is that of lists, to the last row."""
    texts = [f" text {n % 50} <br> {'' if n % 7 else '&amp;'}" for n in range(300)]
    texts[5:9] = ["", "x" * 99, " ", None]
    given = {"train": (texts, [n % 3 for n in range(300)]), "test": (texts[20:40], [0] * 20)}
    options = {
        "duplicates": "drop",
        "leakage": "drop",
        "bad_rows": "drop",
        "split": {"validation": 0.2},
        "clean": {"html": True, "whitespace": True, "max_chars": 50},
    }
    in_blocks = prepared(given, **options)
    assert isinstance(in_blocks[0]["train"].texts[0], TextColumn)
    for module, size in ((columns, 1 << 12), (rows, 1 << 14)):
        monkeypatch.setattr(module, "BLOCK", size)
    at_once = prepared(given, **options)
    assert isinstance(at_once[0]["train"].texts[0], list) and in_blocks[1] == at_once[1]
    for name, part in at_once[0].items():
        found = in_blocks[0][name]
        assert found.texts == part.texts and found.targets == part.targets
        assert found.numbers.tolist() == part.numbers.tolist()


@pytest.mark.parametrize("pairs", [False, True])
def test_tokens_are_the_same_in_blocks(pairs, tmp_path, monkeypatch):
    """Issue 14: texts in blocks of one, of seven or of all come to the same tokens, from lists and from disk."""
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    draw = np.random.default_rng(1)
    words = ["bara", "bare", "cela", "doro", "unknown", "漢字"]
    texts, others = ([" ".join(draw.choice(words, size=draw.integers(0, 12))) for _ in range(40)] for _ in range(2))
    found = []
    for size in (1, 7, 99):
        monkeypatch.setattr(columns, "BLOCK", size)
        for given in ((texts, others), (grown(texts, 3), grown(others, 3))):
            found.append(tokenize(tokenizer, given[0], given[1] if pairs else None, 9))
    for other in found[1:]:
        assert other.truncated == found[0].truncated > 0 and other.offsets.tolist() == found[0].offsets.tolist()
        for name, array in found[0].fields.items():
            assert array.dtype == np.int32 and other.fields[name].tobytes() == array.tobytes()


def test_few_texts_are_encoded_at_one_time(tmp_path, monkeypatch):
    """Issue 14: 40,000 texts are tokenised with a thousand encodings alive, in a fraction of the memory of all."""
    write_tokenizer(tmp_path)
    tokenizer, real, most = load_tokenizer(tmp_path), columns.ranges, []

    def counted(*given):
        for begin, end in real(*given):
            most.append(end - begin)
            yield begin, end

    texts = grown([f"bara bare cela {n % 97} doro dora" for n in range(40_000)], 8192)
    monkeypatch.setattr("sft_jax.data.text.ranges", counted)
    monkeypatch.setattr(columns, "BLOCK", 1000)
    tracemalloc.start()
    found = tokenize(tokenizer, texts, None, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most == [1000] * 40 and peak < 4 * found.fields["input_ids"].nbytes < 40_000 * 400


def test_sorting_is_stable():
    """R21: random numbers are put in order as a stable sort does it, where some are equal too."""
    bits = random_bits(3, 1, 5000)
    for given in (bits, bits % 50, bits[:0], bits[:1]):
        assert sorting(given).tolist() == np.argsort(given, kind="stable").tolist()


# Prepared rows that are kept.


def test_all_that_rows_say_is_kept():
    """Issue 14: whoever gives `Rows`, a report or a prepared split another field says here that it is kept too."""
    of_rows = {
        "table",
        "where",
        "files",
        "file",
        "line",
        "part",
        "bad",
        "notes",
        "written",
        "cells",
        "lacking",
        "unfit",
    }
    assert {field.name for field in fields(rows.Rows)} == of_rows
    assert {field.name for field in fields(Prepared)} == {"rows", "texts", "targets", "numbers"}


@pytest.fixture
def large(monkeypatch, tmp_path):
    """`read(...)`: the rows of a run of a small file that counts as large, and whether they were read anew."""
    monkeypatch.setattr(kept, "LEAST_BYTES", 1)
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "cache"))
    real, made = inputs.load_rows, []
    monkeypatch.setattr(inputs, "load_rows", lambda *given: made.append(1) or real(*given))

    def read(config):
        before = len(made)
        task, found, report = inputs.read_rows(config)
        return task, found, report, len(made) > before

    return read


def write(file, count: int = 60, last: str = "bara") -> None:
    """Rows of three columns, the last of them with this text."""
    with open(file, "w", newline="") as sink:
        lines = [[f"<b>{'bare ' * (n % 9)}</b> cela {n}", "ab"[n % 2], n % 3] for n in range(count - 1)]
        csv.writer(sink).writerows([["text", "label", "kind"], *lines, [last, "a", 7]])


def test_prepared_rows_are_found_again(large, configure, tmp_path):
    """Issue 14: the second run reads no row, and knows of rows, texts, labels and places what the first knew."""
    write(tmp_path / "rows.csv")
    options = [f"data.source.train={tmp_path}/rows.csv", "data.split.validation=0.2", "data.bad_rows=drop"]
    options += [
        "data.source.validation=null",
        "data.source.test=null",
        "eval.every=never",
        "data.clean.html=true",
        "data.duplicates=drop",
    ]
    plain = large(configure(*options, "data.cache=false"))
    first, again = (large(configure(*options)) for _ in range(2))
    assert [found[-1] for found in (plain, first, again)] == [True, True, False]
    for task, found, report, _ in (first, again):
        assert report == plain[2] and task.labels == plain[0].labels and found.keys() == plain[1].keys()
        for name, part in plain[1].items():
            other = found[name]
            assert other.texts == part.texts and other.targets == part.targets and len(other) == len(part)
            assert [other.rows.place(n) for n in range(len(other))] == [part.rows.place(n) for n in range(len(part))]
            for column in ("text", "label", "kind"):
                assert other.rows.column(column) == part.rows.column(column)
            assert other.rows.texts("kind") == part.rows.texts("kind") and other.rows.names == part.rows.names
            assert replace(other.rows, table=None, file=None, line=None) == replace(
                part.rows, table=None, file=None, line=None
            )


def test_prepared_rows_are_found_by_all_that_they_depend_on(large, configure, tmp_path, monkeypatch):
    """Issue 14: other content, names, settings, seeds or code are read anew, whatever dates and sizes say."""
    file = tmp_path / "rows.csv"
    write(file)
    base = [f"data.source.train={file}", "data.source.validation=null", "data.source.test=null", "eval.every=never"]
    base += ["data.split.test=0.2"]
    assert large(configure(*base))[-1] and not large(configure(*base))[-1]
    state = os.stat(file)
    write(file, last="bari")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert os.stat(file).st_size == state.st_size and large(configure(*base))[-1], "the same date, the same size"
    write(file)
    assert not large(configure(*base))[-1], "and what was there before is found again"
    for change in (
        "data.max_length=9",
        "train.batch_size=4",
        "data.prefetch=1",
        "data.layout.kind=padded",
        "seed.init=9",
    ):
        assert not large(configure(*base, change))[-1], change
    for change in ("data.split.test=0.3", "data.max_rows=20", "data.clean.html=true", "data.duplicates=drop", "seed=7",
                   "task.label=kind", "data.bad_rows=drop"):  # fmt: skip
        assert large(configure(*base, change))[-1], change
    (tmp_path / "other.csv").write_bytes(file.read_bytes())
    assert large(configure(f"data.source.train={tmp_path}/other.csv", *base[1:]))[-1], "places say the file's name"
    monkeypatch.setattr(kept, "VERSION", "another")
    assert large(configure(*base))[-1]


def test_files_that_change_while_they_are_read_are_not_kept(large, configure, tmp_path, monkeypatch):
    """Issue 14: an entry is of the content that its key was made of, or it is none."""
    file = tmp_path / "rows.csv"
    write(file)
    config = configure(
        f"data.source.train={file}", "data.source.validation=null", "data.source.test=null", "eval.every=never"
    )
    real = kept.digest

    def late(name):
        found = real(name)
        write(file, last="bari")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(kept, "digest", late)
        assert large(config)[1]["train"].texts[0][-1] == "bari"
    write(file)
    assert large(config)[1]["train"].texts[0][-1] == "bara" and list((tmp_path / "cache" / "rows").iterdir())


def test_rows_that_do_not_lie_flat_are_read_each_time(large, configure, tmp_path):
    """Issue 14: several labels a row are objects: nothing is kept of them, and the rows are those without a cache."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"bara {n}", "labels": ["a", "b"][: n % 3]}) + "\n" for n in range(20)))
    options = [f"data.source.train={file}", "data.source.validation=null", "data.source.test=null", "eval.every=never"]
    options += ["task.kind=multi_label_classification", "task.label=labels"]
    plain, *cached = (large(configure(*options, *more)) for more in (["data.cache=false"], [], []))
    assert all(found[-1] and found[1]["train"].targets == plain[1]["train"].targets for found in cached)
    assert not list((tmp_path / "cache" / "rows").iterdir())
