"""Losses over a vocabulary in chunks: equal to the dense ones, and in no more memory than a chunk takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sft_jax.nn.heads import LazyLogits
from sft_jax.tasks import vocabulary
from sft_jax.tasks.losses import class_divergence
from sft_jax.tasks.vocabulary import chunk_tokens, token_divergence, token_loss, token_scores

R, T, E, V = 3, 13, 5, 37


def drawn(seed: int = 0, softcap: float | None = None) -> tuple[LazyLogits, jax.Array, jax.Array]:
    """(logits, labels, which are wanted) of ragged rows; the last row has nothing."""
    draw = np.random.default_rng(seed)
    arrays = (draw.normal(0, 2, shape).astype(np.float32) for shape in ((R, T, E), (V, E), (V,)))
    hidden, embedding, bias = map(jnp.asarray, arrays)
    wanted = draw.random((R, T)) < 0.4
    wanted[2] = False
    return LazyLogits(hidden, embedding, bias, softcap), jnp.asarray(draw.integers(0, V, (R, T))), jnp.asarray(wanted)


@pytest.fixture(params=[1, 3, 5, 13])
def chunk(request, monkeypatch) -> int:
    """Tokens of a row in a chunk: one, a few that do not divide the row, all."""
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_EACH"):
        monkeypatch.setattr(vocabulary, name, 4 * R * V * request.param)
    assert chunk_tokens(R, T, V) == request.param
    return request.param


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_in_chunks_is_the_dense_one(chunk, smoothing, softcap, platform, monkeypatch):
    """C30: the weighted loss and gradients of hidden states, embeddings and bias are the dense ones.

    Also with the vocabulary filled up to whole lanes, as on a GPU.
    """
    logits, label, wanted = drawn(softcap=softcap)
    pull = jnp.asarray(np.random.default_rng(1).random((R, T)), jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)

    def ours(logits):
        return 3 * token_loss(logits, label, wanted * pull, smoothing)

    def dense(logits):
        target = optax.smooth_labels(jax.nn.one_hot(label, V), smoothing)
        return 3 * (optax.softmax_cross_entropy(logits.dense(), target) * pull * wanted).sum()

    found, expected = jax.value_and_grad(ours)(logits), jax.value_and_grad(dense)(logits)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    each, right = token_scores(logits, label, wanted, smoothing)
    np.testing.assert_allclose(3 * (each * pull).sum(), expected[0], rtol=1e-5)
    assert np.array_equal(right, (logits.dense().argmax(-1) == label) & wanted)


def test_the_divergence_in_chunks_is_the_dense_one(chunk):
    """C30: R-Drop's divergence of two passes and its gradients are those of all logits."""
    (one, _, wanted), (other, _, _) = drawn(0), drawn(7)

    def ours(one, other):
        return token_divergence(one, other, wanted).sum()

    def dense(one, other):
        return class_divergence(one.dense(), other.dense(), wanted.astype(jnp.float32)).total

    found, expected = (jax.value_and_grad(f, (0, 1))(one, other) for f in (ours, dense))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert found[0] > 1, "there is something to compare"


def test_chunks_that_nothing_is_wanted_of_are_skipped(monkeypatch):
    """C30: tokens that nothing is learned of come last, and logits of chunks of them alone are not computed."""
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * R * V * 2)
    logits, label, _ = drawn()
    wanted = jnp.zeros((R, T), bool).at[:, jnp.array([3, 9])].set(True)
    poisoned = LazyLogits(jnp.where(wanted[..., None], logits.hidden, jnp.nan), logits.embedding, logits.bias)
    loss, _ = jax.jit(token_scores)(poisoned, label, wanted)
    assert np.isfinite(loss).all() and (np.asarray(loss) > 0).sum() == 6
    gradient = jax.grad(token_loss)(poisoned, label, wanted.astype(jnp.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), "a chunk that were computed would be NaN"
    assert np.asarray(gradient.hidden).any(axis=-1).sum() == 6


def products(text: str) -> int:
    """Products of matrices in a program."""
    return text.count(" dot_general[")


def test_logits_are_computed_once():
    """C30: loss and gradient take three products over the vocabulary; frozen embeddings get no gradient, nor its sum.

    The control is the gradient of the scores, which computes logits again.
    """
    logits, label, wanted = drawn()
    weight = wanted.astype(jnp.float32)

    def of(hidden, embedding):
        return token_loss(LazyLogits(hidden, embedding), label, weight)

    def twice(hidden, embedding):
        return token_scores(LazyLogits(hidden, embedding), label, wanted)[0].sum()

    given = logits.hidden, logits.embedding
    assert products(str(jax.make_jaxpr(jax.grad(of, (0, 1)))(*given))) == 3
    assert products(str(jax.make_jaxpr(jax.grad(twice, (0, 1)))(*given))) > 3
    frozen = str(jax.make_jaxpr(jax.grad(of))(*given))
    assert products(frozen) == 2 and f"f32[{V},{E}] = broadcast" not in frozen
    both = jax.grad(of, (0, 1))(*given)
    assert np.array_equal(jax.grad(of)(*given), both[0])


def test_nothing_wanted_is_no_loss_and_no_gradient():
    """C9: a batch without a supervised token gives 0 and a gradient of 0, all finite."""
    logits, label, wanted = drawn()
    found, gradient = jax.value_and_grad(token_loss)(logits, label, 0.0 * wanted)
    assert found == 0 and not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_scores_of_narrow_numbers_are_float32():
    """Hidden states in bfloat16 give a loss in float32, near that of float32, and gradients in their own type."""
    logits, label, wanted = drawn()
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), logits)
    loss, _ = token_scores(narrow, label, wanted)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, token_scores(logits, label, wanted)[0], atol=0.2)
    total, gradient = jax.value_and_grad(token_loss)(narrow, label, wanted.astype(jnp.float32))
    assert total.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("bfloat16")}
    wide = jax.grad(token_loss)(logits, label, wanted.astype(jnp.float32))
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wide), strict=True):
        assert np.linalg.norm(one.astype(jnp.float32) - other) < 0.02 * np.linalg.norm(other)


def temporary(tokens: int, vocabulary_size: int) -> int:
    """Temporary bytes of loss and gradient as compiled."""

    def total(hidden, embedding, label, weight):
        return token_loss(LazyLogits(hidden, embedding), label, weight)

    shapes = ((8, tokens, 16), jnp.float32), ((vocabulary_size, 16), jnp.float32), ((8, tokens), jnp.int32)
    given = [jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((8, tokens), jnp.float32))]
    return jax.jit(jax.grad(total, (0, 1))).lower(*given).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_chunk_alone(monkeypatch):
    """C30: temporary bytes follow the chunk, and twice the tokens or the vocabulary is less than a chunk more."""
    budget = 1 << 20
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", budget)
    base, longer, wider = temporary(128, 4096), temporary(256, 4096), temporary(128, 8192)
    logits = 4 * 8 * 128 * 4096
    assert max(base, longer, wider) < logits / 2, "less than half of all logits at once"
    assert longer - base < budget and wider - base < budget
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 1 << 30)
    assert temporary(256, 4096) > temporary(128, 4096) + logits, "the control: in one chunk it grows with the batch"
