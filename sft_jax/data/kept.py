"""Prepared rows of large files, kept on disk: a run that reads the same again begins with what was decided of them.

An entry is found by the content of the files, never by their dates, by all settings that rows are read and prepared by,
and by the code that does it; so there is none to be found once any of these has changed. Only what lies flat is kept:
texts, numbers and tables. Files that change while they are read are not kept. Knows no task.
"""

import hashlib
import io
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features

from sft_jax.config.data import Files
from sft_jax.data import cache
from sft_jax.data.cache import Arrays, Sink
from sft_jax.data.columns import BLOCK, NUMBERS, Column, NumberColumn, TextColumn, flat, put, ranges
from sft_jax.data.columns import digest as columns_digest
from sft_jax.data.prepare import Prepared
from sft_jax.data.report import DataReport, SplitReport
from sft_jax.data.rows import Bad, Rows
from sft_jax.data.sources import SPLITS

VERSION = "1"  # of how it is kept; another one, and what is in caches is not found any more
LEAST_BYTES = 1 << 25  # of all files together: smaller ones are read in no time
PART = 1 << 26  # bytes of a file that are hashed by one thread
CODE = ("config", "data", "tasks")  # folders of the package that rows are read and prepared by
ARRAYS = ("file", "line", "part")  # of rows
TABLE, ROWS, SAID = "table", "rows", "said"  # of a sink: a table of Arrow, rows of it, and as JSON what is no array


@dataclass(frozen=True)
class Found:
    """What a run knows of its rows."""

    sources: dict[str, Rows]  # as they were read
    splits: dict[str, Prepared]  # each of the source of its name, or of the training rows
    report: DataReport
    labels: tuple[str, ...]  # of the task, which may be read off the rows


class _NotKept(Exception):
    """Carries what was prepared and cannot be kept."""

    def __init__(self, found: Found):
        super().__init__()
        self.found = found


def read(home: Path | None, source: Any, settings: Mapping[str, Any], prepare: Callable[[], Found]) -> Found:
    """What `prepare` gives; from the cache at `home` where the files are large, and were prepared so before.

    `settings` are all that rows are read and prepared by.
    """
    files = _files(source) if home is not None else []
    if not files or sum(os.stat(file).st_size for file in files) < LEAST_BYTES:
        return prepare()
    before = _states(files)

    def make(sink: Sink) -> None:
        found = prepare()
        if _states(files) != before or not _put(sink, found):
            raise _NotKept(found)

    try:
        arrays = cache.made(home, lambda: _origin(source, files, settings), make)
    except _NotKept as error:
        return error.found
    return _taken(arrays)


def digest(file: str) -> bytes:
    """A hash of the content of a file, of its parts in threads: sha256 of the sha256 of each part."""

    def of_part(begin: int) -> bytes:
        found = hashlib.sha256()
        with open(file, "rb", buffering=0) as content:
            content.seek(begin)
            left = PART
            while left and (read := content.read(min(left, cache.CHUNK))):
                found.update(read)
                left -= len(read)
        return found.digest()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return hashlib.sha256(b"".join(pool.map(of_part, range(0, os.stat(file).st_size, PART)))).digest()


def _files(source: Any) -> list[str]:
    """The files of a source of plain files; none where there is something else."""
    if not isinstance(source, Files):
        return []
    given = [named for split in SPLITS if (named := getattr(source, split)) is not None]
    paths = [Path(file).expanduser() for named in given for file in ([named] if isinstance(named, str) else named)]
    return [str(path) for path in paths] if all(path.is_file() for path in paths) else []


def _states(files: Sequence[str]) -> list[tuple[int, ...]]:
    found = [os.stat(file) for file in files]
    return [(state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev) for state in found]


def _origin(source: Files, files: Sequence[str], settings: Mapping[str, Any]) -> Iterator[str | bytes]:
    """All that prepared rows depend on, in parts."""
    yield from (VERSION, platform.python_version(), np.__version__, pa.__version__, datasets.__version__)
    home = Path(__file__).parents[1]
    for file in sorted(file for folder in CODE for file in (home / folder).glob("*.py")):
        yield from (file.name, file.read_bytes())
    yield from (json.dumps(source.model_dump(mode="json")), json.dumps(settings, sort_keys=True))
    yield from map(digest, files)


