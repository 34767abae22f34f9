"""Columns of texts that lie flat, as bytes and places: a text is an object of Python only while it is asked for.

A column of ten million short texts would be gigabytes of objects; flat it is its own bytes and eight for each text,
which `cache.made` keeps on disk once there are many. Rows of words, images and answers of several parts are objects.
Holds numpy and Arrow only.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from sft_jax.data import cache
from sft_jax.data.cache import Arrays, Sink

BLOCK = 1 << 12  # texts that are objects of Python at one time
MOST_BLOCK = 1 << 22  # characters of them together, but for a single text that is longer
FLAT = {str: "", int: -1, float: -1.0}  # types of which columns are flat, and what stands for None
TEXT, ENDS, NUMBERS = "text", "ends", "numbers"  # of a sink: the bytes of all texts, and where each ends; numbers


class Column(Sequence[Any]):
    """Values by number, of a flat column or of some of its rows; equal to any sequence of the same values."""

    @abstractmethod
    def select(self, rows: np.ndarray) -> "Column":
        """These values alone, in this order."""

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self[begin : begin + BLOCK] for begin in range(0, len(self), BLOCK))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class NumberColumn(Column):
    """Numbers of one type."""

    def __init__(self, numbers: np.ndarray):
        self.numbers = numbers  # int64 or float64

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        return self.numbers[place].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numbers, dtype, copy=copy)

    def select(self, rows: np.ndarray) -> "NumberColumn":
        """These numbers alone, in this order."""
        return NumberColumn(self.numbers[rows])


class TextColumn(Column):
    """Texts."""

    def __init__(self, whole: pa.LargeStringArray, rows: np.ndarray | None = None, known: tuple[str, ...] = ()):
        self._whole, self._rows = whole, rows
        self.known = known  # its `digest`, where that was computed before

    @classmethod
    def opened(cls, arrays: Arrays, name: str = "", known: tuple[str, ...] = ()) -> "TextColumn":
        """The column that `put` put into a sink."""
        ends, content = (pa.py_buffer(np.ascontiguousarray(arrays[name + part])) for part in (ENDS, TEXT))
        return cls(pa.LargeStringArray.from_buffers(len(arrays[name + ENDS]) - 1, ends, content), known=known)

    def __len__(self) -> int:
        return len(self._whole) if self._rows is None else len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.flat(*place.indices(len(self))).to_pylist()
        row = range(len(self))[place]
        return self._whole[row if self._rows is None else int(self._rows[row])].as_py()

    def select(self, rows: np.ndarray) -> "TextColumn":
        """These texts alone, in this order."""
        picked = np.asarray(rows, np.int64)
        return TextColumn(self._whole, picked if self._rows is None else self._rows[picked])

    def sizes(self, begin: int, end: int) -> np.ndarray:
        """The bytes of each of some texts that follow each other."""
        ends = np.frombuffer(self._whole.buffers()[1], np.int64)
        rows = np.arange(begin, end) if self._rows is None else self._rows[begin:end]
        return ends[rows + 1] - ends[rows]

    def content(self, begin: int, end: int) -> memoryview:
        """The bytes of some texts that follow each other."""
        part = self.flat(begin, end)
        ends = np.frombuffer(part.buffers()[1], np.int64)[part.offset :][[0, len(part)]]
        return memoryview(part.buffers()[2] or b"")[ends[0] : ends[1]]

    def flat(self, begin: int, end: int, step: int = 1) -> pa.LargeStringArray:
        """Some of the texts, as Arrow has them."""
        if self._rows is None and step == 1:
            return self._whole.slice(begin, max(0, end - begin))
        places = np.arange(begin, end, step)
        return self._whole.take(pa.array(places if self._rows is None else self._rows[places]))


class Growing:
    """A column that grows by blocks: a list while it is short, then flat if all its values are texts, or numbers.

    None may stand for what is not there; a flat column has an empty text or -1 in its place.
    """

    def __init__(self) -> None:
        self._sink: Sink | None = None  # of a flat column
        self._kinds: set[type] = set()
        self._objects: list[Any] = []  # what is not flat
        self._absent: list[int] = []  # where None stands in a flat one
        self._count, self._end = 0, None  # values of a flat one, and bytes of its texts
        self._late: list[Any] = []  # that are not yet a block

    def append(self, value: Any) -> None:
        """Append a value."""
        self._late.append(value)
        if len(self._late) >= BLOCK:
            late, self._late = self._late, []
            self.add(late)

    def add(self, values: Sequence[Any]) -> None:
        """Append a block."""
        self._kinds |= {*map(type, values)} - {type(None)}
        flat = len(self._kinds) == 1 and self._kinds <= FLAT.keys()
        if flat and self._count + len(self._objects) + len(values) > BLOCK:
            given = [*self._objects, *values] if self._objects else values
            try:
                self._flatten(given, *self._kinds)
                self._objects = []
                return
            except (OverflowError, UnicodeEncodeError):  # beyond 64 bits, or half of a surrogate pair
                self._kinds.add(object)
        if self._sink is not None:
            self._objects = self._all_objects()
        self._objects.extend(values)

    def column(self) -> "list[Any] | Column":
        """All blocks; nothing may be added after that."""
        if self._late:
            self.add(self._late)
        return self._objects if self._sink is None else self._flat(self._sink)

    def _flatten(self, values: Sequence[Any], kind: type) -> None:
        absent = [place for place, value in enumerate(values, self._count) if value is None]
        filled = [FLAT[kind] if value is None else value for value in values] if absent else values
        packed = pa.array(filled, pa.large_string()) if kind is str else np.asarray(filled, kind)
        self._sink = self._sink or cache.scratch()
        if isinstance(packed, np.ndarray):
            self._sink.add(NUMBERS, packed)
        else:
            self._end = put(self._sink, packed, self._end)
        self._absent += absent
        self._count += len(values)

    def _flat(self, sink: Sink) -> "Column":
        arrays = sink.finish()[0]
        return NumberColumn(arrays[NUMBERS]) if NUMBERS in arrays else TextColumn.opened(arrays)

    def _all_objects(self) -> list[Any]:
        assert self._sink
        found = list(self._flat(self._sink))
        for place in self._absent:
            found[place] = None
        self._sink, self._count = None, 0
        return found


def put(sink: Sink, texts: pa.LargeStringArray, end: int | None = None, name: str = "") -> int:
    """Append texts to those of a sink, which end at a byte or are none, and say where they end then."""
    ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :][: len(texts) + 1]
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    if end is None:
        sink.add(name + ENDS, np.zeros(1, np.int64))
    end = end or 0
    sink.add(name + ENDS, ends[1:] - ends[0] + end)
    sink.add(name + TEXT, content[ends[0] : ends[-1]])
    return end + int(ends[-1] - ends[0])


def flat(values: Sequence[Any]) -> Column | None:
    """The same values as a flat column; None of those that are neither texts nor numbers of one type."""
    if isinstance(values, Column):
        return values
    kinds = {*map(type, values)}
    if len(kinds) != 1 or not kinds <= FLAT.keys():
        return None
    try:
        if str in kinds:
            return TextColumn(pa.array(values, pa.large_string()))
        return NumberColumn(np.asarray(values, kinds.pop()))
    except (OverflowError, UnicodeEncodeError):  # beyond 64 bits, or half of a surrogate pair
        return None


def picked(values: Sequence[Any], rows: np.ndarray) -> Any:
    """These of the values, in this order, in what they are held in."""
    return values.select(rows) if isinstance(values, Column) else [values[row] for row in rows.tolist()]


def ranges(*columns: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(begin, end) of blocks of rows of which the texts are not too many, and together not too long."""
    for first in range(0, max(1, len(columns[0])), BLOCK):  # one block at least, if without rows
        last = min(first + BLOCK, len(columns[0]))
        sizes = np.sum([_sizes(column, first, last) for column in columns], axis=0)
        begin, size = first, 0
        for row, more in enumerate(sizes.tolist() if sizes.sum() > MOST_BLOCK else (), first):
            if size + more > MOST_BLOCK and row > begin:
                yield begin, row
                begin, size = row, 0
            size += more
        yield begin, last


