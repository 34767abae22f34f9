"""What the parity tests share: random `transformers` models on disk, our model loaded from there, equal batches.

Every parameter of the reference is made random, biases and norms too: at their usual 0 and 1 a row of the weight table
that is swapped or missing would not be seen.
"""
# ruff: noqa: E402

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from bounds import TERMS, UNIT, roundings

torch = pytest.importorskip("torch", reason="the reference that parity is measured against is not installed")
transformers = pytest.importorskip("transformers")

from sft_jax.data.batch import Batch, Encoded, Shape, collate, lay_out
from sft_jax.models.family import Head, Model, build_model, find_family, load_model, settled
from sft_jax.nn.heads import LazyLogits
from sft_jax.weights.files import open_checkpoint

TOLERANCE = 1e-4
STEP = 2.0**-13  # far above rounding, and small enough for a network to be straight
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
GPT2 = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 53,
    "n_embd": 20,
    "n_head": 5,
    "n_layer": 3,
    "n_positions": 29,
}
LLAMA = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 53,
    "hidden_size": 36,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "max_position_embeddings": 29,
}
SHALLOW = {**LLAMA, "num_hidden_layers": 1}
GEMMA = {**LLAMA, "head_dim": 10}
CAPPED = {**GEMMA, "query_pre_attn_scalar": 7, "sliding_window": 5}  # far fewer tokens than a document has
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LONGROPE = {"rope_type": "longrope", "short_factor": [1.1, 1.7, 2.5], "long_factor": [1.5, 3.0, 9.0]}
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
    "gpt2": ("gpt2", GPT2),
    "gpt2-inner-relu": (
        "gpt2",
        {**GPT2, "n_layer": 1, "n_inner": 37, "activation_function": "relu", "layer_norm_epsilon": 1e-2},
    ),
    "llama": ("llama", LLAMA),
    "llama-tied-biases": (
        "llama",
        {
            **SHALLOW,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 10,
            "num_key_value_heads": 1,
        },
    ),
    "llama-linear": ("llama", {**SHALLOW, "rope_parameters": {"rope_type": "linear", "rope_theta": 500, "factor": 3}}),
    "llama-dynamic": (
        "llama",
        {**SHALLOW, "max_position_embeddings": 9, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama-yarn": (
        "llama",
        {
            **SHALLOW,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 90},
        },
    ),
    "llama-llama3": (
        "llama",
        {
            **SHALLOW,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 12,
            },
        },
    ),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 5}),
    "qwen2": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2-late-windows": (
        "qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 10, "attention_bias": True}),
    "qwen3-mixed": (
        "qwen3",
        {**LLAMA, "head_dim": 6, "use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
    ),
    "phi3": ("phi3", {**LLAMA, "sliding_window": 7}),
    "phi3-longrope": (
        "phi3",
        {
            **SHALLOW,
            "hidden_size": 72,
            "original_max_position_embeddings": 9,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
        },
    ),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", {**CAPPED, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma3": (
        "gemma3_text",
        {
            **CAPPED,
            "layer_types": MIXED,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}},
        },
    ),
}
# One case of each family, the deep ones; `DECODERS` one of each model type that has a head on the vocabulary.
FAMILIES = ("bert", "distilbert", "roberta", "gpt2", "llama")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3")
# Model type -> its rates of dropout; those that are not here are named as BERT's are.
RATES = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"),
    "gpt2": ("embd_pdrop", "resid_pdrop", "attn_pdrop", "classifier_dropout"),
}
# Kind of head -> what reads it, and how its classes end.
KINDS = {
    "sequence_classification": (transformers.AutoModelForSequenceClassification, "ForSequenceClassification"),
    "token_classification": (transformers.AutoModelForTokenClassification, "ForTokenClassification"),
    "question_answering": (transformers.AutoModelForQuestionAnswering, "ForQuestionAnswering"),
    "causal_lm": (transformers.AutoModelForCausalLM, ("ForCausalLM", "LMHeadModel")),
    "image_classification": (transformers.AutoModelForImageClassification, "ForImageClassification"),
}


@dataclass(frozen=True)
class Pair:
    """A reference and ours, with the numbers that ours loaded from the directory that the reference was saved to."""

    reference: "torch.nn.Module"
    model: Model
    params: dict[str, np.ndarray]
    directory: Path
    forward: Callable[[Any, Batch], jax.Array]  # (parameters, batch) -> logits, compiled


def heads_of(name: str) -> list[str]:
    """The kinds of heads that a case can have."""
    return list(find_family({"model_type": CASES[name][0]}, name).heads)


