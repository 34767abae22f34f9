"""What `predict` reads, files, lines or what Python hands over, as rows in windows, each row with its place.

Every line of an input is a row of its window or stands in `order` as a `Bad`, blank lines too, so that records can
stand beside their lines. Lines are read as they come; a window is small at first, so that first answers are early.
Everything goes by way of the readers of `data/`, so that a row is the same one from a file, a pipe or a program.
"""

import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from sft_jax.data.folders import is_folder
from sft_jax.data.gather import shown
from sft_jax.data.images import encode_plain, image_files
from sft_jax.data.records import Problem, text_records
from sft_jax.data.rows import Bad, Rows, numbered
from sft_jax.data.sources import load_files
from sft_jax.data.tables import read_json
from sft_jax.errors import DataError, reason
from sft_jax.tasks.task import Record, Task

FIRST, MOST = 32, 2048  # rows of the first window, and of any; each is twice as large as the one before
WHERE = "input"
LINES, JSON_LINES = (".txt", ""), ".jsonl"  # files that are read line by line
BLANK = ("no text", "a blank line")
# Where a row stands: "reviews.csv, line 12", "row 3"; a file that is a row has its name alone.
PLACE = re.compile(r"(?:(?P<file>.*), )?(?P<unit>line|row) (?P<number>\d+)", re.DOTALL)
TABLES = ("pandas", "polars", "pyarrow")  # libraries whose tables are taken as they are


class Window(NamedTuple):
    """Some rows, and all records of the input that they are of, in order: the number of a row, or why there is none."""

    rows: Rows
    order: list[int | Bad]


def read_inputs(file: str, task: Task, lines: Sequence[str] | None = None) -> Rows:
    """All rows of a file of any kind that training reads, or the lines of a text file (or those given) as texts.

    For a model of images an image, a folder of some, or lines that are paths of some do as well; `id` is the name. What
    is no row stands in `bad`.
    """
    if lines is not None:
        return next(_of_lines([("line", opened("\n".join(lines)))], task, None), of_texts(task, []))
    if (rows := _of_images([file], task)) is not None:
        return rows
    if _by_line([file]):
        return next(_of_lines([(_by_name([file])[0], file)], task, None, as_json=_says_json(file)), of_texts(task, []))
    return _of_folder(task, file) if is_folder(file) else load_files([file], WHERE)


def stream_inputs(
    files: Sequence[str], task: Task, stdin: BufferedReader, *, at_once: bool = False
) -> Iterator[Window]:
    """The rows of files of one kind, or of the lines of a stream where there is none, as they come.

    With `at_once` a line is answered before the next is waited for, as a person expects.
    """
    if (rows := _of_images(files, task)) is not None:
        yield from windows(rows)
    elif not files or _by_line(files):
        sources = [*zip(_by_name(files), files, strict=True)] if files else [("line", stdin)]
        as_json = True if files and all(map(_says_json, files)) else None
        size = 1 if at_once and not files else FIRST
        for block in _of_lines(sources, task, size, as_json=as_json, grows=not at_once):
            yield from windows(block, first=MOST)
    elif len(files) == 1 and is_folder(files[0]):
        yield from windows(_of_folder(task, files[0]))
    else:
        yield from windows(load_files(files, WHERE))


def windows(rows: Rows, first: int = FIRST) -> Iterator[Window]:
    """Rows some at a time, with what is no row at the place where it was read."""
    bad, before = _between(rows)
    begin, size = 0, first
    while begin < len(rows) or (not begin and bad):
        end = min(begin + size, len(rows))
        last = len(bad) if end == len(rows) else int(np.searchsorted(before, end))
        those = slice(int(np.searchsorted(before, begin)), last)
        order: list[int | Bad] = [*range(end - begin)]
        for place, one in zip(before[those][::-1].tolist(), reversed(bad[those]), strict=True):
            order.insert(place - begin, one)
        yield Window(replace(rows.select(np.arange(begin, end)), bad=()), order)
        if end == len(rows):
            return
        begin, size = end, min(2 * size, MOST)