def digest(*columns: Sequence[str]) -> Iterator[str]:
    """Parts of a key that stand for all texts of these columns, whatever they are held in."""
    for column in columns:
        if isinstance(column, TextColumn) and column.known:
            yield from column.known
            continue
        sizes, content = hashlib.sha256(), hashlib.sha256()
        for begin, end in ranges(column):
            if isinstance(column, TextColumn):
                lengths, joined = column.sizes(begin, end), column.content(begin, end)
            else:
                encoded = [text.encode("utf-8", "surrogatepass") for text in column[begin:end]]
                lengths, joined = np.asarray([len(text) for text in encoded]), b"".join(encoded)
            sizes.update(lengths.astype("<i8").tobytes())
            content.update(joined)
        yield from (str(len(column)), sizes.hexdigest(), content.hexdigest())


def _sizes(texts: Sequence[str], begin: int, end: int) -> Any:
    if isinstance(texts, TextColumn):
        return texts.sizes(begin, end)
    return np.asarray([len(text) for text in texts[begin:end]], np.int64)


def numbers(tables: Sequence[Sequence[Sequence[Hashable]]]) -> list[np.ndarray]:
    """A number for each row of tables of the same columns, the same for equal rows of all tables and for no others.

    Texts are told apart by 128 bits of BLAKE2b, in memory of 16 bytes a row: that two of a billion different ones are
    taken for equal has a probability of 1.5e-21, and nobody knows how to make such a pair.
    """
    columns = [column for table in tables for column in table]
    ends = np.cumsum([len(table[0]) for table in tables])[:-1]
    kinds = {column.numbers.dtype if isinstance(column, NumberColumn) else None for column in columns}
    if len(kinds) == 1 and None not in kinds and len(columns) == len(tables):
        found = np.unique(np.concatenate([np.asarray(column) for column in columns]), return_inverse=True)[1]
        return np.split(found, ends)
    if any(isinstance(column, TextColumn) for column in columns) and all(map(_is_text, columns)):
        return np.split(_ranked(np.concatenate([_hashed(table) for table in tables])), ends)
    known: dict[Hashable, int] = {}
    rows = (table[0] if len(table) == 1 else zip(*table, strict=True) for table in tables)
    return [np.fromiter((known.setdefault(row, len(known)) for row in table), np.int64) for table in rows]


