"""Twenty steps of AdamW on spans follow torch's: the loss of its own classes, on batches that we pack."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_parity_training import CLIP, DECAY, RATE, SECTION, STEPS, WARMUP, apart, batches_of
from torch_reference import CASES, TOLERANCE, documents, paired, reference_model, torch, torch_batch
from transformers import get_linear_schedule_with_warmup

from sft_jax.config.schema import MeshSection
from sft_jax.config.tasks import QuestionAnswering
from sft_jax.config.training import TrainSection
from sft_jax.mesh import batch_sharding, make_mesh, put
from sft_jax.tasks.task import build_task
from sft_jax.train.optim import build_optimizer
from sft_jax.train.state import beginning, initial_state, place
from sft_jax.train.step import make_train_step, train_program

FAMILIES = ("bert", "distilbert", "roberta")


def answered(reference, count: int):
    """Random documents with a random answer each, some of them the first token."""
    encoded, draw = documents(reference, count), np.random.default_rng(3)
    ends = np.sort(draw.integers(0, encoded.lengths[:, None], size=(count, 2)), axis=1).astype(np.int32)
    encoded.documents["answer"] = np.where(draw.random((count, 1)) < 0.2, 0, ends)
    return encoded


def our_losses(pair, batches) -> np.ndarray:
    """The loss of every step, by the training step of a run."""
    model, mesh = pair.model, make_mesh(MeshSection(data=1))
    paths = model.template.keys
    task = build_task(QuestionAnswering(kind="question_answering"), {})
    optimizer = build_optimizer(SECTION, STEPS, paths)
    begin = beginning(optimizer, TrainSection())
    placement = place(mesh, model.template, model.table.axes, paths, begin)
    state, frozen = initial_state(model.template, pair.params, frozenset(), begin, placement, 0, jnp.dtype("float32"))
    settings = {"section": TrainSection(), "compute_dtype": jnp.dtype("float32"), "seed": 0}
    program = train_program(make_train_step(model.template, task, optimizer, **settings), placement, state, frozen)
    losses = []
    for number in range(len(batches)):
        batch = batches[number]
        state, metrics = program.compile(batch)(state, frozen, put(batch, batch_sharding(mesh)))
        losses.append(float(metrics["loss"].value))
    return np.asarray(losses)


def torch_losses(reference, encoded, batches, *, later: int = 0) -> np.ndarray:
    """The same of a plain torch loop; with `later` every answer ends that many tokens after its own end."""
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for number in range(len(batches)):
        index = batches[number]["index"]
        chosen = index[index >= 0]
        fields, total = torch_batch(reference, encoded, chosen), torch.zeros(())
        for place_in_batch, document in enumerate(chosen):  # each without padding, over which torch's softmax would go
            alone = {name: values[place_in_batch : place_in_batch + 1] for name, values in fields.items()}
            width = int(alone["attention_mask"].sum())
            first, last = encoded.documents["answer"][document]
            last = min(int(last) + later, width - 1)
            ends = {"start_positions": torch.tensor([int(first)]), "end_positions": torch.tensor([last])}
            total = total + reference(**{name: values[:, :width] for name, values in alone.items()}, **ends).loss
        loss = total / len(chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return np.asarray(losses)


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_on_spans_follow_torch(name, tmp_path, record_property):
    """C33: the loss of each of 20 steps on packed windows agrees with torch's on each alone within 1e-4."""
    pair = paired(reference_model(name, "question_answering"), tmp_path)
    encoded = answered(pair.reference, 20)
    batches = batches_of(encoded)
    assert (batches[0]["index"] >= 0).sum(axis=1).max() > 1, "no row holds several windows: nothing is packed"
    ours = our_losses(pair, batches)
    theirs = torch_losses(pair.reference, encoded, batches)
    assert theirs[-4:].mean() < 0.8 * theirs[:4].mean(), "nothing was learned"
    record_property("parity", f"{CASES[name][0]}|question_answering|trajectory|{apart(ours, theirs):.1e}")
    assert apart(ours, theirs) < TOLERANCE


def test_the_comparison_sees_another_answer(tmp_path):
    """C33: negative control: answers that end a token later leave the trajectory."""
    pair = paired(reference_model("roberta-late-pad-tanh", "question_answering"), tmp_path)
    encoded = answered(pair.reference, 20)
    batches = batches_of(encoded)
    ours = our_losses(pair, batches)
    assert apart(ours, torch_losses(pair.reference, encoded, batches, later=1)) > 10 * TOLERANCE
