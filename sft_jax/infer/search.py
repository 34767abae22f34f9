"""Token by token: the likeliest, drawn ones, or beams, in one compiled loop over a cache of static size.

Knows no model: a `Forward` takes the newest token of each row, its position, how many tokens were generated before it
and a cache, whose arrays have the rows as their first axis, and gives the logits of the token after and the cache. Rows
are ragged: each has its own length.

Letters: b rows (prompts), k beams, n tokens that can be generated, v vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sft_jax.config.generation import ANYTHING, Generation, Rules

Cache = Any  # a pytree of arrays with the rows first
Forward = Callable[[Int[Array, " r"], Int[Array, " r"], Int[Array, ""], Cache], tuple[Float[Array, "r v"], Cache]]
LEAST = -1e9  # the score of what is no answer; finite, so that sums of it are


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Found:
    """The answer of each row."""

    tokens: Int[Array, "b n"]  # what stands behind an answer's length has no meaning
    lengths: Int[Array, " b"]  # with the token that ends it, where there is one
    scores: Float[Array, " b"]  # sum of the log-probabilities; of beams divided by length ** length_penalty


class _Draws(NamedTuple):
    """A loop over single answers on its way."""

    count: Int[Array, ""]  # tokens that every answer has so far
    tokens: Int[Array, "b n"]
    lengths: Int[Array, " b"]
    scores: Float[Array, " b"]
    open: Bool[Array, " b"]
    logits: Float[Array, "b v"]
    cache: Cache


class _Beams(NamedTuple):
    """A loop over beams on its way: those that are gone on with, and the best whole answers."""

    count: Int[Array, ""]
    tokens: Int[Array, "b k n"]
    scores: Float[Array, "b k"]
    whole: Int[Array, "b k n"]
    whole_lengths: Int[Array, "b k"]
    whole_scores: Float[Array, "b k"]
    is_whole: Bool[Array, "b k"]
    hopeful: Bool[Array, " b"]  # whether a better answer can still be found
    logits: Float[Array, "b k v"]
    cache: Cache


def search(
    forward: Forward,
    logits: Float[Array, "b v"],
    cache: Cache,
    lengths: Int[Array, " b"],
    numbers: Int[Array, " b"],
    section: Generation,
    stop: Sequence[int],
    rules: Rules = ANYTHING,
) -> Found:
    """Answers to prompts whose last tokens gave these logits; `lengths` has the position of each answer's first token.

    `numbers` tells the rows apart when tokens are drawn: what is drawn depends on seed, number and place, and on no
    other row.
    """
    if section.num_beams > 1:
        return _beams(forward, logits, cache, lengths, section, stop, rules)
    return _single(forward, logits, cache, lengths, numbers, section, stop, rules)


def _single(
    forward: Forward,
    logits: Float[Array, "b v"],
    cache: Cache,
    lengths: Int[Array, " b"],
    numbers: Int[Array, " b"],
    section: Generation,
    stop: Sequence[int],
    rules: Rules,
) -> Found:
    rows, most = logits.shape[0], section.max_new_tokens
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(section.seed), number))(numbers)

    def pick(scores: Float[Array, "b v"], state: _Draws) -> Int[Array, " b"]:
        if not section.temperature:
            return jnp.argmax(scores, axis=-1)
        chances = likeliest(scores / section.temperature, section.top_k, section.top_p)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, state.count)
        return jax.vmap(jax.random.categorical)(own, chances)

    def step(state: _Draws) -> _Draws:
        scores = ruled(jax.nn.log_softmax(state.logits), state.count, most, stop, rules)
        token = pick(scores, state).astype(jnp.int32)
        gained = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
        after, cache = forward(token, lengths + state.count, state.count, state.cache)
        return _Draws(
            state.count + 1,
            state.tokens.at[:, state.count].set(token),
            state.lengths + state.open,
            state.scores + jnp.where(state.open, gained, 0),
            state.open & ~_ends(token, stop),
            after.astype(jnp.float32),
            cache,
        )

    begin = _Draws(
        jnp.zeros((), jnp.int32),
        jnp.zeros((rows, most), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows),
        jnp.ones(rows, bool),
        logits.astype(jnp.float32),
        cache,
    )
    end = jax.lax.while_loop(lambda state: (state.count < most) & state.open.any(), step, begin)
    return Found(end.tokens, end.lengths, end.scores)


def _beams(
    forward: Forward,
    logits: Float[Array, "b v"],
    cache: Cache,
    lengths: Int[Array, " b"],
    section: Generation,
    stop: Sequence[int],
    rules: Rules,
) -> Found:
    """Beam search; which answers are kept, and when it ends, as `transformers` 5 has it.

    Of each row, (1 + stop tokens) times as many continuations as beams are looked at, so that enough of them go on
    when all the best ones end.
    """
    rows, vocabulary, beams, most = *logits.shape, section.num_beams, section.max_new_tokens
    looked_at = min(max(2, 1 + len(stop)) * beams, beams * vocabulary)
    among_best = jnp.arange(looked_at) < beams
    repeated = jax.tree.map(lambda a: jnp.repeat(a, beams, axis=0), cache)
    each = jnp.repeat(lengths, beams)

    def step(state: _Beams) -> _Beams:
        gained = ruled(jax.nn.log_softmax(state.logits), state.count, most, stop, rules)
        total = gained + state.scores[..., None]
        scores, picked = jax.lax.top_k(total.reshape(rows, -1), looked_at)
        beam, token = picked // vocabulary, (picked % vocabulary).astype(jnp.int32)
        tokens = _of(state.tokens, beam).at[:, :, state.count].set(token)
        count = state.count + 1
        ends = _ends(token, stop) | (count >= most)

        # Whole answers: the best of those there were and those that end now.
        full = state.is_whole.all(axis=-1) & (section.early_stopping is True)
        taken = ends & among_best & (state.hopeful & ~full)[:, None]
        penalised = scores / count.astype(jnp.float32) ** section.length_penalty
        merged = jnp.concatenate([state.whole_scores, jnp.where(taken, penalised, LEAST)], axis=1)
        whole_scores, best = jax.lax.top_k(merged, beams)
        whole = _of(jnp.concatenate([state.whole, tokens], axis=1), best)
        now = jnp.full_like(token, count)
        whole_lengths = _of(jnp.concatenate([state.whole_lengths, now], axis=1), best)
        is_whole = _of(jnp.concatenate([state.is_whole, ends & among_best], axis=1), best)

        # Beams that go on: the best that do not end.
        scores, on = jax.lax.top_k(scores + ends * LEAST, beams)
        tokens, token, beam = _of(tokens, on), _of(token, on), _of(beam, on)
        place = (jnp.arange(rows)[:, None] * beams + beam).reshape(-1)
        moved = jax.tree.map(lambda a: a[place], state.cache)
        after, cache = forward(token.reshape(-1), each + state.count, state.count, moved)

        # Whether the best beam could still beat the worst whole answer.
        longest = most if section.early_stopping == "never" and section.length_penalty > 0 else count
        best_possible = scores[:, 0] / jnp.asarray(longest, jnp.float32) ** section.length_penalty
        worst = jnp.where(is_whole, whole_scores.min(axis=1, keepdims=True), LEAST)
        hopeful = state.hopeful & (best_possible[:, None] > worst).any(axis=-1)
        logits = after.astype(jnp.float32).reshape(rows, beams, -1)
        return _Beams(count, tokens, scores, whole, whole_lengths, whole_scores, is_whole, hopeful, logits, cache)

    def goes_on(state: _Beams) -> Bool[Array, ""]:
        finished = state.is_whole.all() & (section.early_stopping is True)
        return (state.count < most) & state.hopeful.any() & ~finished

    nothing, no_score = jnp.zeros((rows, beams, most), jnp.int32), jnp.full((rows, beams), LEAST)
    begin = _Beams(
        jnp.zeros((), jnp.int32),
        nothing,
        no_score.at[:, 0].set(0),  # the first token is one of the first beam's, or all beams would be the same
        nothing,
        jnp.zeros((rows, beams), jnp.int32),
        no_score,
        jnp.zeros((rows, beams), bool),
        jnp.ones(rows, bool),
        jnp.repeat(logits.astype(jnp.float32)[:, None], beams, axis=1),
        repeated,
    )
    end = jax.lax.while_loop(goes_on, step, begin)
    return Found(end.whole[:, 0], end.whole_lengths[:, 0], end.whole_scores[:, 0])


def ruled(
    scores: Float[Array, "... v"], count: Int[Array, ""], most: int, stop: Sequence[int], rules: Rules
) -> Float[Array, "... v"]:
    """Log-probabilities of the token number `count` as the rules leave them, in the order of `transformers` 5.

    What may not be said has -inf, and nothing is shared out anew; what must be said has 0.
    """
    never = [token for token in rules.banned if token not in stop]
    if never:
        scores = scores.at[..., jnp.asarray(never)].set(-jnp.inf)
    if rules.least and stop:
        early = scores.at[..., jnp.asarray(stop)].set(-jnp.inf)
        scores = jnp.where(count < rules.least, early, scores)
    for token, place in ((rules.first, 0), (rules.last, most - 1)):
        if token is not None:
            only = jnp.full(scores.shape[-1], -jnp.inf).at[token].set(0)
            scores = jnp.where(count == place, only, scores)
    return scores


def likeliest(logits: Float[Array, "b v"], top_k: int | None, top_p: float) -> Float[Array, "b v"]:
    """Logits with -inf for all but the `top_k` likeliest, and of these all but those that make up `top_p` together.

    Of equal logits at the edge all stay. The likeliest token always stays. Sources: arXiv 1805.04833, 1904.09751.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(chances, axis=-1) - chances
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _ends(token: Int[Array, "..."], stop: Sequence[int]) -> Bool[Array, "..."]:
    return (token[..., None] == jnp.asarray(stop, jnp.int32)).any(axis=-1) if stop else jnp.zeros(token.shape, bool)


def _of(values: Array, picked: Int[Array, "b m"]) -> Array:
    """The entries of each row that are picked."""
    return jnp.take_along_axis(values, picked.reshape(*picked.shape, *[1] * (values.ndim - 2)), axis=1)
