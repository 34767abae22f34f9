"""Packs planned before training: rows of documents that stay together, filled as well as they can be.

Packing within the batch (`batch.py`) reads the same documents at each step as unpacked training does and leaves a tenth
or so of each row empty. A plan over all documents leaves one to three hundredths. A step then reads whole packs, as
many as hold `batch_size` documents on average; packs are what the order shuffles, so the position in the data stays one
integer, and neither hosts nor devices change what a step reads. Holds numpy only.

Documents are taken in a random order, not the longest first: a pack is then a fair sample, as a batch is, where the
longest first would make packs of three long documents and of thirty short ones.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft_jax.data import cache
from sft_jax.data.batch import pack
from sft_jax.data.order import PACKS, random_bits, sorting

VERSION = "1"  # of `plan`: another one, and what is in caches is not found any more


@dataclass(frozen=True, eq=False)
class Packs:
    """Which documents stand in each pack."""

    documents: np.ndarray  # int64 [documents], pack after pack
    offsets: np.ndarray  # int64 [packs + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def slots(self) -> int:
        """The most documents that stand in one pack."""
        return int(np.diff(self.offsets).max())

    def of(self, packs: np.ndarray) -> np.ndarray:
        """The documents of these packs, one pack after the other."""
        return np.concatenate([self.documents[self.offsets[p] : self.offsets[p + 1]] for p in packs])

    def in_a_step(self, batch_size: int) -> int:
        """The packs that hold about `batch_size` documents; of the data alone, and of no device."""
        return max(1, round(batch_size * len(self) / len(self.documents)))


def plan(lengths: np.ndarray, length: int, slots: int, seed: int, home: Path | None = None) -> Packs:
    """Packs of at most `length` tokens and `slots` documents, every document once; from a cache at `home` if there."""
    name = cache.key((VERSION, np.asarray(lengths, "<i8").tobytes(), f"{length} {slots} {seed}"))
    found = cache.load(home, name) if home else None
    if found is None:
        found = _planned(lengths, length, slots, seed)
        if home:
            cache.store(home, name, found)
    return Packs(found["documents"], found["offsets"])


def _planned(lengths: np.ndarray, length: int, slots: int, seed: int) -> dict[str, np.ndarray]:
    order = sorting(random_bits(seed, PACKS, len(lengths)))
    rows = pack(lengths.tolist(), length, slots, order.tolist())
    documents = np.fromiter((document for row in rows for document in row), np.int64, len(lengths))
    return {"documents": documents, "offsets": np.concatenate([[0], np.cumsum([len(row) for row in rows])])}
