"""Running statistics in the training step: moved by passes, not by gradients, and kept as everything else is."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection
from sft_jax.config.training import TrainSection
from sft_jax.errors import ConfigError
from sft_jax.nn.layers import Linear
from sft_jax.nn.template import Moving, Normal, Template, stat, zeros
from sft_jax.tasks.task import Ratio
from sft_jax.train.state import beginning, frozen_paths, initial_state, place
from sft_jax.train.step import make_train_step, train_program


class Centred(nnx.Module):
    """A linear layer of what is left when the mean is taken off; the mean moves half the way to that of each batch."""

    def __init__(self):
        self.mean = stat((3,), zeros)
        self.line = Linear(3, 2, Normal(0.5))

    def __call__(self, batch, *, key=None):
        held = self.mean.get_value()
        if isinstance(held, Moving) and key is not None:
            held.moved = (held.moved + batch["x"].mean(axis=0)) / 2
            return self.line(batch["x"] - batch["x"].mean(axis=0))
        return self.line(batch["x"] - (held.value if isinstance(held, Moving) else held))


def stepper(section: TrainSection):
    """(state, frozen, a function from a state to what a step on ones gives)."""
    mesh = meshes.make_mesh(MeshSection(data=1))
    template, optimizer = Template.of(Centred()), optax.adam(0.1)
    axes = {"mean": (".",), "line/kernel": (".", "."), "line/bias": (".",)}
    frozen, begin = frozen_paths(section.freeze, template), beginning(optimizer, section)
    placement = place(mesh, template, axes, frozen, begin)
    state, fixed = initial_state(template, {}, frozen, begin, placement, 0, jnp.dtype("bfloat16"))
    task = SimpleNamespace(loss=lambda out, batch: Ratio((out.astype(jnp.float32) ** 2).sum(), batch["weight"].sum()))
    step = make_train_step(template, task, optimizer, section=section, compute_dtype=jnp.dtype("bfloat16"), seed=0)
    program = train_program(step, placement, state, fixed)

    def take(state, value: float = 1.0):
        ones = np.ones((4, 1), np.float32)
        batch = {"x": np.full((4, 3), value, np.float32), "segment_ids": ones.astype(np.int32), "weight": ones}
        put = meshes.put(batch, meshes.batch_sharding(mesh))
        return program.compile(put)(state, fixed, put)

    return state, fixed, take


@pytest.mark.parametrize("accumulate", [1, 2])
def test_statistics_move_with_every_pass(accumulate):
    """C28: a statistic that is not frozen moves once a microbatch, in float32, has no moments, and is in the state."""
    state, frozen, take = stepper(TrainSection(accumulate=accumulate))
    assert set(state.stats) == {"mean"} and set(state.params) == {"line/bias", "line/kernel"} and not frozen
    state, _ = take(state)
    expected = 0.5 if accumulate == 1 else 0.75
    assert state.stats["mean"].dtype == jnp.float32 and state.stats["mean"].tolist() == [expected] * 3
    assert state.weights["mean"] is state.stats["mean"]
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(state.opt) if "mean" in str(path)]


def test_frozen_statistics_stay():
    """C28: by the patterns that freeze parameters; what is left is trained on the statistics as they are."""
    state, frozen, take = stepper(TrainSection(freeze=["mean"]))
    assert state.stats is None and frozen["mean"].dtype == jnp.float32
    state, metrics = take(state)
    assert state.stats is None and frozen["mean"].tolist() == [0] * 3
    assert float(metrics["loss"].total) > 0, "the control: with the mean of the batch taken off nothing would be left"


def test_a_skipped_step_moves_no_statistic():
    """C10: a step that is not finite leaves statistics as they were."""
    state, _, take = stepper(TrainSection(non_finite="skip"))
    state, _ = take(state)
    state, metrics = take(state, float("nan"))
    assert bool(metrics["skipped"]) and state.stats["mean"].tolist() == [0.5] * 3


def test_something_must_be_left_to_train():
    """Statistics alone are nothing to train."""
    with pytest.raises(ConfigError, match=r"train\.freeze: every parameter is frozen"):
        frozen_paths(["line/**"], Template.of(Centred()))
