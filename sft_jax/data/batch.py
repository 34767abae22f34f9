"""Batches: documents laid into rows of tokens, from a declared set of shapes. Holds numpy only.

Letters: r rows, t tokens in a row, n document slots in a row. Every layout is the same thing with other numbers: a row
holds one document (`padded`, `bucketed`) or several, kept apart by `segment_ids` (`packed`). A batch holds the same
documents whatever the layout, so the layout changes speed and never what is optimised.

A batch always has `segment_ids` and `position_ids` [r, t], and `starts`, `ends`, `index` and `weight` [r, n]: the first
and the last token of each document, which one it is (-1 none), and 1 for a document, 0 for filler. What documents have
besides, such as a label, stands in [r, n] or [r, n, k]; what tokens have, in [r, t]. Filler is 0 everywhere else, so a
task whose answers are those of tokens says which ones count by a weight of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from sft_jax.config.data import Layout
from sft_jax.data.order import Order

Batch = dict[str, np.ndarray]
Grain = Literal["document", "token"]  # what outputs have an entry for
Row = list[int]  # documents, in the order that they stand in a row
Documents = Sequence[int] | np.ndarray  # numbers of documents


class Shape(NamedTuple):
    """A declared shape: rows, tokens in a row, document slots in a row."""

    rows: int
    length: int
    slots: int

    def __str__(self) -> str:
        return f"{self.rows} × {self.length}" + (f" ({self.slots} slots)" if self.slots > 1 else "")


@dataclass(frozen=True)
class Encoded:
    """Documents ready to be laid out: tokens one document after the other, and what each document has besides."""

    tokens: dict[str, np.ndarray]  # [tokens of all documents]
    offsets: np.ndarray  # [documents + 1]
    documents: dict[str, np.ndarray]  # [documents] or [documents, k], such as the label
    truncated: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [documents], ascending; see below
    beside: dict[str, np.ndarray] = field(default_factory=dict)  # [tokens of all documents, ...] that no batch has
    lost: dict[str, int] = field(default_factory=dict)  # why a row became no document -> how many

    def __post_init__(self):
        if not len(self.rows):  # a document is of the row of its number, unless said otherwise
            object.__setattr__(self, "rows", np.arange(len(self)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def select(self, documents: Documents) -> "Encoded":
        """These documents alone, in this order; how many of them were cut is not known."""
        offsets, places = np.concatenate([[0], np.cumsum(self.lengths[documents])]), self.places(documents)
        tokens, beside = ({n: a[places] for n, a in group.items()} for group in (self.tokens, self.beside))
        fields = {name: values[documents] for name, values in self.documents.items()}
        return Encoded(tokens, offsets, fields, rows=self.rows[documents], beside=beside)

    def ids(self) -> list[list[int]]:
        """The tokens of each document."""
        return [ids.tolist() for ids in np.split(self.tokens["input_ids"], self.offsets[1:-1])]

    def places(self, documents: Documents) -> np.ndarray:
        """Where the tokens of these documents stand, one document after the other."""
        begins, lengths = self.offsets[:-1][documents], self.lengths[documents]
        return np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def pack(lengths: Sequence[int], capacity: int, slots: int, order: Sequence[int] | None = None) -> list[Row]:
    """Rows of at most `capacity` tokens and `slots` documents: best fit, deterministic; positions into `lengths`.

    Longest first, which is within 2 or 3 % of the fewest rows possible on natural text and puts documents of like
    lengths together; or in the order given, which for many documents costs a percent or two and mixes them.
    """
    rows: list[Row] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    free = 0  # bit c is set when some row has room c
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)) if order is None else order:
        length = int(lengths[document])
        fitting = free >> length << length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                free &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        left = room - length
        if left and len(rows[row]) < slots:
            open_rows[left].append(row)
            free |= 1 << left
    return rows


def lay_out(encoded: Encoded, documents: Documents, shape: Shape) -> list[Row]:
    """The rows that hold these documents in a shape, which may be too many for it."""
    if shape.slots == 1:
        return [[int(d)] for d in documents]
    found = pack(encoded.lengths[documents].tolist(), shape.length, shape.slots)
    return [[int(documents[position]) for position in row] for row in found]


def declare(layout: Layout, encoded: Encoded, order: Order, multiple: int) -> tuple[Shape, ...]:
    """The shapes of a training run, smallest first; the last one holds any batch.

    `multiple` divides the rows of every shape (devices times microbatches). The packed numbers of rows are read off
    the batches of the first epoch, so that they depend on the data, the seed and the batch size alone.
    """
    length = row_length(layout, encoded)
    widest = up_to(order.batch_size, multiple)
    if layout.kind == "padded":
        return (Shape(widest, length, 1),)
    if layout.kind == "bucketed":
        longest = [int(encoded.lengths[order.documents(step)].max()) for step in _sample(order)]
        sizes = {*thresholds([up_to(size, 8) for size in longest], layout.buckets), length}
        return tuple(Shape(widest, size, 1) for size in sorted(sizes))
    whole = Shape(widest, length, slots_for(length))
    needed = [len(lay_out(encoded, order.documents(step), whole)) for step in _sample(order)]
    sizes = {*thresholds([up_to(rows, multiple) for rows in needed], layout.buckets), widest}
    return tuple(whole._replace(rows=rows) for rows in sorted(sizes))


def row_length(layout: Layout, encoded: Encoded) -> int:
    """Tokens in a row."""
    return layout.length or up_to(int(encoded.lengths.max()), 8)


def slots_for(length: int) -> int:
    """The most documents that a packed row may hold."""
    return max(1, length // 8)


def place(encoded: Encoded, documents: Documents, shapes: Sequence[Shape]) -> tuple[list[Row], Shape]:
    """The rows that hold these documents and the smallest declared shape that they fit."""
    rows = lay_out(encoded, documents, shapes[-1])
    longest = max(int(encoded.lengths[row].sum()) for row in rows)
    return rows, next(s for s in shapes if len(rows) <= s.rows and longest <= s.length)


def collate(encoded: Encoded, rows: Sequence[Row], shape: Shape) -> Batch:
    """The batch that holds these rows; what is left of the shape is filler of weight 0."""
    tokens = {name: np.zeros(shape[:2], values.dtype) for name, values in encoded.tokens.items()}
    segments, positions = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], np.int32)
    slots = (shape.rows, shape.slots)
    starts, ends, index = np.zeros(slots, np.int32), np.zeros(slots, np.int32), np.full(slots, -1, np.int32)
    for r, row in enumerate(rows):
        begin = 0
        for n, document in enumerate(row):
            source = slice(encoded.offsets[document], encoded.offsets[document + 1])
            end = begin + source.stop - source.start
            for name, values in encoded.tokens.items():
                tokens[name][r, begin:end] = values[source]
            segments[r, begin:end] = n + 1
            positions[r, begin:end] = np.arange(end - begin)
            starts[r, n], ends[r, n], index[r, n] = begin, end - 1, document
            begin = end
    documents = {name: values[index] for name, values in encoded.documents.items()}
    for values in documents.values():
        values[index < 0] = 0
    weight = (index >= 0).astype(np.float32)
    spatial = {"segment_ids": segments, "position_ids": positions, "starts": starts, "ends": ends}
    return {**tokens, **spatial, **documents, "index": index, "weight": weight}


def room_for(outputs: Any, encoded: Encoded, grain: Grain) -> np.ndarray:
    """Zeros for the outputs of all documents: [documents, k], or [tokens, k] where it is tokens that have them."""
    entries = encoded.offsets[-1] if grain == "token" else len(encoded)
    return np.zeros((entries, outputs.shape[-1]), outputs.dtype)


def collect(kept: np.ndarray, batch: Batch, outputs: Any, encoded: Encoded, grain: Grain) -> None:
    """Put the outputs of a batch, [r, n, k] or [r, t, k], where their documents or tokens stand among all of them."""
    if grain == "token":
        rows, places = np.nonzero(batch["segment_ids"])
        document = batch["index"][rows, batch["segment_ids"][rows, places] - 1]
        kept[encoded.offsets[document] + batch["position_ids"][rows, places]] = np.asarray(outputs)[rows, places]
    else:
        real = batch["index"] >= 0
        kept[batch["index"][real]] = np.asarray(outputs)[real]


def up_to(count: int, multiple: int) -> int:
    """The smallest multiple that is at least `count`."""
    return -(-count // multiple) * multiple


def _sample(order: Order, most: int = 512) -> range:
    steps = order.steps_per_epoch
    return range(0, steps, max(1, -(-steps // most)))


def thresholds(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, the largest among them, so that rounding each value up adds the least in all."""
    sizes, often = np.unique(values, return_counts=True)
    # cost[i]: the least sum for the i smallest sizes, the last of which is a threshold; one threshold at first.
    cost = np.cumsum(often) * sizes
    chosen = [[int(size)] for size in sizes]
    for _ in range(min(count, len(sizes)) - 1):
        before, picked = cost.copy(), list(chosen)
        for i in range(1, len(sizes)):
            ways = [before[j] + often[j + 1 : i + 1].sum() * sizes[i] for j in range(i)]
            best = int(np.argmin(ways))
            if ways[best] < before[i]:
                cost[i], chosen[i] = ways[best], [*picked[best], int(sizes[i])]
    return chosen[-1]
