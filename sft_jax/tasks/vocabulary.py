"""Losses over a vocabulary, some tokens at a time: logits of all tokens stand nowhere, forward or backward (C30).

Tokens that nothing is learned of come last, and chunks that hold no others are skipped. Rows stay whole, so that they
may lie on different devices. Letters: r rows of the batch, t tokens in a row, c tokens of a row in a chunk, v
vocabulary, e size of the hidden states.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sft_jax.nn.heads import LazyLogits

CHUNK_BYTES = 128 << 20  # of float32 logits, over all devices

# (float32 logits [r, c, v] of one pass or two, label [r, c]) -> a number or two for each token [r, c]
Score = Callable[..., tuple[Array, ...]]


def token_scores(
    logits: LazyLogits, label: Int[Array, "r t"], wanted: Bool[Array, "r t"], smoothing: float = 0.0
) -> tuple[Float[Array, "r t"], Float[Array, "r t"]]:
    """(cross-entropy, 1 where the label is the likeliest else 0) of the tokens that are wanted, 0 of all others.

    The loss is that of `torch.nn.CrossEntropyLoss(label_smoothing)`.
    """

    def score(found: Float[Array, "r c v"], label: Int[Array, "r c"]) -> tuple[Array, Array]:
        of_label = jnp.take_along_axis(found, label[..., None], axis=-1)[..., 0]
        all_of_them = jax.nn.logsumexp(found, axis=-1)
        target = (1 - smoothing) * of_label + smoothing * found.mean(axis=-1) if smoothing else of_label
        right = jnp.argmax(found, axis=-1) == label
        return all_of_them - target, right.astype(jnp.float32)

    loss, right = _over_chunks(score, (logits,), label, wanted, 2)
    return loss, right


def token_divergence(one: LazyLogits, other: LazyLogits, wanted: Bool[Array, "r t"]) -> Float[Array, "r t"]:
    """Divergence of two passes for the tokens that are wanted, as `losses.class_divergence`; 0 of all others."""

    def score(a: Float[Array, "r c v"], b: Float[Array, "r c v"], label: Int[Array, "r c"]) -> tuple[Array]:
        p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        return (0.5 * ((jnp.exp(p) - jnp.exp(q)) * (p - q)).sum(axis=-1),)

    return _over_chunks(score, (one, other), jnp.zeros(wanted.shape, jnp.int32), wanted, 1)[0]


def chunk_tokens(rows: int, tokens: int, vocabulary: int, most_bytes: int | None = None) -> int:
    """How many tokens of each row a chunk holds."""
    return max(1, min(tokens, (most_bytes or CHUNK_BYTES) // (4 * rows * vocabulary)))


def _over_chunks(
    score: Score, passes: tuple[LazyLogits, ...], label: Int[Array, "r t"], wanted: Bool[Array, "r t"], outputs: int
) -> tuple[Array, ...]:
    """The scores of all tokens, each 0 where it is not wanted."""
    rows, tokens = label.shape
    chunk = chunk_tokens(rows, tokens, passes[0].embedding.shape[0])
    count = -(-tokens // chunk)
    order = jnp.argsort(~wanted, axis=1, stable=True)  # those that are wanted first

    def cut(array: Array) -> Array:
        """[r, t, ...] -> [chunks, r, c, ...], in that order."""
        index = order.reshape(*order.shape, *(1,) * (array.ndim - 2))
        sorted_ = jnp.take_along_axis(array, index, axis=1)
        filled = jnp.pad(sorted_, ((0, 0), (0, count * chunk - tokens), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(filled.reshape(rows, count, chunk, *array.shape[2:]), 1, 0)

    def of_chunk(hidden: tuple[Array, ...], label: Array, wanted: Array) -> tuple[Array, ...]:
        found = score(*(one.of(h) for one, h in zip(passes, hidden, strict=True)), label)
        return tuple(jnp.where(wanted, values, 0) for values in found)

    @jax.checkpoint  # around the choice, or scan would keep the embeddings once for each chunk
    def step(carry: None, item: tuple[tuple[Array, ...], Array, Array]) -> tuple[None, tuple[Array, ...]]:
        nothing = tuple(jnp.zeros((rows, chunk), jnp.float32) for _ in range(outputs))
        return None, jax.lax.cond(item[2].any(), of_chunk, lambda *_: nothing, *item)

    _, found = jax.lax.scan(step, None, (tuple(cut(one.hidden) for one in passes), cut(label), cut(wanted)))
    back = jnp.argsort(order, axis=1)
    whole = (jnp.moveaxis(values, 0, 1).reshape(rows, count * chunk)[:, :tokens] for values in found)
    return tuple(jnp.take_along_axis(values, back, axis=1) for values in whole)