def _is_text(column: Sequence[Hashable]) -> bool:
    return isinstance(column, TextColumn) or all(type(value) is str for value in column)


def _hashed(table: Sequence[Sequence[Any]]) -> np.ndarray:
    """128 bits of each row of texts: uint64 [rows, 2]."""
    found = np.empty((len(table[0]), 2), np.uint64)

    def hashed(contents: Iterable[bytes]) -> Iterator[bytes]:
        return (hashlib.blake2b(content, digest_size=16).digest() for content in contents)

    for begin, end in ranges(*table):
        columns = [hashed(text.encode("utf-8", "surrogatepass") for text in column[begin:end]) for column in table]
        of_rows = columns[0] if len(columns) == 1 else hashed(map(b"".join, zip(*columns, strict=True)))
        found[begin:end] = np.frombuffer(b"".join(of_rows), np.uint64).reshape(-1, 2)
    return found


def _ranked(hashes: np.ndarray) -> np.ndarray:
    """A number for each pair of numbers, the same for equal ones."""
    order = np.lexsort(hashes.T)
    in_order = hashes[order]
    found = np.empty(len(hashes), np.int64)
    found[order] = np.cumsum(np.append(False, (in_order[1:] != in_order[:-1]).any(axis=1))[: len(hashes)])
    return found
