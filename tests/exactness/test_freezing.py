"""What is trained moves, what is frozen does not, and costs nothing."""

import io
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_runs import differing, gradient, norm, settings, small_model, take_steps
from rich.console import Console
from safetensors.numpy import load_file

from sft_jax import console
from sft_jax.errors import ConfigError
from sft_jax.jobs import train
from sft_jax.nn.template import Template
from sft_jax.run import Run, initial, plan, prepare, train_program
from sft_jax.train.report import Screen
from sft_jax.weights.table import save

FREEZE = "train.freeze=['embed/**','blocks/0/attn/**']"
ENCODER = "train.freeze=['embed/**','blocks/**']"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Run]:
    """`ready("key=value", ...)`: a run of one block."""
    home, model = tmp_path_factory.mktemp("freezing"), small_model(tmp_path_factory)
    return lambda *more: prepare(settings(home / "run", model, rows, "data.layout.kind=padded", *more))


def float_types(tree) -> set:
    """The types of all floating-point leaves."""
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


def test_small_steps_move_every_leaf_under_bfloat16(ready):
    """C20: three steps at rate 1e-6 in bfloat16 move every trainable leaf; masters and moments are float32."""
    run = ready("train.compute_dtype=bfloat16", "optim.lr=1e-6", "optim.schedule.kind=constant")
    before = jax.device_get(initial(run)[0].params)
    after = take_steps(run, 3).state
    assert float_types(after.params) == float_types(after.opt) == {jnp.float32.dtype}
    moved = {path: not np.array_equal(before[path], after.params[path]) for path in before}
    assert all(moved.values()) and len(moved) == len(run.model.template.keys)
    # Negative control: masters in bfloat16 would have swallowed these very updates.
    swallowed = [
        path for path in before if np.array_equal(_rounded(before[path]), _rounded(jax.device_get(after.params[path])))
    ]
    assert "head/out/kernel" in swallowed and "embed/norm/scale" in swallowed


def _rounded(array: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32)


def test_frozen_gradients_are_not_in_the_clip_norm(ready):
    """C27: the norm reported and clipped by is that of the trainable leaves, however large the frozen ones are."""
    whole = gradient(ready("optim.name=sgd"), 0)
    trained = {path: g for path, g in whole.items() if not path.startswith("head/")}
    assert norm(whole) > 2 * norm(trained)  # so that clipping by the wrong norm would be seen
    clip = 1.1 * norm(trained)
    plain = ("optim.name=sgd", "optim.lr=1", "optim.weight_decay=0", "optim.groups=[]")
    run = ready("train.freeze=['head/**']", f"optim.clip={clip}", *plain)
    before = jax.device_get(initial(run)[0].params)
    steps = take_steps(run, 1)
    assert steps.norms[0] == pytest.approx(norm(trained), rel=1e-5)
    for path, g in trained.items():
        np.testing.assert_allclose(before[path] - steps.state.params[path], g, rtol=1e-4, atol=1e-6)


def test_the_optimizer_holds_nothing_of_what_is_frozen(ready):
    """C27: no frozen path stands in the optimizer's state, whatever the optimizer."""
    for name in ("adamw", "adafactor", "lamb"):
        run = ready(FREEZE, f"optim.name={name}")
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(run.placement.state.opt)]
        assert any("head/out/kernel" in path for path in paths)
        assert not [path for path in paths if any(frozen in path for frozen in run.frozen)]


def test_frozen_tensors_are_exported_as_they_came(ready, tmp_path: Path):
    """C27: after 14 steps with clipping, decay and dropout, frozen tensors are the source's byte for byte."""
    run = ready(
        FREEZE, "model.dropout=0.1", "optim.weight_decay=0.1", f"run.dir={tmp_path / 'run'}", "eval.every=never"
    )
    assert train(run).steps == 14
    source = load_file(run.checkpoint.directory / "model.safetensors")
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    paths = _paths_of_tensors(run)
    for name, tensor in source.items():
        same = tensor.dtype == written[name].dtype and tensor.tobytes() == written[name].tobytes()
        assert same == (paths[name] in run.frozen), name
    assert {paths[name] for name in source} >= run.frozen


def _paths_of_tensors(run: Run) -> dict[str, str]:
    """Name of each tensor on disk -> our path: the table is asked with a number of its own in each leaf."""
    template: Template = run.model.template
    marked = {p: np.full(template.shapes[p], i, np.float32) for i, p in enumerate(template.keys)}
    return {name: template.keys[int(t.ravel()[0])] for name, t in save(run.model.table, marked).items()}


