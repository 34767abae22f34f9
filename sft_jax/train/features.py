"""Features that are computed once: what a head reads of each document, where all below the head stays as it is.

Whether that is so is seen from the paths that are frozen and from the arithmetic itself. The features of a split are
kept in the user's cache under a hash of all that they depend on. A head is then trained by the steps of `step.py`, many
of them in one call, on batches of the same documents in the same rows, so that state, checkpoints and results are those
of the run without. Knows no family and no source.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Float

from sft_jax.data import cache
from sft_jax.data.batch import Batch, Encoded, Grain, collect, room_for
from sft_jax.data.loader import EvalBatches, TrainBatches, prefetch
from sft_jax.mesh import replicated
from sft_jax.nn.heads import ON_VOCABULARY
from sft_jax.nn.template import Params, Template
from sft_jax.tasks.task import Task
from sft_jax.train.digest import digests
from sft_jax.train.state import Placement, TrainState
from sft_jax.train.step import Arrays, Metrics, abstract, bind

HEAD, FEATURES, PLACE = "head", "features", "place"
DROPOUT = "there is dropout"
ARITHMETIC = ("nn", "models")  # folders of the package that features are computed by


def obstacle(template: Template, task: Task, frozen: Collection[str], batches: TrainBatches, asked: str) -> str | None:
    """Why features are not computed once as `train.cache_features` asks; None where they are."""
    trained = [path for path in template.keys if path not in frozen and not path.startswith(f"{HEAD}/")]
    if asked == "never":
        return "train.cache_features is never"
    if task.head.kind in ON_VOCABULARY:
        return f"a head on a vocabulary, as {task.kind} has it, is part of the model"
    if trained:
        return f"{trained[0]} and {len(trained) - 1} more below the head are not frozen"
    if batches.changes:
        return "training documents are changed at each visit (data.augment, data.images)"
    if asked == "auto" and _draws(template, batches[0]):
        return f"{DROPOUT} below the head; set model.dropout to 0, or train.cache_features to always"
    return None


def _draws(template: Template, batch: Batch) -> bool:
    """Whether anything below the head depends on a key. Traces, and computes nothing."""

    def features(params: Params, batch: Arrays, key: Array) -> Array:
        return template.bind(params).features(batch, key)

    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in template.shapes.items()}
    traced = jax.make_jaxpr(features)(params, abstract(batch), jax.ShapeDtypeStruct((2,), jnp.uint32)).jaxpr
    _, used = dce_jaxpr(traced, [True] * len(traced.outvars))  # looks into loops over layers too
    return used[-1]


def compute(
    template: Template,
    params: Params,
    batches: EvalBatches,
    grain: Grain,
    dtype: Any,
    placement: Placement,
    put: Callable[[Batch], dict[str, Array]],
    ahead: int,
) -> np.ndarray:
    """The features of a split in its order, float32: [documents, e], or [tokens, e] where the head is on tokens."""

    @partial(jax.jit, out_shardings=replicated(placement.mesh))
    def features(params: Params, batch: Arrays) -> Float[Array, "r n_or_t e"]:
        return bind(template, params, dtype).features(batch, None).astype(jnp.float32)

    kept: np.ndarray | None = None
    late: tuple[Batch, Array] | None = None  # the batch before, so that the device never waits for the host
    for batch in prefetch(batches, 0, ahead):
        found = features(params, put(batch))
        kept = room_for(found, batches.encoded, grain) if kept is None else kept
        if late is not None:
            collect(kept, *late, batches.encoded, grain)
        late = batch, found
    assert kept is not None and late is not None
    collect(kept, *late, batches.encoded, grain)
    return kept


def kept(home: Path | None, name: str, make: Callable[[], np.ndarray]) -> tuple[np.ndarray, bool]:
    """(the features of this name, whether they were there), made and kept where they are not."""
    found = cache.load(home, name) if home else None
    if found is not None:
        return found[FEATURES], True
    features = make()
    if home:
        cache.store(home, name, {FEATURES: features})
    return features, False


def origin(params: Params, config: Any, encoded: Encoded, dtype: Any) -> str:
    """A hash of all that the features of a split depend on: weights, sizes, documents and our arithmetic."""
    tokens = {name: _digest(array) for name, array in encoded.tokens.items()}
    documents = [tokens, _digest(encoded.offsets), {name: lazy.digest for name, lazy in encoded.lazy.items()}]
    parts = [digests(params), repr(config), documents, np.dtype(dtype).name, jax.__version__, jax.default_backend()]
    return cache.key([*(json.dumps(part, sort_keys=True) for part in parts), *_arithmetic()])


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in cache.chunks(array):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def beside(encoded: Encoded, grain: Grain, found: np.ndarray, name: str = FEATURES) -> Encoded:
    """The documents with features, or the places of these, where the model's inputs were; they are laid out alike."""
    if grain == "token":
        return Encoded({**encoded.tokens, name: found}, encoded.offsets, encoded.documents, rows=encoded.rows)
    return Encoded({}, encoded.offsets, {**encoded.documents, name: found}, rows=encoded.rows)


def many_steps(step: Callable[..., tuple[TrainState, Metrics]]) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step on each of stacked batches, whose places say which of the features in `frozen` are meant."""

    def steps(state: TrainState, frozen: Params, batches: Arrays, *stream: Array) -> tuple[TrainState, Metrics]:
        def one(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, Metrics]:
            return step(state, frozen, {**batch, FEATURES: frozen[FEATURES][batch[PLACE]]}, *stream)

        return jax.lax.scan(one, state, batches)

    return steps


def _arithmetic() -> list[bytes]:
    home = Path(__file__).parents[1]
    return [file.read_bytes() for folder in ARITHMETIC for file in sorted((home / folder).glob("*.py"))]