def _put(sink: Sink, found: Found) -> bool:
    """Put what is known of rows into a sink; False where something of it does not lie flat."""
    said: dict[str, Any] = {"report": asdict(found.report), "labels": found.labels, "splits": {}}
    for name, part in found.splits.items():
        columns = [column for given in (*part.texts, part.targets) if (column := flat(given)) is not None]
        if len(columns) <= len(part.texts):
            return False
        said["splits"][name] = [_put_column(sink, column, f"{name} {n} ") for n, column in enumerate(columns)]
        sink.add(f"{name} {ROWS}", part.numbers)
    said["sources"] = {name: _put_rows(sink, rows, f"{name} ") for name, rows in found.sources.items()}
    if _report(said["report"]) != found.report:
        return False
    sink.add(SAID, np.frombuffer(json.dumps(said).encode(), np.uint8))
    return True


def _taken(arrays: Arrays) -> Found:
    said = json.loads(arrays[SAID].tobytes())
    sources = {name: _rows(arrays, rows, f"{name} ") for name, rows in said["sources"].items()}
    splits = {}
    for name, digests in said["splits"].items():
        *texts, targets = (_column(arrays, known, f"{name} {n} ") for n, known in enumerate(digests))
        source, numbers = sources.get(name, sources["train"]), arrays[f"{name} {ROWS}"]
        rows = source if len(numbers) == len(source) else source.select(numbers)
        splits[name] = Prepared(rows, tuple(texts), targets, numbers)
    return Found(sources, splits, _report(said["report"]), tuple(said["labels"]))


def _put_column(sink: Sink, column: Column, name: str) -> list[str]:
    """Put a column into a sink; gives back the digest of texts."""
    if isinstance(column, NumberColumn):
        sink.add(name + NUMBERS, column.numbers)
        return []
    assert isinstance(column, TextColumn)
    end = None
    for first, last in ranges(column):
        end = put(sink, column.flat(first, last), end, name)
    return list(columns_digest(column))


def _column(arrays: Arrays, known: list[str], name: str) -> Column:
    if name + NUMBERS in arrays:
        return NumberColumn(arrays[name + NUMBERS])
    return TextColumn.opened(arrays, name, tuple(known))


def _put_rows(sink: Sink, rows: Rows, name: str) -> dict[str, Any]:
    """Put rows into a sink, the table as a stream of Arrow; gives back what is no array."""
    table: Any = rows.table.with_format("arrow")
    parts = (table[begin : begin + BLOCK] for begin in range(0, len(rows), BLOCK))
    first = next(parts)
    with pa.ipc.new_stream(_Stream(sink, name + TABLE), first.schema) as stream:
        for part in chain([first], parts):
            stream.write_table(part)
    for field in ARRAYS:
        if (array := getattr(rows, field)) is not None:
            sink.add(name + field, array)
    cells = {column: str(kind) for column, kind in rows.cells.items()}
    said = {name: getattr(rows, name) for name in ("where", "files", "bad", "notes")}
    said |= {"cells": cells, "lacking": dict(rows.lacking), "unfit": dict(rows.unfit)}
    return {**said, "written": sorted(rows.written)}


def _rows(arrays: Arrays, said: Mapping[str, Any], name: str) -> Rows:
    table = pa.ipc.open_stream(pa.py_buffer(arrays[name + TABLE])).read_all()
    info = DatasetInfo(features=Features.from_arrow_schema(table.schema))
    return Rows(
        Dataset(table, info, fingerprint=hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]),
        said["where"],
        tuple(said["files"]),
        *(arrays.get(name + field) for field in ARRAYS),
        bad=tuple(Bad(*bad) for bad in said["bad"]),
        notes=tuple(said["notes"]),
        written=frozenset(said["written"]),
        cells={column: pa.type_for_alias(kind) for column, kind in said["cells"].items()},
        lacking=said["lacking"],
        unfit=said["unfit"],
    )


class _Stream(io.RawIOBase):
    """A file that Arrow writes to, in a sink."""

    def __init__(self, sink: Sink, name: str):
        self._sink, self._name = sink, name

    def writable(self) -> bool:
        """It is for no more than that."""
        return True

    def write(self, content: Any) -> int:
        """Append to the array."""
        self._sink.add(self._name, np.frombuffer(bytes(content), np.uint8))
        return len(content)


def _report(said: Mapping[str, Any]) -> DataReport:
    return DataReport(**{**said, "splits": {name: SplitReport(**split) for name, split in said["splits"].items()}})
