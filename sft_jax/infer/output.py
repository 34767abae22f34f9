"""Records in a file: JSON lines, CSV or Parquet, by its name; written whole or not at all.

Records are kept beside the file until the last is there, since a table must know its columns before its first row. In
tables a score stands in a column of its own (`scores.NAME`); what a cell cannot hold is JSON.
"""

import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from sft_jax.errors import ConfigError
from sft_jax.tasks.task import Record

SPREAD = "scores"  # whose entries are columns
AT_ONCE = 4096  # rows of a table that are held
LONG = 1 << 63  # numbers from which on Arrow has no type
TYPES = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    (list, float): pa.list_(pa.float64()),
    (list, str): pa.list_(pa.string()),
}
Kinds = dict[str, set[Any]]  # column -> what its values are


def check_output(out: Path, *, replace: bool, endings: Sequence[str] | None = None) -> None:
    """Raise ConfigError where no file of this name can be written, before anything is computed for it."""
    endings = endings or [*WRITERS]
    if out.suffix.lower() not in endings:
        raise ConfigError(f"{out}: ends in '{out.suffix}'; give a name that ends in {', '.join(endings)}")
    if out.is_dir() or (out.exists() and not replace):
        raise ConfigError(f"{out}: is there already; give another name, or --force to write over it")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no directory {out.parent}; make it first")


@contextmanager
def record_file(out: Path) -> Iterator[Callable[[Record], None]]:
    """What takes the records of a file, which is there once all went well."""
    kinds: Kinds = {}
    with new_file(out) as fresh:
        lines = fresh.with_name("records.jsonl")
        with open(lines, "w", encoding="utf-8", errors="backslashreplace") as sink:

            def take(record: Record) -> None:
                sink.write(json.dumps(record, ensure_ascii=False) + "\n")
                for name, value in _flat(record).items():
                    kinds.setdefault(name, set()).add(_kind(value))

            yield take
        with open(lines, encoding="utf-8") as source:
            WRITERS[out.suffix.lower()](source, kinds, fresh)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A name to write to, in a directory of its own, whose file takes the place of `out` when all went well."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        yield Path(work) / "fresh"
        os.replace(Path(work) / "fresh", out)


def _write_lines(source: TextIO, kinds: Kinds, out: Path) -> None:
    os.rename(source.name, out)


def _write_csv(source: TextIO, kinds: Kinds, out: Path) -> None:
    with open(out, "w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(kinds)
        for line in source:
            row = _flat(json.loads(line))
            writer.writerow([_cell(row.get(name)) for name in kinds])


def _write_parquet(source: TextIO, kinds: Kinds, out: Path) -> None:
    types = {name: _type(found - {None}) for name, found in kinds.items()}
    schema = pa.schema([(name, kind or pa.string()) for name, kind in types.items()])
    with pq.ParquetWriter(out, schema) as writer:
        while rows := [_flat(json.loads(line)) for line in islice(source, AT_ONCE)]:
            columns = [
                pa.array([_value(row.get(name), text=kind is None) for row in rows], kind or pa.string())
                for name, kind in types.items()
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


WRITERS: dict[str, Callable[[TextIO, Kinds, Path], None]] = {
    ".jsonl": _write_lines,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a field for each score."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        spread = name == SPREAD and isinstance(value, Mapping)
        found |= {f"{name}.{one}": score for one, score in value.items()} if spread else {name: value}
    return found


def _kind(value: Any) -> Any:
    """What a value is: a type, a list with that of its values, None of nothing, or Any of all else."""
    if isinstance(value, list):
        inner = {float if kind is int else kind for kind in map(_kind, value)}
        return (list, *inner) if inner in ({float}, {str}) else Any
    if type(value) is int and not -LONG <= value < LONG:
        return Any
    return None if value is None else type(value) if type(value) in TYPES else Any


def _type(kinds: set[Any]) -> pa.DataType | None:
    """The type of a column with values of these kinds; None where it is text that says what they are."""
    if kinds == {int, float}:
        return TYPES[float]
    return TYPES.get(next(iter(kinds))) if len(kinds) == 1 else None


def _value(value: Any, *, text: bool) -> Any:
    return _cell(value) or None if text else value


def _cell(value: Any) -> str:
    """A value as a text: as it is, or as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
