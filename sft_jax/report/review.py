"""How the rows of a split were answered, in short: the plain data that `review.json` keeps for the report.

Its size does not grow with the split: bins, quantiles, a sample, and the worst mistakes. Knows no task: a `Review` says
all there is to say, and answers that are numbers are told by their having no confidence and reading as numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sft_jax.data.images import Picture, thumbnail
from sft_jax.data.prepare import Prepared
from sft_jax.data.rows import plain
from sft_jax.tasks.metrics import BINS
from sft_jax.tasks.task import Review

PARTS = 8  # of the lengths, equally many rows
POINTS = 600  # of truth against prediction
LONGEST = 1500  # characters of a text that is shown


def summarise(
    review: Review,
    rows: Prepared,
    columns: Sequence[str],
    lengths: Int[np.ndarray, " d"],
    groups: Sequence[str] | None,
    most: int,
) -> dict[str, Any]:
    """The short form of a review; `columns` names the texts of a row, `lengths` and `groups` have an entry a row."""
    if review.rows is not None:
        lengths = lengths[review.rows]
    errors = _errors(review)
    by_length = (lengths, review.right) if errors is None else (lengths, np.abs(errors))
    return {
        "rows": len(review.truth),
        "wrong": int((~review.right).sum()) if errors is None else None,
        "calibration": None if review.confidence is None else calibration(review.confidence, review.right),
        "length": {"score": "share right" if errors is None else "mean absolute error", "parts": quantiles(*by_length)},
        "numbers": None if errors is None else _numbers(review, errors),
        "mistakes": [
            _mistake(review, rows, columns, groups, int(row)) for row in worst(review, most, every=errors is not None)
        ],
    }


def calibration(confidence: Float[np.ndarray, " d"], right: Bool[np.ndarray, " d"]) -> dict[str, Any]:
    """Mean confidence and share right by bins of confidence, and the expected calibration error (arXiv 1706.04599)."""
    numbers = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # as the metric `ece` has them
    bins = [
        {
            "from": b / BINS,
            "to": (b + 1) / BINS,
            "rows": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "right": float(right[inside].mean()),
        }
        for b in range(BINS)
        if (inside := numbers == b).any()
    ]
    gaps = [b["rows"] * abs(b["confidence"] - b["right"]) for b in bins]
    return {"bins": bins, "ece": sum(gaps) / max(len(right), 1)}


def quantiles(lengths: Int[np.ndarray, " d"], values: np.ndarray) -> list[dict[str, Any]]:
    """The mean of the values, and its standard error, by ranges of length that hold about equally many rows."""
    tops = np.unique(np.quantile(lengths, np.arange(1, PARTS + 1) / PARTS, method="higher"))
    parts = np.searchsorted(tops, lengths)
    return [
        {
            "from": int(lengths[inside].min()),
            "to": int(lengths[inside].max()),
            "rows": int(inside.sum()),
            "score": float(values[inside].mean()),
            "error": float(values[inside].std() / np.sqrt(inside.sum())),
        }
        for part in range(len(tops))
        if (inside := parts == part).any()
    ]


def worst(review: Review, most: int, *, every: bool) -> Int[np.ndarray, " m"]:
    """The rows that were answered worst, worst first, of equals the earlier; of the wrong ones unless `every`."""
    order = np.argsort(-review.loss, kind="stable")
    return order[every | ~review.right[order]][:most]


def _errors(review: Review) -> Float[np.ndarray, " d"] | None:
    """Prediction minus truth, where both are numbers."""
    if review.confidence is not None:
        return None
    try:
        truth, predicted = (np.asarray([float(value) for value in side]) for side in (review.truth, review.predicted))
    except ValueError:
        return None
    return predicted - truth


def _numbers(review: Review, errors: Float[np.ndarray, " d"]) -> dict[str, Any]:
    """Truth against prediction of evenly picked rows, and how often there is an error of which size."""
    picked = np.unique(np.linspace(0, len(errors) - 1, min(POINTS, len(errors))).astype(int))
    counts, edges = np.histogram(errors[np.isfinite(errors)], bins=30)
    return {
        "truth": [float(review.truth[row]) for row in picked],
        "predicted": [float(review.predicted[row]) for row in picked],
        "histogram": {"edges": edges.tolist(), "rows": counts.tolist()},
    }


def _mistake(
    review: Review, rows: Prepared, columns: Sequence[str], groups: Sequence[str] | None, row: int
) -> dict[str, Any]:
    source = row if review.rows is None else int(review.rows[row])
    values = [(name, column[source]) for name, column in zip(columns, rows.texts, strict=True)]
    return {
        "place": rows.rows.place(source),
        "group": None if groups is None else groups[source],
        "texts": [_shown(name, value) for name, value in values],
        "truth": review.truth[row],
        "predicted": review.predicted[row],
        "confidence": None if review.confidence is None else float(review.confidence[row]),
        "loss": float(review.loss[row]),
    }


def _shown(column: str, value: Any) -> dict[str, Any]:
    """What a row says in a column, as far as it is shown."""
    text = plain(value)
    image = {"image": thumbnail(value)} if isinstance(value, Picture) else {}
    return {"column": column, "text": text[:LONGEST], "more": max(0, len(text) - LONGEST), **image}
