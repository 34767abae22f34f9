"""The transformer encoder and decoder that Marian and T5 share, and their cache. Source: arXiv 1706.03762.

Letters: r rows of the batch, s tokens of the source in a row, t of the target, q and k tokens that look and are looked
at, e size of the hidden states; b sequences that are generated together, l tokens that a cache holds, h heads, d size
of a head. A row may hold several documents, each a source with its target: `segment_ids` and `decoder_segment_ids` tell
them apart by the same numbers (0 is filler), so a target sees the source of its own number. `position_ids` and
`decoder_position_ids` begin at 0 in each.

Generation, on `module = template.bind(params)`: `begin(ids, lengths, room)` reads sources and gives the logits of the
first token of each answer, `next(token, position, count, cache)` those of the one after. The keys and values of a
source are computed once; those of the answer stand in slots of their own, in which every sequence is as far as any
other. A cache is a pytree whose every leaf begins with the axis b.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sft_jax.errors import ModelError
from sft_jax.models.family import check_activation, check_fields
from sft_jax.nn.attention import attend, earlier, same_segment
from sft_jax.nn.heads import LazyLogits
from sft_jax.nn.layers import ACTIVATIONS, Embed, LayerNorm, Linear, RMSNorm, dropout, gated
from sft_jax.nn.random import Key, split
from sft_jax.nn.stack import Stack
from sft_jax.nn.template import Moving, Normal, param, stat, zeros

# The largest numbers that are taken from a `config.json`, so that none makes a million layers; others are below 2^31.
MOST = {
    "encoder_layers": 256,
    "decoder_layers": 256,
    "num_positions": 1 << 20,
    "buckets": 1 << 12,
    "max_distance": 1 << 20,
    "dropout": 1,
    "attention_dropout": 1,
    "activation_dropout": 1,
}
MAY_BE_0 = ("start", "buckets", "num_positions")
KeysValues = tuple[Float[Array, "r k h d"], Float[Array, "r k h d"]]


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """What the arithmetic needs; sizes come from the checkpoint's `config.json`."""

    vocab_size: int
    size: int
    head_dim: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    encoder_mlp_size: int
    decoder_mlp_size: int
    start: int  # the token that every target is begun with
    fixed: int | None  # a token whose vector is not trained where it is read: the padding of Marian, and its `start`
    num_positions: int  # of sinusoids; 0: none are added
    buckets: int  # of distances between tokens, each with a bias for each head; 0: none are told apart
    max_distance: int  # from which on all are alike
    activation: str
    gated: bool  # activation(gate(x)) * up(x), else activation(up(x))
    norm: str  # "layer", after what is added, or "rms", before it and at the end
    norm_eps: float
    bias: bool  # whether linear layers have one
    attention_scale: float
    embed_scale: float
    logit_scale: float
    tied: bool  # the head on the vocabulary is the embeddings
    logit_bias: bool
    init_std: float
    init_by_inputs: bool  # of linear layers: divided by the root of their inputs
    dropout: float
    attention_dropout: float
    activation_dropout: float

    def __post_init__(self):
        check_fields(self, MOST, MAY_BE_0)
        check_activation(self.activation)
        if self.start >= self.vocab_size:
            raise ModelError(f"config.json: decoder_start_token_id is {self.start}, of {self.vocab_size} tokens")
        if self.buckets and not 4 <= self.buckets < 2 * self.max_distance:
            raise ModelError(
                f"config.json: relative_attention_num_buckets is {self.buckets}, expected at least 4 and less than "
                f"twice relative_attention_max_distance ({self.max_distance})"
            )


