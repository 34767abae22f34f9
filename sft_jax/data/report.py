"""What became of the rows, as plain data: every decision counted, and shown by examples. Knows no task, holds no jax.

For each split, the rows that were read are those that are used, those that went to other splits, and those that were
dropped, by reason. Rows that stay can be trouble too: duplicates, conflicts and leaks are counted wherever they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from sft_jax.data.batch import Encoded

QUANTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}


@dataclass(frozen=True)
class Tokens:
    """What the documents of a split are in tokens."""

    total: int
    lengths: dict[str, float]  # quantiles of the lengths
    truncated: int  # documents that were cut to `data.max_length`
    truncated_share: float
    padding_share: float  # filler among the tokens of the batches
    supervised: int | None  # of them, those that have a part in the loss; None where documents have labels of their own
    lost: dict[str, int]  # why others were left out -> how many


@dataclass(frozen=True)
class SplitReport:
    """What became of the rows of one split."""

    read: int  # with what could not be read as a row
    used: int
    cut: int  # rows that went to other splits by `data.split`
    dropped: dict[str, int]  # reason -> rows
    duplicates: int  # rows whose texts and target stand earlier in the split
    conflicts: int  # rows whose texts stand in the split with another target
    leaked: int  # training rows whose texts stand in validation or test
    labels: dict[str, int | float]  # of the rows that are used: how often there is each, or what numbers are like
    examples: dict[str, list[str]]  # kind of trouble -> place and beginning of the text
    tokens: Tokens | None = None  # once they are encoded


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of a run."""

    splits: dict[str, SplitReport]
    warnings: list[str] = field(default_factory=list)  # what a person should look at before training
    notes: dict[str, str] = field(default_factory=dict)  # how rows were read, and what is supervised of them

    def with_tokens(
        self,
        data: Mapping[str, Encoded],
        padding: Mapping[str, float],
        lost: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    ) -> "DataReport":
        """The report with what the encoded splits are in tokens; `padding` is their share of filler, and `lost` says by
        reason where rows stand that became no documents."""
        splits = {}
        for split, found in self.splits.items():
            if split in data:
                places = {why: list(shown) for why, shown in (lost or {}).get(split, {}).items()}
                tokens = _tokens(data[split], padding[split])
                found = replace(found, tokens=tokens, examples={**found.examples, **places})
            splits[split] = found
        return replace(self, splits=splits)

    def plain(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return asdict(self)


def _tokens(encoded: Encoded, padding: float) -> Tokens:
    lengths = encoded.lengths
    quantiles = np.percentile(lengths, list(QUANTILES.values()))
    return Tokens(
        total=int(lengths.sum()),
        lengths={name: float(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
        truncated=encoded.truncated,
        truncated_share=encoded.truncated / len(encoded),
        padding_share=padding,
        supervised=_supervised(encoded),
        lost=encoded.lost,
    )


def _supervised(encoded: Encoded) -> int | None:
    """How many tokens, of targets where there are some, weigh more than 0."""
    weights = (encoded.target or encoded).tokens.get("token_weight")
    return None if weights is None else int((weights > 0).sum())
