"""Heads: from hidden states to what a task's loss reads. Their names on disk belong to the families.

Letters: r rows, t tokens in a row, n document slots in a row, e size of the hidden states, c outputs, v vocabulary. A
head takes features, the batch and a key for dropout. Features are what it reads of the hidden states, `pool`: those of
one token of each document, or all of them. Where all below a head stays as it is, they are computed once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sft_jax.nn.devices import Over
from sft_jax.nn.layers import Linear, dropout
from sft_jax.nn.random import Key, split
from sft_jax.nn.template import Init

ON_VOCABULARY = ("causal_lm", "seq2seq")  # kinds of heads that are part of the model


def every_token(hidden: Float[Array, "r t e"], batch: Mapping[str, Array]) -> Float[Array, "r t e"]:
    """All hidden states."""
    return hidden


def first_token(hidden: Float[Array, "r t e"], batch: Mapping[str, Array]) -> Float[Array, "r n e"]:
    """The hidden states of the first token of each document."""
    return jnp.take_along_axis(hidden, batch["starts"][:, :, None], axis=1)


def last_token(hidden: Float[Array, "r t e"], batch: Mapping[str, Array], filler: int | None) -> Float[Array, "r n e"]:
    """The hidden states of the last token of each document; of the last that is not `filler`, where an id is that.

    The reference knows filler by its id alone, so that a text that ends with it is read before its end; the first token
    of a document that is nothing else.
    """
    places = batch["ends"]
    if filler is not None:
        slots = 1 + jnp.arange(places.shape[1])
        real = (batch["segment_ids"][:, None] == slots[:, None]) & (batch["input_ids"] != filler)[:, None]
        last = jnp.where(real, jnp.arange(real.shape[-1]), -1).max(axis=-1)
        places = jnp.where(last < 0, batch["starts"], last)
    return jnp.take_along_axis(hidden, places[:, :, None], axis=1)


def features_of(module: Any, batch: Mapping[str, Array], key: Key | None) -> Float[Array, "r n_or_t e"]:
    """What the head of a module is given: what the batch brings, where it was computed before, or `module.features`."""
    return batch["features"] if "features" in batch else module.features(batch, key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LazyLogits:
    """Logits over a vocabulary that are not computed until they are asked for, and then for some tokens at a time.

    What a head on a vocabulary returns: [r, t, v] numbers would be most of a step's memory.
    """

    hidden: Float[Array, "r t e"]
    embedding: Float[Array, "v e"]  # of tied heads the embeddings themselves (C31)
    bias: Float[Array, " v"] | None = None
    softcap: float | None = field(default=None, metadata={"static": True})  # Gemma 2: cap * tanh(x / cap)
    over: Over | None = field(default=None, metadata={"static": True})  # several devices

    def of(self, hidden: Float[Array, "... e"]) -> Float[Array, "... v"]:
        """The float32 logits of these hidden states."""
        flat = hidden.reshape(-1, hidden.shape[-1])  # as `nn.layers.product`
        logits = jnp.einsum("ne,ve->nv", flat, self.embedding, preferred_element_type=jnp.float32)
        logits = logits.reshape(*hidden.shape[:-1], -1)
        if self.bias is not None:
            logits = logits + self.bias.astype(jnp.float32)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def dense(self) -> Float[Array, "r t v"]:
        """All of them."""
        return self.of(self.hidden)


class TokenHead(nnx.Module):
    """Dropout and linear, on every token."""

    pool = staticmethod(every_token)

    def __init__(self, size: int, labels: int, init: Init, rate: float):
        self.out = Linear(size, labels, init)
        self.rate = rate

    def __call__(
        self, features: Float[Array, "r t e"], batch: Mapping[str, Array], key: Key | None
    ) -> Float[Array, "r t c"]:
        return self.out(dropout(features, self.rate, key))


class PooledHead(nnx.Module):
    """Dense, activation, dropout, linear, on the first token of each document."""

    pool = staticmethod(first_token)

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
        self, features: Float[Array, "r n e"], batch: Mapping[str, Array], key: Key | None
    ) -> Float[Array, "r n c"]:
        before, after = split(key, 2)
        pooled = dropout(features, self.rate_before, before)
        return self.out(dropout(self.activation(self.dense(pooled)), self.rate, after))


class LastTokenHead(nnx.Module):
    """Linear without a bias, on the last token of each document: the only one that has seen all of it (C24)."""

    def __init__(self, size: int, labels: int, init: Init, filler: int | None = None):
        self.out = Linear(size, labels, init, bias=False)
        self.filler = filler

    def pool(self, hidden: Float[Array, "r t e"], batch: Mapping[str, Array]) -> Float[Array, "r n e"]:
        """The hidden states of the last token of each document."""
        return last_token(hidden, batch, self.filler)

    def __call__(
        self, features: Float[Array, "r n e"], batch: Mapping[str, Array], key: Key | None
    ) -> Float[Array, "r n c"]:
        return self.out(features)
