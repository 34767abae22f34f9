"""One label for each row of one or two texts: sentiment, topics, spam, entailment."""

from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.config.tasks import SequenceClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.prepare import read_texts
from sft_jax.data.rows import Rows
from sft_jax.tasks import baselines, classes
from sft_jax.tasks import texts as texts_of
from sft_jax.tasks.task import Examples, Task, Texts


def build(section: SequenceClassification, rows: Mapping[str, Rows]) -> Task:
    """The task on these rows; the labels are those of the configuration, the source, or the sorted values."""
    texts = texts_of.columns(section)

    def encode(texts: Texts, targets: Sequence[int] | None, tokenizer: Any, max_length: int) -> Encoded:
        return texts_of.encode(texts, classes.numbers(targets, len(texts[0])), tokenizer, max_length)

    return classes.build(
        section,
        rows,
        texts_of.to_hf(section),
        texts=texts,
        read=lambda rows: read_texts(rows, texts),
        columns=(*texts, section.label),
        encode=encode,
        baselines=baseline_scores,
    )


def restore(config: Mapping[str, Any]) -> SequenceClassification:
    """The section that a `config.json` was written from; of a model that others trained, its label names."""
    names = classes.names_to_restore(config)
    return SequenceClassification(kind="sequence_classification", labels=names, **texts_of.read_hf(config))


def baseline_scores(train: Examples, test: Examples) -> dict[str, float]:
    """Accuracy of the majority class and of TF-IDF with logistic regression."""
    label, test_label = train.documents["label"], test.documents["label"]
    return {
        "majority class": baselines.commonest_class(label, test_label),
        "TF-IDF + logistic regression": baselines.linear_classes(train.texts, label, test.texts, test_label),
    }
