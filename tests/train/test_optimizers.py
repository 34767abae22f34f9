"""Groups by pattern, decoupled decay, any optimizer of optax by its name, and what is wrong said plainly.

The model here is one linear layer in the run's own training step, so that all compiles in no time.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection
from sft_jax.config.training import OptimSection, TrainSection, Unfreeze
from sft_jax.errors import ConfigError
from sft_jax.nn.layers import Linear
from sft_jax.nn.template import Normal, Template
from sft_jax.tasks.task import Ratio
from sft_jax.train.optim import build_optimizer
from sft_jax.train.state import beginning, initial_state, place
from sft_jax.train.step import make_train_step, train_program

PATHS = ("blocks/0/mlp/up/kernel", "blocks/0/mlp/up/bias", "blocks/0/norm/scale", "head/out/kernel", "head/out/bias")
PLAIN = {"name": "sgd", "lr": 0.1, "clip": None, "schedule": {"kind": "constant"}}


def tree(seed: int) -> dict[str, jax.Array]:
    """A small tree of random leaves."""
    draw = np.random.default_rng(seed)
    shapes = [(3, 2) if path.endswith("kernel") else (2,) for path in PATHS]
    return {p: jnp.asarray(draw.normal(size=s), jnp.float32) for p, s in zip(PATHS, shapes, strict=True)}


def after(optimizer: optax.GradientTransformation, steps: int) -> dict[str, jax.Array]:
    """The tree after some steps along gradients that are the same for all optimizers."""
    params = tree(0)
    state = optimizer.init(params)
    for number in range(steps):
        updates, state = optimizer.update(tree(number + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


def moved(**section) -> dict[str, np.ndarray]:
    """How far one step of plain gradient descent at rate 0.1 moves each leaf."""
    params = after(build_optimizer(OptimSection(**{**PLAIN, **section}), 10, PATHS), 1)
    return {path: np.asarray(params[path] - leaf) for path, leaf in tree(0).items()}


def close(found: np.ndarray, wanted) -> None:
    """The same up to rounding of the subtraction above."""
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=1e-5, atol=1e-6)


def test_the_first_group_that_fits_wins():
    """C33: rate factor and decay are those of the first group that fits; what no group fits has the section's."""
    groups = [{"match": "head/**", "lr_scale": 10}, {"match": "**/{bias,scale}", "weight_decay": 0}]
    found = moved(groups=groups, weight_decay=0.5)
    start, gradient = tree(0), tree(1)
    for path in PATHS:
        head, bare = path.startswith("head/"), path.endswith(("bias", "scale"))
        decay = 0.5 if head or not bare else 0.0  # head/out/bias: the first group says nothing of decay
        close(found[path], (10 if head else 1) * -0.1 * (gradient[path] + decay * start[path]))
    swapped = moved(groups=groups[::-1], weight_decay=0.5)
    close(swapped["head/out/bias"], -0.1 * gradient["head/out/bias"])
    close(swapped["head/out/kernel"], found["head/out/kernel"])


def test_a_factor_of_zero_holds_still():
    """C33: lr_scale 0 moves nothing, decay included."""
    found = moved(groups=[{"match": "blocks/**", "lr_scale": 0}], weight_decay=0.5)
    assert all(not step.any() for path, step in found.items() if path.startswith("blocks/"))
    assert all(step.any() for path, step in found.items() if path.startswith("head/"))


def test_the_default_keeps_decay_off_biases_and_norms():
    """C33: without a word, decay reaches matrices alone."""
    with_decay, without = moved(weight_decay=0.5), moved(weight_decay=0.0)
    changed = {path for path in PATHS if not np.array_equal(with_decay[path], without[path])}
    assert changed == {path for path in PATHS if path.endswith("kernel")}


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb"])
def test_decay_is_decoupled_as_optax_has_it(name: str):
    """C33: five steps with a falling rate equal optax's own decay with a mask; for lamb, whose own is coupled, not."""
    options = {"b2": 0.5}  # a power of two, which optax corrects exactly as well
    schedule = {"kind": "linear", "warmup": 2}
    section = OptimSection(name=name, lr=0.1, weight_decay=0.3, clip=None, schedule=schedule, options=options)
    rate = optax.join_schedules([optax.linear_schedule(0, 0.1, 2), optax.linear_schedule(0.1, 0, 8)], [2])
    mask = {path: path.endswith("kernel") for path in PATHS}
    wanted = after(getattr(optax, name)(rate, weight_decay=0.3, mask=mask, **options), 5)
    found = after(build_optimizer(section, 10, PATHS), 5)
    same = {p: np.allclose(found[p], wanted[p], rtol=1e-6, atol=1e-7) for p in PATHS}
    assert same == {p: name != "lamb" or not mask[p] for p in PATHS}


