"""Batches by number, and their background preparation.

`batches[k]` is a pure function of k: of no host, device, worker or restart. The position in the data is therefore one
integer, the step, and seeking costs nothing.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sft_jax.config.data import Layout
from sft_jax.data.augment import Augmentation
from sft_jax.data.batch import Batch, Encoded, Row, Shape, collate, lay_out, one_row, place, up_to
from sft_jax.data.order import Order
from sft_jax.data.packs import Packs
from sft_jax.data.pixels import Blend, PixelValues
from sft_jax.errors import DataError


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
    blend: Blend | None = None
    workers: int = 0  # processes that `prefetch` has them prepared by

    def __len__(self) -> int:
        return self.steps

    @property
    def changes(self) -> bool:
        """Whether documents are others at each visit."""
        drawn = any(isinstance(lazy, PixelValues) and lazy.changes for lazy in self.encoded.lazy.values())
        return drawn or self.augmentation is not None or self.blend is not None

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
        if self.blend is not None:
            batch = self.blend(batch, visits)
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
class Stacked:
    """Batches of one shape, of several steps at a time: those from one edge to the next, with a leading axis."""

    batches: TrainBatches
    edges: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, number: int) -> Batch:
        found = [self.batches[step] for step in range(*self.edges[number : number + 2])]
        return {name: np.stack([batch[name] for batch in found]) for name in found[0]}


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


def prefetch(batches: TrainBatches | Stacked | EvalBatches, begin: int, ahead: int) -> Iterator[Batch]:
    """The batches from `begin` on, `ahead` of them prepared in the background: by a thread, or by worker processes."""
    if isinstance(batches, TrainBatches) and batches.workers:
        return _by_workers(batches, begin, ahead)
    import grain  # which imports jax, so that no worker may

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    source: Any = batches  # has a length and random access, which is all that grain asks for
    return iter(grain.MapDataset.source(source)[begin:].to_iter_dataset(options))


def padding_share(batches: TrainBatches | EvalBatches, most: int = 64) -> float:
    """Share of the tokens that are filler, over the batches of a pass (at most `most` of them, spread out)."""
    count = min(len(batches), batches.order.steps_per_epoch) if isinstance(batches, TrainBatches) else len(batches)
    if isinstance(batches, TrainBatches):  # pixels would be made for nothing
        batches = replace(batches, encoded=replace(batches.encoded, lazy={}), blend=None)
    elif isinstance(batches, EvalBatches):
        batches = replace(batches, encoded=replace(batches.encoded, lazy={}))
    filler = total = 0
    for number in range(0, count, max(1, -(-count // most))):
        segments = batches[number]["segment_ids"]
        filler, total = filler + int((segments == 0).sum()), total + segments.size
    return filler / total


# What a worker process has: a copy of the batches. It is started anew, never forked from one that runs JAX.
_held: list[TrainBatches] = []


def _begin_worker(batches: TrainBatches) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the first process that is interrupted
    _held.append(batches)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose first process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _batch(number: int) -> Batch:
    return _held[0][number]


def _by_workers(batches: TrainBatches, begin: int, ahead: int) -> Iterator[Batch]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(batches.workers, context, _begin_worker, (batches,))
    asked: deque[Future[Batch]] = deque()
    try:
        for number in range(begin, len(batches)):
            asked.append(pool.submit(_batch, number))
            if len(asked) > ahead:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "data.workers: a worker process did not begin, or was killed; if memory is short lower data.workers; a "
            "program of your own needs `if __name__ == '__main__':` around what it does"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
