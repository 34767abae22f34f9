"""Kernels in 8 and 4 bits: how far they are from what they were, what they take, and what lives between passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.nn.layers import product
from sft_jax.nn.quantised import BLOCK, LEVELS, Quantised, quantise


def drawn(inputs: int = 192, outputs: int = 48) -> np.ndarray:
    """A kernel drawn from a normal distribution, each output of another size, one of them 0."""
    draw = np.random.default_rng(0)
    kernel = draw.normal(size=(inputs, outputs)) * draw.uniform(0.1, 3, outputs)
    kernel[:, 3] = 0
    return kernel.astype(np.float32)


def test_codes_are_the_nearest():
    """int8 is off by half a step at most; of nf4 no level is nearer than the one taken, and zero stays zero."""
    kernel = drawn()
    small, half = quantise(kernel, "int8"), quantise(kernel, "nf4")
    step = np.abs(kernel).max(axis=0) / 127
    assert np.all(np.abs(small[...] - kernel) <= 0.5001 * step)
    scales = np.abs(kernel.reshape(-1, BLOCK, 48)).max(axis=1).repeat(BLOCK, axis=0)
    every = np.abs(scales[..., None] * LEVELS - kernel[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(half[...] - kernel), every, atol=1e-6)
    assert not half[...][:, 3].any() and not small[...][:, 3].any()
    # The sixteen levels themselves come back as they are, in the order of the inputs.
    exact = np.tile(LEVELS, 8)[:, None] * np.float32(2.5)
    np.testing.assert_allclose(quantise(exact, "nf4")[...], exact, rtol=1e-6)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.27), ("nf4", 0.15)])
def test_memory_and_shape(kind, share: float):
    """The shape is that of the kernel, inputs that are no multiple of a block too; memory is 8 or 4.5 bits a number."""
    kernel = drawn()
    held = quantise(kernel, kind)
    assert held.shape == kernel.shape and held.nbytes <= share * kernel.nbytes
    odd = quantise(kernel[:100], kind)
    assert odd.shape == odd[...].shape == (100, 48)
    assert odd.astype(jnp.bfloat16)[...].dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ("int8", "nf4"))
def test_host_and_device_agree(kind):
    """Arrays of the host and of a device give the same numbers, under jit too, and a pytree keeps type and inputs."""
    held = quantise(drawn(100), kind)
    on_device = jax.tree.map(jnp.asarray, held)
    assert isinstance(on_device, Quantised)
    np.testing.assert_array_equal(jax.jit(lambda q: q[...])(on_device), held[...])


@pytest.mark.parametrize("kind", ("int8", "nf4"))
def test_no_float_copy_lives_between_the_passes(kind):
    """The product and its gradient are those of the kernel's numbers, and only codes are kept for the way back."""
    held, x = jax.tree.map(jnp.asarray, quantise(drawn(), kind)), jnp.ones((2, 5, 192)) * jnp.arange(192)
    out, back = jax.vjp(lambda x: product(x, held), x)
    plain, plainly = jax.vjp(lambda x: product(x, held[...]), x)
    np.testing.assert_allclose(out, plain, rtol=1e-6)
    np.testing.assert_allclose(back(out)[0], plainly(out)[0], rtol=1e-6)

    def floats(kept) -> list:
        return [a for a in jax.tree.leaves(kept) if a.shape == (192, 48) and a.dtype == jnp.float32]

    assert not floats(back)
    assert floats(plainly)  # control: without it, the numbers would be kept
