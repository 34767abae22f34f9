"""The order of training rows: a pure function of (seed, epoch), the same in every process and version.

Sorting the raw output of a counter-based generator gives a permutation that depends neither on numpy's version nor on
the number of hosts, devices or workers, and seeking is arithmetic.

Every draw on `seed.data` has a stream of its own: 0 the cut into splits, 1 + e the shuffle of epoch e, and from
`SUBSET`, `PARTS`, `AUGMENT`, `PACKS` and `BLEND` on the rows of each class, the rows of each part of a mixture,
augmentation, which documents are packed together, and which images are mixed.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SPLIT, SUBSET, PARTS, AUGMENT, PACKS, BLEND = (n << 60 for n in range(6))  # epochs stand between the first two


def random_bits(seed: int, stream: int, count: int, at: tuple[int, int] = (0, 0)) -> np.ndarray:
    """`count` 64-bit numbers of a stream from a place of it; the generator's raw output, which numpy keeps stable."""
    key = np.array([seed % 2**64, stream], np.uint64)  # from a list, numbers above 2**63 would be rounded
    return np.random.Philox(key=key, counter=np.array([0, 0, *at], np.uint64)).random_raw(count)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of 0..count-1 for one epoch."""
    # Stream 0 belongs to the split, so that the first epoch is not the order of the split.
    return sorting(random_bits(seed, epoch + 1, count))


def sorting(bits: np.ndarray) -> np.ndarray:
    """What puts these numbers in order, equal ones as they stand; by a quicker sort, since hardly any are equal."""
    found = np.argsort(bits)
    in_order = bits[found]
    return np.argsort(bits, kind="stable") if (in_order[1:] == in_order[:-1]).any() else found


@dataclass(frozen=True, eq=False)
class Mixing:
    """Documents of several parts, and how much of an epoch each part is."""

    part: np.ndarray  # int [documents]: which part each document is of; every part has some
    weights: tuple[float, ...]  # of the parts, relative to each other


@dataclass(frozen=True)
class Order:
    """Which documents step k reads: a fresh permutation each epoch, the last batch of an epoch kept, short.

    A mixture has as many documents an epoch as there are, divided over its parts by weight. A part gives its own
    documents pass after pass, each pass a permutation, and takes up in an epoch where the one before left off.
    """

    count: int  # documents
    batch_size: int
    seed: int
    mixing: Mixing | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the documents."""
        return -(-self.count // self.batch_size)

    def documents(self, step: int) -> np.ndarray:
        """The documents of a step counted from 0; at most `batch_size` of them."""
        return self.visits(step)[0]

    def visits(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents of a step, how often each of them was read before)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        places = permutation(self.seed, epoch, self.count)[position * self.batch_size :][: self.batch_size]
        if self.mixing is None or len(self.mixing.weights) < 2:
            return places, np.full(len(places), epoch)
        documents, visits = _drawn(self.seed, epoch, self.mixing)
        return documents[places], visits[places]


def shares(count: int, weights: tuple[float, ...]) -> list[int]:
    """`count` divided by weight into whole numbers that add up to it: by largest remainder, the first where equal."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    for part in sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))[: count - sum(whole)]:
        whole[part] += 1
    return whole


@lru_cache(maxsize=4)
def _drawn(seed: int, epoch: int, mixing: Mixing) -> tuple[np.ndarray, np.ndarray]:
    """(documents of an epoch, part after part; how often each was read before)."""
    documents, visits = [], []
    for part, given in enumerate(shares(len(mixing.part), mixing.weights)):
        rows = np.flatnonzero(mixing.part == part)
        read, place = np.divmod(np.arange(epoch * given, (epoch + 1) * given), len(rows))
        for number in np.unique(read):
            stream = PARTS + (part << 32) + int(number)
            order = sorting(random_bits(seed, stream, len(rows)))
            documents.append(rows[order[place[read == number]]])
        visits.append(read)
    return np.concatenate(documents), np.concatenate(visits)
