"""Losses over a vocabulary, some tokens at a time: logits of all tokens stand nowhere, forward or backward (C30).

Tokens that nothing is learned of come last, and chunks that hold no others are skipped. Rows stay whole, so that they
may lie on different devices. What is trained on, `token_loss`, makes its gradient while it has the logits, so that they
are computed once: three products over the vocabulary in place of four. Letters: r rows of the batch, t tokens in a row,
c tokens of a row in a chunk, v vocabulary, e size of the hidden states.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sft_jax.nn.devices import Over, apart, kept_apart
from sft_jax.nn.heads import LazyLogits

CHUNK_BYTES = 128 << 20  # of float32 logits of a chunk, over all devices that a CPU is divided into
CHUNK_BYTES_EACH = 1 << 30  # the same on each accelerator, which is slow at products of few tokens
# What accelerators want the sides of a matrix to be a multiple of: products of 50257 words took four times as long.
LANES = 128

# (float32 logits [r, c, v] of one pass or two, label [r, c]) -> a number or two for each token [r, c]
Score = Callable[..., tuple[Array, ...]]


def token_loss(
    logits: LazyLogits, label: Int[Array, "r t"], weight: Float[Array, "r t"], smoothing: float = 0.0
) -> Float[Array, ""]:
    """The sum of cross-entropies times weights, as of `torch.nn.CrossEntropyLoss(label_smoothing)`, in float32.

    Nothing is differentiated by the weights; tokens of weight 0 are left out.
    """
    return _loss(smoothing, logits, label, jax.lax.stop_gradient(weight))


def token_scores(
    logits: LazyLogits, label: Int[Array, "r t"], wanted: Bool[Array, "r t"], smoothing: float = 0.0
) -> tuple[Float[Array, "r t"], Float[Array, "r t"]]:
    """(cross-entropy as in `token_loss`, 1 where the label is the likeliest else 0) of the tokens that are wanted, 0
    of all others.
    """

    def score(found: Float[Array, "r c v"], label: Int[Array, "r c"]) -> tuple[Array, Array]:
        right = jnp.argmax(found, axis=-1) == label
        return _cross_entropy(found, found.mean(axis=-1), label, smoothing)[0], right.astype(jnp.float32)

    loss, right = _over_chunks(score, (logits,), label, wanted, 2)
    return loss, right


def token_divergence(one: LazyLogits, other: LazyLogits, wanted: Bool[Array, "r t"]) -> Float[Array, "r t"]:
    """Divergence of two passes for the tokens that are wanted, as `losses.class_divergence`; 0 of all others."""

    def score(a: Float[Array, "r c v"], b: Float[Array, "r c v"], label: Int[Array, "r c"]) -> tuple[Array]:
        p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        return (0.5 * ((jnp.exp(p) - jnp.exp(q)) * (p - q)).sum(axis=-1),)

    return _over_chunks(score, (one, other), jnp.zeros(wanted.shape, jnp.int32), wanted, 1)[0]


def chunk_tokens(rows: int, tokens: int, vocabulary: int, devices: int = 1) -> int:
    """How many tokens of each row a chunk holds."""
    most = CHUNK_BYTES if jax.default_backend() == "cpu" else CHUNK_BYTES_EACH * devices
    return max(1, min(tokens, most // (4 * rows * vocabulary)))


class _Chunks:
    """The tokens of rows in an order, those that are wanted first, and cut into chunks."""

    def __init__(self, wanted: Bool[Array, "r t"], vocabulary: int, over: Over | None):
        rows, tokens = self.shape = wanted.shape
        self.size = chunk_tokens(rows, tokens, vocabulary, 1 if over is None else over.mesh.size)
        self.count = -(-tokens // self.size)
        self.needed = -(-wanted.sum(axis=1).max() // self.size)  # of them: others hold nothing that is wanted
        self._order = jnp.argsort(~wanted, axis=1, stable=True)

    def cut(self, array: Array) -> Array:
        """[r, t, ...] -> [chunks, r, c, ...], in that order."""
        rows, tokens = self.shape
        index = self._order.reshape(*self.shape, *(1,) * (array.ndim - 2))
        sorted_ = jnp.take_along_axis(array, index, axis=1)
        more = self.count * self.size - tokens
        filled = jnp.pad(sorted_, ((0, 0), (0, more), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(filled.reshape(rows, self.count, self.size, *array.shape[2:]), 1, 0)

    def joined(self, array: Array) -> Array:
        """[chunks, r, c, ...] -> [r, t, ...], as they were."""
        rows, tokens = self.shape
        back = jnp.argsort(self._order, axis=1).reshape(*self.shape, *(1,) * (array.ndim - 3))
        whole = jnp.moveaxis(array, 0, 1).reshape(rows, self.count * self.size, *array.shape[3:])[:, :tokens]
        return jnp.take_along_axis(whole, back, axis=1)


def _cross_entropy(
    found: Float[Array, "r c v"], mean: Float[Array, "r c"], label: Int[Array, "r c"], smoothing: float
) -> tuple[Float[Array, "r c"], Float[Array, "r c 1"]]:
    """(the loss of each token, the logarithm of the sum of its exponentials)."""
    of_label = jnp.take_along_axis(found, label[..., None], axis=-1)[..., 0]
    all_of_them = jax.nn.logsumexp(found, axis=-1, keepdims=True)
    target = (1 - smoothing) * of_label + smoothing * mean if smoothing else of_label
    return all_of_them[..., 0] - target, all_of_them


def _total(smoothing: float, logits: LazyLogits, label: Array, weight: Array) -> Array:
    each, _ = token_scores(logits, label, weight > 0, smoothing)
    return (each * weight).sum()


def _loss_forward(smoothing: float, logits: Any, label: Any, weight: Any) -> tuple[Array, Any]:
    """The loss, and what its gradient is but for a factor: sums over the vocabulary are float32 whatever the rest is.

    Where the embeddings are frozen, they get none.
    """
    given, learned = (jax.tree.map(lambda leaf, n=n: getattr(leaf, n), logits) for n in ("value", "perturbed"))
    label, weight = label.value, weight.value
    hidden, embedding, bias = given.hidden, given.embedding, given.bias
    vocabulary = embedding.shape[0]
    more = 0 if jax.default_backend() == "cpu" else -vocabulary % LANES
    embedding = jnp.pad(embedding, ((0, more), (0, 0)))
    padded = replace(given, embedding=embedding, bias=None if bias is None else jnp.pad(bias, (0, more)))
    over, count = given.over, 1 if given.over is None else given.over.parts(len(hidden))
    chunks = _Chunks(weight > 0, vocabulary, over)
    parts = tuple(map(chunks.cut, (hidden, label, weight)))

    def step(number: Array, carry: Any) -> Any:
        total, of_hidden, of_embedding, of_bias = carry
        hidden, label, weight = (jax.lax.dynamic_index_in_dim(part, number, keepdims=False) for part in parts)
        bounded = padded.of(hidden)
        word = jax.lax.broadcasted_iota(label.dtype, bounded.shape, 2)
        found = jnp.where(word < vocabulary, bounded, -jnp.inf) if more else bounded
        mean = bounded.sum(axis=-1) / vocabulary  # there is nothing where it is padded
        each, all_of_them = _cross_entropy(found, mean, label, smoothing)
        target = word == label[..., None]
        if smoothing:
            target = (1 - smoothing) * target + jnp.where(word < vocabulary, smoothing / vocabulary, 0)
        slope = weight[..., None] * (jnp.exp(found - all_of_them) - target)
        if given.softcap is not None:
            slope = slope * (1 - jnp.square(bounded / given.softcap))
        flat = slope.reshape(-1, vocabulary + more)
        if of_bias is not None:
            of_bias = of_bias + flat.sum(axis=0)
        flat = flat.astype(hidden.dtype)
        back = (flat @ embedding).reshape(hidden.shape)
        of_hidden = jax.lax.dynamic_update_index_in_dim(of_hidden, back, number, 0)
        if of_embedding is not None:
            wide, narrow = apart(flat.reshape(slope.shape), over), apart(hidden, over)
            own = jnp.einsum("pnv,pne->pve", wide, narrow, preferred_element_type=jnp.float32)
            of_embedding = kept_apart(of_embedding + own, over)
        return total + (each * weight).sum(), of_hidden, of_embedding, of_bias

    begin = (
        jnp.zeros((), jnp.float32),
        jnp.zeros_like(parts[0]),
        kept_apart(jnp.zeros((count, *embedding.shape), jnp.float32), over) if learned.embedding else None,
        jnp.zeros(vocabulary + more, jnp.float32) if bias is not None and learned.bias else None,
    )
    total, of_hidden, of_embedding, of_bias = jax.lax.fori_loop(0, chunks.needed, step, begin)
    of_embedding = None if of_embedding is None else of_embedding.sum(axis=0)
    of_embedding, of_bias = (a if a is None else a[:vocabulary] for a in (of_embedding, of_bias))
    slopes = replace(given, hidden=chunks.joined(of_hidden), embedding=of_embedding, bias=of_bias)
    return total, (slopes, jax.tree.map(lambda a: jnp.zeros((), a.dtype), given))


def _loss_backward(smoothing: float, held: Any, above: Any) -> tuple[Any, None, None]:
    slopes, given = held
    factor = jnp.zeros(()) if isinstance(above, jax.custom_derivatives.SymbolicZero) else above

    def scaled(name: str) -> Any:
        slope = getattr(slopes, name)
        return None if slope is None else (factor * slope).astype(getattr(given, name).dtype)

    return replace(given, **{name: scaled(name) for name in ("hidden", "embedding", "bias")}), None, None


_loss = jax.custom_vjp(_total, nondiff_argnums=(0,))
_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _over_chunks(
    score: Score, passes: tuple[LazyLogits, ...], label: Int[Array, "r t"], wanted: Bool[Array, "r t"], outputs: int
) -> tuple[Array, ...]:
    """The scores of all tokens, each 0 where it is not wanted."""
    chunks = _Chunks(wanted, passes[0].embedding.shape[0], passes[0].over)

    def of_chunk(hidden: tuple[Array, ...], label: Array, wanted: Array) -> tuple[Array, ...]:
        found = score(*(one.of(h) for one, h in zip(passes, hidden, strict=True)), label)
        return tuple(jnp.where(wanted, values, 0) for values in found)

    @jax.checkpoint  # around the choice, or scan would keep the embeddings once for each chunk
    def step(carry: None, item: tuple[tuple[Array, ...], Array, Array]) -> tuple[None, tuple[Array, ...]]:
        nothing = tuple(jnp.zeros(item[1].shape, jnp.float32) for _ in range(outputs))
        return None, jax.lax.cond(item[2].any(), of_chunk, lambda *_: nothing, *item)

    given = (tuple(chunks.cut(one.hidden) for one in passes), chunks.cut(label), chunks.cut(wanted))
    return tuple(chunks.joined(values) for values in jax.lax.scan(step, None, given)[1])
