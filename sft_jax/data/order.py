"""The order of training rows: a pure function of (seed, epoch), the same in every process and version.

Sorting the raw output of a counter-based generator gives a permutation that depends neither on numpy's version nor on
the number of hosts, devices or workers, and seeking is arithmetic.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def random_bits(seed: int, stream: int, count: int) -> np.ndarray:
    """`count` 64-bit numbers of a stream; the bit generator's raw output, which numpy keeps stable."""
    key = np.array([seed % 2**64, stream], np.uint64)  # from a list, numbers above 2**63 would be rounded
    return np.random.Philox(key=key).random_raw(count)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of 0..count-1 for one epoch."""
    # Stream 0 belongs to the split, so that the first epoch is not the order of the split.
    return np.argsort(random_bits(seed, epoch + 1, count), kind="stable")


@dataclass(frozen=True)
class Order:
    """Which documents step k reads: a fresh permutation each epoch, the last batch of an epoch kept, short."""

    count: int  # documents
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the documents."""
        return -(-self.count // self.batch_size)

    def documents(self, step: int) -> np.ndarray:
        """The documents of a step counted from 0; at most `batch_size` of them."""
        epoch, position = divmod(step, self.steps_per_epoch)
        begin = position * self.batch_size
        return permutation(self.seed, epoch, self.count)[begin : begin + self.batch_size]
