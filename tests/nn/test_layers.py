"""Layers against numpy in float64, and activations against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import rounding

from sft_jax.nn.heads import LastTokenHead, PooledHead, first_token
from sft_jax.nn.layers import ACTIVATIONS, Embed, LayerNorm, Linear, RMSNorm, gated, noisy
from sft_jax.nn.random import from_jax
from sft_jax.nn.template import Normal, Template

DRAW = np.random.default_rng(0)


def bound(module, **params):
    """The module with these numbers."""
    return Template.of(module).bind({path: jnp.asarray(a, jnp.float32) for path, a in params.items()})


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_layer_norm_equals_its_definition(eps, offset):
    """C33: normalisation equals float64 numpy, its epsilon inside the root, also for inputs far from 0."""
    x = (DRAW.normal(size=(4, 3, 17)) + offset).astype(np.float32)
    scale, bias = DRAW.normal(size=(2, 17))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt(wide.var(-1, keepdims=True) + eps) * scale + bias
    found = bound(LayerNorm(17, eps), scale=scale, bias=bias)(jnp.asarray(x))
    # The mean is a sum of 17, and each number less the mean a difference of numbers of their size.
    size = np.abs(x).max() / np.sqrt(wide.var(-1, keepdims=True) + eps) * np.abs(scale) + np.abs(bias)
    assert (np.abs(found - expected) < rounding(17 + 3, size)).all()
    unmoved = (wide - 1.01 * wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + eps) * scale + bias
    assert offset == 0 or (np.abs(unmoved - expected) > 100 * rounding(17 + 3, size)).mean() > 0.9


def test_layer_norm_of_a_constant_row_is_finite():
    """C34: a row without variance gives the bias, and finite gradients."""
    norm = bound(LayerNorm(5, 1e-12), scale=np.ones(5), bias=np.arange(5.0))
    x = jnp.full((2, 5), 3.0)
    assert (np.asarray(norm(x)) == np.arange(5.0)).all()
    assert np.isfinite(jax.grad(lambda a: norm(a)[:, 0].sum())(x)).all()


def test_layer_norm_in_bfloat16_is_computed_in_float32():
    """C20: for bfloat16 inputs only the result is rounded."""
    x = jnp.asarray(100 + DRAW.normal(size=(8, 64)), jnp.bfloat16)
    norm = bound(LayerNorm(64, 1e-5), scale=np.ones(64), bias=np.zeros(64))
    exact = np.asarray(norm(x.astype(jnp.float32)))
    found = norm(x)
    assert found.dtype == jnp.bfloat16
    assert (np.asarray(found) == np.asarray(exact.astype(jnp.bfloat16))).all()


@pytest.mark.parametrize("centred", [False, True])
def test_rms_norm_equals_its_definition(centred):
    """R57: x / sqrt(mean(x^2) + eps), times the scale, or times 1 + scale in Gemma's form; new ones do not scale."""
    x, scale = DRAW.normal(size=(3, 7)), DRAW.normal(size=7)
    plain = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-2)
    found = bound(RMSNorm(7, 1e-2, centred=centred), scale=scale)(jnp.asarray(x, jnp.float32))
    assert np.abs(found - plain * (scale + centred)).max() < 1e-5
    new = Template.of(RMSNorm(7, 1e-2, centred=centred))
    assert np.abs(new.bind(new.initial(jax.random.key(0), new.keys))(jnp.asarray(x)) - plain).max() < 1e-5


@pytest.mark.parametrize("centred", [False, True])
def test_rms_norm_in_bfloat16_rounds_where_the_reference_does(centred):
    """C20: the mean is of float32; Llama's form is rounded before the scale, Gemma's after."""
    x, scale = jnp.asarray(DRAW.normal(size=(8, 64)), jnp.bfloat16), jnp.asarray(DRAW.normal(size=64), jnp.bfloat16)
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    late, early = (normal * (1 + scale.astype(jnp.float32))).astype(x.dtype), normal.astype(x.dtype) * scale
    found = bound(RMSNorm(64, 1e-6, centred=centred), scale=scale)(x)
    assert found.dtype == jnp.bfloat16
    assert (np.asarray(found) == np.asarray(late if centred else early)).all()


