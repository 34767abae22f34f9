"""From rows to the splits of a run: seeded, stratified, the same on every host. Holds numpy only."""

from collections.abc import Sequence

import numpy as np

from sft_jax.config.schema import Split
from sft_jax.data.order import random_bits
from sft_jax.errors import DataError

Indices = np.ndarray  # int64, rows of the source in the source's order


def cut(classes: Sequence[int], shares: Split, seed: int) -> dict[str, Indices]:
    """Disjoint rows for `train`, `validation` and `test`, each class divided in the same shares.

    A split of share 0 is left out. Rounding is by class to the nearest row, so that a class of n rows gives
    round(n * share), but every class leaves a row to train on.
    """
    order = np.argsort(random_bits(seed, 0, len(classes)), kind="stable")
    kinds = np.asarray(classes)[order]
    parts: dict[str, list[Indices]] = {"test": [], "validation": [], "train": []}
    for kind in np.unique(kinds):
        rows, begin = order[kinds == kind], 0
        for name, share in (("test", shares.test), ("validation", shares.validation)):
            end = min(begin + round(len(rows) * share), len(rows) - 1)
            parts[name].append(rows[begin:end])
            begin = end
        parts["train"].append(rows[begin:])
    result = {name: np.sort(np.concatenate(found)) for name, found in parts.items()}
    for name, share in (("test", shares.test), ("validation", shares.validation)):
        if share and not len(result[name]):
            raise DataError(f"data.split.{name}: {share} of {len(classes)} rows is no row; give a larger share")
    return {name: rows for name, rows in result.items() if len(rows)}
