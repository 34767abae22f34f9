"""BERT. Reference: `transformers.BertFor...`; paper: arXiv 1810.04805."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from sft_jax.models.encoder import Encoder, EncoderConfig, limits
from sft_jax.models.family import Family, Head, refuse
from sft_jax.nn.heads import PooledHead, TokenHead
from sft_jax.nn.template import Normal
from sft_jax.weights.table import SAME, Row, Table, linear, norm, over_layers

# Kind of head -> ending of its class, and the name of its last layer there.
HEADS = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
OUT = {
    "sequence_classification": "classifier",
    "token_classification": "classifier",
    "question_answering": "qa_outputs",
}


def configure(config: dict[str, Any], dropout: float | None) -> EncoderConfig:
    """The encoder that a BERT `config.json` describes."""
    refuse(
        config,
        "bert",
        {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    )
    hidden = config.get("hidden_dropout_prob", 0.1)
    head = config.get("classifier_dropout")
    attention = config.get("attention_probs_dropout_prob", 0.1)
    return EncoderConfig(
        vocab_size=config["vocab_size"],
        size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_size=config["intermediate_size"],
        num_positions=config["max_position_embeddings"],
        num_types=config["type_vocab_size"],
        activation=config.get("hidden_act", "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        init_std=config.get("initializer_range", 0.02),
        dropout=hidden if dropout is None else dropout,
        attention_dropout=attention if dropout is None else dropout,
        head_dropout=(hidden if head is None else head) if dropout is None else dropout,
    )


def build(config: EncoderConfig, head: Head) -> nnx.Module:
    """The encoder with BERT's pooler and classifier on the first token of each document, or a linear layer on all."""
    return Encoder(config, token_head(config, head) or pooled_head(config, head))


def pooled_head(config: EncoderConfig, head: Head) -> nnx.Module:
    """Pooler and classifier."""
    return PooledHead(config.size, head.size, Normal(config.init_std), jnp.tanh, config.head_dropout)


def token_head(config: EncoderConfig, head: Head) -> nnx.Module | None:
    """The head on tokens, where that is what is asked for; the one for spans has no dropout."""
    rates = {"token_classification": config.head_dropout, "question_answering": 0.0}
    known = head.kind in rates
    return TokenHead(config.size, head.size, Normal(config.init_std), rates[head.kind]) if known else None


def block_rows(layer: str) -> tuple[Row, ...]:
    """The rows of one block; `layer` is its name in the checkpoint."""
    return (
        *linear("blocks/{i}/attn/q", f"{layer}.attention.self.query", "embed heads"),
        *linear("blocks/{i}/attn/k", f"{layer}.attention.self.key", "embed heads"),
        *linear("blocks/{i}/attn/v", f"{layer}.attention.self.value", "embed heads"),
        *linear("blocks/{i}/attn/o", f"{layer}.attention.output.dense", "heads embed"),
        *norm("blocks/{i}/attn_norm", f"{layer}.attention.output.LayerNorm"),
        *linear("blocks/{i}/mlp/up", f"{layer}.intermediate.dense", "embed mlp"),
        *linear("blocks/{i}/mlp/down", f"{layer}.output.dense", "mlp embed"),
        *norm("blocks/{i}/mlp_norm", f"{layer}.output.LayerNorm"),
    )


def backbone_rows(config: EncoderConfig, prefix: str) -> tuple[Row, ...]:
    """Embeddings and blocks, under a prefix such as `bert.`."""
    embeddings = f"{prefix}embeddings"
    types = Row("embed/type/embedding", f"{embeddings}.token_type_embeddings.weight", SAME, ". embed")
    return (
        Row("embed/word/embedding", f"{embeddings}.word_embeddings.weight", SAME, "vocab embed"),
        Row("embed/position/embedding", f"{embeddings}.position_embeddings.weight", SAME, ". embed"),
        *((types,) if config.num_types else ()),
        *norm("embed/norm", f"{embeddings}.LayerNorm"),
        *over_layers(block_rows(f"{prefix}encoder.layer.{{i}}"), config.num_layers),
    )


def table(config: EncoderConfig, head: Head) -> Table:
    """All of BERT; pooler and classifier belong to the head."""
    pooled = head.kind == "sequence_classification"
    pooler = linear("head/dense", "bert.pooler.dense", "embed .", head=True)
    return Table(
        family="bert",
        rows=(
            *backbone_rows(config, "bert."),
            *(pooler if pooled else ()),
            *linear("head/out", OUT[head.kind], "embed .", head=True),
        ),
        prefix="bert.",
        # Position numbers are not parameters; the rest are heads of pretraining and of other tasks.
        ignore=("*embeddings.position_ids", "cls.*", *(() if pooled else ("*pooler.dense.*",)), *other_heads(head)),
        renamed=((".gamma", ".weight"), (".beta", ".bias")),
    )


def other_heads(head: Head) -> tuple[str, ...]:
    """Patterns of the tensors of heads of other kinds."""
    return tuple(sorted({f"{name}.*" for name in OUT.values()} - {f"{OUT[head.kind]}.*"}))


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads=HEADS,
    classes={"bert": "Bert"},
    limits=limits,
    unread=("embedding_size", "is_causal", "tie_word_embeddings"),  # of the head of pretraining, and of decoders
)
