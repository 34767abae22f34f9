"""Folders of texts with a folder a label, on the disk and packed: sorted rows that know their files, nothing lost."""

import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from sft_jax.config.data import Files
from sft_jax.config.read import read_config
from sft_jax.data import folders
from sft_jax.data.rows import Rows
from sft_jax.data.sources import load_files, load_rows
from sft_jax.errors import DataError

WHERE = "data.source.train"
TEXTS = {"pos/10.txt": "a fine film", "pos/9.txt": "naïve 🎉\n\nsecond", "neg/1.txt": "a bad one", "neg/2": "no ending"}
FORMS = {".tar": "", ".tar.gz": "gz", ".tgz": "gz", ".tar.bz2": "bz2", ".tar.xz": "xz"}
WANTED = [  # sorted by label and name
    ("neg", "neg/1.txt"), ("neg", "neg/2"), ("pos", "pos/10.txt"), ("pos", "pos/9.txt"),
]  # fmt: skip


def write(home: Path, files: dict[str, str | bytes]) -> Path:
    """These files below a directory."""
    for name, content in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return home


def pack(home: Path, ending: str, above: str = "") -> Path:
    """A directory as an archive beside it, its files in a folder `above`, in no order."""
    archive = home.with_name(f"{home.name}{ending}")
    names = sorted((str(file.relative_to(home)) for file in home.rglob("*") if file.is_file()), key=hash)
    if ending == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for name in names:
                packed.write(home / name, above + name)
    else:
        with tarfile.open(archive, f"w:{FORMS[ending]}") as tar:
            for name in names:
                tar.add(home / name, above + name)
    return archive


def read(path: Path) -> list[tuple[str, str, str]]:
    """(label, place, text) of each row."""
    rows = load_files([str(path)], WHERE)
    assert not rows.bad
    return listed(rows)


def listed(rows: Rows) -> list[tuple[str, str, str]]:
    """(label, place, text) of each row."""
    places = [rows.place(i) for i in range(len(rows))]
    return list(zip(rows.column("label"), places, rows.column("text"), strict=True))


@pytest.mark.parametrize("ending", ["", ".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_a_folder_a_label_is_rows(ending, tmp_path):
    """Folders, plain or packed in any of the ways, give each file's text with its folder as the label, sorted."""
    home = write(tmp_path / "train", TEXTS)
    expected = [(label, place, TEXTS[place]) for label, place in WANTED]
    assert read(pack(home, ending) if ending else home) == expected


@pytest.mark.parametrize("above", ["train/", "aclImdb/train/"])
def test_folders_around_the_labels_do_not_count(above, tmp_path):
    """An archive may hold the folders of the labels in others, of its own name say, and a note beside them."""
    home = write(tmp_path / "train", {**TEXTS, "urls.txt": "no label", ".DS_Store": "x", "neg/.hidden": "x"})
    assert [row[:2] for row in read(pack(home, ".zip", above))] == WANTED
    assert [row[:2] for row in read(home)] == WANTED


def test_files_that_are_no_text_are_named(tmp_path, monkeypatch):
    """What lies in a label's folder and is no text is named by its path: other endings, folders, bytes, sizes."""
    monkeypatch.setattr(folders, "MOST_CHARS", 100)
    odd = {"neg/a.png": b"\x89PNG", "neg/b.txt": b"caf\xe9", "pos/c.txt": b"a\0b", "pos/d.txt": b"x" * 101}
    home = write(tmp_path / "train", {**TEXTS, **odd, "pos/more/e.txt": "deeper"})
    expected = {
        "neg/a.png": "ends in .png, expected .txt",
        "neg/b.txt": "not UTF-8 (byte 0xe9 at byte 4); save the file as UTF-8, or set data.source.encoding (cp1252 "
        "where Windows wrote it)",
        "pos/c.txt": "holds a NUL character; take it out",
        "pos/d.txt": "101 bytes; a text has at most 100",
    }
    plain, packed = load_files([str(home)], WHERE), load_files([str(pack(home, ".zip"))], WHERE)
    more = {"pos/more": "is no file; a label's folder holds files alone"}
    assert {bad.place: bad.text for bad in plain.bad} == {**expected, **more}
    deeper = {"pos/more/e.txt": "lies deeper than in a label's folder"}
    assert {bad.place: bad.text for bad in packed.bad} == {**expected, **deeper}
    assert [row[:2] for row in listed(plain)] == [row[:2] for row in listed(packed)] == WANTED


def test_several_folders_are_told_apart(tmp_path):
    """Rows of several folders stand one after the other, and their places name the folder."""
    homes = [str(write(tmp_path / name, {"a/1.txt": name})) for name in ("two", "one")]
    assert [row[1:] for row in listed(load_files(homes, WHERE))] == [
        (f"{tmp_path}/two/a/1.txt", "two"),
        (f"{tmp_path}/one/a/1.txt", "one"),
    ]


def test_a_name_that_is_no_text_can_be_said(tmp_path):
    """A file whose name is not UTF-8, as disks may hold, is a row, and its place can be printed."""
    home = write(tmp_path / "train", {"a/1.txt": "one"})
    Path(os.fsdecode(os.fsencode(home / "a") + b"/\xff.txt")).write_text("two")
    assert [row[1].encode() for row in read(home)] == [b"a/1.txt", b"a/\\udcff.txt"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", "holds no folder; give one that has a folder for each label"),
        ("hollow", "holds no row; give files with some"),
        ("flat.zip", "holds no folder with files; pack a folder for each label"),
        ("broken.tar.gz", "not a whole zip or tar archive"),
        ("outside.tar", "reaches outside the archive; do not trust it"),
    ],
)
def test_what_is_no_folder_of_labels(name, said, tmp_path):
    """R35: an empty folder, one without labels, and archives that are broken or reach outside are one clear line."""
    path = tmp_path / name
    if name in ("empty", "hollow"):
        (path / "label" if name == "hollow" else path).mkdir(parents=True)
    elif name == "flat.zip":
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("a.txt", "a")
    elif name == "broken.tar.gz":
        path.write_bytes(b"\x1f\x8b no more")
    else:
        with tarfile.open(path, "w:") as packed:
            member = tarfile.TarInfo("../a/1.txt")
            packed.addfile(member)
    with pytest.raises(DataError) as caught:
        load_files([str(path)], WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ") and str(path) in message and said in message and "\n" not in message


def test_folders_and_files_do_not_mix(tmp_path):
    """A folder beside a file is refused with the kinds there are."""
    home = write(tmp_path / "train", TEXTS)
    with pytest.raises(DataError, match=r"files ending in \.csv, folder; give files of one kind among"):
        load_files([str(home), "a.csv"], WHERE)


def test_a_configuration_may_name_a_folder(tmp_path):
    """A directory is a source like a file, which the configuration is checked for before anything starts."""
    home = write(tmp_path / "train", TEXTS)
    given = [f"data.source={{kind: files, train: {home}}}", "model.source=a/b", "task.kind=sequence_classification"]
    config = read_config([], [*given, "eval.every=never"])
    assert isinstance(config.data.source, Files)
    assert [row[:2] for row in listed(load_rows(config.data.source)["train"])] == WANTED
