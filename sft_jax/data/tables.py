"""CSV, TSV, JSON lines, CoNLL and text as rows: records gathered in blocks, each column given one type.

Every record is a row or a `Bad`. The cells of CSV are numbers where the whole column is; a value of JSON that does not
fit most others of its column makes its row a `Bad`. Knows no task.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from sft_jax.data.gather import Gathered, blocks, shown, texts
from sft_jax.data.records import Problem, conll_records, csv_records, json_records, text_records
from sft_jax.data.rows import Rows
from sft_jax.errors import DataError

pc: Any = pyarrow.compute  # whose functions no type checker knows
MOST_COLUMNS = 1000  # keys of all objects of a JSON file together
MOST_NESTED = 16  # lists and objects in each other
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


def read_csv(files: Sequence[str], where: str, delimiter: str = ",") -> Rows:
    """The rows of files that have the same columns; the first line of each names them."""
    header: list[str] = []
    found = _gathered(files, where)

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
                yield line, Problem("wrong number of cells", f"cells: {len(cells)}, expected {len(names)} as in line 1")
            else:
                yield line, cells if plain else [cells[i] for i in order]

    columns: dict[str, list[pa.Array]] = {}
    for block in blocks(files, records, found):
        for name, cells in zip(header, zip(*block, strict=True), strict=True):
            columns.setdefault(name, []).extend(texts(cells))
    table = pa.table({name: _csv_column(columns.get(name, [])) for name in header})
    return found.rows(table)


def read_json(files: Sequence[str], where: str) -> Rows:
    """The rows of files with an object a line, or a list of objects; a column that an object lacks is None there."""
    found = _gathered(files, where)
    columns: dict[str, list[Any]] = {}
    count = 0
    for block in blocks(files, lambda number, file: json_records(file, where), found):
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
    return found.rows(pa.table(arrays, names=list(columns)), None if kept.all() else kept)


def read_lines(files: Sequence[str], where: str) -> Rows:
    """A row for each line, with the one column `text`."""
    found = _gathered(files, where)
    read = blocks(files, lambda number, file: text_records(file, where), found)
    chunks = [chunk for block in read for chunk in texts(block)]
    return found.rows(pa.table({"text": pa.chunked_array(chunks, pa.string())}))


def read_conll(files: Sequence[str], where: str) -> Rows:
    """A row for each sentence: its words in the column `tokens`, their tags in the column `tags`."""
    found, lists = _gathered(files, where), pa.list_(pa.string())
    columns: dict[str, list[pa.Array]] = {"tokens": [], "tags": []}
    for block in blocks(files, lambda number, file: conll_records(file, where), found):
        for name, values in zip(columns, zip(*block, strict=True), strict=True):
            columns[name].append(pa.array(values, lists))
    return found.rows(pa.table({name: pa.chunked_array(chunks, lists) for name, chunks in columns.items()}))


def _gathered(files: Sequence[str], where: str) -> Gathered:
    return Gathered(where, [f"{name}, line" for name in shown(files)])


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
    packed: list[Any] = [chunk for chunk in chunks if not isinstance(chunk, list)]
    if len(packed) == len(chunks):
        try:
            kind = _joined({chunk.type for chunk in packed})
            return pa.chunked_array([_as(chunk, kind) for chunk in packed], kind), {}
        except UNFIT:
            pass
    values = [value for chunk in chunks for value in (chunk if isinstance(chunk, list) else chunk.to_pylist())]
    kind, unfit = _majority(values)
    column = pa.array([None if row in unfit else value for row, value in enumerate(values)], kind)
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column]), unfit


def _as(chunk: pa.Array, kind: pa.DataType) -> pa.Array:
    if chunk.type == kind:
        return chunk
    # Arrow's own cast makes broken arrays of lists of None.
    return pa.array(chunk.to_pylist(), kind) if pa.types.is_nested(kind) else chunk.cast(kind)


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
