"""One program for each shape that is met, and nothing else ever compiles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest
from exact_runs import settings, small_model

from sft_jax.nn import stack
from sft_jax.run import Run, initial, prepare, train_program
from sft_jax.train.step import make_train_step

COMPILED = "/jax/core/compile/backend_compile_duration"
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Run]:
    """`ready("key=value", ...)`: a run of one block."""
    home, model = tmp_path_factory.mktemp("compiling"), small_model(tmp_path_factory)
    return lambda *more: prepare(settings(home / "run", model, rows, *more))


@contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of everything that jax compiles meanwhile."""
    found: list[float] = []

    def listen(event: str, seconds: float, **more: object) -> None:
        if event == COMPILED:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def put_all(run: Run) -> list[dict[str, jax.Array]]:
    """The batches of all steps on the mesh."""
    return [run.put(run.batches[number]) for number in range(run.batches.steps)]


@pytest.mark.parametrize("mesh", [(), MESH], ids=["1x1x1", "2x2x2"])
def test_each_shape_compiles_once(ready, mesh: tuple[str, ...]):
    """C29: as many programs are compiled as shapes are met, in the first step of each shape."""
    run = ready("data.layout.kind=bucketed", "data.layout.buckets=2", "train.batch_size=4", "train.epochs=1", *mesh)
    state, frozen = initial(run)
    program = train_program(run, state, frozen)
    batches, steps_that_compiled, met = put_all(run), [], set()
    first_of_shape = []
    for number, batch in enumerate(batches):
        shape = batch["segment_ids"].shape
        if shape not in met:
            first_of_shape.append(number)
            met.add(shape)
        with compilations() as compiled:
            state, _ = program.compile(batch)(state, frozen, batch)
            jax.block_until_ready(state)
        if compiled:
            steps_that_compiled.append(number)
    assert steps_that_compiled == first_of_shape
    assert 2 <= program.compiled == len(met) <= len(run.batches.shapes)


def test_without_explicit_shardings_it_would_compile_again(ready, monkeypatch):
    """C29: negative control; the same step under a plain jit on a 2x2x2 mesh compiles more than once for one shape,
    where the model does not say how its activations lie."""
    monkeypatch.setattr(stack, "by_rows", lambda x, over: x)
    run = ready("data.layout.kind=padded", *MESH)
    state, frozen = initial(run)
    options = {"section": run.config.train, "compute_dtype": run.dtype, "seed": 0}
    plain = jax.jit(make_train_step(run.model.template, run.task, run.optimizer, **options))
    compiling = []
    for batch in put_all(run)[:3]:
        with compilations() as compiled:
            state, _ = plain(state, frozen, batch)
            jax.block_until_ready(state)
        compiling.append(len(compiled))
    assert sum(compiling) > 1
