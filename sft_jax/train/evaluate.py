"""Exact evaluation: every document once, counts added up on device, one fetch at the end."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sft_jax.data.batch import Batch
from sft_jax.data.loader import EvalBatches, prefetch
from sft_jax.mesh import to_host
from sft_jax.nn.template import Params
from sft_jax.tasks.task import Counts
from sft_jax.train.step import Program

Put = Callable[[Batch], dict[str, jax.Array]]  # a host batch onto the mesh


def evaluate(
    program: Program,
    zero: Counts,
    params: Params,
    frozen: Params,
    batches: EvalBatches,
    put: Put,
    ahead: int,
) -> Counts:
    """The counts of a split, on the host; memory does not grow with its length (C15).

    `zero` are the counts of nothing, as shapes and types.
    """
    executable = program.compile(batches[0])
    counts = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), zero)
    for batch in prefetch(batches, 0, ahead):
        counts = executable(params, frozen, put(batch), counts)
    return to_host(counts)
