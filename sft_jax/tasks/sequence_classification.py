"""One label for each row of one or two texts: sentiment, topics, spam, entailment.

Letters: r rows of the batch, n document slots in a row, c classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from datasets import ClassLabel, Dataset
from jaxtyping import Array, Float, Int

from sft_jax.config.schema import SequenceClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.sources import column
from sft_jax.data.text import tokenize
from sft_jax.errors import ConfigError, DataError, ModelError, did_you_mean, listing
from sft_jax.models.family import Head
from sft_jax.tasks import metrics
from sft_jax.tasks.task import Ratio, Rows, Task

MOST_SHOWN = 5  # bad rows named in one message


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassCounts:
    """What evaluation adds up."""

    loss: Ratio
    confusion: Int[Array, "c c"]  # truth by row, prediction by column


def build(section: SequenceClassification, rows: Rows) -> Task:
    """The task on these rows; the labels are those of the configuration, the source, or the sorted values."""
    labels = _labels(section, rows)

    def encode(split: Dataset, tokenizer: Any, max_length: int, where: str, labelled: bool) -> Encoded:
        texts = read_texts(split, section.text, where)
        pairs = read_texts(split, section.text_pair, where) if section.text_pair else None
        found = label_numbers(split, section.label, labels, where) if labelled else [0] * len(texts)
        tokens = tokenize(tokenizer, texts, pairs, max_length)
        documents = {"label": np.asarray(found, np.int32)}
        return Encoded(tokens.fields, tokens.offsets, documents, tokens.truncated)

    columns = (section.text, *([section.text_pair] if section.text_pair else []), section.label)
    return Task(
        kind=section.kind,
        head=Head(section.kind, len(labels)),
        labels=labels,
        encode=encode,
        classes=lambda split, where: label_numbers(split, section.label, labels, where),
        loss=loss,
        count=count,
        metrics=finish,
        metric_names=("loss", *metrics.classification(np.eye(2))),
        tables=lambda counts: tables(counts, labels),
        decode=lambda logits: decode(logits, labels),
        columns=columns,
        to_hf=lambda: to_hf(section, labels),
    )


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


def read_texts(split: Dataset, name: str, where: str) -> list[str]:
    """A column of texts; rows that hold none are named."""
    texts = column(split, name, where)
    bad = [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if bad:
        problems = [f"row {i + 1}: {name} is {texts[i]!r:.60}, expected a text" for i in bad[:MOST_SHOWN]]
        raise DataError(listing(where, problems, more=len(bad) - len(problems)))
    return texts


def label_numbers(split: Dataset, name: str, labels: Sequence[str], where: str) -> list[int]:
    """The labels as numbers below `len(labels)`, checked on the host before anything is compiled (C25)."""
    values = column(split, name, where)
    by_name: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    feature = split.features[name]
    # A number is the number of a label, unless the labels are themselves called by numbers.
    by_number: Sequence[int] = range(0) if any(label.lstrip("-").isdigit() for label in labels) else range(len(labels))
    if isinstance(feature, ClassLabel):  # which stores numbers of names of its own, never names
        same = set(feature.names) <= set(labels)
        by_name, by_number = {}, [by_name[n] for n in feature.names] if same else range(len(labels))
    found = [by_number[v] if _is_number(v, len(by_number)) else by_name.get(_name(v)) for v in values]
    bad = [i for i, number in enumerate(found) if number is None]
    if bad:
        known = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
        numbers = f" or a number from 0 to {len(by_number) - 1}" if by_number else ""
        problems = [
            f"row {i + 1}: {name} is {values[i]!r:.60}{did_you_mean(str(values[i]), labels)}; expected one of "
            f"the {len(labels)} labels ({known}){numbers}"
            for i in bad[:MOST_SHOWN]
        ]
        raise DataError(listing(where, problems, more=len(bad) - len(problems)))
    return [int(number) for number in found if number is not None]


def _is_number(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _name(value: Any) -> str | None:
    return None if value is None else str(value)  # a missing label is no label that is called "None"


def _labels(section: SequenceClassification, rows: Rows) -> tuple[str, ...]:
    """Names of the labels; numbers keep their order, and 0..k need no gap."""
    if section.labels is not None:
        if len(set(section.labels)) < max(2, len(section.labels)):
            raise ConfigError(f"task.labels: {section.labels}; give two labels or more, each once")
        return tuple(section.labels)
    train = rows["train"]
    values = column(train, section.label, "data.source.train")
    feature = train.features[section.label]
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
