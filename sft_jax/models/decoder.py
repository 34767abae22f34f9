"""The pre-norm transformer decoder that GPT-2, Llama and their kin share, and its cache of keys and values.

Letters: r rows of the batch, t tokens in a row, e size of the hidden states; b sequences that are generated together,
s tokens of each that are read at once, l tokens that a cache holds, g heads of keys and values, d size of a head.
A row may hold several documents: `segment_ids` tells them apart (0 is filler) and `position_ids` begin at 0 in each.

Generation, on `module = template.bind(params)` with a head of kind `causal_lm`:

    cache = empty_cache(config, batch=b, length=l, dtype=dtype)
    logits, cache = module.cached(ids, positions, cache, at)

reads tokens `ids` [b, s] at `positions` [b, s] within their sequences and writes them into slots `at` .. `at + s` of
the cache, the same in every sequence. What a token sees depends on positions alone, never on slots: its own sequence up
to itself. So prompts of different lengths stand in one batch: filler has position -1, wherever it stands, is never seen
and sees nothing. `logits` are the `LazyLogits` of these s tokens; take the hidden state of the last real one and call
`logits.of(hidden)`. A cache is a pytree whose every leaf begins with the axis b: beams are picked by
`jax.tree.map(lambda leaf: leaf[chosen], cache)`. All of `at`, `ids` and `positions` may be traced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sft_jax.errors import ModelError
from sft_jax.models.family import LM_HEAD, Head, check_activation, check_fields
from sft_jax.nn.attention import Visible, earlier, lengths_of, near, same_segment
from sft_jax.nn.heads import LastTokenHead, LazyLogits, TokenHead, features_of
from sft_jax.nn.kernels import XLA, Needs, attend_by
from sft_jax.nn.layers import ACTIVATIONS, Embed, LayerNorm, Linear, RMSNorm, dropout, gated, noisy
from sft_jax.nn.random import Key, split
from sft_jax.nn.rope import Rope, Turns, turn, turns
from sft_jax.nn.stack import Stack
from sft_jax.nn.template import Normal
from sft_jax.weights.table import SAME, Row, linear

# The largest numbers that are taken from a `config.json`, so that none makes a million layers; others are below 2^31.
MOST = {"num_layers": 256, "embed_dropout": 1, "dropout": 1, "attention_dropout": 1, "head_dropout": 1}
# Kind of head -> ending of its class.
HEADS = {
    "causal_lm": "ForCausalLM",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
}
NOWHERE = np.iinfo(np.int32).max  # the position of a slot of a cache that holds no token: later than any


@dataclass(frozen=True)
class LayerKind:
    """What layers of one model may differ in: how far they see, and their rotary positions."""

    window: int | None = None
    rope: Rope | None = None  # None: positions are learned


@dataclass(frozen=True)
class DecoderConfig:
    """What the arithmetic needs; sizes come from the checkpoint's `config.json`."""

    vocab_size: int
    size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    num_positions: int
    activation: str
    norm: str  # "layer", "rms" or "centred rms"
    norm_eps: float
    init_std: float
    embed_dropout: float
    dropout: float
    attention_dropout: float
    head_dropout: float
    layers: tuple[LayerKind, ...]
    tied: bool  # the head on the vocabulary is the embeddings
    gated: bool  # activation(gate(x)) * up(x), else activation(up(x))
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool = False
    post_norms: bool = False  # what attention and MLP give is normed too (Gemma 2)
    embed_scale: float = 1.0
    attention_scale: float | None = None  # 1 / sqrt(head_dim) unless given
    softcap: float | None = None  # of attention scores
    logit_softcap: float | None = None
    fused: bool = False  # on disk queries, keys and values are one tensor, gate and up another (Phi-3)
    causal: bool = True  # a token sees none that come later
    filler: int | None = None  # the id that padding has, which a head on documents passes over
    embedding_noise: float = 0.0  # of training alone

    def __post_init__(self):
        check_fields(self, MOST, may_be_0=("filler",))
        check_activation(self.activation)
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"config.json: {self.num_heads} heads are not divisible by {self.num_kv_heads} key/value heads; "
                f"fetch the checkpoint again"
            )


def limits(config: DecoderConfig) -> dict[str, int]:
    """The numbers that a decoder can be asked for: each below its limit. Rotary positions are stretched at most so."""
    growths = [kind.rope.growth for kind in config.layers if kind.rope and kind.rope.growth]
    return {"input_ids": config.vocab_size, "position_ids": int(config.num_positions * max([1, *growths]))}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """What every layer of a kind needs besides the hidden states: made once a forward."""

    visible: Visible
    turns: Turns | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens that were read, layer by layer; see the top of this file."""

    positions: Int[Array, "b l"]
    layers: tuple[tuple[Float[Array, "b l g d"], Float[Array, "b l g d"]], ...]
    answers: int = field(default=0, metadata={"static": True})  # the slot of the first token of every answer


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """A cache for `batch` sequences of at most `length` tokens, filler counted; `dtype` is that of the parameters."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
    return Cache(jnp.full((batch, length), NOWHERE, jnp.int32), layers)


