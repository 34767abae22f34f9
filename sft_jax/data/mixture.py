"""Rows of several sources put one after the other; each row still knows its part and its place. Knows no weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value

from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import DataError, listing

NUMBERED = "row"  # what `numbered` calls the rows of a source without files


def mix(parts: Sequence[tuple[str, Rows | None]], where: str, column: str | None) -> Rows:
    """The rows of the named parts in order; None stands for a part without such a split, and counts as a number.

    A column that a part lacks is None in its rows, and an error where it is asked for. `column` is made of the names.
    """
    held = [(number, name, rows) for number, (name, rows) in enumerate(parts) if rows is not None]
    features = _features({name: rows.table.features for _, name, rows in held}, where, column)
    tables, files, bad = [], [], list[Bad]()
    file, line, part = [], [], []
    for number, name, rows in held:
        own = Features({key: kind for key, kind in features.items() if key in rows.names})
        table = rows.table if rows.table.features == own else _cast(rows.table, own)
        tables.append(table.add_column(column, [name] * len(table)) if column else table)
        file.append(np.zeros(len(rows), np.int32) if rows.file is None else rows.file + len(files))
        line.append(np.arange(1, len(rows) + 1) if rows.line is None else rows.line)
        part.append(np.full(len(rows), number, np.int32))
        files += [f"{name}, {NUMBERED}" if said == NUMBERED else said for said in rows.files or (NUMBERED,)]
        bad += [Bad(f"{name}, {b.place}", *b[1:]) if b.place.startswith(f"{NUMBERED} ") else b for b in rows.bad]
    lacking = {
        key: ", ".join(f"part '{name}'" for _, name, rows in held if key not in rows.names)
        for key in features
        if any(key not in rows.names for _, _, rows in held)
    }
    table = datasets.concatenate_datasets(tables)
    places = [np.concatenate(values) for values in (file, line, part)]
    return Rows(table, where, tuple(files), *places, bad=tuple(bad), lacking=lacking)


def _features(parts: Mapping[str, Features], where: str, column: str | None) -> Features:
    """The columns of all parts, each of one type."""
    found: dict[str, tuple[str, object]] = {}  # column -> the part that had it first, and its type
    problems = []
    for name, features in parts.items():
        for key, kind in features.items():
            first, other = found.get(key, (name, kind))
            both = _both(other, kind)
            if both is None:
                problems.append(f"column '{key}' holds {_said(other)} in part '{first}', {_said(kind)} in '{name}'")
            found[key] = (first, both or other)
    if column in found:
        problems.append(f"column '{column}', which data.source.column would make, is there; choose another name")
    if problems:
        raise DataError(listing(f"{where}: the parts do not fit together", problems))
    return Features({key: kind for key, (_, kind) in found.items()})


def _both(one: object, other: object) -> object | None:
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


def _said(kind: object) -> str:
    if isinstance(kind, ClassLabel):
        return f"labels named {', '.join(kind.names[:10])}"
    if isinstance(kind, List):
        return f"lists of {_said(kind.feature).removeprefix('one of ')}"
    called = {"string": "texts", "int64": "whole numbers", "float64": "numbers", "bool": "true or false"}
    return called.get(_plain(kind), kind.dtype) if isinstance(kind, Value) else "objects"


def _cast(table: Dataset, features: Features) -> Dataset:
    """The same rows with columns of these types, in memory."""
    plain: Any = table.with_format("arrow")[:]
    return Dataset(plain.cast(features.arrow_schema), datasets.DatasetInfo(features=features))
