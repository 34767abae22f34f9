"""Batches: documents laid into rows of tokens, from a declared set of shapes. Holds numpy only.

Letters: r rows, t tokens in a row, n document slots in a row. Every layout is the same thing with other numbers: a row
holds one document (`padded`, `bucketed`) or several, kept apart by `segment_ids` (`packed`). A batch holds the same
documents whatever the layout, so the layout changes speed and never what is optimised.

A batch always has `segment_ids` and `position_ids` [r, t], and `starts`, `ends`, `index` and `weight` [r, n]: the first
and the last token of each document, which one it is (-1 none), and 1 for a document, 0 for filler. What documents have
besides, such as a label, stands in [r, n] or [r, n, k]; what tokens have, in [r, t]. Filler is 0 everywhere else, so a
task whose answers are those of tokens says which ones count by a weight of its own.

Two kinds of documents have more. Those that are answered in tokens of their own, by an encoder-decoder, have a
`target`, laid out beside the source in the same rows: what its tokens have stands in [r, u], with
`decoder_segment_ids` and `decoder_position_ids`. Images are documents of one token, one a row, and `lazy` makes their
pixels [r, ...] when a batch is made.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from sft_jax.config.data import Layout
from sft_jax.data.order import Order

Batch = dict[str, np.ndarray]
Grain = Literal["document", "token"]  # what outputs have an entry for
Row = list[int]  # documents, in the order that they stand in a row
Documents = Sequence[int] | np.ndarray  # numbers of documents


class Shape(NamedTuple):
    """A declared shape: rows, tokens in a row, document slots in a row, and tokens of targets in a row."""

    rows: int
    length: int
    slots: int
    target: int = 0

    def __str__(self) -> str:
        tokens = f"{self.rows} × {self.length}" + (f" → {self.target}" if self.target else "")
        return tokens + (f" ({self.slots} slots)" if self.slots > 1 else "")


class Lazy(Protocol):
    """What is made of documents when a batch is, an array of one shape for each; goes to workers by pickle."""

    @property
    def digest(self) -> str:
        """The sha256 of all that it is made of."""
        ...

    def __call__(self, documents: np.ndarray, visits: np.ndarray | None) -> np.ndarray:
        """[k, ...] of these documents; `visits` says how often each was read before, None that nothing is drawn."""
        ...


@dataclass(frozen=True)
class _Picked:
    """A `Lazy` of some of the documents of another."""

    whole: Lazy
    documents: np.ndarray

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.whole.digest.encode() + self.documents.tobytes()).hexdigest()

    def __call__(self, documents: np.ndarray, visits: np.ndarray | None) -> np.ndarray:
        return self.whole(self.documents[documents], visits)


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
    lost_rows: dict[str, list[int]] = field(default_factory=dict)  # why -> the first of those rows
    noted: dict[str, int] = field(default_factory=dict)  # what is to be said of those there are -> of how many
    lazy: Mapping[str, Lazy] = field(default_factory=dict)  # what is made of documents when a batch is
    target: "Encoded | None" = None  # what each document is answered with, in tokens of its own

    def __post_init__(self):
        if not len(self.rows):  # a document is of the row of its number, unless said otherwise
            object.__setattr__(self, "rows", np.arange(len(self)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def lengths_of(self, documents: Documents) -> np.ndarray:
        """Tokens of these documents, in the time that these take."""
        numbers = np.asarray(documents, np.int64)
        return self.offsets[numbers + 1] - self.offsets[numbers]

    def select(self, documents: Documents) -> "Encoded":
        """These documents alone, in this order; how many of them were cut is not known."""
        offsets, places = np.concatenate([[0], np.cumsum(self.lengths_of(documents))]), self.places(documents)
        tokens, beside = ({n: a[places] for n, a in group.items()} for group in (self.tokens, self.beside))
        fields = {name: values[documents] for name, values in self.documents.items()}
        lazy = {name: _Picked(made, np.asarray(documents)) for name, made in self.lazy.items()}
        target = self.target and self.target.select(documents)
        return Encoded(tokens, offsets, fields, rows=self.rows[documents], beside=beside, lazy=lazy, target=target)

    def ids(self) -> list[list[int]]:
        """The tokens of each document."""
        return [ids.tolist() for ids in np.split(self.tokens["input_ids"], self.offsets[1:-1])]

    def places(self, documents: Documents) -> np.ndarray:
        """Where the tokens of these documents stand, one document after the other."""
        begins, lengths = self.offsets[:-1][documents], self.lengths_of(documents)
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
    found = pack(sizes(encoded, documents, shape).tolist(), shape.length, shape.slots)
    return [[int(documents[position]) for position in row] for row in found]


def sizes(encoded: Encoded, documents: Documents, shape: Shape) -> np.ndarray:
    """What each of these documents takes of a row's length: its tokens, or as large a share as its target takes."""
    lengths = encoded.lengths_of(documents)
    if encoded.target is None:
        return lengths
    return np.maximum(lengths, -(-encoded.target.lengths_of(documents) * shape.length // shape.target))


def declare(layout: Layout, encoded: Encoded, order: Order, multiple: int) -> tuple[Shape, ...]:
    """The shapes of a training run, smallest first; the last one holds any batch.

    `multiple` divides the rows of every shape (devices times microbatches). Packed numbers of rows are read off the
    batches of some epochs in an order of no seed, so that they depend on the data and the batch size alone: runs with
    other seeds find the programs of this one.
    """
    order = replace(order, seed=0)
    whole = one_row(layout, encoded)._replace(rows=up_to(order.batch_size, multiple))
    if layout.kind == "padded" or encoded.lazy:
        return (whole._replace(slots=1),)
    if layout.kind == "bucketed":
        longest = [int(sizes(encoded, order.documents(step), whole).max()) for step in _sample(order)]
        kept = {*thresholds([up_to(size, 8) for size in longest], layout.buckets), whole.length}
        return tuple(_shortened(whole._replace(slots=1), size) for size in sorted(kept))
    needed = [len(lay_out(encoded, order.documents(step), whole)) for step in _sample(order)]
    kept = {*thresholds([up_to(rows, multiple) for rows in needed], layout.buckets), whole.rows}
    return tuple(whole._replace(rows=rows) for rows in sorted(kept))


def one_row(layout: Layout, encoded: Encoded) -> Shape:
    """The shape of one row that holds any of the documents; packed rows have room for as much target as is usual."""
    longest = int(encoded.lengths.max())
    if encoded.lazy:
        return Shape(1, longest, 1)
    length = layout.length or up_to(longest, 8)
    if encoded.target is None:
        return Shape(1, length, slots_for(length))
    answer = up_to(int(encoded.target.lengths.max()), 8)
    if layout.kind in ("packed", "planned"):
        share = encoded.target.offsets[-1] / encoded.offsets[-1]
        length = layout.length or max(length, up_to(int(answer / share), 8))
        answer = max(answer, up_to(int(length * share), 8))
    return Shape(1, length, slots_for(length), answer)


def _shortened(shape: Shape, length: int) -> Shape:
    """The shape with shorter rows, and targets as much shorter."""
    return shape._replace(length=length, target=up_to(-(-shape.target * length // shape.length), 8))


def slots_for(length: int) -> int:
    """The most documents that a packed row may hold."""
    return max(1, length // 8)


def place(encoded: Encoded, documents: Documents, shapes: Sequence[Shape]) -> tuple[list[Row], Shape]:
    """The rows that hold these documents and the smallest declared shape that they fit."""
    rows = lay_out(encoded, documents, shapes[-1])
    longest = max(int(sizes(encoded, row, shapes[-1]).sum()) for row in rows)
    return rows, next(s for s in shapes if len(rows) <= s.rows and longest <= s.length)


def collate(encoded: Encoded, rows: Sequence[Row], shape: Shape, visits: np.ndarray | None = None) -> Batch:
    """The batch that holds these rows; what is left of the shape is filler of weight 0.

    `visits` says how often the document of each row was read before, where something is drawn anew each time.
    """
    index = np.full((shape.rows, shape.slots), -1, np.int32)
    for r, row in enumerate(rows):
        index[r, : len(row)] = row
    documents = {name: values[index] for name, values in encoded.documents.items()}
    for values in documents.values():
        values[index < 0] = 0
    batch = {**_streamed(encoded, rows, shape), **documents, "index": index, "weight": (index >= 0).astype(np.float32)}
    if encoded.target is not None:
        beside = _streamed(encoded.target, rows, shape._replace(length=shape.target))
        ours = {name: f"decoder_{name}" for name in ("segment_ids", "position_ids")}
        batch |= {ours.get(name, name): array for name, array in beside.items() if name not in ("starts", "ends")}
    for name, lazy in encoded.lazy.items():
        made = lazy(index[: len(rows), 0], visits)
        batch[name] = np.concatenate([made, np.zeros((shape.rows - len(made), *made.shape[1:]), made.dtype)])
    return batch


def _streamed(encoded: Encoded, rows: Sequence[Row], shape: Shape) -> Batch:
    """The tokens of these rows, where each document stands, and which one each token is of."""
    tokens = {name: np.zeros(shape[:2], values.dtype) for name, values in encoded.tokens.items()}
    segments, positions = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], np.int32)
    starts, ends = (np.zeros((shape.rows, shape.slots), np.int32) for _ in range(2))
    for r, row in enumerate(rows):
        begin = 0
        for n, document in enumerate(row):
            source = slice(encoded.offsets[document], encoded.offsets[document + 1])
            end = begin + source.stop - source.start
            for name, values in encoded.tokens.items():
                tokens[name][r, begin:end] = values[source]
            segments[r, begin:end] = n + 1
            positions[r, begin:end] = np.arange(end - begin)
            starts[r, n], ends[r, n] = begin, end - 1
            begin = end
    return {**tokens, "segment_ids": segments, "position_ids": positions, "starts": starts, "ends": ends}


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


def _sample(order: Order, epochs: int = 32, most: int = 2048) -> range:
    """Steps of one epoch of many batches, or of several epochs, so that those of another are seldom larger."""
    steps = order.steps_per_epoch
    steps *= max(1, min(epochs, most // steps))
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
