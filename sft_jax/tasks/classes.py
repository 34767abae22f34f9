"""What tasks with one label for each row share, whatever the row is: losses, counts, metrics, reviews, records.

Letters: r rows of the batch, n document slots in a row, d documents, c classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sft_jax.config.tasks import ImageClassification, SequenceClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.rows import Rows
from sft_jax.errors import ModelError
from sft_jax.models.family import Head
from sft_jax.tasks import label_columns as columns
from sft_jax.tasks import labels as named
from sft_jax.tasks import metrics
from sft_jax.tasks.losses import Weights, class_divergence, cross_entropy
from sft_jax.tasks.metrics import Calibration
from sft_jax.tasks.task import Documents, Ratio, Review, Task

Section = SequenceClassification | ImageClassification
PROBLEM = "single_label_classification"  # what `transformers` calls it
TOP = 5  # of the most probable labels, among which the right one may be; counted where there are more


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassCounts:
    """What evaluation adds up."""

    loss: Ratio  # what is trained on
    log_loss: Ratio  # cross-entropy, no more
    confusion: Int[Array, "c c"]  # truth by row, prediction by column
    calibration: Calibration


def build(section: Section, rows: Mapping[str, Rows], ours: Mapping[str, Any], **own: Any) -> Task:
    """The task of a section on these rows, with fields of `Task` that are the kind's own.

    The labels are those of the configuration, the source, or the sorted values; `ours` is what `config.json` says of
    the task besides.
    """
    labels = (
        named.given(section.labels, 2)
        if section.labels is not None
        else columns.names_of_one(rows["train"], section.label)
    )
    return _task(section, labels, named.weights(section.class_weights, labels), ours, own)


def names_to_restore(config: Mapping[str, Any]) -> list[str]:
    """The labels of the model that a `config.json` describes."""
    names = named.names_in(config)
    if len(names) < 2:
        raise ModelError(f"config.json: names {len(names)} label, expected two or more, of which one is to be told")
    return names


def _task(
    section: Section, labels: tuple[str, ...], weights: Weights, ours: Mapping[str, Any], own: Mapping[str, Any]
) -> Task:
    settings = {
        "class_weights": weights,
        "smoothing": section.label_smoothing,
        "gamma": section.focal_gamma if section.loss == "focal" else 0.0,
    }

    def loss(logits: Float[Array, "r n c"], batch: Mapping[str, Array]) -> Ratio:
        weight, share = batch["weight"], batch.get("label_share")
        if share is None:
            return cross_entropy(logits, batch["label"], weight, **settings)
        one = cross_entropy(logits, batch["label"], weight * share, **settings)
        other = cross_entropy(logits, batch["label_other"], weight * (1 - share), **settings)
        return Ratio(one.total + other.total, one.weight + other.weight)

    def fit(train: Encoded) -> Task:
        balanced = section.class_weights == "balanced"
        found = balanced_weights(train.documents["label"], len(labels)) if balanced else weights
        return _task(section, labels, found, ours, own) if balanced else task

    task = Task(
        kind=section.kind,
        head=Head(section.kind, len(labels)),
        labels=labels,
        targets=lambda rows: columns.read_one(rows, section.label, labels),
        classes=lambda targets: targets,
        label_counts=lambda targets: dict(zip(labels, often(targets, len(labels)).tolist(), strict=True)),
        doubts=named.doubts,
        fit=fit,
        loss=loss,
        divergence=lambda one, other, batch: class_divergence(one, other, batch["weight"]),
        count=lambda logits, batch: count(logits, batch, loss(logits, batch)),
        metrics=finish,
        row_metrics=lambda logits, examples: row_metrics(logits, examples.documents),
        metric_names=(
            *("loss", "log_loss", *metrics.classification(np.eye(2)), "ece", *metrics.RANKING),
            *([f"top{TOP}_accuracy"] if len(labels) > TOP else []),
        ),
        least_is_best=frozenset({"loss", "log_loss", "ece"}),
        headline="accuracy",
        tables=lambda counts: tables(counts, labels),
        review=lambda logits, examples: review(logits, examples.documents, labels),
        decode=lambda logits, examples: [decode(row, labels) for row in logits],
        to_hf=lambda: named.to_hf(labels, PROBLEM, ours),
        **own,
    )
    return task


def numbers(targets: Sequence[int] | None, count: int) -> Int[np.ndarray, " d"]:
    """The labels of documents; without targets, filler."""
    return np.asarray([0] * count if targets is None else targets, np.int32)


def often(label: Sequence[int] | np.ndarray, classes: int) -> Int[np.ndarray, " c"]:
    """How often each class occurs."""
    return np.bincount(np.asarray(label, np.int64), minlength=classes)


def balanced_weights(label: Int[np.ndarray, " d"], classes: int) -> np.ndarray:
    """n / (k * n_c) for each of the k classes that occur, as scikit-learn's; 1 for those that do not."""
    rows = often(label, classes)
    return np.where(rows, len(label) / (np.count_nonzero(rows) * np.maximum(rows, 1)), 1).astype(np.float32)


