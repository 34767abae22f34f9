"""DistilBERT: BERT's encoder without token types, with names of its own.

Reference: `transformers.DistilBertFor...`; paper: arXiv 1910.01108.
"""

from typing import Any

import jax
from flax import nnx

from sft_jax.models import bert
from sft_jax.models.encoder import Encoder, EncoderConfig, limits
from sft_jax.models.family import Family, Head, refuse
from sft_jax.nn.heads import PooledHead, TokenHead
from sft_jax.nn.template import Normal
from sft_jax.weights.table import SAME, Row, Table, linear, norm, over_layers


def configure(config: dict[str, Any], dropout: float | None) -> EncoderConfig:
    """The encoder that a DistilBERT `config.json` describes."""
    refuse(config, "distilbert", {"sinusoidal_pos_embds": False})
    hidden = config.get("dropout", 0.1)
    attention = config.get("attention_dropout", 0.1)
    head = config.get("seq_classif_dropout", 0.2)
    return EncoderConfig(
        vocab_size=config["vocab_size"],
        size=config["dim"],
        num_layers=config["n_layers"],
        num_heads=config["n_heads"],
        mlp_size=config["hidden_dim"],
        num_positions=config["max_position_embeddings"],
        num_types=0,
        activation=config.get("activation", "gelu"),
        norm_eps=1e-12,
        init_std=config.get("initializer_range", 0.02),
        dropout=hidden if dropout is None else dropout,
        attention_dropout=attention if dropout is None else dropout,
        head_dropout=head if dropout is None else dropout,
        span_dropout=config.get("qa_dropout", 0.1) if dropout is None else dropout,
        dropout_after_attention=False,
    )


def build(config: EncoderConfig, head: Head) -> nnx.Module:
    """The encoder with a dense layer and a classifier on the first token of each document, or a linear layer on all."""
    init = Normal(config.init_std)
    if head.kind != "sequence_classification":
        rate = config.dropout if head.kind == "token_classification" else config.span_dropout
        return Encoder(config, TokenHead(config.size, head.size, init, rate))
    return Encoder(config, PooledHead(config.size, head.size, init, jax.nn.relu, config.head_dropout))


def table(config: EncoderConfig, head: Head) -> Table:
    """All of DistilBERT."""
    dense = linear("head/dense", "pre_classifier", "embed .", head=True)
    pooled = head.kind == "sequence_classification"
    layer, embeddings = "distilbert.transformer.layer.{i}", "distilbert.embeddings"
    block = (
        *linear("blocks/{i}/attn/q", f"{layer}.attention.q_lin", "embed heads"),
        *linear("blocks/{i}/attn/k", f"{layer}.attention.k_lin", "embed heads"),
        *linear("blocks/{i}/attn/v", f"{layer}.attention.v_lin", "embed heads"),
        *linear("blocks/{i}/attn/o", f"{layer}.attention.out_lin", "heads embed"),
        *norm("blocks/{i}/attn_norm", f"{layer}.sa_layer_norm"),
        *linear("blocks/{i}/mlp/up", f"{layer}.ffn.lin1", "embed mlp"),
        *linear("blocks/{i}/mlp/down", f"{layer}.ffn.lin2", "mlp embed"),
        *norm("blocks/{i}/mlp_norm", f"{layer}.output_layer_norm"),
    )
    return Table(
        family="distilbert",
        rows=(
            Row("embed/word/embedding", f"{embeddings}.word_embeddings.weight", SAME, "vocab embed"),
            Row(
                "embed/position/embedding",
                f"{embeddings}.position_embeddings.weight",
                SAME,
                ". embed",
            ),
            *norm("embed/norm", f"{embeddings}.LayerNorm"),
            *over_layers(block, config.num_layers),
            *(dense if pooled else ()),
            *linear("head/out", bert.OUT[head.kind], "embed .", head=True),
        ),
        prefix="distilbert.",
        ignore=(
            "*embeddings.position_ids",
            "vocab_*",
            *(() if pooled else ("pre_classifier.*",)),
            *bert.other_heads(head),
        ),
    )


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads=bert.HEADS,
    classes={"distilbert": "DistilBert"},
    limits=limits,
    names={
        "distilbert": {
            "hidden_size": "dim",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
        }
    },
    unread=("tie_word_embeddings",),  # of the head of pretraining
)
