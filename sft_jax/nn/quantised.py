"""Frozen kernels in 8 or 4 bits, which take the place of an array among parameters.

`int8`: a scale for each output, codes rounded to the nearest. `nf4`: the 16 levels of a normal distribution, a scale
for each output and block of 64 inputs, two codes to a byte. Source: QLoRA, arXiv 2305.14314, without its second
quantisation of the scales. Letters: i inputs, o outputs, b blocks of inputs.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Kind = Literal["int8", "nf4"]
BLOCK = 64
# Appendix E of the paper: the quantiles of a normal distribution, scaled to -1 .. 1, with an exact 0.
LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A kernel [i, o] in few bits; `kernel[...]` is its numbers in the type that `astype` asked for.

    `codes` are [i, o] of 8 bits, or [32 b, o] of two times 4; `scales` are [1, o] or [b, o].
    """

    codes: Any
    scales: Any
    inputs: int = field(metadata={"static": True})
    dtype: Any = field(default=np.dtype(np.float32), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return (*self.codes.shape[:-2], self.inputs, self.codes.shape[-1])

    @property
    def nbytes(self) -> int:
        """The memory that is held."""
        return self.codes.nbytes + self.scales.nbytes

    def astype(self, dtype: Any) -> "Quantised":
        """The same codes, whose numbers are of this type."""
        return replace(self, dtype=jnp.dtype(dtype))

    def __getitem__(self, index: Any) -> Float[Array, "i o"]:
        """The numbers; computed in float32 and rounded once. Of host arrays on the host."""
        assert index is Ellipsis, "a quantised kernel has its numbers all at once"
        on_host = isinstance(self.codes, np.ndarray)
        numbers: Any = np if on_host else jnp
        if self.codes.dtype == np.int8:
            return (self.codes.astype(np.float32) * self.scales).astype(self.dtype)
        pairs = numbers.stack([self.codes & 15, self.codes >> 4], axis=-2)
        blocks = (*self.scales.shape[:-1], BLOCK, self.codes.shape[-1])
        values = numbers.take(numbers.asarray(LEVELS), pairs.reshape(blocks).astype(np.int32), axis=0)
        scaled = (values * self.scales[..., None, :]).reshape(*self.codes.shape[:-2], -1, self.codes.shape[-1])
        return scaled[..., : self.inputs, :].astype(self.dtype)


def abstract(shape: tuple[int, ...], kind: Kind) -> Quantised:
    """What a kernel of this shape, or several as one array, would be: shapes and types alone."""
    *layers, inputs, outputs = shape
    blocks = 1 if kind == "int8" else -(-inputs // BLOCK)
    rows, dtype = (inputs, np.int8) if kind == "int8" else (blocks * BLOCK // 2, np.uint8)
    scales = jax.ShapeDtypeStruct((*layers, blocks, outputs), np.float32)
    return Quantised(jax.ShapeDtypeStruct((*layers, rows, outputs), dtype), scales, inputs)


def quantise(kernel: np.ndarray, kind: Kind) -> Quantised:
    """A kernel [i, o] of the host in few bits; a block of zeros stays zeros."""
    wide = np.asarray(kernel, np.float32)
    inputs, outputs = wide.shape
    if kind == "int8":
        scales = np.abs(wide).max(axis=0, keepdims=True) / 127
        codes = np.rint(wide / np.where(scales == 0, 1, scales)).astype(np.int8)
        return Quantised(codes, scales.astype(np.float32), inputs)
    padded = np.pad(wide, ((0, -inputs % BLOCK), (0, 0))).reshape(-1, BLOCK, outputs)
    scales = np.abs(padded).max(axis=1, keepdims=True)
    near = np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, padded / np.where(scales == 0, 1, scales))
    codes = near.astype(np.uint8).reshape(-1, 2, outputs)
    return Quantised(codes[:, 0] | codes[:, 1] << 4, scales[:, 0], inputs)