def test_a_frozen_encoder_is_cheap(ready):
    """C27: with the encoder frozen a step costs at least 2.5 times fewer operations, and only the head has moments."""
    operations = []
    for freeze in ("train.freeze=[]", ENCODER):
        run = ready(freeze)
        state, frozen = initial(run)
        executable = train_program(run, state, frozen).compile(run.batches[0])
        operations.append(executable.cost_analysis()["flops"])
    assert operations[0] >= 2.5 * operations[1]
    held = optax.tree.size([a for a in jax.tree.leaves(state.opt) if jnp.issubdtype(a.dtype, jnp.floating)])
    assert held == 2 * sum(a.size for path, a in state.params.items())
    assert set(state.params) == {"head/dense/kernel", "head/dense/bias", "head/out/kernel", "head/out/bias"}


def test_unfreeze_wins_over_freeze(ready, tmp_path: Path):
    """newcomer S1: `blocks/**` frozen and `blocks/*/mlp/**` unfrozen at half of the run are the source's bit for bit
    until then and trained from then on; what is frozen and not named stays; both is said, at the start and then."""
    section = (ENCODER, "train.unfreeze=[{match: 'blocks/*/mlp/**', at: 0.5}]", "optim.schedule.kind=constant")
    run = ready(*section, f"run.dir={tmp_path / 'run'}", "eval.every=never")
    before = jax.device_get(initial(run)[0].params)
    late = {path for path in before if path.startswith("blocks/0/mlp/")}
    assert late and late | {path for path in before if path.startswith("head/")} == set(before)
    for steps, moved in ((7, False), (8, True)):  # of 14
        after = jax.device_get(take_steps(run, steps).state.params)
        assert {path for path in late if not np.array_equal(before[path], after[path])} == (late if moved else set())
    count = sum(before[path].size for path in late)
    said = f"blocks/*/mlp/**, {count:,} parameters"
    assert plan(run).begins == ((7, said),)
    sink = io.StringIO()
    screen = Screen(Console(file=sink, width=200))
    console.show_run(screen.console, run)
    train(run, screen)
    told = sink.getvalue().splitlines()
    assert [line for line in told if "frozen until" in line] == [
        f"  frozen until step 7  of 14, trained from then on: {said}"
    ]
    place = told.index(f"from step 8 on trained as well: {said}")
    assert told[place - 1].startswith("step 6/")  # reports come a step late
    source, written = (
        load_file(home / "model.safetensors") for home in (run.checkpoint.directory, tmp_path / "run" / "model")
    )
    changed = {name for name, tensor in source.items() if not np.array_equal(tensor, written[name])}
    paths = _paths_of_tensors(run)
    assert {paths[name] for name in changed if not paths[name].startswith("head/")} == late


def test_what_is_unfrozen_later_is_unfrozen_alike(ready):
    """newcomer S1: parameters that `freeze` names beside `unfreeze` move exactly as those that it does not name, and
    features that they change are not computed once."""
    both = "train.unfreeze=[{match: 'blocks/**', at: 3}]"
    named, alone = ready(ENCODER, both), ready("train.freeze=['embed/**']", both)
    assert named.frozen == alone.frozen and named.recomputed and "blocks/0" in named.recomputed
    one, other = take_steps(named, 5).state, take_steps(alone, 5).state
    assert not differing(one, other)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("[{match: 'block/**', at: 3}]", "'block/**' matches no parameter; the nearest are"),
        ("[{match: 'blocks/**', at: 14}]", "'blocks/**' begins at step 14, and the run has 14"),
        ("[{match: 'blocks/**', at: 3}, {match: 'blocks/0/**', at: 5}]", "fits only what an earlier pattern fits"),
    ],
)
def test_unfreezing_that_would_do_nothing_is_refused(ready, settings: str, problem: str):
    """newcomer S1, the kind: a pattern that frees nothing, or never, is named."""
    with pytest.raises(ConfigError) as caught:
        ready(f"train.unfreeze={settings}")
    assert str(caught.value).startswith("train.unfreeze") and problem in str(caught.value)


def test_adapters_keep_their_base(ready):
    """newcomer S1, the kind: beside adapters the base is not unfrozen in silence."""
    with pytest.raises(ConfigError, match=r"'embed/\*\*' fits only what stands still beside adapters; name it in"):
        ready("adapter.rank=2", "train.unfreeze=[{match: 'embed/**', at: 3}]")
