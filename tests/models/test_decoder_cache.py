"""Step by step on a cache of keys and values, a decoder gives what it gives at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import config_of

from sft_jax.models.decoder import empty_cache
from sft_jax.models.family import Head, build_model

PROMPTS, STEPS = (5, 9, 2, 7), 6  # tokens of each prompt, and how many follow one by one
LENGTH = max(PROMPTS) + STEPS  # of the cache
LONGROPE = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 8.0]}
CASES = {
    "gpt2": ("gpt2", {}),
    "llama-dynamic": ("llama", {"max_position_embeddings": 6, "rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": 3}),
    "phi3-longrope": ("phi3", {"original_max_position_embeddings": 12, "rope_scaling": LONGROPE}),
    "gemma3": ("gemma3_text", {"sliding_window": 3, "tie_word_embeddings": True}),
}


class Steps:
    """A random decoder that reads prompts into a cache, then one token of each sequence at a time."""

    def __init__(self, name: str, changes: dict, dtype: str = "float32"):
        model = build_model(config_of(name, initializer_range=0.4, **changes), Head("causal_lm", 0), name)
        self.config, self.template, self.dtype = model.config, model.template, dtype
        drawn = model.template.initial(jax.random.key(0), model.template.keys)
        self.params = {path: array.astype(dtype) for path, array in drawn.items()}
        self.tokens = np.random.default_rng(0).integers(0, 45, (len(PROMPTS), LENGTH)).astype(np.int32)
        self.step = jax.jit(self._step)

    def _step(self, params, ids, positions, cache, at):
        logits, cache = self.template.bind(params).cached(ids, positions, cache, at)
        return logits.dense(), cache

    def at_once(self) -> np.ndarray:
        """Logits of all sequences, as long as the cache, without one."""
        batch = {"input_ids": self.tokens, "segment_ids": np.ones_like(self.tokens)}
        batch["position_ids"] = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), self.tokens.shape)
        return np.asarray(jax.jit(lambda p, b: self.template.bind(p)(b).dense())(self.params, batch))

    def cached(self, left: bool = False) -> list[np.ndarray]:
        """Logits of all tokens of each sequence; filler stands right of the shorter prompts, or left."""
        widest, lengths = max(PROMPTS), np.asarray(PROMPTS)[:, None]
        positions = np.arange(widest) - (widest - lengths if left else 0)
        positions = np.where((positions >= 0) & (positions < lengths), positions, -1).astype(np.int32)
        ids = np.where(positions >= 0, np.take_along_axis(self.tokens, np.maximum(positions, 0), axis=1), 0)
        cache = empty_cache(self.config, batch=len(PROMPTS), length=LENGTH, dtype=self.dtype)
        logits, cache = self.step(self.params, ids, positions, cache, 0)
        found = [list(np.asarray(logits)[row][positions[row] >= 0]) for row in range(len(PROMPTS))]
        for number in range(STEPS):
            places = (lengths + number).astype(np.int32)
            ids = np.take_along_axis(self.tokens, places, axis=1)
            logits, cache = self.step(self.params, ids, places, cache, widest + number)
            for row, held in enumerate(found):
                held.append(np.asarray(logits)[row, 0])
        return [np.stack(held) for held in found]


@pytest.mark.parametrize("name", CASES)
def test_steps_on_a_cache_equal_the_whole(name):
    """R57: prompts of different lengths in one batch, then token by token: each sequence's logits are its own.

    Windows hold in the cache too, and frequencies that depend on the length are those of a document that fills it.
    """
    steps = Steps(*CASES[name])
    whole = steps.at_once()
    assert whole.std() > 0.1
    for row, found in enumerate(steps.cached()):
        assert len(found) == PROMPTS[row] + STEPS
        assert np.abs(found - whole[row, : len(found)]).max() < 2e-5
    assert steps.step._cache_size() == 2, "one program for prompts and one for steps"


def test_filler_may_stand_anywhere():
    """C34: it is positions that count: filler left of the prompts gives what filler right of them gives."""
    steps = Steps(*CASES["gemma3"])
    for right, left in zip(steps.cached(), steps.cached(left=True), strict=True):
        assert np.abs(right - left).max() < 2e-5


def test_the_comparison_sees_another_sequence():
    """C3: negative control: with the cache of two sequences exchanged after the prompts, the logits differ."""
    steps = Steps(*CASES["gpt2"])
    kept = steps.step

    def exchanged(params, ids, positions, cache, at):
        moved = jax.tree.map(lambda leaf: leaf[np.asarray([1, 0, 2, 3])], cache)
        return kept(params, ids, positions, moved if at == max(PROMPTS) else cache, at)

    expected = steps.cached()
    steps.step = exchanged
    found = steps.cached()
    assert np.abs(found[0][-1] - expected[0][-1]).max() > 0.01
    assert np.abs(found[2] - expected[2]).max() < 1e-6


def test_a_cache_has_the_type_asked_for():
    """C20: in bfloat16 all but positions and logits is kept in bfloat16, and the logits are near those of float32."""
    rough, exact = Steps("llama", {}, "bfloat16"), Steps("llama", {})
    exact.params = {path: array.astype(jnp.float32) for path, array in rough.params.items()}
    cache = empty_cache(rough.config, batch=2, length=3, dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(cache)} == {"int32", "bfloat16"}
    ids = np.ones((2, 3), np.int32)
    logits, after = jax.eval_shape(rough.step, rough.params, ids, ids, cache, 0)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), cache
    )
    gaps = [np.abs(r - e).mean() / e.std() for r, e in zip(rough.cached(), exact.cached(), strict=True)]
    assert 1e-4 < max(gaps) < 0.05
