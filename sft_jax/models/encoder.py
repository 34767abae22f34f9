"""The post-norm transformer encoder that BERT, DistilBERT and RoBERTa share. Source: arXiv 1810.04805.

Letters: r rows of the batch, t tokens in a row, e size of the hidden states. A row may hold several documents:
`segment_ids` tells them apart (0 is filler) and `position_ids` begin at 0 in each.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sft_jax.errors import ModelError
from sft_jax.models.family import check_activation, check_fields
from sft_jax.nn.attention import Visible, lengths_of, same_segment
from sft_jax.nn.heads import features_of
from sft_jax.nn.kernels import XLA, Needs, attend_by
from sft_jax.nn.layers import ACTIVATIONS, Embed, LayerNorm, Linear, dropout, noisy
from sft_jax.nn.random import Key, split
from sft_jax.nn.stack import Stack
from sft_jax.nn.template import Init, Normal

# The largest numbers that are taken from a `config.json`, so that none makes a million layers; others are below 2^31.
MOST = {"num_layers": 256, "dropout": 1, "attention_dropout": 1, "head_dropout": 1}


@dataclass(frozen=True)
class EncoderConfig:
    """What the arithmetic needs; sizes come from the checkpoint's `config.json`."""

    vocab_size: int
    size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    num_positions: int
    num_types: int  # 0: the family has no token types
    activation: str
    norm_eps: float
    init_std: float
    dropout: float
    attention_dropout: float
    head_dropout: float
    position_offset: int = 0  # RoBERTa's first position is number pad_token_id + 1
    dropout_after_attention: bool = True
    span_dropout: float = 0.0  # before DistilBERT's head for spans
    embedding_noise: float = 0.0  # of training alone

    def __post_init__(self):
        check_fields(self, MOST, may_be_0=("num_types", "position_offset"))
        if self.size % self.num_heads:
            raise ModelError(
                f"config.json: hidden size {self.size} is not divisible by {self.num_heads} heads; "
                f"fetch the checkpoint again"
            )
        check_activation(self.activation)


def limits(config: EncoderConfig) -> dict[str, int]:
    """The numbers that the tables of an encoder can be asked for: each below its limit."""
    types = {"token_type_ids": config.num_types} if config.num_types else {}
    return {"input_ids": config.vocab_size, "position_ids": config.num_positions - config.position_offset, **types}


class Embeddings(nnx.Module):
    """Words, positions and, where the family has them, token types; summed and normed."""

    def __init__(self, config: EncoderConfig):
        init = Normal(config.init_std)
        self.word = Embed(config.vocab_size, config.size, init)
        self.position = Embed(config.num_positions, config.size, init)
        self.type = Embed(config.num_types, config.size, init) if config.num_types else None
        self.norm = LayerNorm(config.size, config.norm_eps)
        self.offset, self.rate, self.noise = config.position_offset, config.dropout, config.embedding_noise

    def __call__(self, batch: dict[str, Int[Array, "r t"]], visible: Visible, key: Key | None) -> Float[Array, "r t e"]:
        words = noisy(self.word(batch["input_ids"]), visible.mask.sum(axis=-1), self.noise, split(key, 1)[0])
        x = words + self.position(batch["position_ids"] + self.offset)
        if self.type is not None:
            x = x + self.type(batch["token_type_ids"])
        return dropout(self.norm(x), self.rate, key)


class Attention(nnx.Module):
    """Multi-head self-attention with its output projection; `bias` is that of queries, keys and values."""

    def __init__(self, size: int, num_heads: int, init: Init, rate: float, *, bias: bool = True):
        self.q, self.k, self.v = (Linear(size, size, init, bias=bias) for _ in range(3))
        self.o = Linear(size, size, init)
        self.num_heads, self.rate = num_heads, rate
        self.backend, self.needs = XLA, Needs(size // num_heads, rate)

    def __call__(self, x: Float[Array, "r t e"], visible: Visible, key: Key | None) -> Float[Array, "r t e"]:
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (layer(x).reshape(heads) for layer in (self.q, self.k, self.v))
        mixed = attend_by(self.backend, q, k, v, visible, causal=False, rate=self.rate, key=key)
        return self.o(mixed.reshape(x.shape))


class Mlp(nnx.Module):
    """Two linear layers with an activation between."""

    def __init__(self, size: int, inner: int, init: Init, activation: str):
        self.up, self.down = Linear(size, inner, init), Linear(inner, size, init)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Float[Array, "r t e"]) -> Float[Array, "r t e"]:
        return self.down(self.activation(self.up(x)))


class Block(nnx.Module):
    """Attention and MLP, each added to its input and normed after."""

    def __init__(self, config: EncoderConfig):
        init = Normal(config.init_std)
        self.attn = Attention(config.size, config.num_heads, init, config.attention_dropout)
        self.mlp = Mlp(config.size, config.mlp_size, init, config.activation)
        self.attn_norm, self.mlp_norm = (LayerNorm(config.size, config.norm_eps) for _ in range(2))
        self.attn_rate = config.dropout if config.dropout_after_attention else 0.0
        self.mlp_rate = config.dropout

    def __call__(self, x: Float[Array, "r t e"], visible: Visible, *, key: Key | None) -> Float[Array, "r t e"]:
        inside, after_attn, after_mlp = split(key, 3)
        x = self.attn_norm(x + dropout(self.attn(x, visible, inside), self.attn_rate, after_attn))
        return self.mlp_norm(x + dropout(self.mlp(x), self.mlp_rate, after_mlp))


class Encoder(nnx.Module):
    """Embeddings, blocks and a head."""

    def __init__(self, config: EncoderConfig, head: Any):
        self.embed = Embeddings(config)
        self.blocks = Stack(config.num_layers, lambda number: Block(config))
        self.head = head

    def __call__(self, batch: dict[str, Array], *, key: Key | None = None) -> Float[Array, "r n_or_t c"]:
        """Logits for each document slot of each row, or for each token; where there is none they hold no meaning."""
        return self.head(features_of(self, batch, key), batch, split(key, 3)[2]).astype(jnp.float32)

    def features(self, batch: dict[str, Array], key: Key | None) -> Float[Array, "r n_or_t e"]:
        """What the head reads."""
        embed_key, blocks_key, _ = split(key, 3)
        visible = Visible(same_segment(batch["segment_ids"]), lengths_of(batch))
        return self.head.pool(self.blocks(self.embed(batch, visible, embed_key), visible, key=blocks_key), batch)
