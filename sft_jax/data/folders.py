"""A folder for each label and a text file for each row, on the disk or in an archive: the layout of aclImdb.

Nothing of an archive is extracted. Hidden files, and what lies beside the folders of the labels, are no rows.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from sft_jax.archives import ENDINGS, members
from sft_jax.data.gather import Gathered, blocks, texts
from sft_jax.data.records import MOST_CHARS, Problem, read_text
from sft_jax.data.rows import Rows
from sft_jax.errors import DataError

Found = Iterator[tuple[str, bytes | Problem]]  # "label/name.txt" and its content, sorted


def is_folder(path: str) -> bool:
    """Whether this is read as folders of labels: a directory, or an archive by its ending."""
    return path.lower().endswith(ENDINGS) or Path(path).expanduser().is_dir()


def read_folders(folders: Sequence[str], where: str) -> Rows:
    """The rows of some folders, sorted by label and name: the text of each file, and the folder that it is in."""
    found = Gathered(where, [])

    def files() -> Found:
        for folder in folders:
            path, before = Path(folder).expanduser(), f"{folder}/" if len(folders) > 1 else ""
            for name, content in _of_directory(path, where) if path.is_dir() else _of_archive(path, where):
                name = name.encode("utf-8", "backslashreplace").decode()  # a disk may hold names that are no UTF-8
                found.files.append(before + name)
                yield name, content

    def records(_: int, file: tuple[str, bytes | Problem]) -> Iterator[tuple[int, tuple[str, str] | Problem]]:
        name, content = file
        text = content if isinstance(content, Problem) else read_text(content)
        yield 0, text if isinstance(text, Problem) else (text, name.partition("/")[0])

    columns: tuple[list[pa.Array], ...] = ([], [])
    for block in blocks(files(), records, found):
        for column, values in zip(columns, zip(*block, strict=True), strict=True):
            column += texts(values)
    text, label = (pa.chunked_array(column, pa.string()) for column in columns)
    return found.rows(pa.table({"text": text, "label": label}))


def _of_directory(folder: Path, where: str) -> Found:
    try:
        labels = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not labels:
            raise DataError(f"{where}: {folder} holds no folder; give one that has a folder for each label")
        for label in labels:
            for file in sorted(label.iterdir()):
                if not file.name.startswith("."):
                    yield f"{label.name}/{file.name}", _content(file)
    except OSError as error:
        raise DataError(f"{where}: {folder} cannot be read ({error.strerror}); check its rights") from None


def _content(file: Path) -> bytes | Problem:
    if not file.is_file():
        return Problem("no text file", "is no file; a label's folder holds text files alone")
    try:
        return _refusal(file.name, file.stat().st_size) or file.read_bytes()
    except OSError as error:
        return Problem("no text file", f"cannot be read ({error.strerror}); check its rights")


def _refusal(name: str, size: int) -> Problem | None:
    """Why a file in a label's folder is not read; names without an ending are texts too, as those of 20 Newsgroups."""
    ending = os.path.splitext(name)[1].lower()
    if ending not in ("", ".txt") and not ending[1:].isdigit():
        return Problem("no text file", f"ends in {ending}, expected .txt")
    return Problem("text too long", f"{size} bytes; a text has at most {MOST_CHARS}") if size > MOST_CHARS else None


def _of_archive(archive: Path, where: str) -> Found:
    """As `_of_directory`; folders that all texts are in together, such as the archive's own name, do not count."""
    try:
        held = {tuple(name.split("/")): content for name, content in members(archive)}
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    plain = {path for path in held if not any(part.startswith((".", "__MACOSX")) for part in path)}
    depths = Counter(len(path) for path in plain if len(path) > 1)
    if not depths:
        raise DataError(f"{where}: {archive} holds no folder with files; pack a folder for each label")
    depth = max(depths, key=lambda depth: (depths[depth], depth))
    folders = zip(*(path[: depth - 2] for path in plain if len(path) == depth), strict=True)
    above = tuple(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, folders))
    for path in sorted(path for path in plain if path[: len(above)] == above and len(path) > len(above) + 1):
        deep = len(path) > len(above) + 2
        problem = Problem("no text file", "lies deeper than in a label's folder") if deep else None
        yield "/".join(path[len(above) :]), problem or _refusal(path[-1], len(held[path])) or held[path]
