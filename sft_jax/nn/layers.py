"""The layers that every family is built from. `key=None` means no dropout: there is no train flag to forget."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sft_jax.nn.quantised import Quantised
from sft_jax.nn.random import Key, random_bits
from sft_jax.nn.template import Init, ones, param, zeros


def lean(function: Callable[..., Array]) -> Callable[..., Array]:
    """The same function; on an accelerator its gradient is computed from its arguments again.

    They are all that is kept then: of `gelu` a third, and the program of BERT-base moves 6 % fewer bytes. On a CPU
    arithmetic is dearer than memory, and a step took 3 % longer.
    """
    again = jax.checkpoint(function)

    def call(*given: Array) -> Array:
        return (function if jax.default_backend() == "cpu" else again)(*given)

    return call


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lean(lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_new": lean(lambda x: jax.nn.gelu(x, approximate=True)),
    "gelu_pytorch_tanh": lean(lambda x: jax.nn.gelu(x, approximate=True)),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def gated(
    activation: Callable[[Array], Array], gate: Float[Array, "..."], x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`activation(gate) * x`. Source: gated linear units, arXiv 2002.05202."""
    return lean(lambda gate, x: activation(gate) * x)(gate, x)


class Linear(nnx.Module):
    """`x @ kernel + bias`, or without a bias; the kernel is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int, init: Init, *, bias: bool = True):
        self.kernel = param((inputs, outputs), init)
        self.bias = param((outputs,), zeros) if bias else None
        self.adapter: Any = None  # `nn.lora.LowRank`, where the layer has one

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        kernel = self.kernel.get_value()
        out = product(x, kernel) if self.adapter is None else self.adapter.linear(x, kernel)
        return out if self.bias is None else out + self.bias[...]


def product(x: Float[Array, "... i"], kernel: Float[Array, "i o"] | Quantised) -> Float[Array, "... o"]:
    """`x @ kernel` of flat matrices: from more dimensions XLA makes a transposed copy of `x` for the kernel's gradient.

    On two cores this took a fifth off the gradient of ViT-base. The numbers of a quantised kernel are computed again in
    the backward pass, so that none live in between.
    """
    if isinstance(kernel, Quantised):
        return jax.checkpoint(lambda x, held: product(x, held[...]))(x, kernel)
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


class Embed(nnx.Module):
    """A table of vectors, looked up by number."""

    def __init__(self, count: int, size: int, init: Init):
        self.embedding = param((count, size), init)
        self.adapter: Any = None

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... size"]:
        if self.adapter is not None:
            return self.adapter.embed(ids, self.embedding[...])
        return jnp.take(self.embedding[...], ids, axis=0)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32 whatever the input's type."""

    def __init__(self, size: int, eps: float):
        self.scale = param((size,), ones)
        self.bias = param((size,), zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:

        def normalise(x: Array, scale: Array, bias: Array) -> Array:
            wide = x.astype(jnp.float32)
            centred = wide - wide.mean(axis=-1, keepdims=True)
            variance = jnp.square(centred).mean(axis=-1, keepdims=True)
            normal = centred * jax.lax.rsqrt(variance + self.eps)
            return (normal * scale + bias).astype(x.dtype)

        return lean(normalise)(x, self.scale[...], self.bias[...])


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis, computed in float32. Source: arXiv 1910.07467.

    `centred`: Gemma's form, which scales by 1 + scale, and in float32; the others round before they scale.
    """

    def __init__(self, size: int, eps: float, *, centred: bool = False):
        self.scale = param((size,), zeros if centred else ones)
        self.eps, self.centred = eps, centred

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:

        def normalise(x: Array, scale: Array) -> Array:
            wide = x.astype(jnp.float32)
            normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
            if self.centred:
                return (normal * (1 + scale.astype(jnp.float32))).astype(x.dtype)
            return (normal.astype(x.dtype) * scale).astype(x.dtype)

        return lean(normalise)(x, self.scale[...])


def dropout(x: Float[Array, "..."], rate: float, key: Key | None) -> Float[Array, "..."]:
    """Zeroes a share `rate` of the elements and scales the others up; does nothing without a key."""
    if key is None or rate == 0:
        return x
    if rate >= 1:
        return jnp.zeros_like(x)  # the scale below would be infinite, and its gradient NaN
    keep = random_bits(key, x.shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def noisy(x: Float[Array, "r t e"], lengths: Int[Array, "r t"], alpha: float, key: Key | None) -> Float[Array, "r t e"]:
    """Uniform noise of size alpha / sqrt(length of the document * e) on embeddings. Source: NEFTune, arXiv 2310.05914.

    Does nothing without a key. `lengths` has the length of each token's document, so that packing changes nothing.
    """
    if key is None or alpha == 0:
        return x
    uniform = random_bits(key, x.shape).astype(jnp.float32) * 2.0**-31 - 1
    scale = alpha * jax.lax.rsqrt(jnp.maximum(lengths, 1).astype(jnp.float32) * x.shape[-1])
    return (x + uniform * scale[..., None]).astype(x.dtype)
