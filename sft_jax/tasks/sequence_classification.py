"""One label for each row of one or two texts: sentiment, topics, spam, entailment.

Letters: r rows of the batch, n document slots in a row, c classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from datasets import ClassLabel
from jaxtyping import Array, Float, Int

from sft_jax.config.schema import SequenceClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.rows import Bad, Rows
from sft_jax.data.text import tokenize
from sft_jax.errors import ConfigError, DataError, ModelError, did_you_mean
from sft_jax.models.family import Head
from sft_jax.tasks import baselines, metrics
from sft_jax.tasks.task import Documents, Ratio, Review, Targets, Task, Texts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassCounts:
    """What evaluation adds up."""

    loss: Ratio
    confusion: Int[Array, "c c"]  # truth by row, prediction by column


def build(section: SequenceClassification, rows: Mapping[str, Rows]) -> Task:
    """The task on these rows; the labels are those of the configuration, the source, or the sorted values."""
    labels = _labels(section, rows)

    def encode(texts: Texts, targets: Sequence[Any] | None, tokenizer: Any, max_length: int) -> Encoded:
        tokens = tokenize(tokenizer, texts[0], texts[1] if len(texts) > 1 else None, max_length)
        found = [0] * len(texts[0]) if targets is None else targets
        documents = {"label": np.asarray(found, np.int32)}
        return Encoded(tokens.fields, tokens.offsets, documents, tokens.truncated)

    texts = (section.text, *([section.text_pair] if section.text_pair else []))
    task = Task(
        kind=section.kind,
        head=Head(section.kind, len(labels)),
        labels=labels,
        texts=texts,
        columns=(*texts, section.label),
        targets=lambda split: label_numbers(split, section.label, labels),
        classes=lambda targets: targets,
        label_counts=lambda targets: {name: targets.count(i) for i, name in enumerate(labels)},
        encode=encode,
        fit=lambda documents: task,
        loss=loss,
        divergence=divergence,
        count=count,
        metrics=finish,
        row_metrics=lambda outputs, documents: {},
        metric_names=("loss", *metrics.classification(np.eye(2))),
        least_is_best=frozenset({"loss"}),
        headline="accuracy",
        tables=lambda counts: tables(counts, labels),
        review=lambda outputs, documents: review(outputs, documents, labels),
        baselines=baseline_scores,
        decode=lambda logits: decode(logits, labels),
        to_hf=lambda: to_hf(section, labels),
    )
    return task


def restore(config: Mapping[str, Any]) -> SequenceClassification:
    """The section that a `config.json` was written from; of a model that others trained, its label names."""
    names = {int(i): str(name) for i, name in config.get("id2label", {"0": "0", "1": "1"}).items()}
    kind = config.get("problem_type") or "single_label_classification"
    if kind != "single_label_classification" or len(names) < 2:
        raise ModelError(
            f"config.json: problem_type={kind!r} with {len(names)} outputs is not supported; "
            f"only one label out of two or more is"
        )
    written = config.get("sft_jax_task", {})
    return SequenceClassification(
        kind="sequence_classification",
        text=written.get("text", "text"),
        text_pair=written.get("text_pair"),
        labels=[names[i] for i in sorted(names)],
    )


def loss(logits: Float[Array, "r n c"], batch: Mapping[str, Array]) -> Ratio:
    """Cross-entropy of the labels, weighted; in float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probabilities, batch["label"][..., None], axis=-1)[..., 0]
    weight = batch["weight"]
    return Ratio(-(picked * weight).sum(), weight.sum())


def count(logits: Float[Array, "r n c"], batch: Mapping[str, Array]) -> ClassCounts:
    """Loss and confusion matrix of a batch; filler has weight 0 and is not counted (C16)."""
    classes = logits.shape[-1]
    truth = jax.nn.one_hot(batch["label"], classes) * batch["weight"][..., None]
    predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
    confusion = jnp.einsum("rni,rnj->ij", truth, predicted)
    return ClassCounts(loss(logits, batch), confusion.astype(jnp.int32))  # float32 stops counting at 2^24


def divergence(one: Float[Array, "r n c"], other: Float[Array, "r n c"], batch: Mapping[str, Array]) -> Ratio:
    """Kullback-Leibler divergence of two passes, the mean of both directions, weighted. Source: arXiv 2106.14448."""
    p, q = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (one, other))
    each = 0.5 * ((jnp.exp(p) - jnp.exp(q)) * (p - q)).sum(axis=-1)
    return Ratio((each * batch["weight"]).sum(), batch["weight"].sum())


