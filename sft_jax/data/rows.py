"""Rows as the other rooms see them: a table with random access that knows where each row came from. Holds no jax.

Rows are never changed, only selected from; what was wrong with a row is said by its place: file and line, or number.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from sft_jax.data.cells import opened, typed
from sft_jax.errors import DataError, did_you_mean, listing

BLOCK = 1 << 14  # rows that are objects of Python at one time
MOST_SHOWN = 5  # bad rows named in one message
MOST_NAMES = 50  # columns named in one message


class Bad(NamedTuple):
    """A row, or a piece of a file, that cannot be used."""

    place: str  # "reviews.csv, line 12"
    reason: str  # what such rows are counted as: "unknown label"
    text: str  # what is wrong, and what was expected


@dataclass(frozen=True)
class Rows:
    """Rows of one split, in order."""

    table: Dataset
    where: str  # the setting that they come from: "data.source.train"
    files: tuple[str, ...] = ()  # what is said before the number of a row: "reviews.csv, line", or "row"
    file: np.ndarray | None = None  # int32 [rows]: which of `files`
    line: np.ndarray | None = None  # int64 [rows], from 1; 0 where the row has a file of its own
    part: np.ndarray | None = None  # int32 [rows]: which source of a mixture
    bad: tuple[Bad, ...] = ()  # what could not be read as a row at all
    notes: tuple[str, ...] = ()  # what should be known of the source, though all rows can be used
    written: frozenset[str] = frozenset()  # columns of which the table has each value's own JSON
    cells: Mapping[str, pa.DataType] = field(default_factory=dict)  # columns of texts of flat files -> what these mean
    lacking: Mapping[str, str] = field(default_factory=dict)  # columns that parts of a mixture lack -> which parts
    unfit: Mapping[str, str] = field(default_factory=dict)  # columns that cannot be read -> why, and what to do

    def __len__(self) -> int:
        return len(self.table)

    @property
    def names(self) -> list[str]:
        """The columns there are."""
        return self.table.column_names

    def column(self, name: str) -> list[Any]:
        """One column as a list, `a.b` being the `b` of what `a` holds; a missing one is an error that lists all.

        Values are as the source says them. Of JSON: numbers, nulls and the order of keys as they are written, a missing
        column None, and `Broken` what cannot be used. Cells of a flat file are numbers where the whole column is, with
        None for empty ones. In objects that are columns of Parquet and Arrow, None also stands for keys that are not
        there, as Arrow has it; columns of the type `Json` of `datasets` are as that gives them.
        """
        self._refuse(name)
        found = self._values(name)
        return typed(found, self.cells[name]) if name in self.cells else found

    def texts(self, name: str) -> list[Any]:
        """The same with the cells of a flat file as they stand: 911 and 007 are texts."""
        self._refuse(name, texts=True)
        return self._values(name)

    def blocks(self, name: str, *, texts: bool = False) -> Iterator[list[Any]]:
        """What `column` gives, or `texts`, some rows at a time; at one time what is a part of objects."""
        self._refuse(name, texts=texts)
        kind = pa.string() if texts else self.cells.get(name, pa.string())
        size = BLOCK if self._head(name) == name else len(self)
        for begin in range(0, len(self), max(1, size)):
            found = self._values(name, slice(begin, begin + size))
            yield typed(found, kind) if name in self.cells else found

    def feature(self, name: str) -> Any:
        """The type that the source gives a column, that of what is in its lists; None where it gives none."""
        head = self._head(name)
        found: Any = None if head in self.written else self.table.features[head]
        for key in name[len(head) + 1 :].split(".") if name != head else ():
            found = found.get(key) if isinstance(found, Mapping) else None
        return getattr(found, "feature", found)

    def _refuse(self, name: str, *, texts: bool = False) -> None:
        """Raise what is wrong with a column that is there and cannot be read."""
        head = name if name in self.names or name in self.unfit else name.partition(".")[0]
        if head in self.lacking:
            raise DataError(
                f"{self.where}: no column '{head}' in {self.lacking[head]}, which other parts have; "
                f"rename the column that stands for it there"
            )
        if head in self.unfit and not (texts and head in self.cells):  # texts are alike even where some are numbers
            raise DataError(f"{self.where}: {self.unfit[head]}")

    def _values(self, name: str, part: slice = slice(None)) -> list[Any]:
        head = self._head(name)
        found = self.table[head][part]
        values = list(opened(found)) if head in self.written else found
        return values if head == name else self._inside(values, name, name[len(head) + 1 :])

    def _head(self, name: str) -> str:
        """The column that holds `name`, which may be a part of its objects."""
        head = name if name in self.names else name.partition(".")[0]
        if head not in self.names:
            raise DataError(f"{self.where}: no column '{name}'; {_known(name, self.names)}{self._separated(name)}")
        return head

    def _inside(self, values: list[Any], name: str, rest: str) -> list[Any]:
        """What is called `rest` in each of these objects, None where an object has nothing of the name."""
        keys = dict.fromkeys(key for value in values if isinstance(value, Mapping) for key in value)
        head, _, deeper = (rest, "", "") if rest in keys else rest.partition(".")
        if head not in keys:
            above = name[: -len(rest) - 1]
            there = _known(head, list(keys)) if keys else "it holds no objects"
            raise DataError(f"{self.where}: no '{head}' in column '{above}'; {there}")
        found = [value.get(head) if isinstance(value, Mapping) else None for value in values]
        return self._inside(found, name, deeper) if deeper else found

    def _separated(self, name: str) -> str:
        """What to say where the names of columns are one name, since the file is separated by something else."""
        for given in self.names if self.cells else ():
            for mark in re.findall(r"[;|\t,]", given):
                if name in [part.strip() for part in given.split(mark)]:
                    return f"; is the file separated by {mark!r}? then set data.source.delimiter"
        return ""

    def place(self, row: int) -> str:
        """Where a row stands, for people: "reviews.csv, line 12", or its number in the source, from 1."""
        if self.file is None or self.line is None:
            return f"row {row + 1}"
        name, line = self.files[self.file[row]], self.line[row]
        return f"{name} {line}" if line else name

    def select(self, rows: Sequence[int] | np.ndarray) -> "Rows":
        """These rows alone, in this order; what could not be read stays said."""
        picked = np.asarray(rows, np.int64)
        file, line, part = (None if a is None else a[picked] for a in (self.file, self.line, self.part))
        return replace(self, table=_selected(self.table, picked), file=file, line=line, part=part)


def _known(name: str, names: Sequence[str]) -> str:
    """What there is in place of a name, with those first that are like it."""
    last = name.rpartition(".")[2]
    near = [other for other in names if last and last.lower() in re.split(r"[^a-z0-9]+", other.lower())]
    hint = f"; did you mean {' or '.join(map(repr, near[:3]))}?" if near else did_you_mean(name, names)
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"the rows have: {', '.join(names[:MOST_NAMES])}{more}{hint}"


def _selected(table: Dataset, rows: np.ndarray) -> Dataset:
    """`table.select(rows)`, without what that does with each number in Python."""
    if table._indices is not None:
        rows = table._indices.column(0).to_numpy()[rows]
    picked = InMemoryTable.from_pydict({"indices": pa.array(rows, pa.uint64())})
    return Dataset(table.data, table.info, indices_table=picked, fingerprint=os.urandom(8).hex())


def plain(value: Any) -> str:
    """What a row says in one text, for people and for counting: several texts with blanks between, an image by name."""
    return " ".join(plain(part) for part in value) if isinstance(value, tuple | list) else str(value)


def numbered(table: Dataset, where: str, name: str = "row") -> Rows:
    """Rows of a source that has no lines: each is called by its number, and still is after a selection."""
    return Rows(table, where, (name,), np.zeros(len(table), np.int32), np.arange(1, len(table) + 1))


def refuse(where: str, bad: Sequence[Bad]) -> None:
    """Raise one DataError that names the first bad rows and counts the others; nothing where there are none."""
    if bad:
        shown = [f"{b.place}: {b.text}" for b in bad[:MOST_SHOWN]]
        raise DataError(listing(where, shown, more=len(bad) - len(shown)))
