"""How far two computations of the same thing may lie apart: bounds that follow from the arithmetic.

A bound that is a figure of one machine and some room above it holds on that machine: another processor has other
vectors, other libraries and another order of additions. Bounds here come from what is computed, in one of two ways.

*Both sides are ours*, and claim to be the same computation: microbatches and one batch, one device and several, layers
looped over and scanned over. Then the program itself is run `in_double`, every float32 of it a float64. What is the
same but for rounding is then the same but for 1e-15 or so, and `SAME` leaves room for a million such units; the
mistakes that such tests are for, as a mean of means, are off by 1e-3 and more in any arithmetic. No processor comes
into it.

*One side is another library's*, in float32. A number of float32 is right to `UNIT` of itself, relatively. A sum of
products, in whatever order, is off by `rounding(terms, size)` at most. A whole network is off by what one rounding of
each of its parameters does to it, times `roundings`: how much that is depends on the network (its condition) and is
measured, not guessed, by moving the parameters of the reference by far more than a rounding and dividing
(`torch_reference.rounded`). Moving each parameter moves each product once, as its own rounding does; the additions
that follow come to the root of half their number again; and both sides are rounded, which is the root of 2 more. Of 25
networks, from one block of 15 numbers to ViT-base, the two libraries were 0.4 to 3 roundings of all parameters apart.

What cancels is no part of this: the bias of keys has a gradient that is 0 in theory and noise in practice, of which
Adam makes whole steps. It is left out, or frozen, where it would be all that is seen.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.run import Run

UNIT = 2.0**-24  # the most that rounding to float32 changes a number, relative to it
TERMS = 256  # of the longest sums in tiny models: tokens of a batch, or numbers of a hidden layer
SAME = 1e-9  # relative, of what is computed in float64


def rounding(terms: int, size: Any = 1.0) -> Any:
    """The most that float32 may be off in a sum of so many products whose absolute values add up to `size`.

    Errors do not all go one way: of n roundings the root of n is left, six times which is exceeded once in 1e8.
    Source: Higham and Mary, 2019, A New Approach to Probabilistic Rounding Error Analysis.
    """
    return 6 * math.sqrt(terms) * UNIT * size


def roundings(terms: int = TERMS) -> float:
    """How many roundings of all parameters at once two float32 networks may lie apart whose sums have so many terms."""
    return math.sqrt(2) * (1 + math.sqrt(terms / 2))


@contextmanager
def in_double() -> Iterator[None]:
    """Programs that are traced in here compute in float64 wherever they would in float32."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(jnp, "float32", jnp.float64)
        patch.setattr(Run, "dtype", np.dtype(np.float64))
        yield


def widened(tree: Any) -> Any:
    """The same tree with float64 in place of float32; to be called `in_double`."""
    return jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, tree)
