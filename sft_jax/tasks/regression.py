"""A number for each row of one or two texts: ratings, similarity, readability.

Letters: r rows of the batch, n document slots in a row, d documents, p parts of the range of the numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sft_jax.config.tasks import Regression
from sft_jax.data.batch import Encoded
from sft_jax.data.prepare import read_texts
from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import ModelError
from sft_jax.models.family import Head
from sft_jax.tasks import baselines, metrics
from sft_jax.tasks import labels as named
from sft_jax.tasks import texts as texts_of
from sft_jax.tasks.label_columns import read_values
from sft_jax.tasks.losses import absolute_error, huber_error, squared_error
from sft_jax.tasks.task import Documents, Examples, Ratio, Review, Targets, Task, Texts, written

FIGURES = {"lowest": np.min, "mean": np.mean, "highest": np.max}  # of the numbers of a split
TENTHS = np.arange(1, 10) / 10
LARGEST = float(np.finfo(np.float32).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ErrorCounts:
    """What evaluation adds up."""

    loss: Ratio  # what is trained on
    absolute: Ratio
    squared: Ratio
    part_rows: Int[Array, " p"]
    part_error: Float[Array, " p"]  # sum of what was said too much, by where the truth lies
    part_absolute: Float[Array, " p"]


def build(section: Regression, rows: Mapping[str, Rows]) -> Task:
    """The task; rows have no part in it before their numbers are read."""
    return _task(section, np.zeros(0, np.float32))


def _task(section: Regression, edges: Float[np.ndarray, " p-1"]) -> Task:
    def loss(outputs: Float[Array, "r n 1"], batch: Mapping[str, Array]) -> Ratio:
        answer = outputs[..., 0], batch["label"], batch["weight"]
        return squared_error(*answer) if section.loss == "squared" else huber_error(*answer, section.huber_delta)

    def encode(texts: Texts, targets: Sequence[float] | None, tokenizer: Any, max_length: int) -> Encoded:
        numbers = np.asarray([0.0] * len(texts[0]) if targets is None else targets, np.float32)
        return texts_of.encode(texts, numbers, tokenizer, max_length)

    texts = texts_of.columns(section)
    return Task(
        kind=section.kind,
        head=Head("sequence_classification", 1),
        labels=(section.label,),
        texts=texts,
        read=lambda rows: read_texts(rows, texts),
        columns=(*texts, section.label),
        targets=lambda rows: read(rows, section.label),
        classes=tenths,
        label_counts=lambda targets: {name: round(float(f(targets)), 4) for name, f in FIGURES.items()},
        encode=encode,
        fit=lambda train: _task(section, np.unique(np.quantile(train.documents["label"], TENTHS)).astype(np.float32)),
        loss=loss,
        divergence=lambda one, other, batch: squared_error(one[..., 0], other[..., 0], batch["weight"]),
        count=lambda outputs, batch: count(outputs, batch, loss(outputs, batch), edges),
        metrics=finish,
        row_metrics=lambda outputs, examples: metrics.correlation(outputs[:, 0], examples.documents["label"]),
        metric_names=("loss", "mae", "mse", "rmse", *metrics.CORRELATION),
        least_is_best=frozenset({"loss", "mae", "mse", "rmse"}),
        headline="pearson",
        tables=lambda counts: tables(counts, edges),
        review=lambda outputs, examples: review(outputs, examples.documents),
        baselines=baseline_scores,
        decode=lambda outputs, examples: [{"score": float(number)} for number in outputs[:, 0]],
        to_hf=lambda: named.to_hf((section.label,), "regression", {**texts_of.to_hf(section), "label": section.label}),
    )


def restore(config: Mapping[str, Any]) -> Regression:
    """The section that a `config.json` was written from; of a model that others trained, the name of its output."""
    names = named.names_in(config)
    if len(names) != 1:
        raise ModelError(
            f"config.json: problem_type=regression with {len(names)} outputs is not supported; only one is"
        )
    label = written(config).get("label", names[0])
    return Regression(kind="regression", label=label, **texts_of.read_hf(config))


def count(
    outputs: Float[Array, "r n 1"], batch: Mapping[str, Array], loss: Ratio, edges: Float[np.ndarray, " p-1"]
) -> ErrorCounts:
    """The errors of a batch; filler has weight 0 and is not counted (C16)."""
    values, label, weight = outputs[..., 0], batch["label"], batch["weight"]
    part = jnp.searchsorted(jnp.asarray(edges), label)
    member = jax.nn.one_hot(part, len(edges) + 1) * weight[..., None]
    error = (values - label)[..., None]
    return ErrorCounts(
        loss=loss,
        absolute=absolute_error(values, label, weight),
        squared=squared_error(values, label, weight),
        part_rows=member.sum(axis=(0, 1)).astype(jnp.int32),
        part_error=(member * error).sum(axis=(0, 1)),
        part_absolute=(member * jnp.abs(error)).sum(axis=(0, 1)),
    )


def finish(counts: ErrorCounts) -> dict[str, float]:
    """Every metric that sums are enough for, on the host."""
    squared = metrics.mean(counts.squared)
    return {
        "loss": metrics.mean(counts.loss),
        "mae": metrics.mean(counts.absolute),
        "mse": squared,
        "rmse": math.sqrt(squared),
    }


def tables(counts: ErrorCounts, edges: Float[np.ndarray, " p-1"]) -> dict[str, list[list[Any]]]:
    """The errors by where the truth lies among the numbers of training: those at the ends are often drawn inwards."""
    ends = [f"{edge:.4g}" for edge in edges]
    names = [f"up to {end}" for end in ends] + [f"above {ends[-1]}" if ends else "all"]
    table: list[list[Any]] = [["truth", "rows", "mean error", "mean absolute error"]]
    for name, rows, error, absolute in zip(
        names, counts.part_rows, counts.part_error, counts.part_absolute, strict=True
    ):
        if int(rows):
            table.append([name, int(rows), *(round(float(total) / int(rows), 4) for total in (error, absolute))])
    return {"error by truth": table}


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


def baseline_scores(train: Examples, test: Examples) -> dict[str, float]:
    """Pearson's correlation of the mean, which is none, and of ridge regression on TF-IDF."""
    labels = train.documents["label"], test.documents["label"]
    return {
        "mean": 0.0,
        "TF-IDF + ridge regression": baselines.linear_number(train.texts, labels[0], test.texts, labels[1]),
    }


def tenths(targets: Sequence[float]) -> list[int]:
    """The tenth of all numbers that each is among; equal numbers are among the same."""
    return np.searchsorted(np.quantile(targets, TENTHS), targets).tolist()


def read(rows: Rows, column: str) -> Targets:
    """The numbers of a column, those that stand there as text too; each is finite in float32."""

    def bad(place: str, value: Any) -> Bad:
        comma = isinstance(value, str) and _number(value.replace(",", ".", 1)) is not None
        hint = " with a point, such as 3.5" if comma else ""
        return Bad(place, "no number", f"{column} is {value!r:.60}, expected a finite number{hint}")

    return read_values(rows, column, _number, bad)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # NaN is not, either
