"""What tasks on one or two texts share: the columns that hold them, and documents of tokens with their answers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sft_jax.config.tasks import MultiLabelClassification, Regression, SequenceClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.text import tokenize
from sft_jax.tasks.task import Texts, written

Columns = SequenceClassification | MultiLabelClassification | Regression


def columns(section: Columns) -> tuple[str, ...]:
    """The columns of texts that a section names, one or two."""
    return (section.text, *([section.text_pair] if section.text_pair else []))


def encode(texts: Texts, label: np.ndarray, tokenizer: Any, max_length: int) -> Encoded:
    """Documents of one text or a pair each; `label` is what each is answered with, [documents] or [documents, k]."""
    tokens = tokenize(tokenizer, texts[0], texts[1] if len(texts) > 1 else None, max_length)
    return Encoded(tokens.fields, tokens.offsets, {"label": label}, tokens.truncated)


def to_hf(section: Columns) -> dict[str, Any]:
    """What `config.json` says of a task on texts, for our own `predict`."""
    return {"kind": section.kind, "text": section.text, "text_pair": section.text_pair}


def read_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a `config.json` names; of a model that others trained, one called text."""
    return {"text": written(config).get("text", "text"), "text_pair": written(config).get("text_pair")}
