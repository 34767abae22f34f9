"""Which steps are skipped, and that skipping leaves everything as it was and is counted.

The model here is one linear layer in the run's own training step, so that all compiles in no time.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection
from sft_jax.config.training import Spikes, TrainSection
from sft_jax.errors import NonFiniteError
from sft_jax.nn.layers import Linear
from sft_jax.nn.template import Normal, Template
from sft_jax.tasks.task import Ratio
from sft_jax.train.guard import Guard
from sft_jax.train.meter import Meter
from sft_jax.train.state import beginning, initial_state, place
from sft_jax.train.step import make_train_step, train_program

SKIP = TrainSection(non_finite="skip", ema=0.9)
SPIKES = TrainSection(spikes=Spikes(window=4, sigma=2.0))


def decisions(guard: Guard, losses: list[float], section: TrainSection) -> tuple[list[bool], Guard]:
    """Whether each step is taken, and the guard after them."""
    found = []
    for loss in losses:
        take, guard = guard.judge(jnp.float32(loss), jnp.float32(1.0), section)
        found.append(bool(take))
    return found, guard


def test_a_spike_is_far_above_the_window():
    """R24: no step is a spike before the window is full; then one above mean + sigma * std is, and leaves no trace."""
    losses = [9.0, 1.0, 1.2, 0.8, 1.1, 1.3, 50.0, 1.0, 40.0, 1.2]
    taken, guard = decisions(Guard.begin(4), losses, SPIKES)
    assert taken == [True] * 6 + [False, True, False, True]
    assert (int(guard.skipped), int(guard.in_row), int(guard.taken)) == (2, 0, 8)
    assert sorted(np.asarray(guard.losses).tolist()) == pytest.approx([1.0, 1.1, 1.2, 1.3]), "the last four taken"
    quiet = TrainSection(spikes=Spikes(window=4, sigma=1000.0))
    assert decisions(Guard.begin(4), losses, quiet)[0] == [True] * 10


def test_the_decision_is_the_same_after_a_resume():
    """R24: what is decided after step k depends on the guard alone, which is in the checkpoint."""
    losses = [1.0, 1.1, 0.9, 1.0, 1.05, 7.0, 1.0, 6.0]
    whole, _ = decisions(Guard.begin(4), losses, SPIKES)
    first, guard = decisions(Guard.begin(4), losses[:5], SPIKES)
    saved = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).copy()), guard)
    assert first + decisions(saved, losses[5:], SPIKES)[0] == whole
    assert whole[5] is False and decisions(Guard.begin(4), losses[5:], SPIKES)[0][0] is True, "the control"


class Line(nnx.Module):
    """One linear layer."""

    def __init__(self):
        self.line = Linear(3, 2, Normal(0.5))

    def __call__(self, batch, *, key=None):
        return self.line(batch["x"])


def stepper(section: TrainSection):
    """(state, a function from state and batch number to what a step gives); batch 2 holds a NaN."""
    mesh = meshes.make_mesh(MeshSection(data=1))
    template, optimizer = Template.of(Line()), optax.adam(0.1)
    begin = beginning(optimizer, section)
    placement = place(mesh, template, {"line/kernel": (".", "."), "line/bias": (".",)}, frozenset(), begin)
    state, frozen = initial_state(template, {}, frozenset(), begin, placement, 0, jnp.dtype("float32"))
    task = SimpleNamespace(loss=lambda out, batch: Ratio((out**2).sum(), batch["weight"].sum()))
    step = make_train_step(template, task, optimizer, section=section, compute_dtype=jnp.dtype("float32"), seed=0)
    program = train_program(step, placement, state, frozen)

    def take(state, number: int):
        x = np.random.default_rng(number).normal(size=(4, 3)).astype(np.float32)
        if number == 2:
            x[1, 1] = math.nan
        ones = np.ones((4, 1), np.float32)
        batch = meshes.put({"x": x, "segment_ids": ones.astype(np.int32), "weight": ones}, meshes.batch_sharding(mesh))
        return program.compile(batch)(state, frozen, batch)

    return state, take


def test_a_step_that_is_not_finite_leaves_everything():
    """C10, R23: parameters, moments and average are bit-equal after it, the loss is reported raw, and it is counted."""
    state, take = stepper(SKIP)
    state, _ = take(state, 1)
    before = jax.device_get(state)
    state, metrics = take(state, 2)
    assert math.isnan(float(metrics["loss"].total)) and bool(metrics["skipped"])
    after = jax.device_get(state)
    for name in ("params", "opt", "ema"):
        old, new = jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(old, new, strict=True)), name
    assert (int(after.step), int(after.guard.skipped), int(after.guard.in_row)) == (2, 1, 1)
    state, metrics = take(state, 3)
    assert not bool(metrics["skipped"]) and (int(state.guard.skipped), int(state.guard.in_row)) == (1, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_without_the_policy_it_would_spoil_everything():
    """C10: negative control; under `halt` the parameters are NaN after such a step, which is never saved."""
    state, take = stepper(TrainSection())
    state, metrics = take(state, 2)
    assert "skipped" not in metrics and np.isnan(np.asarray(state.params["line/kernel"])).all()


def test_the_average_follows_the_weights():
    """C20: the average is decay * average + (1 - decay) * weights, decay rising from 0.1; it is what is evaluated."""
    state, take = stepper(TrainSection(ema=0.9))
    expected = np.asarray(state.params["line/kernel"], np.float64)
    for step, number in enumerate((1, 3, 4)):
        state, _ = take(state, number)
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * np.asarray(state.params["line/kernel"], np.float64)
    np.testing.assert_allclose(state.weights["line/kernel"], expected, rtol=1e-5)
    assert not np.allclose(state.params["line/kernel"], expected, rtol=1e-3)


def test_too_many_in_a_row_end_the_run():
    """R23: skipped steps are reported and counted; as many in a row as are allowed end it with code 76."""
    events = []
    meter = Meter(9, 2, 3, lambda step: step / 100, [SimpleNamespace(emit=lambda kind, values: events.append(values))])
    for step, in_row in enumerate((0, 1, 2, 0, 1, 2, 3), start=1):
        skipped = np.bool_(in_row > 0)
        loss = Ratio(np.float32(math.nan if skipped else 2.0), np.float32(1))
        counts = {"grad_norm": np.float32(1), "tokens": np.int32(1), "documents": np.int32(1)}
        before = np.int32([0, 0, 1, 2, 2, 3, 4][step - 1])
        more = {"skipped": skipped, "in_row": np.int32(in_row), "skipped_before": before}
        meter.add(step, {"loss": loss, **counts, **more})
    with pytest.raises(NonFiniteError, match="step 7: 3 steps in a row were skipped") as caught:
        meter.flush()
    assert caught.value.exit_code == 76
    assert [values["skipped"] for values in events] == [1, 1, 2, 1]
    assert math.isnan(events[0]["loss"]), "the logger hides it"
    assert events[1]["lr"] == pytest.approx(0.01), "the schedule waits for skipped steps"