def given(task: Task, data: Any) -> tuple[Iterator[Window], bool]:
    """(what Python hands over as rows, whether that is one row alone); what cannot be meant is refused."""
    kind, home = type(data).__name__, type(data).__module__.partition(".")[0]
    if isinstance(data, Rows):
        return windows(data), False
    if isinstance(data, Dataset):
        return windows(numbered(data, WHERE)), False
    if is_one(task, data):
        return _of_values(task, [data]), True
    if home in TABLES:
        return _of_values(task, _table_rows(data)), False
    if isinstance(data, np.ndarray):
        if not (task.images and data.ndim == 4) and not (data.ndim == 1 and data.dtype.kind in "OUT"):
            raise DataError(f"{WHERE}: an array of {data.dtype} [{', '.join(map(str, data.shape))}], {_expected(task)}")
        data = list(data) if task.images else data.tolist()
    several = isinstance(data, tuple) and len(task.texts) > 1
    unordered = isinstance(data, bytes | bytearray | Mapping | set | frozenset)
    if several or unordered or not isinstance(data, Iterable):
        raise DataError(f"{WHERE}: {'a tuple' if several else f'{kind} {data!r:.40}'}, {_expected(task)}")
    return _of_values(task, data), False


def is_one(task: Task, data: Any) -> bool:
    """Whether this is one row: a text, a dict of columns, the messages of one conversation, an image."""
    if isinstance(data, str | Mapping):
        return True
    if task.images:
        return isinstance(data, Path | bytes) or _is_picture(data) or (isinstance(data, np.ndarray) and data.ndim < 4)
    return task.generation is not None and _is_conversation(data)


def of_texts(task: Task, texts: Sequence[str]) -> Rows:
    """Texts as rows."""
    return numbered(Dataset.from_dict({task.texts[0]: list(texts)}), WHERE)


def opened(text: str) -> BufferedReader:
    """A text as a stream of bytes."""
    return BufferedReader(io.BytesIO(text.encode("utf-8", "surrogateescape")))  # pyright: ignore[reportArgumentType]


def placed(bad: Bad, *, several: bool) -> Record:
    """What a record says of a row that is none: its line or number, of several files its file, else its name."""
    found = PLACE.fullmatch(bad.place)
    if not found:
        return {"id": bad.place}
    file = {"file": found["file"]} if several and found["file"] else {}
    return {**file, found["unit"]: int(found["number"])}


def _by_line(files: Sequence[str]) -> bool:
    endings = {Path(file).suffix.lower() for file in files if not is_folder(file)}
    return len(endings) > 0 and (endings <= {*LINES} or endings == {JSON_LINES}) and not any(map(is_folder, files))


def _by_name(files: Sequence[str]) -> list[str]:
    """What is said before the number of a line of each file."""
    return [f"{name}, line" for name in shown(files)]


def _says_json(file: str) -> bool | None:
    """Whether the name of a file says that its lines are JSON; None where it does not."""
    return True if Path(file).suffix.lower() == JSON_LINES else None


def _of_lines(
    sources: Sequence[tuple[str, str | BufferedReader]],
    task: Task,
    size: int | None,
    *,
    as_json: bool | None = None,
    grows: bool = True,
) -> Iterator[Rows]:
    """The rows of lines, so many at a time or all at once; JSON objects if it is not said and most of them are."""
    names = tuple(name for name, _ in sources)
    lines = chain.from_iterable(
        ((number, *found) for found in text_records(source, WHERE)) for number, (_, source) in enumerate(sources)
    )
    while block := list(islice(lines, size)):
        if as_json is None:
            as_json = _are_objects([text for *_, text in block if isinstance(text, str) and text.strip()])
        yield _of_block(block, names, task, as_json=bool(as_json))
        size = size and (min(2 * size, MOST) if grows else size)


