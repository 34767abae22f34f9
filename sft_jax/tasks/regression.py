"""A number for each row of one or two texts: ratings, similarity, readability.

Letters: r rows of the batch, n document slots in a row, d documents.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from sft_jax.config.schema import Regression
from sft_jax.data.batch import Encoded
from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import ModelError
from sft_jax.models.family import Head
from sft_jax.tasks import baselines, metrics
from sft_jax.tasks import labels as named
from sft_jax.tasks import texts as texts_of
from sft_jax.tasks.losses import absolute_error, huber_error, squared_error
from sft_jax.tasks.task import Documents, Ratio, Review, Targets, Task, Texts, written

FIGURES = {"lowest": np.min, "mean": np.mean, "highest": np.max}  # of the numbers of a split
LARGEST = float(np.finfo(np.float32).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ErrorCounts:
    """What evaluation adds up."""

    loss: Ratio  # what is trained on
    absolute: Ratio
    squared: Ratio


def build(section: Regression, rows: Mapping[str, Rows]) -> Task:
    """The task; rows have no part in it before their numbers are read."""

    def loss(outputs: Float[Array, "r n 1"], batch: Mapping[str, Array]) -> Ratio:
        answer = outputs[..., 0], batch["label"], batch["weight"]
        return squared_error(*answer) if section.loss == "squared" else huber_error(*answer, section.huber_delta)

    def encode(texts: Texts, targets: Sequence[float] | None, tokenizer: Any, max_length: int) -> Encoded:
        numbers = np.asarray([0.0] * len(texts[0]) if targets is None else targets, np.float32)
        return texts_of.encode(texts, numbers, tokenizer, max_length)

    texts = texts_of.columns(section)
    task = Task(
        kind=section.kind,
        head=Head("sequence_classification", 1),
        labels=(section.label,),
        texts=texts,
        columns=(*texts, section.label),
        targets=lambda rows: read(rows, section.label),
        classes=tenths,
        label_counts=lambda targets: {name: round(float(f(targets)), 4) for name, f in FIGURES.items()},
        encode=encode,
        fit=lambda documents: task,
        loss=loss,
        divergence=lambda one, other, batch: squared_error(one[..., 0], other[..., 0], batch["weight"]),
        count=lambda outputs, batch: count(outputs, batch, loss(outputs, batch)),
        metrics=finish,
        row_metrics=lambda outputs, documents: metrics.correlation(outputs[:, 0], documents["label"]),
        metric_names=("loss", "mae", "mse", "rmse", *metrics.CORRELATION),
        least_is_best=frozenset({"loss", "mae", "mse", "rmse"}),
        headline="pearson",
        tables=lambda counts: {},
        review=review,
        baselines=baseline_scores,
        decode=lambda outputs: {"score": float(outputs[0])},
        to_hf=lambda: named.to_hf((section.label,), "regression", {**texts_of.to_hf(section), "label": section.label}),
    )
    return task


def restore(config: Mapping[str, Any]) -> Regression:
    """The section that a `config.json` was written from; of a model that others trained, the name of its output."""
    names = named.names_in(config)
    if len(names) != 1:
        raise ModelError(
            f"config.json: problem_type=regression with {len(names)} outputs is not supported; only one is"
        )
    label = written(config).get("label", names[0])
    return Regression(kind="regression", label=label, **texts_of.read_hf(config))


def count(outputs: Float[Array, "r n 1"], batch: Mapping[str, Array], loss: Ratio) -> ErrorCounts:
    """The errors of a batch; filler has weight 0 and is not counted (C16)."""
    answer = outputs[..., 0], batch["label"], batch["weight"]
    return ErrorCounts(loss, absolute_error(*answer), squared_error(*answer))


def finish(counts: ErrorCounts) -> dict[str, float]:
    """Every metric that sums are enough for, on the host."""
    squared = metrics.mean(counts.squared)
    return {
        "loss": metrics.mean(counts.loss),
        "mae": metrics.mean(counts.absolute),
        "mse": squared,
        "rmse": math.sqrt(squared),
    }


def review(outputs: Float[np.ndarray, "d 1"], documents: Documents) -> Review:
    """What was predicted for each document, and how far off that was."""
    values, truth = outputs[:, 0].astype(np.float64), documents["label"]
    return Review(
        truth=[f"{value:.4g}" for value in truth],
        predicted=[f"{value:.4g}" for value in values],
        right=np.zeros(len(truth), bool),
        confidence=None,
        loss=np.abs(values - truth),
    )


def baseline_scores(texts: Texts, train: Documents, test_texts: Texts, test: Documents) -> dict[str, float]:
    """Pearson's correlation of the mean, which is none, and of ridge regression on TF-IDF."""
    return {
        "mean": 0.0,
        "TF-IDF + ridge regression": baselines.linear_number(texts, train["label"], test_texts, test["label"]),
    }


def tenths(targets: Sequence[float]) -> list[int]:
    """The tenth of all numbers that each is among; equal numbers are among the same."""
    return np.searchsorted(np.quantile(targets, np.arange(1, 10) / 10), targets).tolist()


def read(rows: Rows, column: str) -> Targets:
    """The numbers of a column, those that stand there as text too; each is finite in float32."""
    values = rows.column(column)
    found = [_number(value) for value in values]

    def bad(row: int) -> Bad:
        text = f"{column} is {values[row]!r:.60}, expected a finite number"
        return Bad(rows.place(row), "no number", text)

    return Targets(found, {row: bad(row) for row, number in enumerate(found) if number is None})


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # NaN is not, either
