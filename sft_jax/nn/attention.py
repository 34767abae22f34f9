"""Attention that cannot leak: every query sees only the keys of its own segment.

Letters: r rows, q and k tokens, h heads, g heads of keys and values, d size of a head. Segment 0 is filler: its queries
see nothing and return zeros, with zero gradient (C34). What accelerators have of their own is in `kernels.py`, under
the same contract.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sft_jax.nn.layers import dropout
from sft_jax.nn.random import Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visible:
    """Which keys the queries of rows see."""

    mask: Bool[Array, "#r q k"]
    # Where a token sees all of its document, or all of it up to itself, or the last `window` of these: how long each
    # document of a row is, in the order in which they stand there, from the first token on and without gaps; 0 for a
    # slot that is empty.
    lengths: Int[Array, "r n"] | None = None
    window: int | None = field(default=None, metadata={"static": True})


def lengths_of(batch: Mapping[str, Array]) -> Int[Array, "r n"] | None:
    """The tokens of each document slot of a batch; None where a batch does not say how many slots there are."""
    if "starts" not in batch:
        return None
    slots = 1 + jnp.arange(batch["starts"].shape[1])
    return (batch["segment_ids"][:, None] == slots[:, None]).sum(axis=-1, dtype=jnp.int32)


def same_segment(segments: Int[Array, "r t"]) -> Bool[Array, "r t t"]:
    """Which key each query may see: those of its own document; filler sees nothing and is not seen."""
    return (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)


def earlier(queries: Int[Array, "r q"], keys: Int[Array, "r k"], window: int | None = None) -> Bool[Array, "r q k"]:
    """Which key each query may see by their positions: itself and those before it, the last `window` of these."""
    behind = queries[:, :, None] - keys[:, None, :]
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def near(positions: Int[Array, "r t"], window: int | None) -> Bool[Array, "r t t"]:
    """Which key each query may see by their positions where it sees both ways: at most `window` tokens from itself."""
    apart = jnp.abs(positions[:, :, None] - positions[:, None, :])
    return jnp.ones_like(apart, bool) if window is None else apart <= window


def attend(
    queries: Float[Array, "r q h d"],
    keys: Float[Array, "r k g d"],
    values: Float[Array, "r k g d"],
    visible: Bool[Array, "r q k"],
    *,
    scale: float | None = None,
    bias: Float[Array, "r h q k"] | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    key: Key | None = None,
) -> Float[Array, "r q h d"]:
    """Scaled dot-product attention, softmax in float32. Source: Vaswani et al., 2017, arXiv 1706.03762.

    Each head of keys and values serves h / g neighbouring heads of queries (arXiv 2305.13245). The scale is
    1 / sqrt(d) unless given; `bias` is added to the scores (T5); `softcap` bounds them (Gemma 2): cap * tanh(x / cap).
    """
    rows, length, _, size = queries.shape
    groups, shared = keys.shape[2], queries.shape[2] // keys.shape[2]
    # Heads before tokens, once and for both products: on a CPU this takes a third off the gradient of both. Heads that
    # share keys and values stand one behind the other as if they were queries of one head.
    split = queries.reshape(rows, length, groups, shared, size).transpose(0, 2, 3, 1, 4)
    folded = split.reshape(rows, groups, shared * length, size)
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    mask = jnp.tile(visible, (1, shared, 1))[:, None]
    scores = jnp.einsum("rgqd,rgkd->rgqk", folded, keys) * (size**-0.5 if scale is None else scale)
    scores = scores.astype(jnp.float32)
    if bias is not None:
        scores = scores + bias.reshape(scores.shape)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask, scores, -jnp.inf)
    # A query that sees nothing has no finite maximum; 0 keeps exp and its gradient finite.
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0))
    total = weights.sum(axis=-1, keepdims=True)
    probabilities = (weights / jnp.where(total > 0, total, 1)).astype(values.dtype)
    mixed = jnp.einsum("rgqk,rgkd->rgqd", dropout(probabilities, rate, key), values)
    return mixed.reshape(rows, groups, shared, length, size).transpose(0, 3, 1, 2, 4).reshape(queries.shape)
