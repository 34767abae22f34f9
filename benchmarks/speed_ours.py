"""Ours under `accelerator.py`: a run as `sft-jax train` prepares it, its steps taken as many at a time as asked for.

Speaks lines of JSON: one when the first step is done, then one for each count of steps that is read. Whatever the
product does in a step is in the time, waiting for batches too, but for images, which stay on the device: there both
sides repeat one batch.
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_jax import machine

machine.quiet()
machine.tune()

import jax
import jax.numpy as jnp
from speed_jobs import LORA, Job, lengths

from sft_jax import run as runs
from sft_jax.config.read import read_config
from sft_jax.heads import on_features

TASKS = {"classify": "sequence_classification", "lm": "causal_lm", "image": "image_classification"}


def main() -> None:
    """Prepare, take the first step, and then as many as are asked for."""
    directory, dtype, *more = sys.argv[1:]
    job = Job.read(f"{directory}/job.json")
    config = read_config([], settings(job, Path(directory), dtype, more))
    run = runs.prepare(config.model_copy(update={"model": config.model.model_copy(update={"weights": "random"})}))
    state, frozen = runs.initial(run)
    run, frozen = on_features(run, frozen, lambda text: print(text, file=sys.stderr))
    program = runs.train_program(run, state, frozen)
    batches, stacked = run.stream(0), run.template is not None

    def put(batch: Any) -> Any:
        return run.put(batch, stacked=stacked)

    batch = next(batches)
    with alone():
        executable, held = program.compile(batch), put(batch)
    fixed = job.task == "image" and not stacked

    def steps(count: int) -> dict[str, float]:
        nonlocal state, batch, held
        tokens, documents, taken = [], [], 0
        begun = time.perf_counter()
        while taken < count:
            if not fixed:
                batch = next(batches)
                executable, held = program.compile(batch), put(batch)
            else:
                executable = program.compile(batch)
            state, metrics = executable(state, frozen, held)
            taken += len(batch["weight"]) if stacked else 1
            tokens.append(metrics["tokens"])
            documents.append(metrics["documents"])
        loss = float(jnp.asarray(metrics["loss"].total).sum())
        seconds = time.perf_counter() - begun
        totals = (float(sum(jnp.asarray(one).sum() for one in found)) for found in (tokens, documents))
        return {
            "seconds": seconds,
            "steps": taken,
            **dict(zip(("tokens", "documents"), totals, strict=True)),
            "loss": loss,
        }

    state, metrics = executable(state, frozen, held)
    jax.block_until_ready(metrics)
    say(
        first_step=time.time() - machine.started(),
        compile_seconds=program.seconds,
        versions={"jax": jax.__version__, "python": sys.version.split()[0]},
        device=jax.devices()[0].device_kind,
        product=product(jnp.bfloat16 if dtype == "bfloat16" else jnp.float32),
        flags=os.environ.get("XLA_FLAGS", ""),
        shapes={name: list(array.shape) for name, array in batch.items()},
    )
    for line in sys.stdin:
        count, *traced = line.split(maxsplit=1)
        with jax.profiler.trace(traced[0].strip()) if traced else contextlib.nullcontext():
            found = steps(int(count))
        say(**found, peak_bytes=peak(), programs=program.compiled)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While no other process is here, of those that were told of the same file."""
    with contextlib.ExitStack() as stack:
        if "BENCHMARK_LOCK" in os.environ:
            fcntl.flock(stack.enter_context(open(os.environ["BENCHMARK_LOCK"], "w")), fcntl.LOCK_EX)
        yield


def settings(job: Job, directory: Path, dtype: str, more: list[str]) -> list[str]:
    """The overrides that make this job of ours."""
    image = job.task == "image"
    mean = float(lengths(job).mean())
    documents = job.batch if job.task != "lm" else max(1, round(job.batch * job.longest / mean))
    found = [
        f"run.dir={directory / 'run'}",
        f"model.source={directory / 'model'}",
        f"task.kind={TASKS[job.task]}",
        "data.source.kind=files",
        f"data.source.train={directory / ('images.npz' if image else 'rows.jsonl')}",
        "data.cache=false",
        f"train.compute_dtype={dtype}",
        f"train.batch_size={documents}",
        f"train.steps={job.steps}",
        "eval.every=never",
        "optim.lr=1e-5",
        "optim.schedule.kind=constant",
        "mesh.data=1",
        *job.settings,
        *([LORA] if job.trained == "adapter" else []),
        *([] if image else [f"data.max_length={job.longest}"]),
        *(["data.layout.kind=planned", f"data.layout.length={job.longest}"] if not image else []),
    ]
    return [*found, *more]


def product(dtype: Any) -> float:
    """Operations a second of a large matrix product."""
    size = 8192 if jax.default_backend() != "cpu" else 1024
    a, b = (jax.random.normal(jax.random.key(n), (size, size), dtype) for n in range(2))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(a, b))
    begun, count = time.perf_counter(), 10
    for _ in range(count):
        found = multiply(a, b)
    jax.block_until_ready(found)
    return count * 2 * size**3 / (time.perf_counter() - begun)


def peak() -> int:
    """The most memory that was held, of the device where it tells."""
    held = jax.devices()[0].memory_stats() or {}
    return held.get("peak_bytes_in_use") or machine.peak_memory()


def say(**values: Any) -> None:
    """A line for the other end."""
    print("@" + json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
