"""A folder for each label and a file for each row, texts or images, on the disk or in an archive: as aclImdb, ImageNet.

Nothing of an archive is extracted. Hidden files, and what lies beside the folders of the labels, are no rows. Images on
the disk stay there until they are needed.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from datasets import Features, Value

from sft_jax.archives import ENDINGS, members
from sft_jax.data import images
from sft_jax.data.gather import Gathered, blocks, texts
from sft_jax.data.records import MOST_CHARS, UTF8, Problem, read_text
from sft_jax.data.rows import Rows
from sft_jax.errors import DataError


class File(NamedTuple):
    """A file of a label."""

    name: str  # "label/name.txt"
    size: int
    read: Callable[[], bytes]
    path: str | None  # on the disk


Found = Iterator[File | tuple[str, Problem]]  # sorted


def is_folder(path: str) -> bool:
    """Whether this is read as folders of labels: a directory, or an archive by its ending."""
    return path.lower().endswith(ENDINGS) or Path(path).expanduser().is_dir()


def read_folders(folders: Sequence[str], where: str, encoding: str = UTF8) -> Rows:
    """The rows of some folders, sorted by label and name: the text or image of each file, and the folder it is in."""
    found, entries = Gathered(where, []), list[File | tuple[str, Problem]]()
    for folder in folders:
        path, before = Path(folder).expanduser(), f"{folder}/" if len(folders) > 1 else ""
        for entry in _of_directory(path, where) if path.is_dir() else _of_archive(path, where):
            # A disk may hold names that are no UTF-8.
            found.files.append(before + entry[0].encode("utf-8", "backslashreplace").decode())
            entries.append(entry)
    files = [entry for entry in entries if isinstance(entry, File)]
    pictures = sum(_ending(file.name) in images.ENDINGS for file in files)
    as_images = 2 * pictures > len(files)  # those of the other kind are no rows
    read = _image if as_images else partial(_text, encoding=encoding)

    def records(_: int, entry: File | tuple[str, Problem]) -> Iterator[tuple[int, tuple[object, str] | Problem]]:
        content = read(entry) if isinstance(entry, File) else entry[1]
        label = entry[0].encode("utf-8", "backslashreplace").decode().partition("/")[0]
        yield 0, content if isinstance(content, Problem) else (content, label)

    columns: tuple[list[pa.Array], ...] = ([], [])
    kind = images.FEATURE if as_images else Value("string")
    for block in blocks(entries, records, found):
        contents, labels = zip(*block, strict=True)
        columns[0].extend(texts(contents) if not as_images else _chunks(pa.array(contents, images.FEATURE.pa_type)))
        columns[1].extend(texts(labels))
    name, types = ("image" if as_images else "text"), (kind.pa_type, pa.string())
    content, label = (pa.chunked_array(column, kind) for column, kind in zip(columns, types, strict=True))
    return found.rows(
        pa.table({name: content, "label": label}), features=Features({name: kind, "label": Value("string")})
    )


def _image(file: File) -> dict[str, object] | Problem:
    """A cell of a column of images."""
    if _ending(file.name) not in images.ENDINGS:
        return Problem("no image", f"ends in {_ending(file.name)}, expected an image ({', '.join(images.ENDINGS)})")
    return {"bytes": None if file.path else file.read(), "path": file.path}


def _text(file: File, encoding: str) -> str | Problem:
    if not _is_text(file.name):
        return Problem("no text file", f"ends in {_ending(file.name)}, expected .txt")
    if file.size > MOST_CHARS:
        return Problem("text too long", f"{file.size} bytes; a text has at most {MOST_CHARS}")
    try:
        return read_text(file.read(), encoding)
    except OSError as error:
        return _unread(error)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_text(name: str) -> bool:
    """Whether a file is a text by its name; names without an ending are texts too, as those of 20 Newsgroups."""
    ending = _ending(name)
    return ending in ("", ".txt") or ending[1:].isdigit()


def _chunks(array: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return array.chunks if isinstance(array, pa.ChunkedArray) else [array]


def _unread(error: OSError) -> Problem:
    return Problem("no text file", f"cannot be read ({error.strerror}); check its rights")


def _of_directory(folder: Path, where: str) -> Found:
    try:
        labels = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not labels:
            raise DataError(f"{where}: {folder} holds no folder; give one that has a folder for each label")
        held = {label: sorted(f for f in label.iterdir() if not f.name.startswith(".")) for label in labels}
        for label, files in held.items():
            for file in files:
                name = f"{label.name}/{file.name}"
                if file.is_file():
                    yield File(name, file.stat().st_size, file.read_bytes, str(file))
                else:
                    yield name, Problem("no text file", "is no file; a label's folder holds files alone")
            if not files and any(held.values()):
                yield label.name, Problem("empty folder", "is empty; put files of that label there, or take it away")
    except OSError as error:
        raise DataError(f"{where}: {folder} cannot be read ({error.strerror}); check its rights") from None


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
        name, content = "/".join(path[len(above) :]), held[path]
        if len(path) > len(above) + 2:
            yield name, Problem("no text file", "lies deeper than in a label's folder")
        else:
            yield File(name, len(content), lambda content=content: content, None)
