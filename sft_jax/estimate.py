"""What a run will need of each device, before it is begun: shapes, memory and seconds of compiling.

Nothing is allocated, no weights are read and no file is written: state and batches are shapes, and what the compiler
says of the program is taken at its word.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sft_jax.config.schema import Config
from sft_jax.data.batch import Batch
from sft_jax.mesh import batch_parts
from sft_jax.run import Run, otherwise, prepare, train_program
from sft_jax.train.state import abstract_frozen, abstract_state, lying
from sft_jax.train.step import needs

LOOKED_AT = 200  # batches among which the largest shape is looked for
MOST_MICROBATCHES = 16
SAVES = 0.95  # share of the memory before that is less


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device, and what was compiled."""

    parameters: int
    frozen: int
    optimizer: int  # with a moving average and what else a state has
    batch: int
    temporary: int
    total: int  # as the compiler counts, whose arguments may be padded
    shape: tuple[int, int]  # rows and tokens of the batch
    seconds: float


@dataclass(frozen=True)
class Candidate:
    """Settings that may make a step smaller, and what it would need of each device then."""

    settings: tuple[str, ...]
    total: int


def without_weights(config: Config) -> Run:
    """The run as it would be in an empty directory, prepared without weights and without keeping anything in the
    user's cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    data = config.data.model_copy(update={"cache": False})
    model = config.model.model_copy(update={"weights": "random"})
    return prepare(config.model_copy(update={"model": model, "data": data}), anywhere=True)


def estimate(run: Run) -> Estimate:
    """What the step on the largest batch needs."""
    template, placement = run.model.template, run.placement
    state = abstract_state(template, run.frozen, run.begin)
    frozen, batch = abstract_frozen(template, run.frozen, run.dtype, run.few), largest(run)
    begun = time.perf_counter()
    held, temporary = needs(train_program(run, state, frozen).compile(batch))
    parameters = _bytes(state.params, placement.state.params)
    return Estimate(
        parameters=parameters,
        frozen=_bytes(frozen, lying(placement, frozen)),
        optimizer=_bytes(state, placement.state) - parameters,
        batch=sum(array.nbytes for array in batch.values()) // batch_parts(run.mesh),
        temporary=temporary,
        total=held + temporary,
        shape=(batch["segment_ids"].shape[0], batch["segment_ids"].shape[1]),
        seconds=time.perf_counter() - begun,
    )


def largest(run: Run) -> Batch:
    """A batch of the largest shape, or of the largest there is among the first."""
    found = run.batches[0]
    for number in range(1, min(run.batches.steps, LOOKED_AT) if len(run.batches.shapes) > 1 else 1):
        batch = run.batches[number]
        found = batch if batch["segment_ids"].size > found["segment_ids"].size else found
    return found


def _bytes(tree: Any, shardings: Any) -> int:
    """Of what lies on one device."""
    sizes = jax.tree.map(lambda a, s: int(np.prod(s.shard_shape(a.shape))) * a.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def memory() -> int:
    """The memory of a device in bytes; devices that are made of a CPU share that of the machine."""
    device = jax.local_devices()[0]
    known = (device.memory_stats() or {}).get("bytes_limit")
    return int(known or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count())


def smaller(run: Run, total: int, limit: int) -> Iterator[Candidate]:
    """The settings that need less than `total`, each compiled: what is kept of blocks, microbatches, parameters
    divided, and the best of each together; of a kind no more are tried where one fits, or saves no more."""
    together: dict[str, Any] = {}
    for key, values in _tried(run.config, run.mesh.devices.size).items():
        least = total
        for value in values:
            found = _candidate(run, {key: value})
            if found.total < total:
                yield found
            saves, least = found.total < SAVES * least, min(least, found.total)
            together |= {key: value} if saves else {}
            if found.total <= limit or (key == "train.accumulate" and not saves):
                break
    if len(together) > 1:
        yield _candidate(run, together)


def _tried(config: Config, devices: int) -> dict[str, list[Any]]:
    remat, most = config.train.remat, min(MOST_MICROBATCHES, config.train.batch_size // devices)
    divided = config.mesh.fsdp * config.mesh.tensor
    return {
        "train.remat": {"none": ["dots", "full"], "full": []}.get(remat, ["full"]),
        "train.accumulate": [count for count in (2, 4, 8, 16) if config.train.accumulate < count <= most],
        "mesh.fsdp": [devices // config.mesh.tensor] if divided < devices else [],
    }


def _candidate(run: Run, settings: dict[str, Any]) -> Candidate:
    changed = run.config
    for key, value in settings.items():
        name, field = key.split(".")
        section = getattr(changed, name).model_copy(update={field: value})
        if key == "mesh.fsdp":
            section = section.model_copy(update={"data": -1})
        changed = changed.model_copy(update={name: section})
    found = estimate(otherwise(run, changed))
    return Candidate(tuple(f"{key}={value}" for key, value in settings.items()), found.total)
