"""What tests of trajectories share: twenty steps of AdamW by the training step of a run, and by a plain torch loop."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from torch_reference import LONGEST, torch
from transformers import get_linear_schedule_with_warmup

from sft_jax.config.schema import MeshSection
from sft_jax.config.training import OptimSection, Schedule, TrainSection
from sft_jax.data.batch import Encoded, Shape
from sft_jax.data.loader import TrainBatches
from sft_jax.data.order import Order
from sft_jax.mesh import batch_sharding, make_mesh, put
from sft_jax.models.family import Model
from sft_jax.tasks.task import Task
from sft_jax.train.optim import build_optimizer
from sft_jax.train.state import beginning, frozen_paths, initial_state, place
from sft_jax.train.step import make_train_step, train_program

STEPS, WARMUP, RATE, DECAY, CLIP = 20, 4, 5e-3, 0.5, 1.0
SECTION = OptimSection(lr=RATE, weight_decay=DECAY, clip=CLIP, schedule=Schedule(kind="linear", warmup=WARMUP))
ADAMW = partial(torch.optim.AdamW, lr=RATE)
Figures = tuple[np.ndarray, np.ndarray]  # loss and gradient norm of every step


def batches_of(encoded: Encoded, length: int = LONGEST + 3, steps: int = STEPS) -> TrainBatches:
    """Packed batches of a few documents over several epochs, the last of each epoch short."""
    return TrainBatches(encoded, Order(len(encoded), 6, seed=1), (Shape(6, length, 4),), steps)


def our_losses(
    model: Model, params: Mapping[str, np.ndarray], task: Task, batches: TrainBatches, section: OptimSection = SECTION
) -> Figures:
    """By the training step of a run."""
    return our_steps(model, params, task, batches, section)[0]


def our_steps(
    model: Model,
    params: Mapping[str, np.ndarray],
    task: Task,
    batches: TrainBatches,
    section: OptimSection = SECTION,
    freeze: Sequence[str] = (),
) -> tuple[Figures, dict[str, np.ndarray]]:
    """The same, and all that the model has after the last step."""
    mesh, paths = make_mesh(MeshSection(data=1)), sorted(set(model.template.keys) - model.template.stats)
    optimizer = build_optimizer(section, STEPS, paths)
    fixed, begin = frozen_paths(freeze, model.template), beginning(optimizer, TrainSection())
    placement = place(mesh, model.template, model.table.axes, fixed, begin)
    state, frozen = initial_state(model.template, params, fixed, begin, placement, 0, jnp.dtype("float32"))
    settings = {"section": TrainSection(), "compute_dtype": jnp.dtype("float32"), "seed": 0}
    program = train_program(make_train_step(model.template, task, optimizer, **settings), placement, state, frozen)
    found = []
    for number in range(len(batches)):
        batch = batches[number]
        state, metrics = program.compile(batch)(state, frozen, put(batch, batch_sharding(mesh)))
        found.append((float(metrics["loss"].value), float(metrics["grad_norm"])))
    losses, norms = np.asarray(found).T
    return (losses, norms), {path: np.asarray(a) for path, a in {**state.weights, **frozen}.items()}


def torch_losses(
    reference: Any,
    batches: TrainBatches,
    loss_of: Callable[[np.ndarray], Any],
    make: Callable[..., Any] = ADAMW,
) -> Figures:
    """By a plain torch loop; `loss_of` is the reference's loss of the documents that one of our batches names."""
    trained = [p for p in reference.parameters() if p.requires_grad]
    plain = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim == 1]  # biases and the scales of norms
    groups = [{"params": plain, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = make(groups)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    found = []
    for number in range(len(batches)):
        index = batches[number]["index"]
        loss = loss_of(index[index >= 0])
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), CLIP))
        optimizer.step()
        schedule.step()
        found.append((float(loss.detach()), norm))
    losses, norms = np.asarray(found).T
    return losses, norms


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest relative difference."""
    return float(np.abs(ours / theirs - 1).max())
