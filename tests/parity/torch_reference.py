"""What the parity tests share: random `transformers` models on disk, our model loaded from there, equal batches.

Every parameter of the reference is made random, biases and norms too: at their usual 0 and 1 a row of the weight table
that is swapped or missing would not be seen.
"""
# ruff: noqa: E402

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference that parity is measured against is not installed")
transformers = pytest.importorskip("transformers")

from sft_jax.data.batch import Batch, Encoded, Shape, collate, lay_out
from sft_jax.models.family import Head, Model, build_model, load_model
from sft_jax.weights.files import open_checkpoint

TOLERANCE = 1e-4
LABELS = 3
LONGEST = 21  # tokens in a document

# Name -> (family, what its configuration says). Sizes are odd on purpose: no two of them agree by chance.
BERT = {
    "pad_token_id": 0,
    "vocab_size": 53,
    "hidden_size": 20,
    "num_attention_heads": 5,
    "intermediate_size": 37,
    "max_position_embeddings": 29,
    "num_hidden_layers": 3,
}
DISTILBERT = {
    "pad_token_id": 0,
    "vocab_size": 47,
    "dim": 28,
    "n_heads": 7,
    "hidden_dim": 33,
    "max_position_embeddings": 23,
    "n_layers": 3,
}
CASES: dict[str, tuple[str, dict]] = {
    "bert": ("bert", BERT),
    "bert-wide-eps-relu": (
        "bert",
        {
            **BERT,
            "num_hidden_layers": 1,
            "hidden_size": 33,
            "num_attention_heads": 3,
            "intermediate_size": 19,
            "hidden_act": "relu",
            "layer_norm_eps": 1e-2,
        },
    ),
    "bert-three-types-gelu-new": ("bert", {**BERT, "type_vocab_size": 3, "hidden_act": "gelu_new"}),
    "bert-one-type-silu": (
        "bert",
        {**BERT, "type_vocab_size": 1, "hidden_act": "silu", "num_hidden_layers": 1, "num_attention_heads": 1},
    ),
    "distilbert": ("distilbert", DISTILBERT),
    "distilbert-relu": ("distilbert", {**DISTILBERT, "n_layers": 1, "activation": "relu", "dim": 15, "n_heads": 3}),
    "roberta": ("roberta", {**BERT, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta-late-pad-tanh": (
        "roberta",
        {**BERT, "pad_token_id": 5, "type_vocab_size": 1, "num_hidden_layers": 1, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "xlm-roberta": ("xlm-roberta", {**BERT, "pad_token_id": 1, "type_vocab_size": 1, "num_hidden_layers": 1}),
    "camembert": ("camembert", {**BERT, "pad_token_id": 1, "type_vocab_size": 1, "num_hidden_layers": 1}),
}
FAMILIES = ("bert", "distilbert", "roberta")  # one case of each, the deep ones


@dataclass(frozen=True)
class Pair:
    """A reference and ours, with the numbers that ours loaded from the directory that the reference was saved to."""

    reference: "torch.nn.Module"
    model: Model
    params: dict[str, np.ndarray]
    directory: Path
    forward: Callable[[Any, Batch], jax.Array]  # (parameters, batch) -> logits, compiled


def reference_model(name: str, seed: int = 0, spread: float = 0.3) -> "torch.nn.Module":
    """A reference of a case, every number drawn at random, dropout 0."""
    family, settings = CASES[name]
    nothing = (
        {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
        if family == "distilbert"
        else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    return randomised(family, {**settings, **nothing, "num_labels": LABELS}, seed, spread)


def randomised(family: str, settings: Mapping, seed: int, spread: float) -> "torch.nn.Module":
    """The sequence classifier of a family with these settings; noise of this spread on every parameter."""
    config = transformers.AutoConfig.for_model(family, **settings)
    reference = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return reference.eval()


def paired(reference: "torch.nn.Module", directory: Path) -> Pair:
    """Save the reference and load it by the path that every run takes."""
    reference.save_pretrained(directory)
    checkpoint = open_checkpoint(directory)
    labels = reference.config.num_labels
    model = build_model(checkpoint.config, Head("sequence_classification", labels), str(directory))
    matched, params = load_model(model, checkpoint)
    assert not matched.initialised
    return Pair(reference, model, params, directory, jax.jit(lambda p, b: model.template.bind(p)(b)))


def documents(reference: "torch.nn.Module", count: int, seed: int = 0, longest: int = LONGEST) -> Encoded:
    """Ragged documents of random tokens, none of them the padding id; types come in blocks, labels are random."""
    config = reference.config
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, longest + 1, size=count)
    lengths[:2] = 1, longest
    usable = np.setdiff1d(np.arange(config.vocab_size), [config.pad_token_id])
    ids = draw.choice(usable, size=lengths.sum()).astype(np.int32)
    kinds = getattr(config, "type_vocab_size", 1)
    types = np.concatenate([np.sort(draw.integers(0, kinds, size=n)) for n in lengths]).astype(np.int32)
    labels = draw.integers(0, config.num_labels, size=count).astype(np.int32)
    tokens = {"input_ids": ids, "token_type_ids": types}
    return Encoded(tokens, np.concatenate([[0], np.cumsum(lengths)]), {"label": labels})


def one_a_row(encoded: Encoded, length: int = LONGEST + 3) -> Batch:
    """Every document in a row of its own, padded, and a row of filler at the end."""
    rows = [[i] for i in range(len(encoded))]
    return collate(encoded, rows, Shape(len(encoded) + 1, length, 1))


def several_a_row(encoded: Encoded, length: int = LONGEST + 3) -> Batch:
    """The documents packed, and a row of filler at the end."""
    shape = Shape(len(encoded), length, 5)
    rows = lay_out(encoded, np.arange(len(encoded)), shape)
    assert max(map(len, rows)) > 2, "no row holds several documents: this would test nothing"
    return collate(encoded, rows, shape._replace(rows=len(rows) + 1))


def our_logits(pair: Pair, batch: Batch) -> np.ndarray:
    """Logits by document, in the order of the documents."""
    outputs = np.asarray(pair.forward(pair.params, batch))
    found = {int(i): outputs[r, n] for (r, n), i in np.ndenumerate(batch["index"]) if i >= 0}
    return np.stack([found[i] for i in sorted(found)])


def torch_batch(reference: "torch.nn.Module", encoded: Encoded, chosen: Sequence[int] | None = None) -> dict:
    """The arguments of the reference: documents padded on the right with the padding id, masked."""
    chosen = range(len(encoded)) if chosen is None else chosen
    spans = [slice(encoded.offsets[d], encoded.offsets[d + 1]) for d in chosen]
    shape = (len(spans), max(s.stop - s.start for s in spans))
    ids = np.full(shape, reference.config.pad_token_id, np.int64)
    types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, span in enumerate(spans):
        width = span.stop - span.start
        ids[row, :width] = encoded.tokens["input_ids"][span]
        types[row, :width] = encoded.tokens["token_type_ids"][span]
        mask[row, :width] = 1
    fields = {"input_ids": ids, "attention_mask": mask}
    if hasattr(reference.config, "type_vocab_size"):
        fields["token_type_ids"] = types
    return {name: torch.from_numpy(values) for name, values in fields.items()}


def torch_logits(reference: "torch.nn.Module", encoded: Encoded) -> np.ndarray:
    """Logits of the reference by document."""
    with torch.no_grad():
        return reference(**torch_batch(reference, encoded)).logits.numpy()
