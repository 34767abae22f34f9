"""Losses at their extremes: finite values and gradients in float32, whatever the outputs and the weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.tasks import losses

SIZES = (-1e4, -90.0, 0.0, 17.0, 1e4)
OUTPUTS = jnp.asarray(list(itertools.product(SIZES, repeat=3)), jnp.float32)[:, None]  # [125, 1, 3]
WEIGHT = jnp.ones(OUTPUTS.shape[:2])
CLASS = jnp.arange(len(OUTPUTS))[:, None] % 3
LABELS = jnp.asarray(np.random.default_rng(0).integers(0, 2, OUTPUTS.shape))
NONE = np.zeros(3, np.float32)


def finite(loss, outputs=OUTPUTS) -> None:
    """Value and gradient are finite, and so is each total."""
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x).value))(outputs)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(("gamma", "smoothing", "weights"), [*itertools.product([0.0, 0.3], [0.0, 0.1], [None, NONE])])
def test_losses_of_labels_are_finite(gamma, smoothing, weights):
    """C9: outputs of +-1e4, equal outputs, and weights of 0 give finite losses and gradients, focal ones included."""
    settings = {"gamma": gamma, "smoothing": smoothing}
    finite(lambda x: losses.cross_entropy(x, CLASS, WEIGHT, class_weights=weights, **settings))
    finite(lambda x: losses.binary_cross_entropy(x, LABELS, WEIGHT, positive_weights=weights, **settings))


def test_losses_of_numbers_and_divergences_are_finite():
    """C9: so are errors of numbers, at an error of exactly 0 and of exactly delta too, and divergences."""
    values = jnp.asarray([[0.0], [1.0], [2.0], [-1e4], [1e4]])
    answer, weight = jnp.asarray([[0.0], [0.0], [2.5], [1e4], [-1e4]]), jnp.ones((5, 1))
    finite(lambda x: losses.squared_error(x, answer, weight), values)
    finite(lambda x: losses.huber_error(x, answer, weight, 1.0), values)
    for divergence in (losses.class_divergence, losses.label_divergence):
        finite(lambda x, f=divergence: f(x, -OUTPUTS, WEIGHT))
        finite(lambda x, f=divergence: f(x, x, WEIGHT))


def test_focal_with_gamma_0_is_cross_entropy():
    """A focal loss that weighs nothing down is bit for bit the plain one; with more it is smaller."""
    plain, none, some = (losses.cross_entropy(OUTPUTS, CLASS, WEIGHT, gamma=g).total for g in (0.0, 0.0, 1.0))
    assert plain == none and some < plain


def test_a_sure_answer_keeps_its_focal_weight():
    """The complement of a probability near 1 is exact: (1 - p)^gamma is not 0 before it must be."""
    outputs = jnp.asarray([[[20.0, 0.0]]])  # 1 - p is 2.06e-9, which float32 cannot take from 1
    found = losses.cross_entropy(outputs, jnp.asarray([[0]]), jnp.ones((1, 1)), gamma=0.5)
    p = 1 / (1 + np.exp(20.0))
    assert float(found.total) == pytest.approx(p**0.5 * -np.log1p(-p), rel=1e-4)


def test_documents_of_weight_0_alone_have_no_gradient():
    """C9: a batch of filler, and one of classes that weigh 0, give 0 and a gradient of 0 rather than NaN."""
    for weight, weights in ((0 * WEIGHT, None), (WEIGHT, NONE)):
        gradient = jax.grad(lambda x, a=weight, b=weights: losses.cross_entropy(x, CLASS, a, class_weights=b).value)
        assert not gradient(OUTPUTS).any()


def test_divergence_is_symmetric_and_0_of_equals():
    """Both directions count alike, equal passes have none, and others have some."""
    for divergence in (losses.class_divergence, losses.label_divergence):
        one, other = jnp.tanh(OUTPUTS / 9), jnp.cos(OUTPUTS)
        assert divergence(one, one, WEIGHT).total == 0
        assert divergence(one, other, WEIGHT).total == divergence(other, one, WEIGHT).total > 1
