"""Attention with dropout in one kernel, for NVIDIA GPUs, by Pallas: scores of all pairs of tokens stand nowhere.

Rows hold documents one behind the other; a block of queries reads the keys of its own documents alone. Dropout masks
are those of `attend`, bit for bit: a hash of key and place, computed where it is needed, forward and backward.
Source: FlashAttention-2, arXiv 2307.08691.

Letters: r rows, t tokens (padded to whole blocks), h heads of queries, g of keys and values, d size of a head, n
documents of a row, b blocks of tokens.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from sft_jax.nn.kernels import ATTENDED, Part
from sft_jax.nn.random import Key, at_places

BLOCK = 64  # tokens of a row that are taken at a time


@dataclass(frozen=True)
class How:
    """What a kernel is compiled for."""

    causal: bool
    scale: float
    rate: float
    tokens: int  # of a row as it came
    heads: int  # of all devices
    interpret: bool


def attend(
    queries: Float[Array, "r t h d"],
    keys: Float[Array, "r t g d"],
    values: Float[Array, "r t g d"],
    lengths: Int[Array, "r n"],
    *,
    causal: bool,
    scale: float,
    rate: float = 0.0,
    key: Key | None = None,
    part: Part,
) -> Float[Array, "r t h d"]:
    """What `nn.attention.attend` gives, of documents of these lengths; what follows them in a row is filler."""
    rate = 0.0 if key is None else rate
    begins = jnp.stack([jnp.asarray(number, jnp.uint32) for number in (part.row, part.head)])
    words = jnp.concatenate([jnp.zeros(2, jnp.uint32) if key is None else key, begins])
    tokens = queries.shape[1]
    how = How(causal, scale, rate, tokens, part.heads, interpreted())
    more = ((0, 0), (0, -tokens % BLOCK), (0, 0), (0, 0))
    q, k, v = (jnp.pad(array, more) for array in (queries, keys, values))
    mixed: Any = _attend(how, words, layout(lengths, q.shape[1], causal), q, k, v)
    return mixed[:, :tokens]


def interpreted() -> bool:
    """Whether this is a machine that can follow a kernel but not run it."""
    return jax.default_backend() == "cpu"


def layout(lengths: Int[Array, "r n"], tokens: int, causal: bool) -> tuple[Int[Array, "..."], ...]:
    """(document of each token, counted from 1, 0 for filler; first and last block that the queries of each block read,
    the latter not included; and of queries that read each block)."""
    ends = jnp.cumsum(lengths, axis=-1)
    places = jnp.arange(tokens)
    document = (places[None, None] >= ends[..., None]).sum(axis=1)
    real = places < ends[:, -1:]
    held = jnp.minimum(document, lengths.shape[1] - 1)
    end = jnp.where(real, jnp.take_along_axis(ends, held, axis=1), places)
    begin = jnp.where(real, end - jnp.take_along_axis(lengths, held, axis=1), places)
    first = begin.reshape(len(lengths), -1, BLOCK).min(axis=-1) // BLOCK
    last = -(-end.reshape(len(lengths), -1, BLOCK).max(axis=-1) // BLOCK)
    own = jnp.broadcast_to(jnp.arange(first.shape[1]), first.shape)
    after = own + 1 if causal else last
    found = (jnp.where(real, document + 1, 0), first, after, own if causal else first, last)
    return tuple(array.astype(jnp.int32) for array in found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, words: Any, layout: Any, q: Any, k: Any, v: Any) -> Array:
    return _forward(how, words, layout, q, k, v)[0]


def _with_rest(how: How, words: Any, layout: Any, q: Any, k: Any, v: Any) -> tuple[Array, Any]:
    out, log = checkpoint_name(_forward(how, words, layout, q, k, v), ATTENDED)
    return out, (words, layout, q, k, v, out, log)


# By itself, so that it is traced once for all layers, and that jax leaves it out where nothing that it gives is read.
@functools.partial(jax.jit, static_argnums=0)
def _forward(how: How, words: Array, layout: tuple[Array, ...], q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """(outputs, logarithm of the sum of exponentials [r, h, t])."""
    document, first, last, _, _ = layout
    rows, tokens, heads, _ = q.shape
    shared = heads // k.shape[2]
    log = jax.ShapeDtypeStruct((rows, heads, tokens), jnp.float32)
    return _call(
        functools.partial(_forward_kernel, how=how),
        how,
        q,
        [_whole(words), _row(document), _row(first), _row(last), _block(q), _all(k, shared), _all(v, shared)],
        (jax.ShapeDtypeStruct(q.shape, q.dtype), log),
        (_block(q), _numbers(log)),
    )(words, document, first, last, q, k, v)


def _backward(how: How, rest: Any, above: Array) -> tuple[None, None, Array, Array, Array]:
    words, layout, q, k, v, out, log = rest
    document, first, last, read_first, read_last = layout
    heads = q.shape[2]
    shared = heads // k.shape[2]
    inner = (above.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)  # [r, h, t]
    like = jax.ShapeDtypeStruct(q.shape, q.dtype)
    some, numbers, lines = ([_whole(words), _row(document)], *([of(log), of(inner)] for of in (_numbers, _line)))
    of_queries = _call(
        functools.partial(_queries_kernel, how=how),
        how,
        q,
        [*some, _row(first), _row(last), _block(q), _all(k, shared), _all(v, shared), _block(above), *numbers],
        like,
        _block(q),
    )(words, document, first, last, q, k, v, above, log, inner)
    of_keys, of_values = _call(
        functools.partial(_keys_kernel, how=how),
        how,
        q,
        [*some, _row(read_first), _row(read_last), _all(q), _block(k, shared), _block(v, shared), _all(above), *lines],
        (like, like),
        (_block(q), _block(q)),
    )(words, document, read_first, read_last, q, k, v, above, log, inner)
    if shared > 1:
        split = (*q.shape[:2], heads // shared, shared, q.shape[3])
        of_keys, of_values = (
            a.astype(jnp.float32).reshape(split).sum(axis=3).astype(a.dtype) for a in (of_keys, of_values)
        )
    return None, None, of_queries, of_keys, of_values


_attend.defvjp(_with_rest, _backward)


def _call(kernel: Callable[..., None], how: How, q: Array, given: Any, shapes: Any, places: Any) -> Callable[..., Any]:
    """A kernel over blocks of tokens, heads and rows."""
    rows, tokens, heads, size = q.shape
    return pl.pallas_call(
        kernel,
        grid=(tokens // BLOCK, heads, rows),
        in_specs=given,
        out_specs=places,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=4 if size <= BLOCK else 8, num_stages=2),
        interpret=how.interpret,
        name="attention",
    )


def _whole(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda i, h, r: (0,) * len(array.shape))


def _row(array: Any) -> pl.BlockSpec:
    """All of [r, ...] that a row has."""
    return pl.BlockSpec((None, array.shape[1]), lambda i, h, r: (r, 0))


def _block(array: Any, shared: int = 1) -> pl.BlockSpec:
    """A block of tokens of a head of [r, t, h, d]."""
    return pl.BlockSpec((None, BLOCK, None, array.shape[3]), lambda i, h, r: (r, i, h // shared, 0))


def _all(array: Any, shared: int = 1) -> pl.BlockSpec:
    """All tokens of a head of [r, t, h, d]."""
    return pl.BlockSpec((None, array.shape[1], None, array.shape[3]), lambda i, h, r: (r, 0, h // shared, 0))


def _numbers(array: Any) -> pl.BlockSpec:
    """A block of tokens of a head of [r, h, t]."""
    return pl.BlockSpec((None, None, BLOCK), lambda i, h, r: (r, h, i))


def _line(array: Any) -> pl.BlockSpec:
    """All tokens of a head of [r, h, t]."""
    return pl.BlockSpec((None, None, array.shape[2]), lambda i, h, r: (r, h, 0))


def _some(ref: Any, block: Any) -> Array:
    """A block of tokens of what a kernel has of a row."""
    return triton.load(ref.at[pl.dslice(block * BLOCK, BLOCK)])


def _scores(how: How, q: Array, k: Array, seen: tuple[Array, Array], at: tuple[Any, Any]) -> Array:
    """Scaled scores of a block of queries and one of keys, -inf where a key is not seen."""
    mask = (seen[0][:, None] == seen[1][None, :]) & (seen[0] > 0)[:, None]
    if how.causal:
        queries, keys = (block * BLOCK + jnp.arange(BLOCK) for block in at)
        mask &= queries[:, None] >= keys[None, :]
    return jnp.where(mask, triton.dot(q, k.T) * how.scale, -math.inf)


def _stream(words: Any, how: How) -> tuple[Any, Any, Any]:
    """(two words of a key, the number of the first query of this row and head among all), read before any loop."""
    head, row = (pl.program_id(axis).astype(jnp.uint32) for axis in (1, 2))
    line = (words[2] + row) * jnp.uint32(how.heads) + words[3] + head
    return words[0], words[1], line * jnp.uint32(how.tokens)


def _kept(how: How, stream: tuple[Any, Any, Any], at: tuple[Any, Any]) -> Array:
    """What `attend` multiplies the probabilities of a block with: 0 or 1 / (1 - rate)."""
    queries, keys = (block * BLOCK + jnp.arange(BLOCK) for block in at)
    begins = (stream[2] + queries.astype(jnp.uint32)) * jnp.uint32(how.tokens)
    bits = at_places(stream[:2], begins[:, None] + keys.astype(jnp.uint32)[None, :])
    return jnp.where(bits >= jnp.uint32(min(round(how.rate * 2**32), 2**32 - 1)), 1 / (1 - how.rate), 0.0)


def _forward_kernel(words, document, first, last, q, k, v, out, log, *, how: How) -> None:
    block, stream = pl.program_id(0), _stream(words, how)
    queries, mine = triton.load(q), _some(document, block)

    def step(other: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, peak, total = carry
        scores = _scores(how, queries, _some(k, other), (mine, _some(document, other)), (block, other))
        higher = jnp.maximum(peak, scores.max(axis=1))
        base = jnp.where(higher == -math.inf, 0.0, higher)
        weights = jnp.exp(scores - base[:, None])
        shrunk = jnp.exp(peak - base)
        total = total * shrunk + weights.sum(axis=1)
        if how.rate:
            weights = weights * _kept(how, stream, (block, other))
        values = _some(v, other)
        mixed = mixed * shrunk[:, None] + triton.dot(weights.astype(values.dtype), values)
        return mixed, higher, total

    nothing = jnp.zeros(queries.shape, jnp.float32), jnp.full(BLOCK, -math.inf), jnp.zeros(BLOCK, jnp.float32)
    mixed, peak, total = jax.lax.fori_loop(first[block], last[block], step, nothing)
    seen = total > 0
    triton.store(out, (mixed / jnp.where(seen, total, 1.0)[:, None]).astype(out.dtype))
    triton.store(log, jnp.where(seen, jnp.where(seen, peak, 0.0) + jnp.log(jnp.where(seen, total, 1.0)), math.inf))


def _slopes(
    how: How, stream: tuple[Any, Any, Any], at: tuple[Any, Any], scores: Array, log: Array, by: Array, inner: Array
) -> tuple[Array, Array]:
    """(probabilities after dropout, gradients of scores) of a block; `by` are the gradients of probabilities."""
    probabilities = jnp.exp(scores - log[:, None])
    kept = probabilities
    if how.rate:
        factor = _kept(how, stream, at)
        kept, by = probabilities * factor, by * factor
    return kept, probabilities * (by - inner[:, None]) * how.scale


def _queries_kernel(words, document, first, last, q, k, v, above, log, inner, out, *, how: How) -> None:
    block, stream = pl.program_id(0), _stream(words, how)
    queries, slope, mine = triton.load(q), triton.load(above), _some(document, block)
    logs, inners = triton.load(log), triton.load(inner)

    def step(other: Any, found: Array) -> Array:
        at, keys = (block, other), _some(k, other)
        scores = _scores(how, queries, keys, (mine, _some(document, other)), at)
        _, slopes = _slopes(how, stream, at, scores, logs, triton.dot(slope, _some(v, other).T), inners)
        return found + triton.dot(slopes.astype(keys.dtype), keys)

    found = jax.lax.fori_loop(first[block], last[block], step, jnp.zeros(queries.shape, jnp.float32))
    triton.store(out, found.astype(out.dtype))


def _keys_kernel(words, document, first, last, q, k, v, above, log, inner, of_keys, of_values, *, how: How) -> None:
    block, stream = pl.program_id(0), _stream(words, how)
    keys, values, mine = triton.load(k), triton.load(v), _some(document, block)

    def step(other: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        found_keys, found_values = carry
        at, queries, slope = (other, block), _some(q, other), _some(above, other)
        scores = _scores(how, queries, keys, (_some(document, other), mine), at)
        by = triton.dot(slope, values.T)
        kept, slopes = _slopes(how, stream, at, scores, _some(log, other), by, _some(inner, other))
        found_values = found_values + triton.dot(kept.T.astype(slope.dtype), slope)
        return found_keys + triton.dot(slopes.T.astype(queries.dtype), queries), found_values

    nothing = jnp.zeros(keys.shape, jnp.float32)
    found_keys, found_values = jax.lax.fori_loop(first[block], last[block], step, (nothing, nothing))
    triton.store(of_keys, found_keys.astype(of_keys.dtype))
    triton.store(of_values, found_values.astype(of_values.dtype))
