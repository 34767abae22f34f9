"""Exact evaluation: every document once, counts added up on device, one fetch at the end."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.data.batch import Batch
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
    outputs: np.ndarray  # float32 [documents, c], in the order of the split


def evaluate(program: Program, params: Params, frozen: Params, batches: EvalBatches, put: Put, ahead: int) -> Evaluated:
    """The counts of a split, and the outputs of each document; nothing else grows with its length (C15)."""
    executable, (_, _, _, abstract) = program.compile(batches[0]), program.specimen(batches[0])
    tally = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)
    documents: np.ndarray | None = None
    late: tuple[Batch, jax.Array] | None = None  # the batch before, so that the device never waits for the host
    for batch in prefetch(batches, 0, ahead):
        tally, outputs = executable(params, frozen, put(batch), tally)
        if documents is None:
            documents = np.zeros((len(batches.encoded), outputs.shape[-1]), np.float32)
        if late is not None:
            _keep(documents, *late)
        late = batch, outputs
    assert documents is not None and late is not None
    _keep(documents, *late)
    found = to_host(tally)
    count = 0 if found.groups is None else jax.tree.leaves(found.groups)[0].shape[0]
    return Evaluated(found.all, [jax.tree.map(lambda a, g=g: a[g], found.groups) for g in range(count)], documents)


def _keep(documents: np.ndarray, batch: Batch, outputs: jax.Array) -> None:
    real = batch["index"] >= 0
    documents[batch["index"][real]] = np.asarray(outputs)[real]
