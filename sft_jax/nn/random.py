"""Random bits for dropout: a hash of (key, index of the element).

Every bit is a pure function of the key and of the element's place in the whole array, so masks are the same on one
device and on many, in every version of jax; and a mask costs about twenty integer operations an element, fewer than
the twenty rounds of threefry that `jax.random` inlines. Fit for dropout, not for cryptography. The mixing function is
the two-multiply finaliser of Wellons, "Prospecting for hash functions" (2018, public domain), twice.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt32

Key = UInt32[Array, "2"]  # two words; made from a key of jax once a step


def from_jax(key: PRNGKeyArray) -> Key:
    """The words of a key of jax."""
    return jax.random.key_data(key)[-2:]


def split(key: Key | None, count: int) -> list[Key | None]:
    """`count` independent keys, or as many Nones."""
    if key is None:
        return [None] * count
    words = at_places(key, jnp.arange(2 * count, dtype=jnp.uint32)).reshape(count, 2)
    return list(words)


def random_bits(key: Key, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """32 random bits for each element of an array of this shape."""
    return at_places(key, places(shape))


def at_places(key: Any, index: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The random bits of the elements at these places; two words are enough of a key."""
    return mixed(mixed(index ^ key[0]) + key[1])


def places(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """The place of each element in the whole array: 0, 1, 2 ... in rows."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        step = math.prod(shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step)
    return index


def mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Another number for each number, and never the same for two; near ones come out far apart."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)