def even_share(size: int, heads: int) -> int:
    """The size of a head where a `config.json` does not say it."""
    if size % heads:
        raise ModelError(
            f"config.json: hidden size {size} is not divisible by {heads} heads; fetch the checkpoint again"
        )
    return size // heads


def windows_of(kinds: Any, window: int | None, layers: int) -> list[int | None]:
    """How many tokens each layer sees by the `layer_types` of a `config.json`, None for all before it."""
    known = {"full_attention": None, "sliding_attention": window}
    if type(kinds) is not list or len(kinds) != layers or not all(type(k) is str and k in known for k in kinds):
        raise ModelError(
            f"config.json: layer_types is {kinds!r:.60}, expected {layers} times one of: {', '.join(known)}"
        )
    if window is None and "sliding_attention" in kinds:
        raise ModelError("config.json: layer_types names sliding layers, but there is no sliding_window")
    return [known[kind] for kind in kinds]


def shared(config: dict[str, Any]) -> dict[str, Any]:
    """What `transformers` reads of the `config.json` of every decoder, as ours has it.

    Whatever counts as false there makes a model look both ways; a padding id that no token has pads nothing.
    """
    pad, size = config.get("pad_token_id"), config["vocab_size"]
    known = type(pad) is int and type(size) is int and 0 <= pad < size
    return {"causal": bool(config.get("is_causal", True)), "filler": pad if known else None}


def token_dropout(config: dict[str, Any]) -> Any:
    """The rate before the head on tokens, as `transformers` picks it."""
    rates = (config.get("classifier_dropout"), config.get("hidden_dropout"), 0.1)
    return next(rate for rate in rates if rate is not None)


def make_head(config: DecoderConfig, head: Head) -> nnx.Module | None:
    """The head of this kind; None where it is one on the vocabulary."""
    init = Normal(config.init_std)
    if head.kind == "sequence_classification":
        return LastTokenHead(config.size, head.size, init, config.filler)
    if head.kind == "causal_lm" and not config.causal:
        raise ModelError(
            "config.json: is_causal=false lets tokens see those that come later, so that nothing can be learned of "
            "the next one; remove it from config.json, or choose a task with labels"
        )
    return TokenHead(config.size, head.size, init, config.head_dropout) if head.kind == "token_classification" else None


