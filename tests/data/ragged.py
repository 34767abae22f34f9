"""Documents of given lengths whose tokens are all different, so that a lost or swapped one shows."""

from collections.abc import Sequence

import numpy as np

from sft_jax.data.batch import Batch, Encoded


def ragged(lengths: Sequence[int]) -> Encoded:
    """Documents of these lengths; token k of them all is k + 1, document d has label d + 100."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    labels = np.arange(len(lengths), dtype=np.int32) + 100
    return Encoded({"input_ids": tokens, "token_type_ids": tokens % 2}, offsets, {"label": labels})


def natural(count: int, seed: int = 0, longest: int = 128) -> np.ndarray:
    """Lengths such as those of sentences: log-normal about 24 tokens."""
    drawn = np.random.default_rng(seed).lognormal(3.1, 0.5, count)
    return np.clip(drawn, 3, longest).astype(int)


def held(batch: Batch) -> list[int]:
    """The documents of a batch, sorted."""
    return sorted(batch["index"][batch["index"] >= 0].tolist())


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal to the last bit, types included."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )
