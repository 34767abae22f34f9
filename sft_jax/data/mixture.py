"""Rows of several sources put one after the other; each row still knows its part and its place. Knows no weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, List, Value

from sft_jax.data.cells import WRITTEN, packed, turned
from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import DataError

NUMBERED = "row"  # what `numbered` calls the rows of a source without files
TEXT = Value("string")


def mix(parts: Sequence[tuple[str, Rows | None]], where: str, column: str | None) -> Rows:
    """The rows of the named parts in order; None stands for a part without such a split, and counts as a number.

    A column that a part lacks, or that holds other things there, is an error where it is asked for, and no sooner.
    `column` is made of the names.
    """
    held = [(number, name, rows) for number, (name, rows) in enumerate(parts) if rows is not None]
    columns = _columns({name: rows for _, name, rows in held})
    if column in columns:
        raise DataError(
            f"{where}: column '{column}', which data.source.column would make, is there; choose another name"
        )
    tables, files, bad = [], [], list[Bad]()
    file, line, part = [], [], []
    for number, name, rows in held:
        table = _table(rows, columns)
        tables.append(table.add_column(column, [name] * len(table)) if column else table)
        file.append(np.zeros(len(rows), np.int32) if rows.file is None else rows.file + len(files))
        line.append(np.arange(1, len(rows) + 1) if rows.line is None else rows.line)
        part.append(np.full(len(rows), number, np.int32))
        files += [f"{name}, {NUMBERED}" if said == NUMBERED else said for said in rows.files or (NUMBERED,)]
        bad += [Bad(f"{name}, {b.place}", *b[1:]) if b.place.startswith(f"{NUMBERED} ") else b for b in rows.bad]
    return Rows(
        datasets.concatenate_datasets(tables),
        where,
        tuple(files),
        *(np.concatenate(values) for values in (file, line, part)),
        bad=tuple(bad),
        notes=tuple(note for *_, rows in held for note in rows.notes),
        written=frozenset(name for name, found in columns.items() if found.written),
        cells={name: found.cells for name, found in columns.items() if found.cells is not None},
        lacking={name: found.lacking for name, found in columns.items() if found.lacking},
        unfit={name: found.unfit for name, found in columns.items() if found.unfit},
    )


@dataclass(frozen=True)
class _Column:
    """How a column of all parts is stored."""

    kind: Any  # its feature
    written: bool = False
    cells: pa.DataType | None = None  # of texts of flat files: what they mean
    lacking: str = ""  # the parts that have it not
    unfit: str = ""  # why it cannot be read


def _columns(parts: Mapping[str, Rows]) -> dict[str, _Column]:
    found = {}
    for key in dict.fromkeys(key for rows in parts.values() for key in rows.names):
        lacking = [f"part '{name}'" for name, rows in parts.items() if key not in rows.names]
        column = _column(key, {name: rows for name, rows in parts.items() if key in rows.names})
        found[key] = replace(column, lacking=", ".join(lacking))
    return found


def _column(key: str, parts: Mapping[str, Rows]) -> _Column:
    """The one form of a column that all of these parts have."""
    broken = next((rows.unfit[key] for rows in parts.values() if key in rows.unfit), "")
    if broken:
        return _Column(TEXT, unfit=broken)
    if any(key in rows.written for rows in parts.values()):
        return _Column(TEXT, written=True)
    first, *others = parts
    kind, unfit = _meant(parts[first], key), ""
    for name in others:
        both = _both(kind, _meant(parts[name], key))
        if both is None:
            said = f"{_said(kind)} in part '{first}', {_said(_meant(parts[name], key))} in '{name}'"
            unfit = unfit or f"column '{key}' holds {said}; make them alike, or take another column"
        kind = both or kind
    stored = {str(rows.table.features[key]) for rows in parts.values()}
    if any(key in rows.cells for rows in parts.values()) and stored == {str(TEXT)}:
        return _Column(TEXT, cells=pa.string() if unfit else kind.pa_type, unfit=unfit)
    return _Column(TEXT if unfit else kind, unfit=unfit)


def _meant(rows: Rows, key: str) -> Any:
    """The type of a column, of cells what they mean."""
    return Value(str(rows.cells[key])) if key in rows.cells else rows.table.features[key]


def _table(rows: Rows, columns: Mapping[str, _Column]) -> Dataset:
    """The rows of a part in the forms that columns have in all parts."""
    features, table = Features({}), rows.table
    for key in columns:
        if key in rows.names:
            column = columns[key]
            features[key] = column.kind
            if column.unfit and column.cells is None:
                table = _with(table, key, pa.nulls(len(table), pa.string()))
            elif column.written and key not in rows.written:
                array, form = packed(rows.column(key))
                table = _with(table, key, turned(array, form, WRITTEN))
            elif key in rows.cells and column.cells is None:
                table = _with(table, key, pa.array(rows.column(key), column.kind.pa_type))
    return table if table.features == features else _cast(table, features)


def _with(table: Dataset, key: str, values: pa.Array | pa.ChunkedArray) -> Dataset:
    """A table with other values in one column."""
    whole: Any = table.with_format("arrow")[:]
    return Dataset(whole.set_column(whole.column_names.index(key), key, values))


def _both(one: Any, other: Any) -> Any:
    """The type that holds the values of both as they are, None where there is none."""
    if one == other or one == Value("null") or other == Value("null"):
        return other if one == Value("null") else one
    if isinstance(one, List) and isinstance(other, List):
        inner = _both(one.feature, other.feature)
        return None if inner is None else List(inner)
    if isinstance(one, Value) and isinstance(other, Value):
        kinds = {_plain(one), _plain(other)}
        if len(kinds) == 1 and kinds <= {"string", "int64", "float64"}:
            return Value(kinds.pop())
        return Value("float64") if kinds == {"int64", "float64"} else None
    return None


def _plain(kind: Value) -> str:
    widest = {"large_string": "string", "string_view": "string", "uint64": "uint64"}
    plain = "int64" if kind.dtype.startswith(("int", "uint")) else "float64" if kind.dtype.startswith("float") else ""
    return widest.get(kind.dtype) or plain or kind.dtype


def _said(kind: Any) -> str:
    if isinstance(kind, ClassLabel):
        return f"labels named {', '.join(kind.names[:10])}"
    if isinstance(kind, List):
        return f"lists of {_said(kind.feature).removeprefix('one of ')}"
    called = {"string": "texts", "int64": "whole numbers", "float64": "numbers", "bool": "true or false"}
    return called.get(_plain(kind), kind.dtype) if isinstance(kind, Value) else "objects"


def _cast(table: Dataset, features: Features) -> Dataset:
    """The same rows with columns of these types and in this order, in memory."""
    plain: Any = table.with_format("arrow")[:]
    return Dataset(plain.select(list(features)).cast(features.arrow_schema), datasets.DatasetInfo(features=features))