def limits(config: EncoderDecoderConfig) -> dict[str, int]:
    """The numbers that the tables of a model can be asked for: each below its limit; distances have none."""
    positions = {"position_ids": config.num_positions} if config.num_positions else {}
    sides = {"input_ids": config.vocab_size, **positions}
    return {**sides, **{f"decoder_{name}": limit for name, limit in sides.items()}}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """What queries see, and what is added to their scores: made once for all layers."""

    visible: Bool[Array, "r q k"]
    bias: Float[Array, "r h q k"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the answers so far and of their sources, layer by layer; see the top of this file."""

    source: Bool[Array, "b s"]  # which tokens of the source are no filler
    layers: tuple[tuple[KeysValues, KeysValues], ...]  # (of the answer [b, l], of the source [b, s])


def linear(config: EncoderDecoderConfig, inputs: int, outputs: int, scale: float = 1.0) -> Linear:
    """A linear layer of the family; `scale` is of the spread that it begins with."""
    std = config.init_std * scale * (inputs**-0.5 if config.init_by_inputs else 1.0)
    return Linear(inputs, outputs, Normal(std), bias=config.bias)


def make_norm(config: EncoderDecoderConfig) -> nnx.Module:
    """The norm of the family."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(config.size, config.norm_eps)


@lru_cache(maxsize=4)
def sinusoids(count: int, size: int) -> Float[np.ndarray, "count size"]:
    """Sines of each position in the first half of the vector, cosines in the second."""
    turned = np.arange(count)[:, None] / np.power(10000, 2 * (np.arange(size) // 2) / size)
    return np.concatenate([np.sin(turned[:, 0::2]), np.cos(turned[:, 1::2])], axis=1).astype(np.float32)


@lru_cache(maxsize=4)
def distance_buckets(buckets: int, most: int) -> Int[np.ndarray, " most_and_1"]:
    """The bucket of each distance up to `most`: near ones have their own, the others share by their logarithm.

    In the reference's order of float32 operations, which decides where a bucket begins. Source: arXiv 1910.10683.
    """
    distance, exact = np.arange(most + 1), buckets // 2
    with np.errstate(divide="ignore"):
        grown = np.log(distance.astype(np.float32) / np.float32(exact)) / np.float32(np.log(most / exact))
    far = exact + np.minimum(np.maximum(grown * np.float32(buckets - exact), 0), buckets).astype(np.int64)
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(np.int32)


class Embeddings(nnx.Module):
    """Words of both sides, scaled, and the sinusoids of their positions where the family has them."""

    def __init__(self, config: EncoderDecoderConfig):
        self.word = Embed(config.vocab_size, config.size, Normal(config.init_std))
        self.scale, self.rate, self.fixed = config.embed_scale, config.dropout, config.fixed
        self.positions = (config.num_positions, config.size)

    def __call__(self, ids: Int[Array, "r t"], positions: Int[Array, "r t"], key: Key | None) -> Float[Array, "r t e"]:
        words = self.word(ids)
        if self.fixed is not None:
            words = jnp.where((ids == self.fixed)[..., None], jax.lax.stop_gradient(words), words)
        x = words * jnp.asarray(self.scale, words.dtype)
        if self.positions[0]:
            x = x + jnp.take(jnp.asarray(sinusoids(*self.positions), x.dtype), positions, axis=0)
        return dropout(x, self.rate, key)


class Distances(nnx.Module):
    """A bias for each head and each bucket of distances between two tokens of a document."""

    def __init__(self, config: EncoderDecoderConfig, heads: int, *, both_ways: bool):
        self.embedding = param((config.buckets, heads), Normal(config.init_std * config.size**-0.5))
        self.buckets = config.buckets // 2 if both_ways else config.buckets
        self.most, self.both_ways = config.max_distance, both_ways

    def __call__(self, queries: Int[Array, "r q"], keys: Int[Array, "r k"]) -> Float[Array, "r h q k"]:
        ahead = keys[:, None, :] - queries[:, :, None]
        distance = jnp.abs(ahead) if self.both_ways else jnp.maximum(-ahead, 0)
        bucket = jnp.take(distance_buckets(self.buckets, self.most), jnp.minimum(distance, self.most))
        if self.both_ways:
            bucket = bucket + jnp.where(ahead > 0, self.buckets, 0)
        return jnp.moveaxis(jnp.take(self.embedding[...], bucket, axis=0), -1, 1)


class Attention(nnx.Module):
    """Attention with its output projection, to the tokens themselves or to those of the other side."""

    def __init__(self, config: EncoderDecoderConfig, heads: int):
        inside = heads * config.head_dim
        self.q = linear(config, config.size, inside, config.head_dim**-0.5 if config.init_by_inputs else 1.0)
        self.k, self.v = (linear(config, config.size, inside) for _ in range(2))
        self.o = linear(config, inside, config.size)
        self.heads, self.scale, self.rate = heads, config.attention_scale, config.attention_dropout

    def keys_values(self, x: Float[Array, "r k e"]) -> KeysValues:
        """What is looked at."""
        return self._by_head(self.k(x)), self._by_head(self.v(x))

    def __call__(
        self, x: Float[Array, "r q e"], seen: KeysValues, view: View, key: Key | None
    ) -> Float[Array, "r q e"]:
        queries = self._by_head(self.q(x))
        mixed = attend(queries, *seen, view.visible, scale=self.scale, bias=view.bias, rate=self.rate, key=key)
        return self.o(mixed.reshape(*x.shape[:2], -1))

    def _by_head(self, x: Float[Array, "r t hd"]) -> Float[Array, "r t h d"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class Mlp(nnx.Module):
    """Two linear layers with an activation and dropout between, or with a gate."""

    def __init__(self, config: EncoderDecoderConfig, inside: int):
        self.gate = linear(config, config.size, inside) if config.gated else None
        self.up, self.down = linear(config, config.size, inside), linear(config, inside, config.size)
        self.activation, self.rate = ACTIVATIONS[config.activation], config.activation_dropout

    def __call__(self, x: Float[Array, "r t e"], key: Key | None) -> Float[Array, "r t e"]:
        up = self.up(x)
        inside = self.activation(up) if self.gate is None else gated(self.activation, self.gate(x), up)
        return self.down(dropout(inside, self.rate, key))


@dataclass(frozen=True)
class Added:
    """How what a layer gives is added to what it took: normed before the layer, or after the sum."""

    first: bool
    rate: float

    def before(self, norm: Any, x: Float[Array, "r t e"]) -> Float[Array, "r t e"]:
        """What the layer takes."""
        return norm(x) if self.first else x

    def after(
        self, norm: Any, x: Float[Array, "r t e"], out: Float[Array, "r t e"], key: Key | None
    ) -> Float[Array, "r t e"]:
        """The sum."""
        total = x + dropout(out, self.rate, key)
        return total if self.first else norm(total)


class EncoderBlock(nnx.Module):
    """Self-attention and MLP."""

    def __init__(self, config: EncoderDecoderConfig):
        self.attn, self.attn_norm = Attention(config, config.encoder_heads), make_norm(config)
        self.mlp, self.mlp_norm = Mlp(config, config.encoder_mlp_size), make_norm(config)
        self.added = Added(config.norm == "rms", config.dropout)

    def __call__(self, x: Float[Array, "r s e"], view: View, *, key: Key | None) -> Float[Array, "r s e"]:
        inside, after_attn, in_mlp, after_mlp = split(key, 4)
        given = self.added.before(self.attn_norm, x)
        mixed = self.attn(given, self.attn.keys_values(given), view, inside)
        x = self.added.after(self.attn_norm, x, mixed, after_attn)
        return self.added.after(self.mlp_norm, x, self.mlp(self.added.before(self.mlp_norm, x), in_mlp), after_mlp)


class DecoderBlock(nnx.Module):
    """Self-attention, attention to the source, and MLP."""

    def __init__(self, config: EncoderDecoderConfig):
        heads = config.decoder_heads
        self.attn, self.attn_norm = Attention(config, heads), make_norm(config)
        self.cross, self.cross_norm = Attention(config, heads), make_norm(config)
        self.mlp, self.mlp_norm = Mlp(config, config.decoder_mlp_size), make_norm(config)
        self.added = Added(config.norm == "rms", config.dropout)

    def __call__(
        self, x: Float[Array, "r t e"], source: Float[Array, "r s e"], own: View, cross: View, *, key: Key | None
    ) -> Float[Array, "r t e"]:
        given = self.added.before(self.attn_norm, x)
        seen = self.attn.keys_values(given), self.cross.keys_values(source)
        return self._finish(x, given, seen, own, cross, key)

    def cached(
        self,
        x: Float[Array, "b 1 e"],
        state: tuple[KeysValues, KeysValues],
        own: View,
        cross: View,
        at: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "b 1 e"], tuple[KeysValues, KeysValues]]:
        """The same of one token, whose keys and values are written into slot `at` of a cache first."""
        (past_keys, past_values), source = state
        given = self.added.before(self.attn_norm, x)
        keys, values = self.attn.keys_values(given)
        kept = (
            jax.lax.dynamic_update_slice_in_dim(past_keys, keys, at, 1),
            jax.lax.dynamic_update_slice_in_dim(past_values, values, at, 1),
        )
        return self._finish(x, given, (kept, source), own, cross, None), (kept, source)

    def _finish(
        self,
        x: Float[Array, "r t e"],
        given: Float[Array, "r t e"],
        seen: tuple[KeysValues, KeysValues],
        own: View,
        cross: View,
        key: Key | None,
    ) -> Float[Array, "r t e"]:
        inside, after_attn, in_cross, after_cross, in_mlp, after_mlp = split(key, 6)
        x = self.added.after(self.attn_norm, x, self.attn(given, seen[0], own, inside), after_attn)
        mixed = self.cross(self.added.before(self.cross_norm, x), seen[1], cross, in_cross)
        x = self.added.after(self.cross_norm, x, mixed, after_cross)
        return self.added.after(self.mlp_norm, x, self.mlp(self.added.before(self.mlp_norm, x), in_mlp), after_mlp)


class Side(nnx.Module):
    """The blocks of one side, with what they know of distances and a last norm where the family has them."""

    def __init__(self, config: EncoderDecoderConfig, *, encodes: bool):
        layers, heads = (
            (config.encoder_layers, config.encoder_heads) if encodes else (config.decoder_layers, config.decoder_heads)
        )
        self.blocks = Stack(layers, lambda _: EncoderBlock(config) if encodes else DecoderBlock(config))
        self.distances = Distances(config, heads, both_ways=encodes) if config.buckets else None
        self.norm = make_norm(config) if config.norm == "rms" else None
        self.rate = config.dropout

    def view(self, visible: Bool[Array, "r q k"], queries: Int[Array, "r q"], keys: Int[Array, "r k"]) -> View:
        """What tokens at these positions see of their own side."""
        return View(visible, None if self.distances is None else self.distances(queries, keys))

    def end(self, x: Float[Array, "r t e"], key: Key | None) -> Float[Array, "r t e"]:
        """The hidden states that the blocks are left with, normed."""
        return x if self.norm is None else dropout(self.norm(x), self.rate, key)


class VocabularyHead(nnx.Module):
    """Logits over the vocabulary: by the embeddings or by a table of its own, and with a bias that is not trained."""

    def __init__(self, config: EncoderDecoderConfig):
        self.embedding = None if config.tied else param((config.vocab_size, config.size), Normal(config.init_std))
        self.bias = stat((config.vocab_size,), zeros) if config.logit_bias else None
        self.scale = config.logit_scale

    def __call__(self, hidden: Float[Array, "r t e"], words: Embed) -> LazyLogits:
        table = words.embedding[...] if self.embedding is None else self.embedding[...]
        bias: Any = None if self.bias is None else self.bias.get_value()
        bias = bias.value if isinstance(bias, Moving) else bias
        return LazyLogits(hidden * jnp.asarray(self.scale, hidden.dtype), table, bias)


class EncoderDecoder(nnx.Module):
    """Embeddings of both sides, an encoder, a decoder and a head on the vocabulary."""

    def __init__(self, config: EncoderDecoderConfig):
        self.embed = Embeddings(config)
        self.encoder, self.decoder = Side(config, encodes=True), Side(config, encodes=False)
        self.head = VocabularyHead(config)
        self.start, self.by_head = config.start, (config.decoder_heads, config.head_dim)

    def __call__(self, batch: dict[str, Array], *, key: Key | None = None) -> LazyLogits:
        """Logits for each token of the targets; where there is none they hold no meaning."""
        read, embed_key, blocks_key, end_key = split(key, 4)
        segments, own, at = batch["segment_ids"], batch["decoder_segment_ids"], batch["decoder_position_ids"]
        source = self._read(batch["input_ids"], batch["position_ids"], segments, read)
        visible = (own[:, :, None] == segments[:, None, :]) & (own[:, :, None] > 0)
        x = self.embed(batch["decoder_input_ids"], at, embed_key)
        view = self.decoder.view(same_segment(own) & earlier(at, at), at, at)
        x = self.decoder.blocks(x, source, view, View(visible), key=blocks_key)
        return replace(self.head(self.decoder.end(x, end_key), self.embed.word), over=self.decoder.blocks.over)

    def begin(
        self, ids: Int[Array, "b s"], lengths: Int[Array, " b"], room: int
    ) -> tuple[Float[Array, "b v"], Cache, Int[Array, " b"]]:
        """Logits of the first token of the answer to each source, the cache, and the position of that token."""
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        real = positions < lengths[:, None]
        source = self._read(ids, positions, real.astype(jnp.int32), None)
        nothing = jnp.zeros((len(ids), room + 1, *self.by_head), source.dtype)
        layers = tuple(((nothing, nothing), block.cross.keys_values(source)) for block in self.decoder.blocks)
        first = jnp.full_like(lengths, self.start)
        logits, cache = self._step(first, 0, Cache(real, layers))
        return logits, cache, jnp.ones_like(lengths)

    def next(
        self, token: Int[Array, " b"], position: Int[Array, " b"], count: Int[Array, ""], cache: Cache
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Logits of the token after this one, before which the answer has `count`, and the cache with it."""
        return self._step(token, count + 1, cache)

    def _step(
        self, token: Int[Array, " b"], at: Int[Array, ""] | int, cache: Cache
    ) -> tuple[Float[Array, "b v"], Cache]:
        slots = jnp.arange(cache.layers[0][0][0].shape[1])[None, :]
        places = jnp.full((len(token), 1), at, jnp.int32)
        own = self.decoder.view(slots <= places[:, :, None], places, jnp.broadcast_to(slots, (len(token), slots.size)))
        x = self.embed(token[:, None], places, None)
        x, layers = self.decoder.blocks.cached(x, cache.layers, own, View(cache.source[:, None, :]), at)
        lazy = self.head(self.decoder.end(x, None), self.embed.word)
        return lazy.of(lazy.hidden[:, 0]), Cache(cache.source, layers)

    def _read(
        self, ids: Int[Array, "r s"], positions: Int[Array, "r s"], segments: Int[Array, "r s"], key: Key | None
    ) -> Float[Array, "r s e"]:
        embed_key, blocks_key, end_key = split(key, 3)
        view = self.encoder.view(same_segment(segments), positions, positions)
        x = self.encoder.blocks(self.embed(ids, positions, embed_key), view, key=blocks_key)
        return self.encoder.end(x, end_key)
