"""Dropout: its share, its scale, and masks that depend on the key and the place in the array alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.nn.attention import attend, same_segment
from sft_jax.nn.layers import dropout
from sft_jax.nn.random import from_jax, random_bits, split

KEY = from_jax(jax.random.key(7))
COUNT = 1 << 20


def kept(key, rate: float = 0.5, shape: tuple[int, ...] = (COUNT,)) -> np.ndarray:
    """Which elements a mask keeps."""
    return np.asarray(dropout(jnp.ones(shape), rate, key)) != 0


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_and_scale(rate):
    """R20: a share `rate` of the elements is 0, the others are scaled so that the mean stays, and neighbours differ."""
    values = np.asarray(dropout(jnp.full(COUNT, 3.0), rate, KEY))
    spread = (rate * (1 - rate) / COUNT) ** 0.5
    assert abs((values == 0).mean() - rate) < 5 * spread
    assert set(np.unique(values)) == {0.0, np.float32(3.0) / np.float32(1 - rate)}
    assert abs(values.mean() / 3 - 1) < 5 * spread / (1 - rate)
    gone = (values == 0) - rate
    for lag in (1, 2, 64, 768, 4096):
        assert abs((gone[lag:] * gone[:-lag]).mean()) < 5 * rate * (1 - rate) / (COUNT - lag) ** 0.5, lag


def test_no_key_or_no_rate_does_nothing():
    """C26: without a key or at rate 0 the very same array comes back; at rate 1 nothing is left, gradient 0."""
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEY) is x
    values, gradient = jax.value_and_grad(lambda a: dropout(a, 1.0, KEY).sum())(x)
    assert values == 0 and (np.asarray(gradient) == 0).all()


def test_the_gradient_has_the_mask_of_the_forward_pass():
    """R20: gradients are the mask times its scale."""
    forward = dropout(jnp.ones(1000), 0.3, KEY)
    backward = jax.grad(lambda a: dropout(a, 0.3, KEY).sum())(jnp.ones(1000))
    assert (np.asarray(forward) == np.asarray(backward)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_type_stays(dtype):
    """C20: dropout leaves the type of its input alone."""
    assert dropout(jnp.ones(8, dtype), 0.5, KEY).dtype == dtype


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("axes", [("a", None), (None, "a")])
def test_masks_do_not_depend_on_the_sharding(devices, axes):
    """R20 R19: on 1, 2, 4 and 8 devices, by rows or by columns, the mask is bit-equal to that of one array."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("a",))
    sharding = NamedSharding(mesh, P(*axes))
    x = jax.device_put(jnp.ones((16, 24)), sharding)
    run = jax.jit(lambda a, key: dropout(a, 0.4, key), out_shardings=sharding)
    found = run(x, KEY)
    assert len(found.sharding.device_set) == devices
    assert (np.asarray(found) == np.asarray(dropout(jnp.ones((16, 24)), 0.4, KEY))).all()


def test_keys_give_masks_of_their_own():
    """R20: keys of other seeds, steps and places in the model give masks that agree on half of the elements only."""
    stream = jax.random.key(0)
    by_step = [from_jax(jax.random.fold_in(stream, step)) for step in range(4)]
    keys = [KEY, *by_step, *split(KEY, 4), *split(by_step[0], 4)]
    masks = [kept(key) for key in keys]
    for i in range(len(masks)):
        for j in range(i):
            assert abs((masks[i] == masks[j]).mean() - 0.5) < 6 * 0.5 / COUNT**0.5, (i, j)
    assert (kept(KEY) == masks[0]).all(), "the same key must give the same mask"


def test_bits_are_balanced():
    """R20: each of the 32 bits is 1 half of the time, and no two of them move together."""
    bits = np.asarray(random_bits(KEY, (COUNT,)))
    signs = np.stack([(bits >> place & 1).astype(np.float32) * 2 - 1 for place in range(32)])
    together = signs @ signs.T / COUNT
    assert np.abs(signs.mean(axis=1)).max() < 6 / COUNT**0.5
    assert np.abs(together - np.eye(32)).max() < 6 / COUNT**0.5


def test_bits_of_an_array_follow_its_index():
    """R20: bits are those of the flat index, whatever the shape, and all of them differ in a block of a hash."""
    flat = np.asarray(random_bits(KEY, (6 * 5 * 7,)))
    assert (np.asarray(random_bits(KEY, (6, 5, 7))).ravel() == flat).all()
    assert len(np.unique(flat)) == flat.size
    assert random_bits(KEY, ()).shape == ()


def test_split_gives_no_stream_twice():
    """R20: over a tree of splits as a deep model makes it, no key occurs twice and no two streams share a run."""
    keys = [split_key for parent in split(KEY, 48) for child in split(parent, 3) for split_key in split(child, 2)]
    words = {tuple(np.asarray(key).tolist()) for key in keys}
    assert len(words) == len(keys)
    streams = np.stack([np.asarray(random_bits(key, (256,))) for key in keys])
    # 73728 draws of 32 bits meet by chance less than once; a shifted or repeated stream would share hundreds.
    assert streams.size - len(np.unique(streams)) < 10
    assert split(None, 3) == [None, None, None]


def test_attention_drops_probabilities():
    """C26: dropout reaches the attention probabilities: with a key the outputs vary around those without."""
    draw = np.random.default_rng(0)
    queries, keys, values = (jnp.asarray(draw.normal(size=(1, 16, 2, 4)), jnp.float32) for _ in range(3))
    visible = same_segment(jnp.ones((1, 16), jnp.int32))
    plain = attend(queries, keys, values, visible)
    noisy = jax.vmap(lambda key: attend(queries, keys, values, visible, rate=0.2, key=key))
    many = noisy(jnp.stack(split(KEY, 400)))
    error = jnp.abs(many.mean(axis=0) - plain).max()
    assert jnp.abs(many[0] - plain).max() > 0.05 and error < 0.1
    assert (attend(queries, keys, values, visible, rate=0.2) == plain).all()
