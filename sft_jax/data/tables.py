"""CSV, TSV, JSON lines and text as rows: records gathered in blocks, each column given one type.

Every record is a row or a `Bad`. The cells of CSV are numbers where the whole column is; a value of JSON that does not
fit most others of its column makes its row a `Bad`. Knows no task.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from sft_jax.data.records import Problem, csv_records, json_records, text_records
from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import DataError

BLOCK = 1 << 14  # records that are Python objects at one time
MOST_COLUMNS = 1000  # keys of all objects of a JSON file together
MOST_NESTED = 16  # lists and objects in each other
LONGEST_NAME = 60  # characters of a path that is said in full
INTEGER = r"^-?(0|[1-9][0-9]*)$"
NUMBER = r"^-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"
CALLED = (
    (pa.types.is_string, "a text"),
    (pa.types.is_boolean, "true or false"),
    (pa.types.is_integer, "a whole number"),
    (pa.types.is_floating, "a number"),
    (pa.types.is_list, "a list"),
    (pa.types.is_struct, "an object"),
)
UNFIT = (pa.ArrowException, OverflowError, ValueError, TypeError)  # what Arrow raises for values of no one type


@dataclass
class Gathered:
    """Where the records came from, in the order they were read; grows while they are."""

    names: list[str]  # of the files
    file: array = field(default_factory=lambda: array("i"))
    line: array = field(default_factory=lambda: array("q"))  # from 1; 0 where the record has a file of its own
    bad: list[tuple[int, int, Bad]] = field(default_factory=list)  # by file and line

    def refuse(self, file: int, line: int, reason: str, text: str) -> None:
        """Note that a record is no row."""
        place = f"{self.names[file]}, line {line}" if line else self.names[file]
        self.bad.append((file, line, Bad(place, reason, text)))

    def rows(self, table: pa.Table, where: str, kept: np.ndarray | None = None) -> Rows:
        """The rows of a table that has as many as there were records, or those of them that are kept."""
        file, line = np.asarray(self.file, np.int32), np.asarray(self.line, np.int64)
        names = tuple(f"{name}, line" for name in self.names) if line.any() else tuple(self.names)
        if kept is not None:
            table, file, line = table.filter(pa.array(kept)), file[kept], line[kept]
        bad = tuple(found for *_, found in sorted(self.bad, key=lambda entry: entry[:2]))
        return Rows(Dataset(table), where, names, file, line, bad=bad)


def read_csv(files: Sequence[str], where: str, delimiter: str = ",") -> Rows:
    """The rows of files that have the same columns; the first line of each names them."""
    header: list[str] = []
    found = Gathered(shown(files))

    def records(number: int, file: str) -> Iterator[tuple[int, Any]]:
        lines = csv_records(file, where, delimiter)
        names = _header(next(lines, None), file, where)
        kept = _named_once(names, number, found)
        columns = [names[i] for i in kept]
        header.extend(() if header else columns)
        if sorted(columns) != sorted(header):
            raise DataError(
                f"{where}: {files[0]} has the columns {', '.join(header)}, {file} has {', '.join(columns)}; "
                f"give files of the same columns"
            )
        order = [names.index(name) for name in header]
        plain = order == list(range(len(names)))
        for line, cells in lines:
            if isinstance(cells, Problem):
                yield line, cells
            elif len(cells) != len(names):
                yield line, Problem("wrong number of cells", f"{len(cells)} cells, expected {len(names)} as in line 1")
            else:
                yield line, cells if plain else [cells[i] for i in order]

    columns: dict[str, list[pa.Array]] = {}
    for block in _blocks(files, records, found):
        for name, cells in zip(header, zip(*block, strict=True), strict=True):
            columns.setdefault(name, []).extend(_texts(cells))
    table = pa.table({name: _csv_column(columns.get(name, [])) for name in header})
    return found.rows(table, where)


def read_json(files: Sequence[str], where: str) -> Rows:
    """The rows of files with an object a line, or a list of objects; a column that an object lacks is None there."""
    found = Gathered(shown(files))
    columns: dict[str, list[Any]] = {}
    count = 0
    for block in _blocks(files, lambda number, file: json_records(file, where), found):
        for name in dict.fromkeys(name for record in block for name in record):
            columns.setdefault(name, [pa.nulls(count)] if count else [])
        if len(columns) > MOST_COLUMNS:
            raise DataError(f"{where}: {files[0]} has more than {MOST_COLUMNS} columns; give objects of the same keys")
        for name, chunks in columns.items():
            chunks.append(_packed([record.get(name) for record in block]))
        count += len(block)
    kept, arrays = np.ones(count, bool), []
    for name, chunks in columns.items():
        array, unfit = _json_column(chunks)
        arrays.append(array)
        for row, text in unfit.items():
            if kept[row]:
                found.refuse(found.file[row], found.line[row], "wrong type", f"{name} is {text}")
            kept[row] = False
    return found.rows(pa.table(arrays, names=list(columns)), where, None if kept.all() else kept)


def read_lines(files: Sequence[str], where: str) -> Rows:
    """A row for each line, with the one column `text`."""
    found = Gathered(shown(files))
    blocks = _blocks(files, lambda number, file: text_records(file, where), found)
    chunks = [chunk for block in blocks for chunk in _texts(block)]
    return found.rows(pa.table({"text": pa.chunked_array(chunks, pa.string())}), where)


def shown(files: Sequence[str]) -> list[str]:
    """What files are called in messages: as they were given where that is short, else by their names alone."""
    names = [file if len(file) <= LONGEST_NAME else Path(file).name for file in files]
    return names if len(set(names)) == len(set(files)) else list(files)


def _blocks(
    files: Sequence[str], records: Callable[[int, str], Iterator[tuple[int, Any]]], found: Gathered
) -> Iterator[list[Any]]:
    """The records of all files, some at a time; places and problems go into `found`."""
    block = []
    for number, file in enumerate(files):
        for line, record in records(number, file):
            if isinstance(record, Problem):
                found.refuse(number, line, record.reason, record.text)
                continue
            block.append(record)
            found.file.append(number)
            found.line.append(line)
            if len(block) == BLOCK:
                yield block
                block = []
    if block:
        yield block


def _header(first: tuple[int, Any] | None, file: str, where: str) -> list[str]:
    if first is None:
        raise DataError(f"{where}: {file} is empty; its first line names the columns")
    line, names = first
    if isinstance(names, Problem):
        raise DataError(f"{where}: {file}, line {line}: {names.text}; this line names the columns")
    if not any(names):
        raise DataError(f"{where}: {file}, line {line}: names no column; give each column a name")
    return names


def _named_once(names: list[str], file: int, found: Gathered) -> list[int]:
    """Places of the columns that have a name of their own; the others are said to be left out."""
    kept = []
    for i, name in enumerate(names):
        if not name:
            found.refuse(file, 1, "column without name", f"column {i + 1} has no name, and is left out; name it")
        elif name in names[:i]:
            found.refuse(file, 1, "column twice", f"column {i + 1} is called '{name}' too, and is left out; rename it")
        else:
            kept.append(i)
    return kept


def _texts(values: Sequence[str]) -> list[pa.Array]:
    array = pa.array(values, pa.string())
    return array.chunks if isinstance(array, pa.ChunkedArray) else [array]  # several from 2 GiB on


def _csv_column(chunks: list[pa.Array]) -> pa.ChunkedArray:
    """Numbers where every cell is one or empty, else the cells as they stand."""
    texts = pa.chunked_array(chunks, pa.string())
    for pattern, kind in ((INTEGER, pa.int64()), (NUMBER, pa.float64())):
        if not all(_fits(chunk, pattern) for chunk in chunks) or pc.all(pc.equal(texts, "")).as_py():
            continue
        try:
            numbers = pc.if_else(pc.equal(texts, ""), None, texts).cast(kind)
        except pa.ArrowInvalid:  # beyond 64 bits
            return texts
        return numbers if pc.all(pc.is_finite(numbers)).as_py() else texts
    return texts


def _fits(chunk: pa.Array, pattern: str) -> bool:
    fits = pc.or_(pc.match_substring_regex(chunk, pattern), pc.equal(chunk, ""))
    return bool(pc.all(fits).as_py())


def _packed(values: list[Any]) -> pa.Array | list[Any]:
    """The values as Arrow has them, or as they are where they are of no one type."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds <= {int, float} or len(kinds) <= 1:
        try:
            packed = pa.array(values)
        except UNFIT:
            return values
        if isinstance(packed, pa.Array) and _depth(packed.type) <= MOST_NESTED:
            return packed
    return values