def _are_objects(texts: Sequence[str]) -> bool | None:
    """Whether lines are JSON objects: most of them, or all by how they begin; None where there is none."""
    if not texts:
        return None
    if all(text.lstrip().startswith("{") for text in texts):
        return True
    return sum(map(_is_object, texts)) > len(texts) / 2


def _is_object(text: str) -> bool:
    try:
        return text.lstrip().startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _of_block(
    block: Sequence[tuple[int, int, str | Problem]], names: tuple[str, ...], task: Task, *, as_json: bool
) -> Rows:
    """The rows of some lines, each by the number of its file and its own."""
    kept: list[tuple[int, int]] = []
    texts: list[str] = []
    bad: list[Bad] = []
    for number, line, text in block:
        if isinstance(text, Problem):
            bad.append(Bad(f"{names[number]} {line}", *text))
        elif not text.strip():
            bad.append(Bad(f"{names[number]} {line}", *BLANK))
        else:
            kept.append((number, line))
            texts.append(text)
    if as_json and texts:
        return _of_objects(texts, names, kept, bad)
    columns = {task.texts[0]: texts, **({"id": texts} if task.images else {})}
    return _at(Rows(Dataset.from_dict(columns), WHERE), names, kept, bad)


def _of_objects(texts: Sequence[str], names: tuple[str, ...], places: list[tuple[int, int]], bad: list[Bad]) -> Rows:
    """The rows of JSON objects, read as a file of them is."""
    with tempfile.NamedTemporaryFile("w", suffix=JSON_LINES, encoding="utf-8", newline="\n") as file:
        file.writelines(f"{text}\n" for text in texts)
        file.flush()
        found = read_json([file.name], WHERE)
    for one in found.bad:
        number, line = places[int(one.place.rpartition(" ")[2]) - 1]
        bad.append(one._replace(place=f"{names[number]} {line}"))
    assert found.line is not None
    return _at(found, names, [places[line - 1] for line in found.line.tolist()], bad)


def _at(rows: Rows, names: tuple[str, ...], places: Sequence[tuple[int, int]], bad: Sequence[Bad]) -> Rows:
    """The rows at other places."""
    file, line = np.asarray(places, np.int64).reshape(-1, 2).T
    return replace(rows, files=names, file=file.astype(np.int32), line=line, bad=tuple(bad))


def _between(rows: Rows) -> tuple[list[Bad], np.ndarray]:
    """(what is no row, in order, how many rows stand before each)."""
    if not rows.bad or rows.file is None or rows.line is None:
        return list(rows.bad), np.zeros(len(rows.bad), np.int64)
    numbers = {name: number for number, name in enumerate(rows.files)}

    def key(bad: Bad) -> int:
        name, _, line = bad.place.rpartition(" ")
        if bad.place in numbers:
            return numbers[bad.place] << 40
        return (numbers[name] << 40) + int(line) if name in numbers and line.isdecimal() else 0

    keys = (rows.file.astype(np.int64) << 40) + rows.line
    found = sorted(((key(bad), number) for number, bad in enumerate(rows.bad)))
    before = np.searchsorted(keys, np.asarray([place for place, _ in found], np.int64), side="right")
    return [rows.bad[number] for _, number in found], before


def _of_images(files: Sequence[str], task: Task) -> Rows | None:
    """The rows of images by their files, or of a folder that holds some; None of what is none."""
    if not task.images or not files:
        return None
    found = [image_files(Path(file).expanduser()) for file in files]
    if len(files) == 1 and found[0]:
        names = [image.name for image in found[0]]
    elif all(images == [Path(file).expanduser()] for images, file in zip(found, files, strict=True)):
        names = list(files)
    else:
        return None
    paths = [str(image) for images in found for image in images]
    rows = Rows(Dataset.from_dict({"id": names, task.texts[0]: paths}), WHERE)
    return replace(rows, files=tuple(names), file=np.arange(len(names), dtype=np.int32), line=np.zeros(len(names), int))


def _of_folder(task: Task, folder: str) -> Rows:
    """The rows of a folder of labels, each with its place as its `id`."""
    rows = load_files([folder], WHERE)
    return replace(rows, table=rows.table.add_column("id", [rows.place(row) for row in range(len(rows))]))


