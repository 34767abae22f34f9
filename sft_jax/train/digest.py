"""Digests of arrays: 64 bits that are others when any bit of an array is.

A digest is a sum over the elements of a hash of (bits, place in the whole array), so it is the same however the array
is divided over devices and processes, and is made where the array lies. One changed element always shows; of other
damage one in 2^64 would not. Fit to find what storage did, not what an enemy did.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from sft_jax.mesh import to_host
from sft_jax.nn.random import mixed, places

_START = 0x9E3779B9  # or the first place would be hashed to 0


def digests(tree: Any) -> dict[str, str]:
    """Path of each leaf -> 16 hexadecimal digits; waits for the arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = to_host([_digest(leaf) for _, leaf in leaves])
    return {name(path): f"{int(a):08x}{int(b):08x}" for (path, _), (a, b) in zip(leaves, found, strict=True)}


def name(path: tuple[Any, ...]) -> str:
    """A path of a tree as it is shown: `params/head/out/bias`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _digest(array: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    words = _words(array)
    place = mixed(places(words.shape) + jnp.uint32(_START))
    hashed = mixed(words ^ place)
    return jnp.stack([hashed.sum(dtype=jnp.uint32), (hashed * (place | 1)).sum(dtype=jnp.uint32)])


def _words(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of each element as one word of 32 bits, or two."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)