def _json_column(chunks: list[pa.Array | list[Any]]) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """(a column of one type, what the values are that do not fit it, by row)."""
    packed = [chunk for chunk in chunks if isinstance(chunk, pa.Array)]
    if len(packed) == len(chunks):
        try:
            kind = _joined({chunk.type for chunk in packed})
            return pa.chunked_array([chunk.cast(kind) for chunk in packed], kind), {}
        except UNFIT:
            pass
    values = [value for chunk in chunks for value in (chunk.to_pylist() if isinstance(chunk, pa.Array) else chunk)]
    kind, unfit = _majority(values)
    column = pa.array([None if row in unfit else value for row, value in enumerate(values)], kind)
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column]), unfit


def _majority(values: list[Any]) -> tuple[pa.DataType, dict[int, str]]:
    """(type of most values and of those that go with them, what the others are by row)."""
    rows: dict[pa.DataType | str, list[int]] = {}
    for row, value in enumerate(values):
        if value is not None:
            rows.setdefault(_kind(value), []).append(row)
    chosen, unfit = pa.null(), dict[int, str]()
    for kind in sorted(rows, key=lambda kind: -len(rows[kind])):
        try:
            if isinstance(kind, str):
                raise ValueError(kind)
            chosen = _joined({chosen, kind})
            pa.array([values[row] for row in rows[kind]], chosen)
        except UNFIT:
            unfit |= {row: kind if isinstance(kind, str) else _said(values[row]) for row in rows[kind]}
    called = next((name for test, name in CALLED if test(chosen)), "a value")
    return chosen, {row: f"{said}, expected {called} as in most rows" for row, said in unfit.items()}


def _kind(value: Any) -> pa.DataType | str:
    """The type that Arrow has for a value, or why it has none."""
    try:
        kind = pa.array([value]).type
    except UNFIT:
        return "a number beyond 64 bits" if isinstance(value, int) else f"{_said(value)} of several types"
    return kind if _depth(kind) <= MOST_NESTED else f"nested deeper than {MOST_NESTED} levels"


def _joined(kinds: Iterable[pa.DataType]) -> pa.DataType:
    """The type that holds values of all these types as they are."""
    schemas = [pa.schema([("column", kind)]) for kind in kinds]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _depth(kind: pa.DataType) -> int:
    depth, level = 0, [kind]
    while level:
        depth += 1
        level = [kind.field(i).type for kind in level for i in range(kind.num_fields)]
    return depth


def _said(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"{value!r:.60}"
