"""Exact evaluation: every document once, counts added up on device, one fetch at the end."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.data.batch import Batch, Grain, collect, room_for
from sft_jax.data.loader import EvalBatches, prefetch
from sft_jax.mesh import to_host
from sft_jax.nn.template import Params
from sft_jax.tasks.task import Counts
from sft_jax.train.step import Program

Put = Callable[[Batch], dict[str, jax.Array]]  # a host batch onto the mesh


@dataclass(frozen=True)
class Evaluated:
    """What a split came to, on the host."""

    counts: Counts
    groups: list[Counts]  # of each group, in their order
    kept: np.ndarray  # what the task keeps of the outputs, [documents, k] or [tokens, k], in the order of the split


def evaluate(
    program: Program, params: Params, frozen: Params, batches: EvalBatches, put: Put, ahead: int, grain: Grain
) -> Evaluated:
    """The counts of a split, and what the task keeps of the outputs; nothing else grows with its length (C15)."""
    executable, (_, _, _, abstract) = program.compile(batches[0]), program.specimen(batches[0])
    tally = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)
    kept: np.ndarray | None = None
    late: tuple[Batch, jax.Array] | None = None  # the batch before, so that the device never waits for the host
    for batch in prefetch(batches, 0, ahead):
        tally, outputs = executable(params, frozen, put(batch), tally)
        if kept is None:
            kept = room_for(outputs, batches.encoded, grain)
        if late is not None:
            collect(kept, *late, batches.encoded, grain)
        late = batch, outputs
    assert kept is not None and late is not None
    collect(kept, *late, batches.encoded, grain)
    found = to_host(tally)
    count = 0 if found.groups is None else jax.tree.leaves(found.groups)[0].shape[0]
    return Evaluated(found.all, [jax.tree.map(lambda a, g=g: a[g], found.groups) for g in range(count)], kept)