def test_clipping_is_by_the_norm_of_all_leaves():
    """C27: the step that is too long is shortened to the norm asked for; a short one is left alone."""
    length = float(optax.tree.norm(tree(1)))
    for clip, wanted in ((0.5, 0.5), (2 * length, length)):
        found = moved(clip=clip, weight_decay=0.0)
        assert float(optax.tree.norm(found)) == pytest.approx(0.1 * wanted, rel=1e-5)


class Line(nnx.Module):
    """One linear layer."""

    def __init__(self):
        self.line = Linear(8, 16, Normal(0.5))

    def __call__(self, batch, *, key=None):
        return self.line(batch["x"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"b2": 0.98}),
        ("sgd", {"momentum": 0.9}),
        ("lion", {}),
        ("adafactor", {"min_dim_size_to_factor": 4}),
        ("lamb", {}),
        ("rmsprop", {}),
    ],
)
def test_any_optimizer_trains_sharded(name: str, options: dict):
    """C29, C20: a named optimizer takes two steps on a 2x2x2 mesh, moves every leaf and stays where it was placed."""
    mesh = meshes.make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    template = Template.of(Line())
    axes = {"line/kernel": ("embed", "mlp"), "line/bias": ("mlp",)}
    optimizer = build_optimizer(OptimSection(name=name, options=options, lr=0.01), 10, template.keys)
    section = TrainSection(accumulate=2)
    begin = beginning(optimizer, section)
    placement = place(mesh, template, axes, frozenset(), begin)
    state, frozen = initial_state(template, {}, frozenset(), begin, placement, 0, jnp.dtype("float32"))
    task = SimpleNamespace(loss=lambda out, batch: Ratio((out**2).sum(), batch["weight"].sum()))
    step = make_train_step(template, task, optimizer, section=section, compute_dtype=jnp.dtype("float32"), seed=0)
    program = train_program(step, placement, state, frozen)
    draw = np.random.default_rng(0)
    batch = {
        "x": draw.normal(size=(8, 8)).astype(np.float32),
        "segment_ids": np.ones((8, 1), np.int32),
        "weight": np.ones((8, 1), np.float32),
    }
    put = meshes.put(batch, meshes.batch_sharding(mesh))
    before, losses = jax.device_get(state.params), []
    for _ in range(2):
        state, metrics = program.compile(put)(state, frozen, put)
        losses.append(float(metrics["loss"].value))
    assert losses[1] < losses[0]
    assert all((state.params[path] != before[path]).any() for path in before)
    assert state.params["line/kernel"].sharding.shard_shape((8, 16)) == (4, 8)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(placement.state), strict=True)
    assert all(leaf.sharding == wanted for leaf, wanted in pairs)
    held = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.shape == (8, 16)]
    assert all(leaf.sharding.shard_shape((8, 16)) == (4, 8) for leaf in held)
    assert len(held) == {"adamw": 2, "sgd": 1, "lion": 1, "adafactor": 0, "lamb": 2, "rmsprop": 1}[name]


