"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's encoder with other position numbers and another head.

Reference: `transformers.RobertaFor...`; paper: arXiv 1907.11692.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sft_jax.errors import ModelError
from sft_jax.models import bert
from sft_jax.models.encoder import Encoder, EncoderConfig, limits
from sft_jax.models.family import Family, Head
from sft_jax.nn.heads import PooledHead
from sft_jax.nn.template import Normal
from sft_jax.weights.table import Table, linear


def configure(config: dict[str, Any], dropout: float | None) -> EncoderConfig:
    """The encoder that a RoBERTa `config.json` describes; the numbers of positions follow the padding id."""
    pad = config.get("pad_token_id", 1)
    if type(pad) is not int:
        raise ModelError(f"config.json: pad_token_id is {pad!r:.60}, expected a whole number; positions begin after it")
    return dataclasses.replace(bert.configure(config, dropout), position_offset=pad + 1)


def build(config: EncoderConfig, head: Head) -> nnx.Module:
    """The encoder with a dense layer and a classifier on the first token, dropout before each; or BERT's on tokens."""
    init, rate = Normal(config.init_std), config.head_dropout
    pooled = PooledHead(config.size, head.size, init, jnp.tanh, rate, rate_before=rate)
    return Encoder(config, bert.token_head(config, head) or pooled)


def table(config: EncoderConfig, head: Head) -> Table:
    """All of RoBERTa; the pooler of a bare encoder is not part of this head."""
    dense = linear("head/dense", "classifier.dense", "embed .", head=True)
    pooled = head.kind == "sequence_classification"
    out = "classifier.out_proj" if pooled else bert.OUT[head.kind]
    return Table(
        family="roberta",
        rows=(
            *bert.backbone_rows(config, "roberta."),
            *(dense if pooled else ()),
            *linear("head/out", out, "embed .", head=True),
        ),
        prefix="roberta.",
        ignore=("*embeddings.position_ids", "*pooler.dense.*", "lm_head.*", *bert.other_heads(head)),
    )


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads=bert.HEADS,
    classes={"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"},
    limits=limits,
    unread=bert.FAMILY.unread,
)
