"""CoNLL files: each sentence is a row of words and tags that knows its line, or is named by the line that is wrong."""

import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_jax.config.data import Files
from sft_jax.data import records
from sft_jax.data.rows import Rows
from sft_jax.data.sources import load_files, load_rows
from sft_jax.errors import DataError

WHERE = "data.source.train"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """`read(content, name)`: its rows, the file being called by its name."""
    monkeypatch.chdir(tmp_path)

    def reader(content: str | bytes, name: str = "a.conll") -> Rows:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return load_files([name], WHERE)

    return reader


def sentences(rows: Rows) -> list[str]:
    """The sentences as `word/tag word/tag`."""
    pairs = zip(rows.column("tokens"), rows.column("tags"), strict=True)
    return [" ".join(f"{word}/{tag}" for word, tag in zip(*pair, strict=True)) for pair in pairs]


def said(rows: Rows) -> list[tuple[str, str]]:
    """Where each piece stands that is no row, and what it is counted as."""
    return [(bad.place, bad.reason) for bad in rows.bad]


@pytest.mark.parametrize("name", ["a.conll", "a.iob", "a.IOB2", "a.bio"])
def test_sentences_of_four_columns(read, name):
    """Words are the first column and tags the last; lines that begin documents are no words, and blank lines divide."""
    rows = read("-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\n", name)
    assert sentences(rows) == ["EU/B-ORG rejects/O", "Peter/B-PER"] and rows.names == ["tokens", "tags"]
    assert [rows.place(i) for i in range(2)] == [f"{name}, line 3", f"{name}, line 7"] and not rows.bad
    assert rows.place(0) == rows.select([0]).place(0)


def test_tabs_and_blanks(read):
    """With tabs a word may hold a blank; a line of blanks or of a tab divides, as does any kind of line end."""
    rows = read("New York\tB-LOC\r\n#\tO\r\n\t\r\n«é»\tO\r\n   \r\n🙂   O")
    assert sentences(rows) == ["New York/B-LOC #/O", "«é»/O", "🙂/O"]


def test_comments_before_a_sentence(read):
    """What stands before a sentence about it is no word of it; a hash that is a word is one."""
    rows = read("# id 12 domain=en\na _ _ O\n# _ _ O\n\n# sent_id = 3\n# text = a b\nb _ _ O\n")
    assert sentences(rows) == ["a/O #/O", "b/O"] and rows.place(1) == "a.conll, line 7"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("b", "word without tag"),
        ("b\t", "word without tag"),
        ("\tO", "tag without word"),
        ("b x O", "wrong number of columns"),
        ("b\0 O", "NUL character"),
        ("caf\udce9 O", "broken UTF-8"),
        ("x" * 200 + " O", "line too long"),
    ],
)
def test_a_wrong_line_costs_its_sentence(read, monkeypatch, wrong, reason):
    """C21: a line that lacks its tag, or is broken, is named; its sentence is no row, and those around it are."""
    monkeypatch.setattr(records, "MOST_CHARS", 100)
    content = f"a O\n\na O\n{wrong}\nc\n\nd O\n".encode("utf-8", "surrogateescape")
    rows = read(content)
    assert sentences(rows) == ["a/O", "d/O"] and said(rows) == [("a.conll, line 4", reason)]


def test_what_is_said_of_a_word_without_tag(read):
    """C21: the message names the word, and what to do."""
    assert read("a O\nEurope\n").bad[0].text == "'Europe' has no tag; write it in the last column"


def test_a_sentence_without_end(read, monkeypatch):
    """A file without blank lines is one bad row, not a sentence without bound."""
    monkeypatch.setattr(records, "MOST_WORDS", 5)
    assert said(read("a O\n" * 9 + "\nb O\n")) == [("a.conll, line 6", "sentence too long")]


def test_several_files_and_packed_ones(tmp_path):
    """Files go one after the other, also packed by gzip, and each sentence knows its own."""
    (tmp_path / "a.bio").write_text("a O\n")
    (tmp_path / "b.bio.gz").write_bytes(gzip.compress(b"\nb B-X\nc I-X\n"))
    rows = load_rows(Files(kind="files", train=[str(tmp_path / "a.bio"), str(tmp_path / "b.bio.gz")]))["train"]
    assert sentences(rows) == ["a/O", "b/B-X c/I-X"] and rows.place(1).endswith("b.bio.gz, line 2")


LINES = st.sampled_from(
    ["a O", "b B-X", "c\tO", "", " ", "\t", "d", "-DOCSTART- O", "# id 1", "# O", "e f O", "g\t", "\0"]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=25))
def test_every_sentence_is_a_row_or_bad(lines, tmp_path):
    """Each run of lines between blank ones is one row, with all of its words, or one bad row."""
    file = tmp_path / "a.conll"
    file.write_text("x O\n\n" + "".join(f"{line}\n" for line in lines))
    rows = load_files([str(file)], WHERE)
    runs: list[list[str]] = [[]]
    for line in lines:
        if not line.strip() or line.startswith("-DOCSTART-"):
            runs.append([])
        elif runs[-1] or line != "# id 1":
            runs[-1].append(line)
    whole = [run for run in runs if run]
    assert len(rows) + len(rows.bad) == 1 + len(whole)
    sound = [run for run in whole if all(line in ("a O", "b B-X", "c\tO", "# O") for line in run)]
    assert [len(tokens) for tokens in rows.column("tokens")[1:]] == [len(run) for run in sound]


@pytest.mark.parametrize(
    ("row", "said"),
    [("{n}\tword{n}\tword\tNOUN\t_", "numbers in its first column, such as '1'"),
     ("bc/cctv/00/cctv_0000 0 {n} word{n} NN *", "names of documents in its first column, such as 'bc/cctv/00")],
)  # fmt: skip
def test_other_kinds_of_conll_are_refused(row, said, read):
    """CoNLL-U and CoNLL-2012 have no word in their first column, and are never read as if they had."""
    with pytest.raises(DataError, match=said):
        read("\n".join(row.format(n=n) for n in range(1, 5)) + "\n")