@pytest.mark.parametrize("blocks", [("blocks/0/k", "blocks/1/k"), ("stages/0/blocks/10/k", "stages/1/blocks/2/k")])
def test_rates_fall_from_the_head_to_the_embeddings(blocks):
    """C26: with layer_decay each block, those of stages too, has the rate of the one above it times the factor, the
    embeddings least.
    """
    paths = ("embed/word", *blocks, "norm/scale", "head/k")
    section = OptimSection(**PLAIN, weight_decay=0.0, layer_decay=0.5, groups=[])
    params = {path: jnp.ones(2) for path in paths}
    optimizer = build_optimizer(section, 10, paths)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    rates = [float(-updates[path][0]) for path in paths]
    assert rates == pytest.approx([0.1 / 8, 0.1 / 4, 0.1 / 2, 0.1, 0.1])


def test_penalties_are_gradients_of_their_sums():
    """C26: l1 and l2 add the derivatives of the sums of sizes and of squares where the pattern fits."""
    start, plain = tree(0), moved(weight_decay=0.0)
    found = moved(weight_decay=0.0, penalty={"l1": 0.3, "l2": 0.2})
    for path in PATHS:
        wanted = jax.grad(lambda leaf: 0.3 * jnp.abs(leaf).sum() + 0.2 * jnp.square(leaf).sum())(start[path])
        close(found[path] - plain[path], -0.1 * wanted if path.endswith("kernel") else jnp.zeros_like(wanted))


UNFREEZE = [Unfreeze(match="blocks/**", at=3), Unfreeze(match="**/bias", at=0.1)]


def test_gradual_unfreezing_is_the_optimizer_begun_later():
    """C27: until its step a leaf stays bit for bit and out of the clip norm; from then on it moves as if begun then."""
    section = OptimSection(lr=0.1, clip=0.5, weight_decay=0.3, schedule={"kind": "linear"})
    late = build_optimizer(section, 10, PATHS, UNFREEZE)
    early = {path for path in PATHS if path.startswith("head/")}
    params, state = tree(0), late.init(tree(0))
    params["blocks/0/mlp/up/kernel"] = params["blocks/0/mlp/up/kernel"].at[0, 0].set(-0.0)
    start = dict(params)
    alone = build_optimizer(section, 10, sorted(early), [UNFREEZE[1]])
    lonely, theirs = {p: params[p] for p in early}, alone.init({p: params[p] for p in early})
    for number in range(3):
        gradients = {p: (1.0 if p in early else 1e6) * g for p, g in tree(number + 1).items()}
        updates, state = late.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        updates, theirs = alone.update({p: gradients[p] for p in early}, theirs, lonely)
        lonely = optax.apply_updates(lonely, updates)
    for path in PATHS:
        if path in early:
            np.testing.assert_allclose(params[path], lonely[path], rtol=1e-6)
        else:
            assert np.asarray(params[path]).tobytes() == np.asarray(start[path]).tobytes()
    # From step 3 on: Adam's first step is rate times sign, whatever its size, if its bias correction begins anew.
    gradients = tree(4)
    updates, _ = late.update(gradients, state, params)
    rate = 0.1 * (1 - 3 / 10)
    path = "blocks/0/mlp/up/bias"  # without decay
    np.testing.assert_allclose(updates[path], -rate * np.sign(gradients[path]), rtol=1e-3)


def test_an_idle_unfreezing_is_named():
    """C26: a pattern that fits nothing is an error with what is near."""
    with pytest.raises(ConfigError, match=r"train\.unfreeze.*\n.*'block/\*\*' matches no parameter; the nearest are"):
        build_optimizer(OptimSection(), 10, PATHS, [Unfreeze(match="block/**", at=1)])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "adamv"}, "optim.name: optax has no optimizer 'adamv'; did you mean 'adam"),
        ({"options": {"beta2": 0.9}}, "optim.options.beta2: adamw has no such argument"),
        ({"options": {"weight_decay": 0.1}}, "optim.options.weight_decay: is set by optim.weight_decay"),
        ({"groups": [{"match": "heads/**", "lr_scale": 2}]}, "'heads/**' matches no parameter; the nearest are head/"),
    ],
)
def test_what_is_wrong_is_named(section: dict, message: str):
    """C26: an optimizer, option or pattern that means nothing is an error that names it and what is near."""
    with pytest.raises(ConfigError) as caught:
        build_optimizer(OptimSection(**section), 10, PATHS)
    assert message in str(caught.value)
