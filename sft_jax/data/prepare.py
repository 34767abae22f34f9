"""From rows to the splits of a run: checked, seeded, stratified, the same on every host. Holds numpy only.

Knows no task: what rows are answered with, and what a split is stratified by, are functions handed in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.config.schema import DataSection, Split
from sft_jax.data.order import random_bits
from sft_jax.data.rows import Bad, Rows, refuse
from sft_jax.errors import ConfigError, DataError

Indices = np.ndarray  # int64, rows of the source in the source's order


@dataclass(frozen=True)
class Prepared:
    """The rows of one split that are used, their texts as they will be tokenised, and their targets."""

    rows: Rows
    texts: tuple[list[str], ...]  # one or two columns
    targets: list[Any]

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, rows: Indices) -> "Prepared":
        """These rows alone, in this order."""
        texts = tuple([column[i] for i in rows] for column in self.texts)
        return Prepared(self.rows.select(rows), texts, [self.targets[i] for i in rows])


def prepare(
    rows: Mapping[str, Rows],
    section: DataSection,
    texts: Sequence[str],
    targets: Callable[[Rows], Any],  # -> what has `values` and `bad`, by row
    classes: Callable[[Sequence[Any]], Sequence[int]],  # of targets
    seed: int,
) -> dict[str, Prepared]:
    """The splits of a run; raises DataError for rows that cannot be used."""
    if section.max_rows:
        rows = {split: found.select(range(min(section.max_rows, len(found)))) for split, found in rows.items()}
    if not len(rows["train"]):
        raise DataError("data.source.train: holds no row; give a file with some")
    found = {split: _checked(given, texts, targets) for split, given in rows.items()}
    shares = section.split
    wanted = [name for name, share in (("validation", shares.validation), ("test", shares.test)) if share]
    for name in wanted:
        if name in rows:
            raise ConfigError(f"data.split.{name}: the source has a split of its own; drop one of the two")
    if wanted:
        parts = cut(classes(found["train"].targets), shares, seed)
        found |= {name: found["train"].select(part) for name, part in parts.items()}
    return found


def read_texts(rows: Rows, names: Sequence[str]) -> tuple[tuple[list[str], ...], dict[int, Bad]]:
    """(columns of texts, what is wrong with the rows that lack one)."""
    columns = tuple(rows.column(name) for name in names)
    bad: dict[int, Bad] = {}
    for name, column in zip(names, columns, strict=True):
        for row, text in enumerate(column):
            if not isinstance(text, str) or not text.strip():
                bad[row] = Bad(rows.place(row), "no text", f"{name} is {text!r:.60}, expected a text")
    return columns, bad


def _checked(rows: Rows, texts: Sequence[str], targets: Callable[[Rows], Any]) -> Prepared:
    columns, bad = read_texts(rows, texts)
    found = targets(rows)
    bad = found.bad | bad
    refuse(rows.where, [bad[row] for row in sorted(bad)])
    return Prepared(rows, columns, found.values)


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