def kind_of(reference: "torch.nn.Module") -> str:
    """The kind of head that a reference has."""
    return next(kind for kind, (_, ending) in KINDS.items() if type(reference).__name__.endswith(ending))


def reference_model(
    name: str, kind: str = "sequence_classification", seed: int = 0, spread: float = 0.3
) -> "torch.nn.Module":
    """A reference of a case with a head of this kind, every number drawn at random, dropout 0."""
    family, settings = CASES[name]
    nothing = dict.fromkeys(RATES.get(family, RATES["bert"]), 0.0)
    labels = 2 if kind == "question_answering" else LABELS
    return randomised(family, {**settings, **nothing, "num_labels": labels}, seed, spread, kind)


def randomised(
    family: str, settings: Mapping, seed: int, spread: float, kind: str = "sequence_classification"
) -> "torch.nn.Module":
    """A model of a family with these settings and a head of this kind; noise of this spread on every parameter."""
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(dict(settings)))
    torch.manual_seed(seed)
    reference = KINDS[kind][0].from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return reference.eval()


def rounded(reference: "torch.nn.Module", outputs: Callable[[Any], Any], apart: Callable[[Any, Any], float]) -> float:
    """The most that float32 may put between two computations of `outputs(reference)`, as `apart` measures it.

    Each parameter is moved by STEP of itself, up or down; what that does is scaled down to a rounding (`bounds.py`).
    """
    moved, generator = copy.deepcopy(reference), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1 + STEP * (2 * torch.randint(0, 2, parameter.shape, generator=generator) - 1))
    terms = max([TERMS, *(parameter[0].numel() for parameter in moved.parameters() if parameter.ndim > 1)])
    return roundings(terms) * UNIT / STEP * apart(outputs(moved), outputs(reference))


def gap(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference."""
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


def paired(reference: "torch.nn.Module", directory: Path) -> Pair:
    """Save the reference and load it by the path that every run takes."""
    reference.save_pretrained(directory)
    kind = kind_of(reference)
    head = Head(kind, reference.config.vocab_size if kind == "causal_lm" else reference.config.num_labels)
    checkpoint = settled(open_checkpoint(directory), head)
    model = build_model(checkpoint.config, head, str(directory))
    matched, params = load_model(model, checkpoint)
    assert not matched.initialised
    return Pair(reference, model, params, directory, jax.jit(lambda p, b: dense(model.template.bind(p)(b))))


def dense(outputs: Any) -> jax.Array:
    """Logits as an array, also those of a head on the vocabulary."""
    return outputs.dense() if isinstance(outputs, LazyLogits) else outputs


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
    """Logits by document, or by token, in the order of the documents."""
    return in_order(pair.forward(pair.params, batch), batch, kind_of(pair.reference))


def in_order(outputs: jax.Array, batch: Batch, kind: str) -> jax.Array:
    """What a head of this kind makes of a batch, by document or token in the order of the documents, without filler."""
    if kind == "sequence_classification":
        rows, slots = np.nonzero(batch["index"] >= 0)
        return outputs[rows, slots][np.argsort(batch["index"][rows, slots])]
    rows, places = np.nonzero(batch["segment_ids"])
    document = batch["index"][rows, batch["segment_ids"][rows, places] - 1]
    return outputs[rows, places][np.lexsort((batch["position_ids"][rows, places], document))]


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


def torch_outputs(reference: "torch.nn.Module", encoded: Encoded) -> "torch.Tensor":
    """Logits of the reference by document, or by token, in the order of the documents.

    Each document is alone in a batch where the batch's longest one would change the rotary positions of all.
    """
    ropes = getattr(reference.config, "rope_parameters", None) or {}
    alone, kind = ropes.get("rope_type") in ("dynamic", "longrope"), kind_of(reference)
    parts = []
    for chosen in [[d] for d in range(len(encoded))] if alone else [range(len(encoded))]:
        if alone:
            reference(input_ids=torch.ones((1, 1), dtype=torch.int64))  # it would remember the longest one so far
        fields = torch_batch(reference, encoded, chosen)
        found = reference(**fields)
        outputs = (
            torch.stack([found.start_logits, found.end_logits], -1) if kind == "question_answering" else found.logits
        )
        parts.append(outputs if kind == "sequence_classification" else outputs[fields["attention_mask"] > 0])
    return torch.cat(parts)


def torch_logits(reference: "torch.nn.Module", encoded: Encoded) -> np.ndarray:
    """The same as an array."""
    with torch.no_grad():
        return torch_outputs(reference, encoded).numpy()
