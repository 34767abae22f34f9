"""Rotary positions: turning keeps lengths and sees distances alone, and each document has frequencies of its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.errors import ModelError
from sft_jax.nn.rope import read_rope, turn, turns

SIZE, POSITIONS = 8, 16
STRETCHED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0},
}


def turned(x: np.ndarray, first: int = 0, length: int = POSITIONS + 5, **parameters) -> np.ndarray:
    """One row of vectors [t, d] at the positions from `first` on, of a document of this length."""
    positions = jnp.arange(first, first + len(x))[None]
    by = turns(read_rope(parameters, SIZE, POSITIONS), positions, jnp.full_like(positions, length), jnp.float32)
    return np.asarray(turn(jnp.asarray(x, jnp.float32)[None, :, None], by))[0, :, 0]


def vectors(count: int = 6) -> np.ndarray:
    """Some to be turned."""
    return np.random.default_rng(0).normal(size=(count, SIZE)).astype(np.float32)


def test_turning_is_that_of_complex_numbers():
    """R57: pair i of dimensions, half a head apart, turns by position * theta^(-2i/d) radians."""
    x = vectors()
    pairs = x[:, : SIZE // 2] + 1j * x[:, SIZE // 2 :]
    angles = np.arange(len(x))[:, None] * 100.0 ** -(np.arange(0, SIZE, 2) / SIZE)
    expected = pairs * np.exp(1j * angles)
    assert np.abs(turned(x, rope_theta=100.0) - np.concatenate([expected.real, expected.imag], axis=1)).max() < 1e-5


@pytest.mark.parametrize("kind", ["default", *STRETCHED])
def test_products_depend_on_the_distance(kind):
    """C3: the scores of a document are the same wherever its positions begin, so that packing changes nothing."""
    x, parameters = vectors(), {"rope_type": kind, **STRETCHED.get(kind, {})}
    here, there = (turned(x, first, **parameters) for first in (0, 9))
    assert np.abs(here @ here.T - there @ there.T).max() < 1e-4
    assert np.abs(here - there).max() > 0.1
    if kind != "default":
        assert np.abs(here - turned(x)).max() > 1e-3, "nothing is stretched"


@pytest.mark.parametrize("kind", STRETCHED)
def test_only_two_kinds_ask_how_long_a_document_is(kind):
    """C3 R17: dynamic and LongRoPE stretch documents beyond the usual length, each token by its own document."""
    x, parameters = vectors(), {"rope_type": kind, **STRETCHED[kind]}
    usual, beyond = (turned(x, length=length, **parameters) for length in (POSITIONS, POSITIONS + 1))
    assert (np.abs(usual - beyond).max() > 1e-3) == (kind in ("dynamic", "longrope"))
    rope, positions = read_rope(parameters, SIZE, POSITIONS), jnp.arange(6)[None]
    mixed = turns(rope, positions, jnp.asarray([[POSITIONS] * 3 + [POSITIONS + 1] * 3]), jnp.float32)
    both = np.asarray(turn(jnp.asarray(x)[None, :, None], mixed))[0, :, 0]
    assert np.abs(both - np.concatenate([usual[:3], beyond[3:]])).max() < 1e-6


def test_part_of_a_head_may_turn():
    """R57: with a partial factor the last dimensions stay as they are."""
    x = vectors()
    found = turned(x, partial_rotary_factor=0.5)
    assert (found[:, 4:] == x[:, 4:]).all() and np.abs(found[1:, :4] - x[1:, :4]).min() > 1e-4


def test_tables_have_the_type_of_the_computation():
    """C20: angles are float32 whatever the type; only cosine and sine are rounded."""
    positions = jnp.asarray([[3001]])
    rope = read_rope({}, SIZE, POSITIONS)
    fine, rough = (turns(rope, positions, positions, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert all(part.dtype == jnp.bfloat16 for part in rough)
    assert all((f.astype(jnp.bfloat16) == r).all() for f, r in zip(fine, rough, strict=True))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rope_type": "mrope"}, "rope type 'mrope' is not supported"),
        ({"type": "dynamik"}, "did you mean 'dynamic'?"),
        ({"rope_theta": 0}, "rope rope_theta is 0, expected a number above 1"),
        ({"rope_theta": "1e4"}, "rope rope_theta is '1e4'"),
        ({"rope_type": "llama3", "factor": 8}, "rope low_freq_factor is None"),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}, "expected less than"),
        ({"rope_type": "longrope", "short_factor": [1] * 4}, "rope long_factor must be 4 numbers above 0"),
        ({"partial_rotary_factor": 0.1}, "0 dimensions of each head would be turned"),
    ],
)
def test_what_cannot_be_turned_is_named(parameters, said):
    """C26: a way of stretching that is not known, or lacks a number, is an error that names it."""
    with pytest.raises(ModelError) as error:
        read_rope(parameters, SIZE, POSITIONS)
    assert said in str(error.value)
