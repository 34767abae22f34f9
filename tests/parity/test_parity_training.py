"""Twenty steps of AdamW follow torch's: same batches, warmup, clipping, and decay off biases and norms."""

import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import CASES, FAMILIES, LONGEST, TOLERANCE, documents, paired, reference_model, torch, torch_batch
from transformers import get_linear_schedule_with_warmup

from sft_jax.config.schema import MeshSection
from sft_jax.config.tasks import SequenceClassification
from sft_jax.config.training import OptimSection, Schedule, TrainSection
from sft_jax.data.batch import Shape
from sft_jax.data.loader import TrainBatches
from sft_jax.data.order import Order
from sft_jax.mesh import batch_sharding, make_mesh, put
from sft_jax.tasks.task import build_task
from sft_jax.train.optim import build_optimizer
from sft_jax.train.state import beginning, initial_state, place
from sft_jax.train.step import make_train_step, train_program

STEPS, WARMUP, RATE, DECAY, CLIP = 20, 4, 5e-3, 0.5, 1.0
SECTION = OptimSection(lr=RATE, weight_decay=DECAY, clip=CLIP, schedule=Schedule(kind="linear", warmup=WARMUP))


def batches_of(encoded) -> TrainBatches:
    """Packed batches of a few documents over several epochs, the last of each epoch short."""
    return TrainBatches(encoded, Order(len(encoded), 6, seed=1), (Shape(6, LONGEST + 3, 4),), STEPS)


def our_losses(pair, batches, section=SECTION) -> tuple[np.ndarray, np.ndarray]:
    """(loss, gradient norm) of every step, by the training step of a run."""
    model, mesh = pair.model, make_mesh(MeshSection(data=1))
    paths = model.template.keys
    labels = [str(i) for i in range(pair.reference.config.num_labels)]
    task = build_task(SequenceClassification(kind="sequence_classification", labels=labels), {})
    optimizer = build_optimizer(section, STEPS, paths)
    begin = beginning(optimizer, TrainSection())
    placement = place(mesh, model.template, model.table.axes, paths, begin)
    state, frozen = initial_state(model.template, pair.params, frozenset(), begin, placement, 0, jnp.dtype("float32"))
    settings = {"section": TrainSection(), "compute_dtype": jnp.dtype("float32"), "seed": 0}
    step = make_train_step(model.template, task, optimizer, **settings)
    program = train_program(step, placement, state, frozen)
    losses, norms = [], []
    for number in range(len(batches)):
        batch = batches[number]
        state, metrics = program.compile(batch)(state, frozen, put(batch, batch_sharding(mesh)))
        losses.append(float(metrics["loss"].value))
        norms.append(float(metrics["grad_norm"]))
    return np.asarray(losses), np.asarray(norms)


def torch_losses(reference, encoded, batches) -> tuple[np.ndarray, np.ndarray]:
    """The same of a plain torch loop on the documents that our batches name."""
    plain = [p for p in reference.parameters() if p.ndim > 1]
    others = [p for p in reference.parameters() if p.ndim == 1]  # biases and the scales of norms
    groups = [{"params": plain, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses, norms = [], []
    for number in range(len(batches)):
        index = batches[number]["index"]
        chosen = index[index >= 0]
        labels = torch.from_numpy(encoded.documents["label"][chosen].astype(np.int64))
        loss = reference(**torch_batch(reference, encoded, chosen), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), CLIP)))
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return np.asarray(losses), np.asarray(norms)


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest relative difference."""
    return float(np.abs(ours / theirs - 1).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_follow_torch(name, tmp_path, record_property):
    """C33: the loss of each of 20 AdamW steps agrees with torch's within 1e-4, clipping and warmup included."""
    pair = paired(reference_model(name), tmp_path)
    encoded = documents(pair.reference, 20)
    batches = batches_of(encoded)
    assert batches[3]["weight"].sum() < batches[0]["weight"].sum(), "no short batch: means would weigh alike"
    ours, our_norms = our_losses(pair, batches)
    theirs, their_norms = torch_losses(pair.reference, encoded, batches)
    assert their_norms.max() > 2 * CLIP, "nothing was clipped"
    assert theirs[-4:].mean() < 0.8 * theirs[:4].mean(), "nothing was learned"
    record_property("parity", f"{CASES[name][0]}|sequence_classification|trajectory|{apart(ours, theirs):.1e}")
    assert apart(ours, theirs) < TOLERANCE
    assert apart(our_norms, their_norms) < 10 * TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"groups": []},
        {"clip": None},
        {"schedule": Schedule(kind="linear", warmup=WARMUP + 1)},
    ],
    ids=["decay on all", "no clipping", "warmup off by one"],
)
def test_the_comparison_sees_another_recipe(change, tmp_path):
    """C33: negative control: decay on biases, no clipping or a schedule off by one leave the trajectory."""
    pair = paired(reference_model("bert-one-type-silu"), tmp_path)
    encoded = documents(pair.reference, 20)
    batches = batches_of(encoded)
    ours, _ = our_losses(pair, batches, SECTION.model_copy(update=change))
    theirs, _ = torch_losses(pair.reference, encoded, batches)
    assert apart(ours, theirs) > 10 * TOLERANCE
