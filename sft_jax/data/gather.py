"""Records on their way to become rows: in blocks, each with its place, and what is no row said beside them.

Shared by everything that is read record by record. Knows no kind of file.
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features

from sft_jax.data.records import Problem
from sft_jax.data.rows import Bad, Rows, refuse

BLOCK = 1 << 14  # records that are Python objects at one time
MOST_BAD = 1 << 20  # that are kept in mind; so many mean that the whole is not what it was taken for
LONGEST_NAME = 60  # characters of a path that is said in full
Source = TypeVar("Source")


@dataclass
class Gathered:
    """Where the records came from, in the order they were read; grows while they are."""

    where: str  # the setting
    files: list[str]  # what is said before the number of a record: "reviews.csv, line"
    file: array = field(default_factory=lambda: array("i"))  # of each record: which of `files`
    line: array = field(default_factory=lambda: array("q"))  # from 1; 0 where a record has a file of its own
    bad: list[tuple[int, int, Bad]] = field(default_factory=list)  # by file and line
    notes: list[str] = field(default_factory=list)

    def refuse(self, file: int, line: int, reason: str, text: str) -> None:
        """Note that a record is no row."""
        place = f"{self.files[file]} {line}" if line else self.files[file]
        self.bad.append((file, line, Bad(place, reason, text)))
        if len(self.bad) > MOST_BAD:
            refuse(self.where, [found for *_, found in self.bad])

    def note(self, text: str) -> None:
        """Note what a person should know of the files, though every row of them can be used."""
        self.notes.append(text)

    def rows(self, table: pa.Table, features: Features | None = None, **known: Any) -> Rows:
        """The rows of a table that has as many as there were records."""
        file, line = np.asarray(self.file, np.int32), np.asarray(self.line, np.int64)
        bad = tuple(found for *_, found in sorted(self.bad, key=lambda entry: entry[:2]))
        # A fingerprint is given, since `datasets` would hash every row for one.
        found = Dataset(table, DatasetInfo(features=features), fingerprint=os.urandom(8).hex())
        return Rows(found, self.where, tuple(self.files), file, line, bad=bad, notes=tuple(self.notes), **known)


def blocks(
    sources: Iterable[Source], records: Callable[[int, Source], Iterator[tuple[int, Any]]], found: Gathered
) -> Iterator[list[Any]]:
    """The records of all sources, some at a time; places and problems go into `found`."""
    block = []
    for number, source in enumerate(sources):
        for line, record in records(number, source):
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


def texts(values: Sequence[str]) -> list[pa.Array]:
    """Texts as Arrow has them; several arrays from 2 GiB on."""
    packed = pa.array(values, pa.string())
    return packed.chunks if isinstance(packed, pa.ChunkedArray) else [packed]


def shown(files: Sequence[str]) -> list[str]:
    """What files are called in messages: as they were given where that is short, else by their names alone."""
    names = [file if len(file) <= LONGEST_NAME else Path(file).name for file in files]
    return names if len(set(names)) == len(set(files)) else list(files)
