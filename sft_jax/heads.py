"""Runs that train a head alone: the features that it reads are computed once, and it learns from memory."""

import time
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from sft_jax import machine, mesh
from sft_jax.data.loader import EvalBatches
from sft_jax.nn.template import Params
from sft_jax.run import Run
from sft_jax.train import features
from sft_jax.train.resume import Tell


def on_features(run: Run, frozen: Params, tell: Tell) -> tuple[Run, Params]:
    """(the run on features, what a step gets beside its state), or the run as it is where they are not to be."""
    if run.recomputed is not None:
        if run.recomputed.startswith(features.DROPOUT):  # all else is as it was asked for
            tell(f"features are computed at every step: {run.recomputed}")
        return run, frozen
    below = {path: array for path, array in frozen.items() if not path.startswith(f"{features.HEAD}/")}
    found = {split: _features(run, split, below, tell) for split in run.data}
    return _placed(run, found), {
        **{path: array for path, array in frozen.items() if path not in below},
        features.FEATURES: mesh.put({features.FEATURES: found["train"].astype(run.dtype)}, mesh.replicated(run.mesh))[
            features.FEATURES
        ],
    }


def _features(run: Run, split: str, below: Params, tell: Tell) -> np.ndarray:
    """The features of a split, from the user's cache where they are there."""
    config, encoded, begun = run.config, run.data[split], time.perf_counter()
    shape = run.batches.shapes[-1]
    batches = EvalBatches.of(encoded, shape, config.eval.batch_size, mesh.batch_parts(run.mesh))

    def make() -> np.ndarray:
        whole = {**below, **{p: jnp.zeros(()) for p in run.model.template.keys if p not in below}}
        return features.compute(
            run.model.template, whole, batches, run.task.grain, run.dtype, run.placement, run.put, config.data.prefetch
        )

    home = machine.cache_home() / "features" if config.data.cache else None
    found, old = features.kept(home, features.origin(below, run.model.config, encoded, run.dtype), make)
    how = "from the cache" if old else f"computed once in {time.perf_counter() - begun:.1f} s"
    tell(f"features of {split}: {len(found):,} × {found.shape[-1]}, {found.nbytes / 1e6:,.0f} MB, {how}")
    return found


def _placed(run: Run, found: dict[str, np.ndarray]) -> Run:
    """The run whose batches bring features, those of training by their places, in place of the model's inputs."""
    grain = run.task.grain
    places = np.arange(len(found["train"]), dtype=np.int32)
    batches = replace(
        run.batches,
        encoded=features.beside(run.data["train"], grain, places, features.PLACE),
        shapes=run.batches.shapes[-1:],
    )
    evals = {
        split: replace(part, encoded=features.beside(part.encoded, grain, found[split]))
        for split, part in run.evals.items()
    }
    return replace(run, batches=batches, evals=evals, template=run.model.template.part(features.HEAD))
