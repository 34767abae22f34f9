"""Attention that cannot leak: every query sees only the keys of its own segment.

Letters: r rows, q and k tokens, h heads, d size of a head. Segment 0 is filler: its queries see nothing and return
zeros, with zero gradient (C34). Other backends (cuDNN, Pallas) will stand beside `attend` under the same contract, and
one that cannot keep segments apart must refuse.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sft_jax.nn.layers import dropout
from sft_jax.nn.random import Key


def same_segment(segments: Int[Array, "r t"]) -> Bool[Array, "r t t"]:
    """Which key each query may see: those of its own document; filler sees nothing and is not seen."""
    return (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)


def attend(
    queries: Float[Array, "r q h d"],
    keys: Float[Array, "r k h d"],
    values: Float[Array, "r k h d"],
    visible: Bool[Array, "r q k"],
    *,
    rate: float = 0.0,
    key: Key | None = None,
) -> Float[Array, "r q h d"]:
    """Scaled dot-product attention, softmax in float32. Source: Vaswani et al., 2017, arXiv 1706.03762."""
    mask = visible[:, None]
    scores = jnp.einsum("rqhd,rkhd->rhqk", queries, keys) * queries.shape[-1] ** -0.5
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    # A query that sees nothing has no finite maximum; 0 keeps exp and its gradient finite.
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0))
    total = weights.sum(axis=-1, keepdims=True)
    probabilities = (weights / jnp.where(total > 0, total, 1)).astype(values.dtype)
    return jnp.einsum("rhqk,rkhd->rqhd", dropout(probabilities, rate, key), values)
