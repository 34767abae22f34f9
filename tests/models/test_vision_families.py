"""Models of images: what is frozen, what is drawn in training, and what an image knows of the rest of its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import PIXELS, config_of

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection
from sft_jax.config.tasks import SequenceClassification
from sft_jax.config.training import OptimSection, TrainSection
from sft_jax.errors import ModelError
from sft_jax.models.family import Model, build_model
from sft_jax.models.vision_encoder import bicubic, drop_path
from sft_jax.nn.random import from_jax
from sft_jax.nn.template import Moving
from sft_jax.tasks.task import build_task
from sft_jax.train.optim import build_optimizer
from sft_jax.train.state import beginning, frozen_paths, initial_state, place
from sft_jax.train.step import make_train_step, train_program
from sft_jax.weights.table import match, save

DRAW = np.random.default_rng(0)


def batch_of(count: int, side: int = 12) -> dict[str, np.ndarray]:
    """Random images with labels, the last row filler."""
    rows, slots = np.arange(count + 1)[:, None], np.zeros((count + 1, 1), np.int32)
    weight = (rows < count).astype(np.float32)
    pixels = DRAW.normal(size=(count + 1, side, side, 3)).astype(np.float32) * weight[..., None, None]
    more = {"segment_ids": weight.astype(np.int32), "position_ids": slots, "index": np.where(weight, rows, -1)}
    return {"pixel_values": pixels, "label": (rows % 3).astype(np.int32), "weight": weight, **more}


def steps(model: Model, batch, freeze: list[str], count: int = 3) -> tuple[dict, dict]:
    """(all that a model begins with, and what it has after some steps of training)."""
    mesh, section = meshes.make_mesh(MeshSection(data=1)), TrainSection(freeze=freeze)
    optimizer = build_optimizer(OptimSection(lr=1e-2, schedule={"kind": "constant"}), count, model.template.keys)
    frozen, begin = frozen_paths(freeze, model.template), beginning(optimizer, section)
    placement = place(mesh, model.template, model.table.axes, frozen, begin)
    state, fixed = initial_state(model.template, {}, frozen, begin, placement, 0, jnp.dtype("float32"))
    before = jax.device_get({**state.weights, **fixed})
    task = build_task(SequenceClassification(kind="sequence_classification", labels=["a", "b", "c"]), {})
    step = make_train_step(model.template, task, optimizer, section=section, compute_dtype=jnp.dtype("float32"), seed=0)
    program = train_program(step, placement, state, fixed)
    put = meshes.put(batch, meshes.batch_sharding(mesh))
    for _ in range(count):
        state, _ = program.compile(put)(state, fixed, put)
    return before, jax.device_get({**state.weights, **fixed})


def trained_features(model: Model, params, batch, moving: bool) -> np.ndarray:
    """Features as a training step sees them: with a key, and statistics that may move or not."""

    @jax.jit
    def features(params, batch):
        held = {path: Moving(params[path]) for path in model.template.stats} if moving else {}
        return model.template.bind({**params, **held}).features(batch, jnp.zeros(2, jnp.uint32))

    return np.asarray(features(params, batch))


def test_a_frozen_resnet_stays_as_it_is():
    """C28: frozen, statistics and kernels are bit-equal after training; not frozen, every one of them has moved."""
    model, batch = build_model(config_of("resnet"), PIXELS, "resnet"), batch_of(5, 24)
    before, after = steps(model, batch, ["embed/**", "stages/**"])
    same = {path: np.array_equal(before[path], after[path]) for path in before}
    assert same == {path: not path.startswith("head/") for path in before}
    before, after = steps(model, batch, [])
    assert not [path for path in before if np.array_equal(before[path], after[path])]


def test_features_of_a_frozen_resnet_do_not_depend_on_the_batch():
    """C28: with frozen statistics an image has bit for bit the features it has among other images; else it has not."""
    model = build_model(config_of("resnet"), PIXELS, "resnet")
    params = model.template.initial(jax.random.key(0), model.template.keys)
    one, other = batch_of(4, 24), batch_of(4, 24)
    other["pixel_values"][0] = one["pixel_values"][0]
    found = [trained_features(model, params, batch, moving=False)[0] for batch in (one, other)]
    assert np.array_equal(*found)
    moved = [trained_features(model, params, batch, moving=True)[0] for batch in (one, other)]
    assert np.abs(moved[0] - moved[1]).max() > 1e-3


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_stochastic_depth_equals_its_definition(rate):
    """C26: a branch is left out for whole rows, the others are scaled by 1 / (1 - rate), as often as asked for."""
    x = jnp.asarray(DRAW.normal(size=(4000, 3, 2)), jnp.float32)
    found = np.asarray(drop_path(x, rate, from_jax(jax.random.key(0))))
    kept = found.any(axis=(1, 2))
    assert abs(kept.mean() - (1 - rate)) < 0.03
    assert np.allclose(found[kept], np.asarray(x)[kept] / (1 - rate) if kept.any() else 0)
    assert (drop_path(x, rate, None) == x).all() and (drop_path(x, 0.0, jnp.zeros(2, jnp.uint32)) == x).all()


def test_stochastic_depth_is_of_training_alone():
    """C26 R20: `drop_path_rate` changes what is computed with a key, as the key says; without one it does nothing."""
    plain, dropping = (build_model(config_of("dinov2", drop_path_rate=r), PIXELS, "dinov2") for r in (0.0, 0.5))
    params = plain.template.initial(jax.random.key(0), plain.template.keys)
    batch, keys = batch_of(3), [from_jax(jax.random.key(seed)) for seed in (0, 0, 1)]
    without = [np.asarray(model.template.bind(params)(batch)) for model in (plain, dropping)]
    assert np.array_equal(*without)
    first, again, other = (np.asarray(dropping.template.bind(params)(batch, key=key)) for key in keys)
    assert np.array_equal(first, again) and (first != other).any() and (first != without[0]).any()
    assert np.array_equal(np.asarray(plain.template.bind(params)(batch, key=keys[0])), without[0])


def test_dropout_of_vision_transformers():
    """C26: ViT drops embeddings and branches, DINOv2 embeddings alone; one rate for all is none of stochastic depth."""
    rates = {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.12}
    vit = build_model(config_of("vit", **rates), PIXELS, "vit").config
    assert (vit.embed_dropout, vit.dropout, vit.attention_dropout) == (0.11, 0.11, 0.12)
    own = config_of("dinov2", **rates, drop_path_rate=0.3)
    kept, given = (build_model(own, PIXELS, "dinov2", dropout=rate).config for rate in (None, 0.5))
    assert (kept.embed_dropout, kept.dropout, kept.attention_dropout, kept.drop_path) == (0.11, 0.0, 0.12, 0.3)
    assert (given.embed_dropout, given.dropout, given.attention_dropout, given.drop_path) == (0.5, 0.0, 0.5, 0.3)


@pytest.mark.parametrize(("old", "new"), [(5, 5), (5, 8), (8, 3), (1, 4)])
def test_interpolation_keeps_what_does_not_vary(old, new):
    """R57: each point is a mean of its neighbours, itself where the size is the same, and straight lines stay so."""
    found = bicubic(old, new)
    assert found.shape == (new, old) and np.allclose(found.sum(axis=1), 1)
    if old == new:
        assert np.allclose(found, np.eye(old))
    if old > 4 and new > old:
        line = found @ np.arange(old)
        expected = (np.arange(new) + 0.5) * old / new - 0.5
        inside = (expected >= 1) & (expected < old - 2)
        assert inside.any() and np.abs(line - expected)[inside].max() < 0.1


def test_a_checkpoint_under_two_names_is_refused():
    """R57: a tensor that is there under the names of two libraries is named, and neither is taken."""
    model = build_model(config_of("resnet"), PIXELS, "resnet")
    shapes = model.template.shapes
    tensors = save(model.table, {path: np.zeros(shape, np.float32) for path, shape in shapes.items()})
    held = {name: tensor.shape for name, tensor in tensors.items()}
    assert not match(model.table, shapes, held, "here").initialised
    said = "resnet.embedder.embedder.normalization.weight: the same as bn1.weight by another name; leave one"
    with pytest.raises(ModelError, match=said):
        match(model.table, shapes, {**held, "bn1.weight": (8,)}, "here")
