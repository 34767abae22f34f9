"""Layers on images, channels last: convolution, batch normalisation, pooling. Arithmetic and padding are torch's.

Letters: r images (rows of the batch), h height, w width, c and d channels. A row may be filler, which must not enter
what is computed of a whole batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sft_jax.nn.layers import product
from sft_jax.nn.random import Key
from sft_jax.nn.template import Init, Moving, Stat, ones, param, stat, zeros


class Conv(nnx.Module):
    """Convolution with a square kernel [k, k, c / groups, d], `padding` zeros on each side of both dimensions.

    Where no pixel belongs to two places of the kernel, it is written as the matrix product that it is: faster on a CPU,
    backwards above all. Not where a GPU would skip pixels: XLA 0.11 ends the process when it compiles that.
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
        if plain and self.size == 1 and (self.stride == 1 or jax.default_backend() != "gpu"):
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
        held = [_held(self.mean), _held(self.variance)]
        moving = [statistic for statistic in held if isinstance(statistic, Moving)]
        if key is not None and len(moving) == len(held):
            found: Normalised = normalised(x, real, self.scale[...], self.bias[...], self.eps)
            self._move(moving, real.sum() * (x.shape[1] * x.shape[2]), *found[1:])
            return found[0]
        mean, variance = (s.value if isinstance(s, Moving) else s for s in held)
        normal = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)

    def _move(
        self, moving: list[Moving], pixels: Int[Array, ""], mean: Float[Array, " c"], variance: Float[Array, " c"]
    ) -> None:
        count = jnp.maximum(pixels, 1).astype(jnp.float32)
        unbiased = variance * (count / jnp.maximum(count - 1, 1))
        for statistic, found in zip(moving, (mean, unbiased), strict=True):
            step = jnp.where(pixels > 0, self.momentum, 0.0)
            statistic.moved = statistic.moved + step * (jax.lax.stop_gradient(found) - statistic.moved)


Normalised = tuple[Float[Array, "r h w c"], Float[Array, " c"], Float[Array, " c"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def normalised(
    x: Float[Array, "r h w c"],
    real: Bool[Array, " r"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    eps: float,
) -> Normalised:
    """(every image normalised, mean, biased variance): by the statistics of those that are real, in float32.

    The gradient is written out, and does not see mean and variance: it takes two sums over the batch where that of the
    parts took five, and keeps `x` as it came.
    """
    return _normalise(x, real, scale, bias, eps)[0]


def _normalise(x: Array, real: Array, scale: Array, bias: Array, eps: float) -> tuple[Normalised, tuple[Array, ...]]:
    share = real[:, None, None, None] / jnp.maximum(real.sum() * (x.shape[1] * x.shape[2]), 1).astype(jnp.float32)
    wide = x.astype(jnp.float32)
    mean = (wide * share).sum(axis=(0, 1, 2))
    variance = (jnp.square(wide - mean) * share).sum(axis=(0, 1, 2))
    inverse = jax.lax.rsqrt(variance + eps)
    out = (wide - mean) * inverse * scale + bias
    return (out.astype(x.dtype), mean, variance), (x, share, scale, mean, inverse)


def _normalise_back(eps: float, kept: tuple[Array, ...], given: Normalised) -> tuple[Array, np.ndarray, Array, Array]:
    x, share, scale, mean, inverse = kept
    of_out, normal = given[0].astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    of_bias, of_scale = of_out.sum(axis=(0, 1, 2)), (of_out * normal).sum(axis=(0, 1, 2))
    of_x = scale * inverse * (of_out - share * (of_bias + normal * of_scale))
    nothing = np.zeros(x.shape[0], jax.dtypes.float0)
    return of_x.astype(x.dtype), nothing, of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


normalised.defvjp(_normalise, _normalise_back)


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