def _table_rows(data: Any) -> Iterator[Any]:
    """The rows of a table of another library, as dicts; the values of a column of one."""
    if not hasattr(data, "columns"):
        return iter(data.tolist() if hasattr(data, "tolist") else data.to_pylist())
    if hasattr(data, "iter_rows"):  # polars
        return data.iter_rows(named=True)
    if hasattr(data, "to_batches"):  # Arrow
        return (row for batch in data.to_batches() for row in batch.to_pylist())
    return (row for begin in range(0, len(data), MOST) for row in data.iloc[begin : begin + MOST].to_dict("records"))


def _of_values(task: Task, values: Iterable[Any]) -> Iterator[Window]:
    """Windows of rows as Python has them."""
    source, size, begin = iter(values), FIRST, 0
    while block := list(islice(source, size)):
        places = [(0, begin + number) for number in range(1, len(block) + 1)]
        if task.images:
            rows = Rows(_pictures(task, block), WHERE)
        elif all(isinstance(value, str) for value in block):
            rows = of_texts(task, [str(value) for value in block])
        else:
            texts = [_written(_row(task, value), begin + number) for number, value in enumerate(block, 1)]
            rows, places = _of_objects(texts, ("row",), places, []), []
        yield from windows(_at(rows, ("row",), places, ()) if places else rows, first=MOST)
        begin, size = begin + len(block), min(2 * size, MOST)


def _row(task: Task, value: Any) -> Mapping[str, Any]:
    """The columns of a row."""
    if isinstance(value, Mapping):
        return value
    first, *more = task.texts
    if more and isinstance(value, list | tuple) and len(value) == len(task.texts):
        return dict(zip(task.texts, value, strict=True))
    return {first: value}


def _written(row: Mapping[str, Any], number: int) -> str:
    try:
        return json.dumps({str(name): value for name, value in row.items()}, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{WHERE}: row {number}: {reason(error)}; give texts, numbers, lists and dicts") from None


def _plain(value: Any) -> Any:
    """What JSON has for a value of other libraries."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} {value!r:.40} is no value of a row")


def _is_conversation(data: Any) -> bool:
    """Whether this is the messages of one conversation, and not several rows."""
    return isinstance(data, list) and bool(data) and all(isinstance(m, Mapping) and "role" in m for m in data)


def _is_picture(value: Any) -> bool:
    """Whether this is an image of Pillow."""
    return hasattr(value, "save") and hasattr(value, "convert")


def _pictures(task: Task, values: Sequence[Any]) -> Dataset:
    """A table of images: their files by name, their bytes, or their pixels."""
    rows = [value if isinstance(value, Mapping) else {task.texts[0]: value} for value in values]
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    if task.texts[0] in columns:
        images = columns[task.texts[0]]
        named = [str(image) if isinstance(image, str | Path) else None for image in images]
        if "id" not in columns and all(named):
            columns["id"] = named
        columns[task.texts[0]] = [_cell(image) for image in images]
    return Dataset.from_dict(columns)


def _cell(image: Any) -> Any:
    if isinstance(image, Mapping) or image is None:
        return image
    if isinstance(image, str | Path):
        return {"bytes": None, "path": str(image)}
    if _is_picture(image):
        held = io.BytesIO()
        image.save(held, "PNG")
        return {"bytes": held.getvalue(), "path": None}
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        return {"bytes": encode_plain(image), "path": None}
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    raise DataError(
        f"{WHERE}: {type(image).__name__} {image!r:.40} is no image; give a path, bytes, uint8 or a PIL image"
    )


def _expected(task: Task) -> str:
    pairs = f", or of tuples of {' and '.join(task.texts)}" if len(task.texts) > 1 else ""
    what = "an image or a list of images" if task.images else f"a text, or a list of texts or dicts{pairs}"
    return f"expected {what}, a DataFrame or a datasets.Dataset"
