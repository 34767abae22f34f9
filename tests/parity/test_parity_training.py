"""Twenty steps of AdamW follow torch's: same batches, warmup, clipping, and decay off biases and norms."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch_reference import CASES, FAMILIES, TOLERANCE, documents, paired, reference_model, torch, torch_batch
from twenty_steps import CLIP, SECTION, WARMUP, apart, batches_of, our_losses, torch_losses

from sft_jax.config.tasks import SequenceClassification
from sft_jax.config.training import Schedule
from sft_jax.data.batch import Encoded
from sft_jax.tasks.task import Task, build_task


def task_of(reference) -> Task:
    """The task of a reference that classifies documents."""
    labels = [str(i) for i in range(reference.config.num_labels)]
    return build_task(SequenceClassification(kind="sequence_classification", labels=labels), {})


def loss_of(reference, encoded: Encoded) -> Callable[[np.ndarray], Any]:
    """The reference's loss of some documents."""

    def loss(chosen: np.ndarray) -> Any:
        labels = torch.from_numpy(encoded.documents["label"][chosen].astype(np.int64))
        return reference(**torch_batch(reference, encoded, chosen), labels=labels).loss

    return loss


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_follow_torch(name, tmp_path, record_property):
    """C33: the loss of each of 20 AdamW steps agrees with torch's within 1e-4, clipping and warmup included."""
    pair = paired(reference_model(name), tmp_path)
    encoded = documents(pair.reference, 20)
    batches = batches_of(encoded)
    assert batches[3]["weight"].sum() < batches[0]["weight"].sum(), "no short batch: means would weigh alike"
    ours, our_norms = our_losses(pair.model, pair.params, task_of(pair.reference), batches)
    theirs, their_norms = torch_losses(pair.reference, batches, loss_of(pair.reference, encoded))
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
    section = SECTION.model_copy(update=change)
    ours, _ = our_losses(pair.model, pair.params, task_of(pair.reference), batches, section)
    theirs, _ = torch_losses(pair.reference, batches, loss_of(pair.reference, encoded))
    assert apart(ours, theirs) > 10 * TOLERANCE