def finish(counts: ClassCounts) -> dict[str, float]:
    """Every metric, on the host."""
    mean = float(np.asarray(counts.loss.total) / max(float(counts.loss.weight), 1.0))
    return {"loss": mean, **metrics.classification(np.asarray(counts.confusion))}


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
    logs = logits - logits.max(axis=-1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(axis=-1, keepdims=True))
    truth, predicted = documents["label"], logits.argmax(axis=-1)
    number = np.arange(len(logits))
    return Review(
        truth=[labels[i] for i in truth],
        predicted=[labels[i] for i in predicted],
        right=truth == predicted,
        confidence=np.exp(logs[number, predicted]),
        loss=-logs[number, truth],
    )


def baseline_scores(texts: Texts, train: Documents, test_texts: Texts, test: Documents) -> dict[str, float]:
    """Accuracy of the majority class and of TF-IDF with logistic regression."""
    labels, test_labels = train["label"], test["label"]
    return {
        "majority class": baselines.majority(labels, test_labels),
        "TF-IDF + logistic regression": baselines.tfidf(texts[0], labels, test_texts[0], test_labels),
    }


def decode(logits: Float[np.ndarray, " c"], labels: Sequence[str]) -> dict[str, Any]:
    """`{"label": ..., "scores": {...}}`: the most probable label and the probability of each."""
    odds = np.exp(logits.astype(np.float64) - logits.max())
    scores = odds / odds.sum()
    return {
        "label": labels[int(scores.argmax())],
        "scores": {name: round(float(s), 6) for name, s in zip(labels, scores, strict=True)},
    }


def to_hf(section: SequenceClassification, labels: Sequence[str]) -> dict[str, Any]:
    """The label names where `transformers` looks for them, and the columns for our own `predict`."""
    return {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": "single_label_classification",
        "sft_jax_task": {
            "kind": section.kind,
            "text": section.text,
            "text_pair": section.text_pair,
        },
    }


def label_numbers(rows: Rows, name: str, labels: Sequence[str]) -> Targets:
    """The labels as numbers below `len(labels)`, checked on the host before anything is compiled (C25)."""
    values = rows.column(name)
    by_name: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    feature = rows.table.features[name]
    # A number is the number of a label, unless the labels are themselves called by numbers.
    by_number: Sequence[int] = range(0) if any(label.lstrip("-").isdigit() for label in labels) else range(len(labels))
    if isinstance(feature, ClassLabel):  # which stores numbers of names of its own, never names
        same = set(feature.names) <= set(labels)
        by_name, by_number = {}, [by_name[n] for n in feature.names] if same else range(len(labels))
    found = [by_number[v] if _is_number(v, len(by_number)) else by_name.get(_name(v)) for v in values]
    known = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
    numbers = f" or a number from 0 to {len(by_number) - 1}" if by_number else ""

    def bad(row: int) -> Bad:
        hint = did_you_mean(str(values[row]), labels)
        expected = f"expected one of the {len(labels)} labels ({known}){numbers}"
        return Bad(rows.place(row), "unknown label", f"{name} is {values[row]!r:.60}{hint}; {expected}")

    return Targets(found, {row: bad(row) for row, number in enumerate(found) if number is None})


def _is_number(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _name(value: Any) -> str | None:
    return None if value is None else str(value)  # a missing label is no label that is called "None"


def _labels(section: SequenceClassification, rows: Mapping[str, Rows]) -> tuple[str, ...]:
    """Names of the labels; numbers keep their order, and 0..k need no gap."""
    if section.labels is not None:
        if len(set(section.labels)) < max(2, len(section.labels)):
            raise ConfigError(f"task.labels: {section.labels}; give two labels or more, each once")
        return tuple(section.labels)
    train = rows["train"]
    values = train.column(section.label)
    feature = train.table.features[section.label]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    odd = [v for v in values if isinstance(v, float | list | dict) and v == v]  # NaN, a gap, is not itself
    if odd:
        raise DataError(
            f"data.source.train: column '{section.label}' holds values such as {odd[0]!r:.60}, "
            f"not labels; name another column in task.label"
        )
    kinds = {v for v in values if v is not None and v == v}
    ordered = sorted(kinds) if all(isinstance(v, int) for v in kinds) else sorted(map(str, kinds))
    if len(ordered) < 2:
        raise DataError(
            f"data.source.train: column '{section.label}' holds {len(ordered)} label; classification needs two or more"
        )
    return tuple(str(v) for v in ordered)
