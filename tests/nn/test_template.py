"""Templates: paths and their order, binding, initial values that depend on seed and path alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sft_jax.nn.layers import Linear
from sft_jax.nn.stack import Stack
from sft_jax.nn.template import Normal, Template, crc, ones, param, zeros


class Wrapped(nnx.Module):
    """A module with a stack of more than ten layers, so that 10 sorts before 2 as a text."""

    def __init__(self, count: int = 12, width: int = 3):
        self.stack = Stack(count, lambda number: Linear(width, width, Normal(0.5)))
        self.scale = param((width,), ones)
        self.note = "static"

    def __call__(self, x):
        for layer in self.stack:
            x = x + layer(x)
        return x * self.scale[...]


class Shared(nnx.Module):
    """A module that uses one layer in two places."""

    def __init__(self):
        self.first = Linear(2, 2, zeros)
        self.second = self.first


def test_paths_name_every_leaf_and_never_change():
    """C23: paths name layers by number, sorted within a module, and are the same for every template of a model."""
    template = Template.of(Wrapped())
    layers = [f"stack/{i}/{leaf}" for i in range(12) for leaf in ("bias", "kernel")]
    assert sorted(template.keys) == sorted(["scale", *layers])
    assert template.keys == Template.of(Wrapped()).keys
    assert list(template.initial(jax.random.key(0), template.keys)) == sorted(template.keys)
    assert template.shapes["stack/7/kernel"] == (3, 3) and template.shapes["scale"] == (3,)
    assert hash(template) == hash(template)


def test_bind_puts_each_array_in_its_place():
    """R57: a bound module computes with exactly the arrays of the dictionary, in whatever order they are given."""
    template = Template.of(Wrapped())
    params = template.initial(jax.random.key(0), template.keys)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = x
    for i in range(12):
        expected = expected + expected @ np.asarray(params[f"stack/{i}/kernel"])
    shuffled = {path: params[path] for path in reversed(list(params))}
    found = jax.jit(lambda p: template.bind(p)(x))(shuffled)
    assert np.allclose(found, expected, rtol=1e-5)
    halved = template.bind({**params, "scale": params["scale"] / 2})
    assert np.allclose(halved(x), expected / 2, rtol=1e-5)
    with pytest.raises(KeyError):
        template.bind({path: array for path, array in params.items() if path != "scale"})


def test_building_allocates_nothing():
    """R30: a template of a model far beyond this machine's memory is made at once, from shapes alone."""
    template = Template.of(Wrapped(count=2, width=10**6))
    assert template.shapes["stack/1/kernel"] == (10**6, 10**6)


def test_initial_values_depend_on_seed_and_path_alone():
    """C23 R19: a path begins the same whichever others are asked for; another seed or path begins otherwise."""
    template, larger = Template.of(Wrapped()), Template.of(Wrapped(count=13))
    path = "stack/10/kernel"
    whole = template.initial(jax.random.key(3), template.keys)
    alone = template.initial(jax.random.key(3), [path])
    assert list(alone) == [path]
    assert (np.asarray(alone[path]) == np.asarray(whole[path])).all()
    assert (np.asarray(larger.initial(jax.random.key(3), larger.keys)[path]) == np.asarray(whole[path])).all()
    kernels = [np.asarray(whole[f"stack/{i}/kernel"]).tobytes() for i in range(12)]
    assert len(set(kernels)) == 12
    assert (np.asarray(template.initial(jax.random.key(4), [path])[path]) != np.asarray(whole[path])).all()


@pytest.mark.parametrize("devices", [2, 8])
def test_initial_values_do_not_depend_on_the_mesh(devices):
    """R19: drawn under jit and divided over devices, initial values are bit-equal to those of one device."""
    template = Template.of(Wrapped(count=1, width=16))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("a",))
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    run = jax.jit(lambda key: template.initial(key, template.keys), out_shardings=divided)
    found, expected = run(jax.random.key(0)), template.initial(jax.random.key(0), template.keys)
    assert all((np.asarray(found[p]) == np.asarray(expected[p])).all() for p in template.keys)


def test_initial_kinds():
    """C23: biases begin at 0, scales at 1, kernels normal around 0 with the spread asked for, all float32."""
    shape = (300, 300)
    drawn = np.asarray(Normal(0.02)(jax.random.key(0), shape))
    assert drawn.dtype == np.float32
    assert abs(drawn.std() / 0.02 - 1) < 0.02 and abs(drawn.mean()) < 5 * 0.02 / 300
    assert (np.asarray(zeros(jax.random.key(0), shape)) == 0).all()
    assert (np.asarray(ones(jax.random.key(0), shape)) == 1).all()


def test_a_module_used_twice_is_refused():
    """C31: a module that stands in two places is refused, since its copies would drift apart."""
    with pytest.raises(AssertionError, match="shared by reference"):
        Template.of(Shared())


def test_names_of_streams_are_stable_numbers():
    """C23: the number of a name is the checksum that every zlib computes, not the hash of this process."""
    assert crc("123456789") == 0xCBF43926 & 0x7FFFFFFF
    assert crc("head/out/kernel") != crc("head/out/bias")
    assert jnp.int32(crc("dropout")) >= 0
