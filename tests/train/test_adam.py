"""Adam as it is written in the paper, in float64, beside ours and beside optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bounds import rounding

from sft_jax.train.adam import adam, adamw, scale_by_adam

STEPS, B1, B2, EPS = 60, 0.9, 0.999, 1e-8


def gradients() -> np.ndarray:
    """Of one leaf, [steps, numbers], over six decades."""
    draw = np.random.default_rng(0)
    return (draw.normal(size=(STEPS, 64)) * 10.0 ** draw.uniform(-4, 2, size=64)).astype(np.float32)


def by_hand(*, nesterov: bool) -> np.ndarray:
    """The updates of every step in float64, [steps, numbers]."""
    m, v, found = np.zeros(64), np.zeros(64), []
    for t, g in enumerate(gradients().astype(np.float64), start=1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        ahead = B1 * m / (1 - B1 ** (t + 1)) + (1 - B1) * g / (1 - B1**t) if nesterov else m / (1 - B1**t)
        found.append(ahead / (np.sqrt(v / (1 - B2**t)) + EPS))
    return np.stack(found)


def updates(optimizer: optax.GradientTransformation) -> np.ndarray:
    """The updates of every step, [steps, numbers]."""
    state, found, update = optimizer.init({"p": jnp.zeros(64)}), [], jax.jit(optimizer.update)
    for gradient in gradients():
        moved, state = update({"p": jnp.asarray(gradient)}, state, {"p": jnp.ones(64)})
        found.append(np.asarray(moved["p"]))
    return np.stack(found)


def furthest(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of a step by the step's largest update."""
    return float((np.abs(found - wanted).max(1) / np.abs(wanted).max(1)).max())


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_updates_are_those_of_float64(nesterov: bool):
    """C33: every step is as long as in float64 but for rounding; negative control: with optax's corrections it is not.

    An update goes through a dozen roundings: two moments of three each, two corrections, a root, a sum and a quotient.
    """
    wanted = by_hand(nesterov=nesterov)
    assert furthest(updates(scale_by_adam(B1, B2, EPS, nesterov=nesterov)), wanted) < rounding(12)
    assert furthest(updates(optax.scale_by_adam(B1, B2, EPS, nesterov=nesterov)), wanted) > 4 * rounding(12)


@pytest.mark.parametrize("options", [{}, {"b2": 0.95, "eps_root": 1e-6}, {"mu_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), [(adam, optax.adam), (adamw, optax.adamw)], ids=["adam", "adamw"])
def test_all_else_is_as_optax_has_it(ours, theirs, options: dict):
    """C33: with the same arguments the same state and, but for the corrections, the same updates."""
    one, other = ours(1e-2, **options), theirs(1e-2, **options)
    params = {"p": jnp.ones(64)}
    assert jax.tree.structure(one.init(params)) == jax.tree.structure(other.init(params))
    assert [leaf.dtype for leaf in jax.tree.leaves(one.init(params))] == [
        leaf.dtype for leaf in jax.tree.leaves(other.init(params))
    ]
    np.testing.assert_allclose(updates(one), updates(other), rtol=1e-4, atol=1e-7)


def test_a_decay_of_zero():
    """C33: without a memory of squares an update is the sign of the gradient, from the first step on."""
    found = updates(scale_by_adam(0.0, 0.0, 1e-12))
    np.testing.assert_allclose(found, np.sign(gradients()), rtol=1e-3)