def test_linear_and_embed():
    """R57: a linear layer is `x @ kernel + bias` with the inputs first, a table gives its rows."""
    kernel, bias, x = DRAW.normal(size=(4, 7)), DRAW.normal(size=7), DRAW.normal(size=(2, 3, 4))
    found = bound(Linear(4, 7, Normal(1)), kernel=kernel, bias=bias)(jnp.asarray(x, jnp.float32))
    assert np.allclose(found, x @ kernel + bias, atol=1e-5)
    table = DRAW.normal(size=(9, 4)).astype(np.float32)
    ids = np.asarray([[0, 8], [3, 3]])
    assert (np.asarray(bound(Embed(9, 4, Normal(1)), embedding=table)(ids)) == table[ids]).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_definitions(name):
    """C26: every activation that a `config.json` may name computes what that name means."""
    x = np.linspace(-6, 6, 101)
    tanh_gelu = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    expected = {
        "gelu": 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        "gelu_new": tanh_gelu,
        "gelu_pytorch_tanh": tanh_gelu,
        "relu": np.maximum(x, 0),
        "silu": x / (1 + np.exp(-x)),
        "swish": x / (1 + np.exp(-x)),
        "tanh": np.tanh(x),
    }[name]
    # A tail of gelu is a small number by a difference of two near 1: what is rounded is x, not the result.
    assert (np.abs(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)) - expected) <= rounding(3, np.abs(x))).all()


def test_pooling_reads_the_first_token_of_each_document():
    """C24: each document slot pools the token where its document begins."""
    hidden = jnp.arange(24.0).reshape(2, 4, 3)
    found = first_token(hidden, {"starts": jnp.asarray([[0, 2], [3, 0]])})
    assert (np.asarray(found) == np.asarray([[hidden[0, 0], hidden[0, 2]], [hidden[1, 3], hidden[1, 0]]])).all()


def test_the_last_token_of_each_document_is_scored():
    """C24: the head of decoders reads where each document ends, wherever that is, and nothing else."""
    hidden = DRAW.normal(size=(2, 4, 3)).astype(np.float32)
    kernel = DRAW.normal(size=(3, 2)).astype(np.float32)
    template, batch = Template.of(LastTokenHead(3, 2, Normal(1))), {"ends": jnp.asarray([[1, 3], [0, 2]])}
    assert template.keys == ("out/kernel",)
    head = template.bind({"out/kernel": kernel})
    found = head(head.pool(hidden, batch), batch, None)
    expected = np.stack([hidden[[0, 0], [1, 3]], hidden[[1, 1], [0, 2]]]) @ kernel
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(("rate", "before"), [(0.5, 0.0), (0.0, 0.5)])
def test_both_dropouts_of_the_head_act(rate, before):
    """C26: the dropout before the dense layer and the one after it each change the outputs, given a key."""
    head = PooledHead(8, 2, Normal(0.5), jnp.tanh, rate, before)
    template = Template.of(head)
    bind = template.bind(template.initial(jax.random.key(0), template.keys))
    pooled = jnp.asarray(DRAW.normal(size=(2, 1, 8)), jnp.float32)
    plain, noisy = bind(pooled, {}, None), bind(pooled, {}, from_jax(jax.random.key(1)))
    assert plain.shape == (2, 1, 2)
    assert (np.asarray(plain) != np.asarray(noisy)).any()


def test_embedding_noise_is_that_of_neftune():
    """C3: uniform noise of at most alpha / sqrt(length * width), by each document's own length; none without a key."""
    x = jnp.zeros((2, 64, 16))
    lengths = jnp.asarray([[4] * 64, [64] * 64])
    found = np.asarray(noisy(x, lengths, 5.0, from_jax(jax.random.key(1))))
    for row, length in enumerate((4, 64)):
        bound = 5.0 / math.sqrt(length * 16)
        assert 0.98 * bound < np.abs(found[row]).max() <= bound
        assert found[row].std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(found[row].mean()) < 0.05 * bound
    assert not np.asarray(noisy(x, lengths, 5.0, None)).any()


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "layer norm", "rms norm", "gated"])
def test_an_accelerator_keeps_arguments_alone(name, monkeypatch):
    """R30: gradients are the same whether what they need is kept, as on a CPU, or computed again, which keeps less."""
    draw = np.random.default_rng(0)
    x, y = (jnp.asarray(draw.normal(size=(5, 8)), jnp.float32) for _ in range(2))
    norms = {"layer norm": lambda: LayerNorm(8, 1e-5), "rms norm": lambda: RMSNorm(8, 1e-5)}

    def run(x):
        if name in norms:
            template = Template.of(norms[name]())
            return template.bind({path: y[0, :8] for path in template.keys})(x)
        return gated(jax.nn.silu, x, x * y) if name == "gated" else ACTIVATIONS[name](x)

    def kept():
        return sum(a.size for a in jax.tree.leaves(jax.vjp(run, x)[1]))

    one, before = jax.grad(lambda x: jnp.sin(run(x)).sum())(x), kept()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    other = jax.grad(lambda x: jnp.sin(run(x)).sum())(x)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert kept() < before