def count(logits: Float[Array, "r n c"], batch: Mapping[str, Array], loss: Ratio) -> ClassCounts:
    """The counts of a batch; filler has weight 0 and is not counted (C16)."""
    classes, label, weight = logits.shape[-1], batch["label"], batch["weight"]
    predicted = jnp.argmax(logits, axis=-1)
    truth = jax.nn.one_hot(label, classes) * weight[..., None]
    confusion = jnp.einsum("rni,rnj->ij", truth, jax.nn.one_hot(predicted, classes))
    confidence = jax.nn.softmax(logits.astype(jnp.float32)).max(axis=-1)
    return ClassCounts(
        loss=loss,
        log_loss=cross_entropy(logits, label, weight),
        confusion=confusion.astype(jnp.int32),  # float32 stops counting at 2^24
        calibration=metrics.count_calibration(confidence, predicted == label, weight),
    )


def finish(counts: ClassCounts) -> dict[str, float]:
    """Every metric that counts are enough for, on the host."""
    losses = {"loss": metrics.mean(counts.loss), "log_loss": metrics.mean(counts.log_loss)}
    return {
        **losses,
        **metrics.classification(np.asarray(counts.confusion)),
        "ece": metrics.calibration_error(counts.calibration),
    }


def row_metrics(logits: Float[np.ndarray, "d c"], documents: Documents) -> dict[str, float]:
    """How well the outputs rank: of the second label where there are two, else of each against the rest."""
    label, logs, classes = documents["label"], log_softmax(logits), logits.shape[-1]
    if classes == 2:
        return metrics.ranking(logs[:, 1:] - logs[:, :1], (label == 1)[:, None])
    top = {f"top{TOP}_accuracy": top_accuracy(logits, label)} if classes > TOP else {}
    return metrics.ranking(logs, label[:, None] == np.arange(classes)) | top


def top_accuracy(logits: Float[np.ndarray, "d c"], label: Int[np.ndarray, " d"]) -> float:
    """Share of the documents whose label is among the `TOP` most probable; of equals the first is."""
    if not len(label) or not np.isfinite(logits).all():
        return 0.0
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :TOP]
    return float((best == label[:, None]).any(axis=-1).mean())


def tables(counts: ClassCounts, labels: Sequence[str]) -> dict[str, list[list[Any]]]:
    """The confusion matrix and the figures of each class."""
    confusion = np.asarray(counts.confusion)
    matrix = [["truth \\ predicted", *labels]]
    matrix += [[name, *(int(v) for v in row)] for name, row in zip(labels, confusion, strict=True)]
    by_class: list[list[Any]] = [["label", "precision", "recall", "F1", "rows"]]
    for name, p, r, f, n in zip(labels, *metrics.per_class(confusion), strict=True):
        by_class.append([name, round(float(p), 4), round(float(r), 4), round(float(f), 4), int(n)])
    return {"confusion matrix": matrix, "per class": by_class}


def review(logits: Float[np.ndarray, "d c"], documents: Documents, labels: tuple[str, ...]) -> Review:
    """What was predicted for each document, how surely, and how wrong that was."""
    logs, truth, predicted = log_softmax(logits), documents["label"], logits.argmax(axis=-1)
    number = np.arange(len(logits))
    return Review(
        truth=[labels[i] for i in truth],
        predicted=[labels[i] for i in predicted],
        right=truth == predicted,
        confidence=np.exp(logs[number, predicted]),
        loss=-logs[number, truth],
    )


def decode(logits: Float[np.ndarray, " c"], labels: Sequence[str]) -> dict[str, Any]:
    """`{"label": ..., "scores": {...}}`: the most probable label and the probability of each."""
    scores = np.exp(log_softmax(logits))
    return {
        "label": labels[int(scores.argmax())],
        "scores": {name: round(float(s), 6) for name, s in zip(labels, scores, strict=True)},
    }


def log_softmax(logits: Float[np.ndarray, "... c"]) -> Float[np.ndarray, "... c"]:
    """Logarithms of the probabilities, on the host in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
