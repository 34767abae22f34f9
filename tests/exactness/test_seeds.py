"""Three seeds for three kinds of chance; dropout masks know the seed and the step, and no layout."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import jax
import numpy as np
import pytest
from exact_runs import (
    differing,
    digest,
    documents,
    settings,
    small_model,
    take_steps,
)

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection
from sft_jax.nn import random
from sft_jax.nn.layers import dropout
from sft_jax.run import Run, initial, prepare, train_program

DROPOUT = ("model.dropout=0.1", "optim.name=sgd", "optim.lr=0.1", "train.accumulate=2", "data.layout.kind=packed")
MESHES = {"2": ["mesh.data=2"], "4": ["mesh.data=4"], "1x2x2": ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"]}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Run]:
    """`ready("key=value", ...)`: a run of one block."""
    home, model = tmp_path_factory.mktemp("seeds"), small_model(tmp_path_factory)
    return lambda *more: prepare(settings(home / "run", model, rows, *more))


@pytest.fixture(scope="module")
def alone(ready) -> np.ndarray:
    """The losses of two steps with dropout on one device."""
    return take_steps(ready(*DROPOUT), 2).losses


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_under_dropout_do_not_depend_on_devices(ready, alone: np.ndarray, mesh: str):
    """R20: with dropout on, losses on 2 and 4 devices are those on one within 1e-6."""
    assert take_steps(ready(*DROPOUT, *MESHES[mesh]), 2).losses == pytest.approx(alone, rel=1e-6)


def test_another_mask_would_be_seen(ready, alone: np.ndarray):
    """R20, R21: negative control; another dropout seed moves the loss a thousand times the tolerance."""
    assert abs(take_steps(ready(*DROPOUT, "seed.dropout=1"), 2).losses / alone - 1).min() > 1e-3


def test_masks_follow_the_step(ready):
    """R20: the same batch and parameters at another step have another loss, and at the same step the same one."""
    run = ready(*DROPOUT)
    losses = []
    for step in (0, 5, 0):
        state, frozen = initial(run)
        at_step = meshes.put({"step": np.asarray(step, np.int32)}, meshes.replicated(run.mesh))["step"]
        program, batch = train_program(run, state, frozen), run.batches[0]
        _, metrics = program.compile(batch)(replace(state, step=at_step), frozen, run.put(batch))
        losses.append(float(metrics["loss"].total))
    assert losses[0] == losses[2]
    assert abs(losses[1] / losses[0] - 1) > 1e-3


def test_masks_are_bit_equal_across_layouts():
    """R20: the mask of a batch is the same bits on 1, 2, 4 and 8 devices and any mesh; another step has another."""

    def mask(step: int, **axes: int) -> np.ndarray:
        rows = meshes.batch_sharding(meshes.make_mesh(MeshSection(**axes)))

        def drop(x: jax.Array, step: int) -> jax.Array:
            return dropout(x, 0.1, random.from_jax(jax.random.fold_in(jax.random.key(0), step)))

        ones = jax.device_put(np.ones((8, 24, 16), np.float32), rows)
        return np.asarray(jax.jit(drop, in_shardings=(rows, None), out_shardings=rows)(ones, step))

    one = mask(3, data=1)
    for axes in ({"data": 2}, {"data": 4}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        assert mask(3, **axes).tobytes() == one.tobytes()
    assert (one == 0).mean() == pytest.approx(0.1, abs=0.02)
    assert ((mask(4, data=1) == 0) != (one == 0)).mean() > 0.1


def ids(run: Run) -> list[list[int]]:
    """The documents of every step."""
    return [documents(run.batches[number]) for number in range(run.batches.steps)]


def test_each_seed_rules_one_kind_of_chance(ready):
    """R21, C23: seed.init changes the new head alone, seed.data the order alone, seed.dropout neither."""
    base = ready()
    start, order = initial(base)[0].params, ids(base)
    assert digest(initial(ready())[0].params) == digest(start)
    for name, new_leaves, same_order in (
        ("init", ["['head/out/kernel']"], True),
        ("data", [], False),
        ("dropout", [], True),
    ):
        run = ready(f"seed.{name}=1")
        changed = differing(initial(run)[0].params, start)
        assert changed == new_leaves
        assert (ids(run) == order) == same_order
        assert sorted(chain(*ids(run)[:7])) == sorted(chain(*order[:7]))
