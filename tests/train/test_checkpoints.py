"""Which checkpoints stay, what comes back, and what is refused."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection
from sft_jax.errors import RunError
from sft_jax.train import checkpoint
from sft_jax.train.checkpoint import Checkpoints, Progress
from sft_jax.train.loop import Plan, note
from sft_jax.train.state import TrainState


def state(step: int, shape: tuple[int, ...] = (4, 2), dtype=jnp.float32, name: str = "head/kernel") -> TrainState:
    """A state whose numbers are those of its step."""
    params = {name: jnp.full(shape, step, dtype)}
    return TrainState(jnp.asarray(step, jnp.int32), params, {"mu": {name: jnp.full(shape, step / 2, dtype)}})


def restored(checkpoints: Checkpoints, like: TrainState, step: int, mesh=None) -> tuple[TrainState, Progress]:
    """A step as `like` is, whole on every device of the mesh or divided over its two first axes."""
    mesh = mesh or meshes.make_mesh(MeshSection(data=1))

    def spec(leaf) -> NamedSharding:
        return NamedSharding(mesh, P("fsdp", "tensor") if leaf.ndim == 2 else P())

    return checkpoints.restore(like, jax.tree.map(spec, like), step)


def plan(mode: str) -> Plan:
    """A plan that looks at accuracy."""
    return Plan(steps=9, log_every=1, eval_every=1, save_every=None, best_metric="accuracy", best_mode=mode)


def evaluated(checkpoints: Checkpoints, progress: Progress, scores: list[float], mode: str = "max") -> None:
    """Go on for one step, evaluation and checkpoint for each score."""
    for score in scores:
        progress.step += 1
        note(progress, plan(mode), {"accuracy": score}, [])
        checkpoints.save(state(progress.step), progress)
    checkpoints.wait()


def test_the_best_and_the_latest_stay(tmp_path: Path):
    """R11: while scores fall, the best step stays beside the latest ones; latest is last, best is argmax."""
    checkpoints, progress = Checkpoints(tmp_path, 2), Progress()
    evaluated(checkpoints, progress, [0.7, 0.9, 0.5, 0.4, 0.3])
    assert checkpoints.steps() == [2, 4, 5]
    assert (progress.best_step, progress.best_value) == (2, 0.9)
    checkpoints.close()


def test_a_new_process_still_knows_the_best(tmp_path: Path):
    """R11: resumed from the last step by a new process, the best of before stays until it is beaten."""
    checkpoints = Checkpoints(tmp_path, 1)
    evaluated(checkpoints, Progress(), [0.9, 0.5, 0.4])
    checkpoints.close()
    again = Checkpoints(tmp_path, 1)
    assert again.steps() == [1, 3]
    latest, progress = restored(again, state(0), again.steps()[-1])
    assert (int(latest.step), progress.best_step, len(progress.evaluations)) == (3, 1, 3)
    evaluated(again, progress, [0.3])
    assert again.steps() == [1, 4]
    evaluated(again, progress, [0.95, 0.1])
    assert again.steps() == [5, 6]
    again.close()


def test_of_equals_the_earlier_is_best_and_min_is_the_least(tmp_path: Path):
    """R11: equal scores do not move the best step; with best_mode min the least is best."""
    checkpoints, progress = Checkpoints(tmp_path / "a", 1), Progress()
    evaluated(checkpoints, progress, [0.5, 0.9, 0.9])
    assert progress.best_step == 2
    checkpoints.close()
    checkpoints, progress = Checkpoints(tmp_path / "b", 1), Progress()
    evaluated(checkpoints, progress, [0.5, 0.9, 0.2], "min")
    assert (progress.best_step, checkpoints.steps()) == (3, [3])
    checkpoints.close()


def test_restoring_is_onto_the_mesh_that_is_asked_for(tmp_path: Path):
    """R13: what one device wrote comes back bit-equal on 2x2 devices, divided as asked, and on one again."""
    checkpoints = Checkpoints(tmp_path, 2)
    saved = state(1)
    saved.params["head/kernel"] = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
    checkpoints.save(saved, Progress(step=1))
    checkpoints.wait()
    for mesh, part in ((MeshSection(data=1, fsdp=2, tensor=2), (2, 1)), (MeshSection(data=1), (4, 2))):
        found, _ = restored(checkpoints, state(0), 1, meshes.make_mesh(mesh))
        leaf = found.params["head/kernel"]
        assert leaf.sharding.shard_shape(leaf.shape) == part
        assert np.asarray(leaf).tobytes() == np.asarray(saved.params["head/kernel"]).tobytes()
    checkpoints.close()


@pytest.mark.parametrize(
    ("like", "problem"),
    [
        (state(0, shape=(4, 3)), "head/kernel: saved as float32[4, 2], expected float32[4, 3]"),
        (state(0, dtype=jnp.bfloat16), "head/kernel: saved as float32[4, 2], expected bfloat16[4, 2]"),
        (state(0, name="head/weight"), "head/weight: not in the checkpoint"),
    ],
)
def test_other_parameters_are_refused_by_name(tmp_path: Path, like: TrainState, problem: str):
    """R13, C20: another shape, type or name is named instead of being cast or reported by the storage library."""
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(state(1), Progress(step=1))
    checkpoints.wait()
    with pytest.raises(RunError) as caught:
        restored(checkpoints, like, 1)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}: step 1: ")
    assert {f"  - params/{problem}", f"  - opt/mu/{problem}"} <= set(lines)
    checkpoints.close()


def test_saving_a_step_that_stands_is_left_alone(tmp_path: Path):
    """R12: a step is written once; the second save of it changes nothing and is no error."""
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(state(1), Progress(step=1))
    checkpoints.save(state(7), Progress(step=1))
    checkpoints.wait()
    assert int(restored(checkpoints, state(0), 1)[0].step) == 1
    checkpoints.close()


ODD = [
    "[x]/run",
    "w\\z",
    "**",
    "a*",
    "what?",
    "{a,b}",
    "#1",
    "50%20 %",
    "$HOME ~",
    "'q\"|&;",
    "a::b",
    "è😀",
    "two\nlines",
]


@pytest.mark.parametrize("name", ODD)
def test_any_path_can_hold_checkpoints(tmp_path: Path, name: str):
    """Fault A: orbax reads paths as patterns, so that under `[x]` nothing was saved that could be opened; whatever
    characters a path has, what was saved comes back, and the older step is gone."""
    home = tmp_path / name / "checkpoints"
    checkpoints = Checkpoints(home, 1)
    for step in (1, 2):
        checkpoints.save(state(step), Progress(step=step))
    checkpoints.close()
    again = Checkpoints(home, 1)
    assert int(restored(again, state(0), 2)[0].step) == 2 and [entry.name for entry in home.iterdir()] == ["2"]
    again.close()


def test_a_path_is_no_pattern_over_its_neighbours(tmp_path: Path):
    """Fault A, the kind: `a*` fits `ab` as well, whose arrays of the same step are not those of this run."""
    beside = tmp_path / "ab" / "1.orbax-checkpoint-tmp" / "state"
    other = Checkpoints(tmp_path / "other", 1)
    other.save(state(7, name="head/other"), Progress(step=1))
    other.close()
    shutil.copytree(tmp_path / "other" / "1" / "state", beside)
    checkpoints = Checkpoints(tmp_path / "a*", 1)
    checkpoints.save(state(1), Progress(step=1))
    checkpoints.close()
    keys = (tmp_path / "a*" / "1" / "state").rglob("*")
    assert not any(b"head/other" in file.read_bytes() for file in keys if file.is_file())


@pytest.mark.parametrize("warns", [False, True])
def test_saved_is_what_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warns: bool):
    """Fault A, the kind: a step that nothing can open is not called saved, is not the best one, stands in no later
    run's way, and has cost no older step."""
    told: list[str] = []
    home = tmp_path / "[x]"
    before = Checkpoints(home, 1)
    before.save(state(1), Progress(step=1))
    before.close()
    monkeypatch.setattr(checkpoint, "_is_plain", lambda directory: True)  # so orbax reads the path as a pattern
    checkpoints, progress = Checkpoints(home, 1, told.append if warns else None), Progress(2, 2, 0.5)
    checkpoints.save(state(2), progress)
    what = f"{home}: step 2 could not be saved (it cannot be opened again: "
    if warns:
        checkpoints.wait()
        assert told[0].startswith(what) and told[0].endswith("); the next one is tried")
    else:
        with pytest.raises(RunError) as caught:
            checkpoints.wait()
        assert str(caught.value).startswith(what)
        assert str(caught.value).endswith("; mend what is in its way, and the same command goes on after step 1")
    assert progress.best_step is None and checkpoints.steps() == [1] and (home / "damaged" / "2").is_dir()
    monkeypatch.undo()
    checkpoints.save(state(3), Progress(step=3))
    checkpoints.close()
    assert checkpoints.steps() == [3]
