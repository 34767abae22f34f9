"""Rows as the other rooms see them: a table with random access that knows where each row came from. Holds no jax.

Rows are never changed, only selected from; what was wrong with a row is said by its place: file and line, or number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from sft_jax.errors import DataError, listing

MOST_SHOWN = 5  # bad rows named in one message


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
    lacking: Mapping[str, str] = field(default_factory=dict)  # column -> the sources of a mixture that lack it

    def __len__(self) -> int:
        return len(self.table)

    @property
    def names(self) -> list[str]:
        """The columns there are."""
        return self.table.column_names

    def column(self, name: str) -> list[Any]:
        """One column as a list, `a.b` being the `b` of what `a` holds; a missing one is an error that lists all."""
        head, _, rest = name.partition(".")
        if name not in self.names and rest and head in self.names:
            return [value.get(rest) if isinstance(value, Mapping) else None for value in self.column(head)]
        if name not in self.names:
            raise DataError(f"{self.where}: no column '{name}'; the rows have: {', '.join(self.names)}")
        if name in self.lacking:
            raise DataError(
                f"{self.where}: no column '{name}' in {self.lacking[name]}, which other parts have; "
                f"rename the column that stands for it there"
            )
        return self.table[name][:]

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
        return replace(self, table=self.table.select(picked), file=file, line=line, part=part)


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
