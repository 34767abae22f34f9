"""Any number of labels for each row of one or two texts: topics, emotions, kinds of abuse.

Letters: r rows of the batch, n document slots in a row, d documents, c labels.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sft_jax.config.tasks import MultiLabelClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.prepare import read_texts
from sft_jax.data.rows import Rows
from sft_jax.errors import ConfigError
from sft_jax.models.family import Head
from sft_jax.tasks import baselines, metrics
from sft_jax.tasks import label_columns as columns
from sft_jax.tasks import labels as named
from sft_jax.tasks import texts as texts_of
from sft_jax.tasks.label_columns import Target
from sft_jax.tasks.losses import Weights, binary_cross_entropy, label_divergence
from sft_jax.tasks.task import Documents, Examples, Ratio, Review, Targets, Task, Texts, written

RARE = 10  # combinations of labels that fewer rows have are not told apart where rows are divided
LOSSES = ("loss", "log_loss", "subset_accuracy", "hamming_loss")
BY_ROW = ("precision_samples", "recall_samples", "f1_samples")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LabelCounts:
    """What evaluation adds up; integers, since float32 stops counting at 2^24."""

    loss: Ratio  # what is trained on
    log_loss: Ratio  # binary cross-entropy, no more
    rows: Int[Array, ""]
    same: Int[Array, ""]  # rows with all labels right
    hits: Int[Array, " c"]  # rows with the label that were given it
    predicted: Int[Array, " c"]
    support: Int[Array, " c"]
    by_row: Float[Array, "3"]  # sums of the precision, recall and F1 of each row


def build(section: MultiLabelClassification, rows: Mapping[str, Rows]) -> Task:
    """The task on these rows; labels are those of the configuration, the columns, the source or the sorted values."""
    if not section.separator:
        raise ConfigError("task.separator: is empty; give what joins the labels of a row, such as ','")
    names = section.labels
    if isinstance(section.label, list):
        names = section.label if names is None else names
        if len(names) != len(section.label):
            raise ConfigError(f"task.labels: {names} for {len(section.label)} columns in task.label; give as many")
    elif names is None:
        names = columns.names_of_several(rows["train"], section.label, section.separator)
    labels = named.given(names, 1)
    return _task(section, labels, named.weights(section.class_weights, labels))


def restore(config: Mapping[str, Any]) -> MultiLabelClassification:
    """The section that a `config.json` was written from; of a model that others trained, its label names."""
    return MultiLabelClassification(
        kind="multi_label_classification",
        labels=named.names_in(config),
        threshold=written(config).get("threshold", 0.5),
        **texts_of.read_hf(config),
    )


def _task(section: MultiLabelClassification, labels: tuple[str, ...], weights: Weights) -> Task:
    gamma = section.focal_gamma if section.loss == "focal" else 0.0
    cut = _logit(section.threshold)

    def loss(logits: Float[Array, "r n c"], batch: Mapping[str, Array]) -> Ratio:
        settings = {"positive_weights": weights, "smoothing": section.label_smoothing, "gamma": gamma}
        return binary_cross_entropy(logits, batch["label"], batch["weight"], **settings)

    def fit(train: Encoded) -> Task:
        balanced = section.class_weights == "balanced"
        return _task(section, labels, balanced_weights(train.documents["label"])) if balanced else task

    def encode(texts: Texts, targets: Sequence[Target] | None, tokenizer: Any, max_length: int) -> Encoded:
        given = np.zeros((len(texts[0]), len(labels))) if targets is None else targets
        label = np.asarray(given, np.int32).reshape(-1, len(labels))
        return texts_of.encode(texts, label, tokenizer, max_length)

    def answers(rows: Rows) -> Targets:
        if isinstance(section.label, list):
            return columns.read_bits(rows, section.label)
        return columns.read_several(rows, section.label, section.separator, labels)

    texts = texts_of.columns(section)
    task = Task(
        kind=section.kind,
        head=Head("sequence_classification", len(labels)),
        labels=labels,
        texts=texts,
        read=lambda rows: read_texts(rows, texts),
        columns=(*texts, *([section.label] if isinstance(section.label, str) else section.label)),
        targets=answers,
        classes=combinations,
        label_counts=lambda targets: dict(zip(labels, np.sum(targets, axis=0).tolist(), strict=True)),
        doubts=named.doubts,
        encode=encode,
        fit=fit,
        loss=loss,
        divergence=lambda one, other, batch: label_divergence(one, other, batch["weight"]),
        count=lambda logits, batch: count(logits, batch, loss(logits, batch), cut),
        metrics=finish,
        row_metrics=lambda logits, examples: row_metrics(logits, examples.documents),
        metric_names=(*LOSSES, *metrics.averaged([1], [1], [1]), *BY_ROW, *metrics.RANKING),
        least_is_best=frozenset({"loss", "log_loss", "hamming_loss"}),
        headline="f1_micro",
        tables=lambda counts: tables(counts, labels),
        review=lambda logits, examples: review(logits, examples.documents, labels, cut),
        baselines=baseline_scores,
        decode=lambda logits, examples: [decode(row, labels, cut) for row in logits],
        to_hf=lambda: named.to_hf(
            labels, "multi_label_classification", {**texts_of.to_hf(section), "threshold": section.threshold}
        ),
    )
    return task


def balanced_weights(label: Int[np.ndarray, "d c"]) -> np.ndarray:
    """Negatives over positives of each label; 1 for one that no document has, or every one."""
    positives = label.sum(axis=0)
    negatives = len(label) - positives
    return np.where(positives * negatives > 0, negatives / np.maximum(positives, 1), 1).astype(np.float32)


def count(logits: Float[Array, "r n c"], batch: Mapping[str, Array], loss: Ratio, cut: float) -> LabelCounts:
    """The counts of a batch, a label being predicted from the logit `cut` on; filler is not counted (C16)."""
    real = batch["weight"] > 0
    truth, said = (chosen & real[..., None] for chosen in (batch["label"] > 0, logits >= cut))
    both = truth & said
    hits, predicted, support = (chosen.sum(axis=-1) for chosen in (both, said, truth))  # of each document
    pairs = ((hits, predicted), (hits, support), (2 * hits, predicted + support))
    return LabelCounts(
        loss=loss,
        log_loss=binary_cross_entropy(logits, batch["label"], batch["weight"]),
        rows=real.sum(),
        same=(real & (truth == said).all(axis=-1)).sum(),
        hits=both.sum(axis=(0, 1)),
        predicted=said.sum(axis=(0, 1)),
        support=truth.sum(axis=(0, 1)),
        by_row=jnp.stack([(above / jnp.maximum(below, 1)).sum() for above, below in pairs]),
    )


def finish(counts: LabelCounts) -> dict[str, float]:
    """Every metric that counts are enough for, on the host."""
    hits, predicted, support = (np.asarray(c, np.int64) for c in (counts.hits, counts.predicted, counts.support))
    rows, wrong = max(int(counts.rows), 1), predicted.sum() + support.sum() - 2 * hits.sum()
    by_row = np.asarray(counts.by_row, np.float64) / rows
    return {
        "loss": metrics.mean(counts.loss),
        "log_loss": metrics.mean(counts.log_loss),
        "subset_accuracy": int(counts.same) / rows,
        "hamming_loss": float(wrong) / (rows * len(hits)),
        **metrics.averaged(hits, predicted, support),
        **dict(zip(BY_ROW, by_row.tolist(), strict=True)),
    }


def row_metrics(logits: Float[np.ndarray, "d c"], documents: Documents) -> dict[str, float]:
    """How well the outputs of each label rank, the mean over labels."""
    return metrics.ranking(logits.astype(np.float64), documents["label"] > 0)


def tables(counts: LabelCounts, labels: Sequence[str]) -> dict[str, list[list[Any]]]:
    """The figures of each label."""
    each = metrics.precision_recall_f1(counts.hits, counts.predicted, counts.support)
    table: list[list[Any]] = [["label", "precision", "recall", "F1", "rows", "predicted"]]
    for name, p, r, f, n, m in zip(labels, *each, counts.support, counts.predicted, strict=True):
        table.append([name, round(float(p), 4), round(float(r), 4), round(float(f), 4), int(n), int(m)])
    return {"per label": table}


def review(logits: Float[np.ndarray, "d c"], documents: Documents, labels: Sequence[str], cut: float) -> Review:
    """What was predicted for each document, how surely (labels taken as independent), and how wrong that was."""
    truth, said = documents["label"] > 0, logits >= cut
    yes, no = log_sigmoid(logits), log_sigmoid(-logits)
    return Review(
        truth=[_joined(row, labels) for row in truth],
        predicted=[_joined(row, labels) for row in said],
        right=(truth == said).all(axis=-1),
        confidence=np.exp(np.where(said, yes, no).sum(axis=-1)),
        loss=-np.where(truth, yes, no).mean(axis=-1),
    )


def baseline_scores(train: Examples, test: Examples) -> dict[str, float]:
    """Micro F1 of the commonest label alone, and of a logistic regression for each label on TF-IDF."""
    label, test_label = train.documents["label"], test.documents["label"]
    return {
        "commonest label": baselines.commonest_label(label, test_label),
        "TF-IDF + logistic regression": baselines.linear_labels(train.texts, label, test.texts, test_label),
    }


def decode(logits: Float[np.ndarray, " c"], labels: Sequence[str], cut: float) -> dict[str, Any]:
    """`{"labels": [...], "scores": {...}}`: the labels from the threshold on, and the probability of each."""
    scores = np.exp(log_sigmoid(logits))
    return {
        "labels": [name for name, logit in zip(labels, logits, strict=True) if logit >= cut],
        "scores": {name: round(float(s), 6) for name, s in zip(labels, scores, strict=True)},
    }


def log_sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, on the host in float64."""
    return -np.logaddexp(0, -logits.astype(np.float64))


def combinations(targets: Sequence[Target]) -> list[int]:
    """A number for each combination of labels; rare ones are put together by how many labels they have."""
    often, numbers = Counter(targets), {}
    return [numbers.setdefault(t if often[t] >= RARE else sum(t), len(numbers)) for t in targets]


def _joined(row: Bool[np.ndarray, " c"], labels: Sequence[str]) -> str:
    return ", ".join(name for name, has in zip(labels, row, strict=True) if has) or "none"


def _logit(probability: float) -> float:
    """The logit from which on a probability is at least this."""
    if probability in (0.0, 1.0):
        return -math.inf if probability == 0 else math.inf
    return math.log(probability) - math.log1p(-probability)
