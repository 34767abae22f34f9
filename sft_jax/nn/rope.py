"""Rotary positions (arXiv 2104.09864) and every published way to stretch them, as `transformers` computes them.

Letters: r rows, t tokens in a row, h heads, d size of a head, p pairs of its dimensions that are turned.

Two of these ways depend on how long a document is. That is the length of the token's own document, never that of the
row or the batch, so that packing changes nothing (R17).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sft_jax.errors import ModelError, did_you_mean

Turns = tuple[Float[Array, "r t 1 p"], Float[Array, "r t 1 p"]]  # cosine and sine of each token's angles


@dataclass(frozen=True)
class Rope:
    """How fast each pair of dimensions turns."""

    frequencies: tuple[float, ...]  # radians a position
    scale: float = 1.0  # of cosine and sine
    usual: int = 0  # longest document that is not stretched, of the two ways that ask for it
    longer: tuple[float, ...] | None = None  # frequencies of documents beyond it (LongRoPE)
    growth: float | None = None  # how much the base grows with documents beyond it (dynamic NTK)


def read_rope(parameters: Mapping[str, Any], head_dim: int, num_positions: int) -> Rope:
    """The frequencies that `rope_parameters` describe, for heads of this size; refuses by name what is not known."""
    apart = [key for key, value in parameters.items() if type(value) is dict]
    if apart:
        raise ModelError(f"config.json: rope parameters of their own for {', '.join(apart)} are not supported here")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if type(kind) is not str or kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS)
        raise ModelError(f"config.json: rope type {kind!r:.60} is not supported{hint} (known: {', '.join(KINDS)})")
    size = int(head_dim * _number(parameters, "partial_rotary_factor", 1.0, most=1))
    if size < 2 or size % 2:
        raise ModelError(f"config.json: {size} dimensions of each head would be turned, expected an even number")
    theta = _number(parameters, "rope_theta", 10_000.0, least=1)
    plain = Rope(_floats(theta ** -(np.arange(0, size, 2) / size)))
    return KINDS[kind](plain, parameters, num_positions)


def turns(rope: Rope, positions: Int[Array, "r t"], lengths: Int[Array, "r t"], dtype: jnp.dtype) -> Turns:
    """Cosine and sine for tokens at these positions of documents of these lengths; angles are float32."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.longer is not None:
        frequencies = jnp.where(lengths[..., None] > rope.usual, jnp.asarray(rope.longer, jnp.float32), frequencies)
    if rope.growth is not None:
        pairs = len(rope.frequencies)
        grown = rope.growth * jnp.maximum(lengths, rope.usual) / rope.usual - (rope.growth - 1)
        frequencies = frequencies * grown[..., None] ** -(jnp.arange(pairs) / max(pairs - 1, 1))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cosine, sine = ((rope.scale * part)[:, :, None].astype(dtype) for part in (jnp.cos(angles), jnp.sin(angles)))
    return cosine, sine


def turn(x: Float[Array, "r t h d"], by: Turns) -> Float[Array, "r t h d"]:
    """Turns the first 2p dimensions of each head, pairs being p apart; the others stay."""
    cosine, sine = by
    pairs = cosine.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)


def _default(plain: Rope, parameters: Mapping[str, Any], num_positions: int) -> Rope:
    return plain


def _linear(plain: Rope, parameters: Mapping[str, Any], num_positions: int) -> Rope:
    """Positions divided by a factor."""
    return replace(plain, frequencies=_floats(np.asarray(plain.frequencies) / _number(parameters, "factor")))


def _dynamic(plain: Rope, parameters: Mapping[str, Any], num_positions: int) -> Rope:
    """NTK-aware: the base grows with the length of documents beyond the usual one."""
    return replace(plain, usual=num_positions, growth=_number(parameters, "factor"))


def _yarn(plain: Rope, parameters: Mapping[str, Any], num_positions: int) -> Rope:
    """Slow pairs are stretched, fast ones are not, those between partly. Source: arXiv 2309.00071."""
    original = _number(parameters, "original_max_position_embeddings", num_positions)
    factor = _number(parameters, "factor", num_positions / original)
    theta, size = _number(parameters, "rope_theta", 10_000.0, least=1), 2 * len(plain.frequencies)

    def boundary(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = boundary(_number(parameters, "beta_fast", 32)), boundary(_number(parameters, "beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    stretched = np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)
    fast = np.asarray(plain.frequencies)
    scale = _number(parameters, "attention_factor", _yarn_scale(factor, parameters))
    return replace(plain, frequencies=_floats(fast / factor * stretched + fast * (1 - stretched)), scale=scale)


def _yarn_scale(factor: float, parameters: Mapping[str, Any]) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(_number(parameters, "mscale")) / scale(_number(parameters, "mscale_all_dim"))
    return scale(1)


def _longrope(plain: Rope, parameters: Mapping[str, Any], num_positions: int) -> Rope:
    """A factor for each pair, of one set for usual documents, of another for longer ones. Source: arXiv 2402.13753."""
    original = max(1, int(_number(parameters, "original_max_position_embeddings", num_positions)))
    factor = _number(parameters, "factor", num_positions / original)
    stretched = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
    sets = []
    for key in ("short_factor", "long_factor"):
        values = parameters.get(key)
        listed = values if type(values) is list else []
        if len(listed) != len(plain.frequencies) or not all(type(v) in (int, float) and v > 0 for v in listed):
            raise ModelError(f"config.json: rope {key} must be {len(plain.frequencies)} numbers above 0")
        sets.append(_floats(np.asarray(plain.frequencies) / np.asarray(listed)))
    scale = _number(parameters, "attention_factor", stretched)
    return replace(plain, frequencies=sets[0], longer=sets[1], usual=original, scale=scale)


def _llama3(plain: Rope, parameters: Mapping[str, Any], num_positions: int) -> Rope:
    """Pairs that turn slower than once in the original length are stretched, fast ones are not."""
    original = _number(parameters, "original_max_position_embeddings", num_positions)
    factor, slow, fast = (_number(parameters, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if not slow < fast:
        raise ModelError(f"config.json: rope low_freq_factor is {slow}, expected less than high_freq_factor ({fast})")
    frequencies = np.asarray(plain.frequencies)
    kept = np.clip((original * frequencies / (2 * math.pi) - slow) / (fast - slow), 0, 1)
    return replace(plain, frequencies=_floats((1 - kept) * frequencies / factor + kept * frequencies))


KINDS: dict[str, Callable[[Rope, Mapping[str, Any], int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


def _number(
    parameters: Mapping[str, Any], key: str, default: float | None = None, *, least: float = 0, most: float = 2**31
) -> float:
    value: Any = parameters.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not least < value <= most:
        raise ModelError(
            f"config.json: rope {key} is {value!r:.60}, expected a number above {least} and at most {most:g}"
        )
    return float(value)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())
