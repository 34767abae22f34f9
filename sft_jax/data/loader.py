"""Batches by number, and their background preparation.

`batches[k]` is a pure function of k: of no host, device, worker or restart. The position in the data is therefore one
integer, the step, and seeking costs nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from sft_jax.config.data import Layout
from sft_jax.data.augment import Augmentation
from sft_jax.data.batch import Batch, Encoded, Row, Shape, collate, lay_out, one_row, place, up_to
from sft_jax.data.order import Order
from sft_jax.data.packs import Packs


@dataclass(frozen=True)
class TrainBatches:
    """The batch of every step of a run; the shapes hold any batch of documents as they are, or shorter.

    Where there are packs, it is these that the order counts, and a step reads whole ones.
    """

    encoded: Encoded
    order: Order
    shapes: tuple[Shape, ...]
    steps: int
    augmentation: Augmentation | None = None
    packs: Packs | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        documents, visits, ends = self._read(step)
        encoded, numbers = self.encoded, documents
        if self.augmentation is not None:
            encoded, numbers = self.augmentation(encoded, documents, visits), np.arange(len(documents))
        if ends is None:
            rows, shape = place(encoded, numbers, self.shapes)
        else:
            rows, shape = [row.tolist() for row in np.split(numbers, ends)], self.shapes[0]
        batch = collate(encoded, rows, shape, visits)
        if encoded is self.encoded:
            return batch
        return {**batch, "index": np.where(batch["index"] < 0, -1, documents[batch["index"]]).astype(np.int32)}

    def _read(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(documents of a step, how often each was read before, where packs end among them if they are planned)."""
        read, visits = self.order.visits(step)
        if self.packs is None:
            return read, visits, None
        sizes = np.diff(self.packs.offsets)[read]
        return self.packs.of(read), np.repeat(visits, sizes), np.cumsum(sizes)[:-1]


@dataclass(frozen=True)
class EvalBatches:
    """Every document once, in one shape, laid out over the whole split since order does not matter."""

    encoded: Encoded
    rows: Sequence[Row]
    shape: Shape

    @classmethod
    def of(cls, encoded: Encoded, like: Shape, batch_size: int, multiple: int) -> "EvalBatches":
        """Batches of about `batch_size` documents, in rows like those of training, or longer if need be."""
        needed = one_row(Layout(kind="padded"), encoded)
        like = like._replace(length=max(like.length, needed.length), target=max(like.target, needed.target))
        rows = lay_out(encoded, range(len(encoded)), like)
        per_batch = min(len(rows), -(-batch_size * len(rows) // len(encoded)))
        return cls(encoded, rows, like._replace(rows=up_to(per_batch, multiple)))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.shape.rows)

    def __getitem__(self, number: int) -> Batch:
        begin = number * self.shape.rows
        return collate(self.encoded, self.rows[begin : begin + self.shape.rows], self.shape)


def prefetch(batches: TrainBatches | EvalBatches, begin: int, ahead: int) -> Iterator[Batch]:
    """The batches from `begin` on, `ahead` of them prepared in the background."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    source: Any = batches  # has a length and random access, which is all that grain asks for
    return iter(grain.MapDataset.source(source)[begin:].to_iter_dataset(options))


def padding_share(batches: TrainBatches | EvalBatches, most: int = 64) -> float:
    """Share of the tokens that are filler, over the batches of a pass (at most `most` of them, spread out)."""
    count = min(len(batches), batches.order.steps_per_epoch) if isinstance(batches, TrainBatches) else len(batches)
    filler = total = 0
    for number in range(0, count, max(1, -(-count // most))):
        segments = batches[number]["segment_ids"]
        filler, total = filler + int((segments == 0).sum()), total + segments.size
    return filler / total
