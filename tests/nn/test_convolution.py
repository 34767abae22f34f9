"""Layers on images: which statistics a pass takes, in which type, and what filler may change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.nn.convolution import BatchNorm, Conv, max_pool, normalised, patches
from sft_jax.nn.template import Moving, Template, zeros

DRAW = np.random.default_rng(0)
KEY = jnp.zeros(2, jnp.uint32)
TEMPLATE = Template.of(BatchNorm(3))
PARAMS = {path: jnp.asarray(DRAW.uniform(0.5, 2, 3), jnp.float32) for path in TEMPLATE.keys}
X = jnp.asarray(DRAW.normal(size=(4, 5, 2, 3)), jnp.float32)
ALL = jnp.ones(4, bool)


def passed(x=X, real=ALL, key=KEY, moving=("mean", "variance")):
    """(what a pass gives, the statistics after it), where these may move."""
    held = {path: Moving(PARAMS[path]) for path in moving}
    found = TEMPLATE.bind({**PARAMS, **held})(x, real, key)
    return found, {path: statistic.moved for path, statistic in held.items()}


@pytest.mark.parametrize("how", [{"key": None}, {"moving": ()}, {"moving": ("mean",)}])
def test_running_statistics_unless_all_may_move_in_training(how):
    """C28: without a key, or where one of the two is frozen, a pass takes the stored statistics and moves none."""
    found, after = passed(**how)
    normal = (np.asarray(X, np.float64) - PARAMS["mean"]) / np.sqrt(np.asarray(PARAMS["variance"]) + 1e-5)
    assert np.abs(found - (normal * PARAMS["scale"] + PARAMS["bias"])).max() < 1e-5
    assert all((statistic == PARAMS[path]).all() for path, statistic in after.items())
    trained, moved = passed()
    assert np.abs(trained - found).max() > 0.1 and all((moved[path] != PARAMS[path]).all() for path in moved)


def test_filler_is_not_in_the_statistics_of_a_batch():
    """C16: rows of weight 0, whatever they hold, change neither outputs nor statistics; filler alone moves none."""
    found, after = passed()
    filler = jnp.full((3, *X.shape[1:]), 100.0)
    more, same = passed(jnp.concatenate([filler, X]), jnp.arange(7) >= 3)
    assert np.allclose(more[3:], found, atol=1e-5) and np.isfinite(more).all()
    assert all(np.allclose(same[path], after[path], rtol=1e-6) for path in after)
    counted, wrong = passed(jnp.concatenate([filler, X]), jnp.ones(7, bool))
    assert np.abs(wrong["mean"] - after["mean"]).min() > 1 and np.abs(counted[3:] - found).max() > 0.1
    nothing, stayed = passed(X, ~ALL)
    assert np.isfinite(nothing).all() and all((stayed[path] == PARAMS[path]).all() for path in stayed)


def test_statistics_are_float32_in_bfloat16():
    """C20: of bfloat16 images mean and variance are taken in float32: rounded ones would lose what is far from 0."""
    x = (100 + X).astype(jnp.bfloat16)
    found, after = passed(x)
    assert found.dtype == jnp.bfloat16 and {a.dtype for a in after.values()} == {jnp.dtype("float32")}
    exact, same = passed(x.astype(jnp.float32))
    assert (found == exact.astype(jnp.bfloat16)).all()
    assert all((after[path] == same[path]).all() for path in after)


def test_gradients_are_those_of_the_parts():
    """C28: the gradient that is written out is that of mean, variance and what is made of them, with filler there."""
    x, real = jnp.concatenate([X, 5 + X[:2]]), jnp.arange(6) < 4
    by = jnp.asarray(DRAW.normal(size=x.shape), jnp.float32)

    def parts(x, real, scale, bias, eps):
        share = real[:, None, None, None] / (real.sum() * x.shape[1] * x.shape[2])
        mean = (x * share).sum(axis=(0, 1, 2))
        variance = (jnp.square(x - mean) * share).sum(axis=(0, 1, 2))
        return (x - mean) * jax.lax.rsqrt(variance + eps) * scale + bias

    def pulled(function):
        found, pull = jax.vjp(lambda *given: function(given[0], real, *given[1:], 1e-3), x, *affine)
        return found, *pull(by)

    affine = (PARAMS["scale"], PARAMS["bias"])
    ours, theirs = pulled(lambda *given: normalised(*given)[0]), pulled(parts)
    assert all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    assert np.abs(ours[1]).min(axis=(1, 2, 3)).max() > 1e-3 and np.abs(ours[2]).min() > 0.1


def test_two_passes_move_twice():
    """C28: a second pass of a step (R-Drop) moves on from where the first one left, as in torch."""
    held = {path: Moving(PARAMS[path]) for path in TEMPLATE.stats}
    module = TEMPLATE.bind({**PARAMS, **held})
    module(X, ALL, KEY)
    once = held["mean"].moved
    module(X, ALL, KEY)
    mean = X.mean(axis=(0, 1, 2))
    assert np.allclose(once, 0.9 * PARAMS["mean"] + 0.1 * mean, rtol=1e-5)
    assert np.allclose(held["mean"].moved, 0.9 * once + 0.1 * mean, rtol=1e-5)


def test_statistics_do_not_depend_on_the_devices():
    """R14: over eight devices a batch has the same statistics as on one: those of all its rows."""
    x = jnp.asarray(DRAW.normal(size=(16, 3, 2, 3)), jnp.float32)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("a",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    run = jax.jit(lambda x: passed(x, jnp.ones(16, bool)))
    (here, after), (there, same) = run(x), run(jax.device_put(x, rows))
    assert np.allclose(here, there, atol=1e-5) and all(np.allclose(after[p], same[p], rtol=1e-5) for p in after)


def test_patches_are_cut_in_rows():
    """R57: a patch is its pixels by row, column and channel; what is left at the edges is in none."""
    x = jnp.arange(2 * 5 * 7 * 2).reshape(2, 5, 7, 2)
    found = patches(x, 2)
    assert found.shape == (2, 2, 3, 8)
    assert (found[1, 1, 2] == x[1, 2:4, 4:6].reshape(-1)).all()


def test_kernels_are_shared_by_groups():
    """R57: with groups, a kernel sees its share of the channels alone."""
    template = Template.of(Conv(6, 4, 3, zeros, padding=1, groups=2))
    assert template.shapes == {"kernel": (3, 3, 3, 4)}
    x, bound = jnp.ones((1, 4, 4, 6)), template.bind({"kernel": jnp.ones((3, 3, 3, 4))})
    changed = bound(x.at[..., 5].set(9.0)) != bound(x)
    assert changed[..., 2:].any() and not changed[..., :2].any()


def test_pooling_of_one_pixel_is_that_pixel():
    """R57: padding is never the largest."""
    x = -jnp.ones((1, 1, 1, 2))
    assert (max_pool(x, 3, 2, 1) == x).all()


def test_pixels_are_skipped_in_the_same_way_on_a_gpu(monkeypatch):
    """A kernel of one pixel with a stride, which is no product on a GPU (its compiler fails), gives the same."""
    template = Template.of(Conv(3, 4, 1, zeros, stride=2))
    kernel = {path: jnp.asarray(DRAW.normal(size=template.shapes[path]), jnp.float32) for path in template.keys}

    def run(kernel):
        return jax.value_and_grad(lambda kernel: jnp.sin(template.bind(kernel)(X)).sum())(kernel)

    def convolves():
        return "conv_general_dilated" in str(jax.make_jaxpr(lambda kernel: template.bind(kernel)(X))(kernel))

    assert not convolves()
    one = run(kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolves()
    for mine, theirs in zip(jax.tree.leaves(run(kernel)), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
