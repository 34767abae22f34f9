"""`attend` sees its own segment only, is exact, and stays finite where a query sees nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.nn.attention import attend, earlier, same_segment

ROWS, TOKENS, HEADS, SIZE = 3, 11, 2, 5


def inputs(seed: int = 0) -> list[np.ndarray]:
    """Queries, keys and values."""
    draw = np.random.default_rng(seed)
    return [draw.normal(size=(ROWS, TOKENS, HEADS, SIZE)).astype(np.float32) for _ in range(3)]


def segments(*rows: list[int]) -> np.ndarray:
    """Segment ids from the lengths of the documents in each row; what is left is filler."""
    ids = np.zeros((len(rows), TOKENS), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return ids


def reference(queries, keys, values, visible) -> np.ndarray:
    """Attention query by query in float64; a query that sees nothing gives zeros."""
    out = np.zeros(values.shape, np.float64)
    for r, q, h in np.ndindex(queries.shape[:3]):
        seen = visible[r, q]
        if seen.any():
            scores = keys[r, seen, h].astype(np.float64) @ queries[r, q, h] / np.sqrt(queries.shape[-1])
            weights = np.exp(scores - scores.max())
            out[r, q, h] = weights / weights.sum() @ values[r, seen, h]
    return out


def attended(queries, keys, values, ids, dtype=jnp.float32) -> jax.Array:
    """`attend` under segment ids."""
    return attend(*(jnp.asarray(a, dtype) for a in (queries, keys, values)), same_segment(jnp.asarray(ids)))


def test_same_segment_isolates_documents_and_filler():
    """C3: a token sees exactly the tokens of its own document; filler sees nothing and is not seen."""
    visible = np.asarray(same_segment(jnp.asarray([[1, 1, 2, 0, 0]])))[0]
    expected = np.zeros((5, 5), bool)
    expected[:2, :2] = expected[2, 2] = True
    assert (visible == expected).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-2)])
def test_attention_equals_the_definition(dtype, tolerance):
    """C3 C34: packed, half-padded and empty rows all equal attention written out in float64."""
    ids = segments([4, 1, 6], [5], [])
    found = np.asarray(attended(*inputs(), ids, dtype), np.float64)
    expected = reference(*inputs(), np.asarray(same_segment(jnp.asarray(ids))))
    assert np.abs(found - expected).max() < tolerance
    unmasked = reference(*inputs(), np.ones((ROWS, TOKENS, TOKENS), bool))
    assert np.abs(found - unmasked).max() > 0.1, "the mask does nothing"


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(scale):
    """C34: empty and half-padded rows: zeros forward, every gradient finite, and none at all into filler."""
    ids = segments([4, 1, 6], [5], [])
    filler = ids == 0

    def total(queries, keys, values):
        out = attended(scale * queries, keys, values, ids)
        return (jnp.square(out) + out).sum(), out

    gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*inputs())
    assert (np.asarray(out)[filler] == 0).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[filler] == 0).all()
    if scale == 1:  # with larger scores the softmax picks single tokens, and the others rightly get nothing
        assert (np.asarray(gradients[2])[~filler] != 0).any(axis=(1, 2)).all()


def test_the_usual_softmax_fails_where_nothing_is_seen():
    """C34: negative control: the same mask with jax's own softmax of -inf gives NaN forward and backward."""
    visible = np.asarray(same_segment(jnp.asarray(segments([4], [5], []))))[:, None]

    def naive(queries, keys, values):
        scores = jnp.einsum("rqhd,rkhd->rhqk", queries, keys)
        return jnp.einsum("rhqk,rkhd->rqhd", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), values).sum()

    assert np.isnan(naive(*inputs()))
    assert np.isnan(jax.grad(naive, argnums=2)(*inputs())).any()


@pytest.mark.parametrize("broken", [False, True], ids=["isolated", "control"])
def test_another_document_changes_neither_outputs_nor_gradients(broken):
    """C3: with document A perturbed, outputs and gradients of B in the same row stay bit-equal; merged, they move."""
    ids = segments([4, 7], [6, 5], [11])
    mask = np.minimum(ids, 1) if broken else ids
    second = ids == 2

    def of_second(queries, keys, values):
        out = attended(queries, keys, values, mask)
        return (jnp.sin(out) * second[:, :, None, None]).sum(), out

    run = jax.jit(jax.grad(of_second, argnums=(0, 1, 2), has_aux=True))
    before = inputs()
    after = [np.where(second[:, :, None, None], a, 3 * a + 1) for a in before]
    (first, out), (other, moved) = run(*before), run(*after)
    equal = (np.asarray(out)[second] == np.asarray(moved)[second]).all()
    equal &= all((np.asarray(a)[second] == np.asarray(b)[second]).all() for a, b in zip(first, other, strict=True))
    leaked = any(np.asarray(a)[~second].any() for a in first)
    assert equal == (not broken)
    assert leaked == broken


@pytest.mark.parametrize("window", [None, 1, 3])
def test_causal_visibility_counts_positions(window):
    """C3 C34: a token sees itself and those before it in its document, the last few under a window; never another's."""
    ids = segments([4, 7])
    positions = np.concatenate([np.arange(4), np.arange(7)])[None]
    visible = same_segment(jnp.asarray(ids)) & earlier(jnp.asarray(positions), jnp.asarray(positions), window)
    for q, k in np.ndindex(TOKENS, TOKENS):
        behind = positions[0, q] - positions[0, k]
        expected = ids[0, q] == ids[0, k] and 0 <= behind < (window or TOKENS)
        assert visible[0, q, k] == expected


def test_heads_that_share_keys():
    """R57: with fewer heads of keys and values, neighbouring heads of queries share one; as if each had its own."""
    queries, keys, values = inputs()
    queries = np.random.default_rng(1).normal(size=(ROWS, TOKENS, 6, SIZE)).astype(np.float32)
    visible = np.asarray(same_segment(jnp.asarray(segments([4, 1, 6], [5], []))))
    expected = reference(queries, keys.repeat(3, axis=2), values.repeat(3, axis=2), visible)
    found = attend(*map(jnp.asarray, (queries, keys, values, visible)))
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(found - reference(queries, np.tile(keys, (1, 1, 3, 1)), values.repeat(3, 2), visible)).max() > 0.1


def test_scale_and_soft_cap():
    """R57: scores are scaled as told, then bounded by cap * tanh(x / cap); a cap far away changes nothing."""
    queries, keys, values = map(jnp.asarray, inputs())
    visible = same_segment(jnp.asarray(segments([11], [5], [])))
    scores = np.einsum("rqhd,rkhd->rhqk", queries, keys) * 3
    weights = np.exp(2 * np.tanh(scores / 2)) * np.asarray(visible)[:, None]
    expected = np.einsum("rhqk,rkhd->rqhd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9), values)
    assert np.abs(attend(queries, keys, values, visible, scale=3.0, softcap=2.0) - expected).max() < 1e-5
    free, far = (attend(queries, keys, values, visible, softcap=cap) for cap in (None, 1e4))
    assert np.abs(free - far).max() < 1e-5
