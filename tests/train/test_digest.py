"""Digests of arrays: the same wherever the array lies, and another for another array."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection
from sft_jax.train.digest import digests


def of(array: np.ndarray, sharding: NamedSharding | None = None) -> str:
    """The digest of one array."""
    return digests({"x": jax.device_put(array, sharding)})["x"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_a_digest_does_not_depend_on_the_mesh(kind: str):
    """R13, R8: an array has one digest, on one device and divided over four in any way."""
    array = np.asarray(jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 4, 6)), kind))
    grid = meshes.make_mesh(MeshSection(data=1, fsdp=2, tensor=2))
    specs = (P(), P("fsdp"), P("fsdp", "tensor"), P(None, ("fsdp", "tensor")), P("tensor", None, "fsdp"))
    assert {of(array, NamedSharding(grid, spec)) for spec in specs} == {of(array)}


def test_every_bit_and_every_place_matters():
    """R8: each of the bits of an array changed by itself, any two of its elements exchanged, and all of them moved by
    one place give digests of their own; so do a zero and its negative."""
    array = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    others = []
    for bit in range(8 * array.nbytes):
        raw = bytearray(array.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        others.append(np.frombuffer(bytes(raw), np.float32).reshape(array.shape))
    for a, b in itertools.combinations(range(array.size), 2):
        swapped = array.copy()
        swapped.flat[a], swapped.flat[b] = array.flat[b], array.flat[a]
        others.append(swapped)
    others.append(np.roll(array, 1))
    found = [of(other) for other in (array, *others)]
    assert len(set(found)) == len(found) > 400
    assert of(np.zeros(3, np.float32)) != of(-np.zeros(3, np.float32))
