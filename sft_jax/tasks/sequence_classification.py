"""One label for each row of one or two texts: sentiment, topics, spam, entailment.

Letters: r rows of the batch, n document slots in a row, d documents, c classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sft_jax.config.tasks import SequenceClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.prepare import read_texts
from sft_jax.data.rows import Rows
from sft_jax.errors import ModelError
from sft_jax.models.family import Head
from sft_jax.tasks import baselines, metrics
from sft_jax.tasks import label_columns as columns
from sft_jax.tasks import labels as named
from sft_jax.tasks import texts as texts_of
from sft_jax.tasks.losses import Weights, class_divergence, cross_entropy
from sft_jax.tasks.metrics import Calibration
from sft_jax.tasks.task import Documents, Examples, Ratio, Review, Task, Texts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassCounts:
    """What evaluation adds up."""

    loss: Ratio  # what is trained on
    log_loss: Ratio  # cross-entropy, no more
    confusion: Int[Array, "c c"]  # truth by row, prediction by column
    calibration: Calibration


def build(section: SequenceClassification, rows: Mapping[str, Rows]) -> Task:
    """The task on these rows; the labels are those of the configuration, the source, or the sorted values."""
    labels = (
        named.given(section.labels, 2)
        if section.labels is not None
        else columns.names_of_one(rows["train"], section.label)
    )
    return _task(section, labels, named.weights(section.class_weights, labels))


def restore(config: Mapping[str, Any]) -> SequenceClassification:
    """The section that a `config.json` was written from; of a model that others trained, its label names."""
    names = named.names_in(config)
    if len(names) < 2:
        raise ModelError(f"config.json: names {len(names)} label, expected two or more, of which one is to be told")
    return SequenceClassification(kind="sequence_classification", labels=names, **texts_of.read_hf(config))


def _task(section: SequenceClassification, labels: tuple[str, ...], weights: Weights) -> Task:
    gamma = section.focal_gamma if section.loss == "focal" else 0.0

    def loss(logits: Float[Array, "r n c"], batch: Mapping[str, Array]) -> Ratio:
        settings = {"class_weights": weights, "smoothing": section.label_smoothing, "gamma": gamma}
        return cross_entropy(logits, batch["label"], batch["weight"], **settings)

    def fit(train: Encoded) -> Task:
        balanced = section.class_weights == "balanced"
        return _task(section, labels, balanced_weights(train.documents["label"], len(labels))) if balanced else task

    def encode(texts: Texts, targets: Sequence[int] | None, tokenizer: Any, max_length: int) -> Encoded:
        numbers = np.asarray([0] * len(texts[0]) if targets is None else targets, np.int32)
        return texts_of.encode(texts, numbers, tokenizer, max_length)

    texts = texts_of.columns(section)
    task = Task(
        kind=section.kind,
        head=Head("sequence_classification", len(labels)),
        labels=labels,
        texts=texts,
        read=lambda rows: read_texts(rows, texts),
        columns=(*texts, section.label),
        targets=lambda rows: columns.read_one(rows, section.label, labels),
        classes=lambda targets: targets,
        label_counts=lambda targets: dict(zip(labels, often(targets, len(labels)).tolist(), strict=True)),
        encode=encode,
        fit=fit,
        loss=loss,
        divergence=lambda one, other, batch: class_divergence(one, other, batch["weight"]),
        count=lambda logits, batch: count(logits, batch, loss(logits, batch)),
        metrics=finish,
        row_metrics=lambda logits, examples: row_metrics(logits, examples.documents),
        metric_names=("loss", "log_loss", *metrics.classification(np.eye(2)), "ece", *metrics.RANKING),
        least_is_best=frozenset({"loss", "log_loss", "ece"}),
        headline="accuracy",
        tables=lambda counts: tables(counts, labels),
        review=lambda logits, examples: review(logits, examples.documents, labels),
        baselines=baseline_scores,
        decode=lambda logits, examples: [decode(row, labels) for row in logits],
        to_hf=lambda: named.to_hf(labels, "single_label_classification", texts_of.to_hf(section)),
    )
    return task


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
    label, logs = documents["label"], log_softmax(logits)
    if logits.shape[-1] == 2:
        return metrics.ranking(logs[:, 1:] - logs[:, :1], (label == 1)[:, None])
    return metrics.ranking(logs, label[:, None] == np.arange(logits.shape[-1]))


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


def baseline_scores(train: Examples, test: Examples) -> dict[str, float]:
    """Accuracy of the majority class and of TF-IDF with logistic regression."""
    label, test_label = train.documents["label"], test.documents["label"]
    return {
        "majority class": baselines.commonest_class(label, test_label),
        "TF-IDF + logistic regression": baselines.linear_classes(train.texts, label, test.texts, test_label),
    }


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
