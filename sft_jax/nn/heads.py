"""Heads: from hidden states to what a task's loss reads. Their names on disk belong to the families."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sft_jax.nn.layers import Linear, dropout
from sft_jax.nn.random import Key, split
from sft_jax.nn.template import Init


def gather_tokens(hidden: Float[Array, "r t e"], starts: Int[Array, "r n"]) -> Float[Array, "r n e"]:
    """The hidden states at `starts`: for each of n documents in a row, the position of its pooled token."""
    return jnp.take_along_axis(hidden, starts[:, :, None], axis=1)


class PooledHead(nnx.Module):
    """Dense, activation, dropout, linear, on one token of each document."""

    def __init__(
        self,
        size: int,
        labels: int,
        init: Init,
        activation: Callable[[Array], Array],
        rate: float,
        rate_before: float = 0.0,
    ):
        self.dense = Linear(size, size, init)
        self.out = Linear(size, labels, init)
        self.activation = activation
        self.rate, self.rate_before = rate, rate_before

    def __call__(
        self, hidden: Float[Array, "r t e"], starts: Int[Array, "r n"], key: Key | None
    ) -> Float[Array, "r n labels"]:
        before, after = split(key, 2)
        pooled = dropout(gather_tokens(hidden, starts), self.rate_before, before)
        return self.out(dropout(self.activation(self.dense(pooled)), self.rate, after))