def head_rows(config: DecoderConfig, head: Head, out: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of a head; `out` has the names of those on labels."""
    if head.kind in out:
        bias = head.kind == "token_classification"
        return linear("head/out", out[head.kind], "embed .", head=True, bias=bias)
    return () if config.tied else (Row("head/embedding", LM_HEAD, SAME, "vocab embed", head=True),)


def other_heads(config: DecoderConfig, head: Head, out: Mapping[str, str]) -> tuple[str, ...]:
    """Patterns of the tensors of heads of other kinds, and of the copy of tied embeddings that some files hold."""
    names = {"lm_head", "qa_outputs", *out.values()} - {out.get(head.kind, "lm_head" if not config.tied else "")}
    return tuple(sorted(f"{name}.*" for name in names))


def tied_copies(config: DecoderConfig, head: Head, embeddings: str) -> dict[str, str]:
    """The copy of tied embeddings that some files hold, where it would be the head."""
    return {LM_HEAD: embeddings} if config.tied and head.kind == "causal_lm" else {}


def make_norm(config: DecoderConfig, size: int) -> nnx.Module:
    """The norm of the family."""
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps)
    return RMSNorm(size, config.norm_eps, centred=config.norm == "centred rms")


class Embeddings(nnx.Module):
    """Words, scaled, and positions where they are learned."""

    def __init__(self, config: DecoderConfig):
        init = Normal(config.init_std)
        learned = any(kind.rope is None for kind in config.layers)
        self.word = Embed(config.vocab_size, config.size, init)
        self.position = Embed(config.num_positions, config.size, init) if learned else None
        self.scale, self.rate, self.noise = config.embed_scale, config.embed_dropout, config.embedding_noise

    def __call__(
        self, ids: Int[Array, "r t"], positions: Int[Array, "r t"], lengths: Int[Array, "r t"], key: Key | None
    ) -> Float[Array, "r t e"]:
        words = self.word(ids)
        x = noisy(words * jnp.asarray(self.scale, words.dtype), lengths, self.noise, split(key, 1)[0])
        if self.position is not None:
            x = x + self.position(positions)
        return dropout(x, self.rate, key)


class Attention(nnx.Module):
    """Self-attention with its output projection; fewer heads of keys and values than of queries."""

    def __init__(self, config: DecoderConfig):
        init, size, width = Normal(config.init_std), config.size, config.head_dim
        inside, kept = config.num_heads * width, config.num_kv_heads * width
        self.q = Linear(size, inside, init, bias=config.qkv_bias)
        self.k, self.v = (Linear(size, kept, init, bias=config.qkv_bias) for _ in range(2))
        self.o = Linear(inside, size, init, bias=config.out_bias)
        self.q_norm, self.k_norm = (make_norm(config, width) if config.qk_norm else None for _ in range(2))
        self.head_dim, self.rate, self.causal = width, config.attention_dropout, config.causal
        self.scale, self.softcap = config.attention_scale, config.softcap
        windows = any(kind.window is not None for kind in config.layers)
        self.backend, self.needs = XLA, Needs(width, self.rate, self.softcap, windows)

    def project(
        self, x: Float[Array, "r t e"], by: Turns | None
    ) -> tuple[Float[Array, "r t h d"], Float[Array, "r t g d"], Float[Array, "r t g d"]]:
        """Queries, keys and values; the first two turned."""
        q, k, v = (layer(x).reshape(*x.shape[:2], -1, self.head_dim) for layer in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if by is None else (turn(q, by), turn(k, by), v)

    def mix(
        self,
        q: Float[Array, "r q h d"],
        k: Float[Array, "r k g d"],
        v: Float[Array, "r k g d"],
        visible: Visible,
        key: Key | None,
    ) -> Float[Array, "r q e"]:
        """What the queries take from the values they see."""
        how = {"scale": self.scale, "softcap": self.softcap, "rate": self.rate}
        mixed = attend_by(self.backend, q, k, v, visible, causal=self.causal, key=key, **how)
        return self.o(mixed.reshape(*q.shape[:2], -1))


class Mlp(nnx.Module):
    """Two linear layers with an activation between, or with a gate."""

    def __init__(self, config: DecoderConfig):
        init, bias = Normal(config.init_std), config.mlp_bias
        self.gate = Linear(config.size, config.mlp_size, init, bias=bias) if config.gated else None
        self.up = Linear(config.size, config.mlp_size, init, bias=bias)
        self.down = Linear(config.mlp_size, config.size, init, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Float[Array, "r t e"]) -> Float[Array, "r t e"]:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(gated(self.activation, self.gate(x), self.up(x)))


class Block(nnx.Module):
    """Attention and MLP, each of the normed input and added to it."""

    def __init__(self, config: DecoderConfig, kind: LayerKind):
        self.attn, self.attn_norm = Attention(config), make_norm(config, config.size)
        self.mlp, self.mlp_norm = Mlp(config), make_norm(config, config.size)
        self.attn_post, self.mlp_post = (make_norm(config, config.size) if config.post_norms else None for _ in "am")
        self.kind, self.rate = kind, config.dropout

    def __call__(
        self, x: Float[Array, "r t e"], views: dict[LayerKind, View], *, key: Key | None
    ) -> Float[Array, "r t e"]:
        inside, outside = split(key, 2)
        view = views[self.kind]
        q, k, v = self.attn.project(self.attn_norm(x), view.turns)
        return self._finish(x, self.attn.mix(q, k, v, view.visible, inside), outside)

    def cached(
        self,
        x: Float[Array, "b s e"],
        past: tuple[Float[Array, "b l g d"], Float[Array, "b l g d"]],
        views: dict[LayerKind, View],
        at: Int[Array, ""],
    ) -> tuple[Float[Array, "b s e"], tuple[Float[Array, "b l g d"], Float[Array, "b l g d"]]]:
        """The same on the keys and values of a cache, these tokens' own written into it first."""
        view = views[self.kind]
        q, *new = self.attn.project(self.attn_norm(x), view.turns)
        k, v = (jax.lax.dynamic_update_slice_in_dim(old, part, at, 1) for old, part in zip(past, new, strict=True))
        return self._finish(x, self.attn.mix(q, k, v, view.visible, None), None), (k, v)

    def _finish(self, x: Float[Array, "r t e"], mixed: Float[Array, "r t e"], key: Key | None) -> Float[Array, "r t e"]:
        after_attn, after_mlp = split(key, 2)
        x = x + dropout(mixed if self.attn_post is None else self.attn_post(mixed), self.rate, after_attn)
        out = self.mlp(self.mlp_norm(x))
        return x + dropout(out if self.mlp_post is None else self.mlp_post(out), self.rate, after_mlp)


class Decoder(nnx.Module):
    """Embeddings, blocks, a last norm and a head; `head` is None for logits over the vocabulary."""

    def __init__(self, config: DecoderConfig, head: Any):
        self.embed = Embeddings(config)
        self.blocks = Stack(config.num_layers, lambda number: Block(config, config.layers[number]))
        self.norm = make_norm(config, config.size)
        untied = head is None and not config.tied
        self.head: Any = Embed(config.vocab_size, config.size, Normal(config.init_std)) if untied else head
        self.kinds, self.softcap = frozenset(config.layers), config.logit_softcap
        self.config = config
        self.on_vocabulary = head is None

    def __call__(self, batch: dict[str, Array], *, key: Key | None = None) -> Float[Array, "r n_or_t c"] | LazyLogits:
        """Logits for each document slot of each row, or for each token; where there is none they hold no meaning."""
        if self.on_vocabulary:
            return self._logits(self._hidden(batch, key))
        return self.head(features_of(self, batch, key), batch, split(key, 3)[2]).astype(jnp.float32)

    def features(self, batch: dict[str, Array], key: Key | None) -> Float[Array, "r n_or_t e"]:
        """What a head on documents or tokens reads."""
        return self.head.pool(self._hidden(batch, key), batch)

    def _hidden(self, batch: dict[str, Array], key: Key | None) -> Float[Array, "r t e"]:
        embed_key, blocks_key, _ = split(key, 3)
        positions, own = batch["position_ids"], same_segment(batch["segment_ids"])
        lengths = own.sum(axis=-1)
        x = self.embed(batch["input_ids"], positions, lengths, embed_key)
        sizes = lengths_of(batch)

        def view(kind: LayerKind) -> View:
            causal, window = self.config.causal, kind.window
            mask = own & (earlier(positions, positions, window) if causal else near(positions, window))
            known = sizes if causal or window is None else None  # kernels know no windows that reach both ways
            return View(Visible(mask, known, window), self._turns(kind, positions, lengths, x.dtype))

        return self.norm(self.blocks(x, {kind: view(kind) for kind in self.kinds}, key=blocks_key))

    def cached(
        self, ids: Int[Array, "b s"], positions: Int[Array, "b s"], cache: Cache, at: Int[Array, ""] | int
    ) -> tuple[LazyLogits, Cache]:
        """Logits of tokens that continue what a cache holds, and the cache with them; see the top of this file."""
        real = positions >= 0
        written = jnp.where(real, positions, NOWHERE)
        held = jax.lax.dynamic_update_slice_in_dim(cache.positions, written, at, 1)
        lengths = jnp.full_like(positions, held.shape[1])  # frequencies must not change while a sequence grows
        x = self.embed(ids, jnp.maximum(positions, 0), lengths, None)
        views = {
            kind: View(Visible(earlier(positions, held, kind.window)), self._turns(kind, positions, lengths, x.dtype))
            for kind in self.kinds
        }
        x, layers = self.blocks.cached(x, cache.layers, views, at)
        return self._logits(self.norm(x)), replace(cache, positions=held, layers=layers)

    def begin(
        self, ids: Int[Array, "b s"], lengths: Int[Array, " b"], room: int
    ) -> tuple[Float[Array, "b v"], Cache, Int[Array, " b"]]:
        """Logits of the first token of the answer to each prompt, the cache, and the position of that token."""
        rows, size = ids.shape
        cache = empty_cache(self.config, rows, size + room, self.embed.word.embedding[...].dtype)
        places = jnp.arange(size)[None, :]
        positions = jnp.where(places < lengths[:, None], places, -1)
        lazy, cache = self.cached(ids, positions, replace(cache, answers=size), 0)
        last = jnp.take_along_axis(lazy.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return lazy.of(last), cache, lengths

    def next(
        self, token: Int[Array, " b"], position: Int[Array, " b"], count: Int[Array, ""], cache: Cache
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Logits of the token after this one, before which the answer has `count`, and the cache with it."""
        lazy, cache = self.cached(token[:, None], position[:, None], cache, cache.answers + count)
        return lazy.of(lazy.hidden[:, 0]), cache

    def _turns(
        self, kind: LayerKind, positions: Int[Array, "r t"], lengths: Int[Array, "r t"], dtype: Any
    ) -> Turns | None:
        return None if kind.rope is None else turns(kind.rope, positions, lengths, dtype)

    def _logits(self, hidden: Float[Array, "r t e"]) -> LazyLogits:
        table = self.embed.word if self.head is None else self.head
        return LazyLogits(hidden, table.embedding[...], softcap=self.softcap, over=self.blocks.over)
