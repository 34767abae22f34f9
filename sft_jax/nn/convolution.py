"""Layers on images, channels last: convolution, batch normalisation, pooling. Arithmetic and padding are torch's.

Letters: r images (rows of the batch), h height, w width, c and d channels. A row may be filler, which must not enter
what is computed of a whole batch.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sft_jax.nn.layers import product
from sft_jax.nn.random import Key
from sft_jax.nn.template import Init, Moving, Stat, ones, param, stat, zeros


class Conv(nnx.Module):
    """Convolution with a square kernel [k, k, c / groups, d], `padding` zeros on each side of both dimensions.

    Where no pixel belongs to two places of the kernel, it is written as the matrix product that it is: faster on a CPU,
    backwards above all.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        init: Init,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ):
        self.kernel = param((size, size, inputs // groups, outputs), init)
        self.bias = param((outputs,), zeros) if bias else None
        self.size, self.stride, self.padding, self.groups = size, stride, padding, groups

    def __call__(self, x: Float[Array, "r h w c"]) -> Float[Array, "r i j d"]:
        kernel, plain = self.kernel[...], self.padding == 0 and self.groups == 1
        if plain and self.size == 1:
            out = product(x[:, :: self.stride, :: self.stride], kernel[0, 0])
        elif plain and self.size == self.stride:
            out = product(patches(x, self.size), kernel.reshape(-1, kernel.shape[-1]))
        else:
            out = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                [(self.padding, self.padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        return out if self.bias is None else out + self.bias[...]


class BatchNorm(nnx.Module):
    """Batch normalisation, computed in float32 whatever the input's type. Source: arXiv 1502.03167, as in torch.

    A pass in training (a key) takes mean and biased variance of the batch where the running ones may move, and moves
    them, the variance towards the unbiased one. Every other pass takes the running ones, so that images of a batch
    know nothing of each other.
    """

    def __init__(self, size: int, eps: float = 1e-5, momentum: float = 0.1):
        self.scale, self.bias = param((size,), ones), param((size,), zeros)
        self.mean, self.variance = stat((size,), zeros), stat((size,), ones)
        self.eps, self.momentum = eps, momentum

    def __call__(self, x: Float[Array, "r h w c"], real: Bool[Array, " r"], key: Key | None) -> Float[Array, "r h w c"]:
        """`real` tells images from filler."""
        wide, held = x.astype(jnp.float32), [_held(self.mean), _held(self.variance)]
        moving = [statistic for statistic in held if isinstance(statistic, Moving)]
        if key is not None and len(moving) == len(held):
            mean, variance = self._of_batch(wide, real, moving)
        else:
            mean, variance = (s.value if isinstance(s, Moving) else s for s in held)
        normal = (wide - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)

    def _of_batch(
        self, x: Float[Array, "r h w c"], real: Bool[Array, " r"], moving: list[Moving]
    ) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        pixels = real.sum() * (x.shape[1] * x.shape[2])
        count = jnp.maximum(pixels, 1).astype(jnp.float32)
        share = real[:, None, None, None].astype(jnp.float32)
        mean = (x * share).sum(axis=(0, 1, 2)) / count
        variance = (jnp.square(x - mean) * share).sum(axis=(0, 1, 2)) / count
        unbiased = variance * (count / jnp.maximum(count - 1, 1))
        for statistic, found in zip(moving, (mean, unbiased), strict=True):
            step = jnp.where(pixels > 0, self.momentum, 0.0)
            statistic.moved = statistic.moved + step * (jax.lax.stop_gradient(found) - statistic.moved)
        return mean, variance


def _held(statistic: Stat) -> Float[Array, " c"] | Moving:
    return statistic.get_value()


def patches(x: Float[Array, "r h w c"], size: int) -> Float[Array, "r i j d"]:
    """Squares of `size` pixels that do not overlap, each as one vector (row, column, channel); a rest is left out."""
    rows, columns = x.shape[1] // size, x.shape[2] // size
    cut = x[:, : rows * size, : columns * size].reshape(x.shape[0], rows, size, columns, size, x.shape[-1])
    return cut.swapaxes(2, 3).reshape(x.shape[0], rows, columns, -1)


def max_pool(x: Float[Array, "r h w c"], size: int, stride: int, padding: int) -> Float[Array, "r i j c"]:
    """The largest number of each window; what is outside of the image is never the largest.

    Along one side after the other: the gradient of `reduce_window` took up to five times as long on a CPU.
    """
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-jnp.inf)
    for axis in (2, 1):
        count = (x.shape[axis] - size) // stride + 1
        parts = [jax.lax.slice_in_dim(x, b, b + (count - 1) * stride + 1, stride, axis) for b in range(size)]
        x = functools.reduce(_larger, parts)
    return x


def _larger(best: Float[Array, "..."], other: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of equal ones the first, which then has all of the gradient, as in torch; what is not a number is not hidden."""
    return jnp.where((other > best) | jnp.isnan(other), other, best)
