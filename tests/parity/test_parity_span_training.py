"""Twenty steps of AdamW on spans follow torch's: the loss of its own classes, on batches that we pack."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch_reference import CASES, TOLERANCE, documents, paired, reference_model, torch, torch_batch
from twenty_steps import apart, batches_of, our_losses, torch_losses

from sft_jax.config.tasks import QuestionAnswering
from sft_jax.tasks.task import build_task

TASK = build_task(QuestionAnswering(kind="question_answering"), {})
FAMILIES = ("bert", "distilbert", "roberta")


def answered(reference, count: int):
    """Random documents with a random answer each, some of them the first token."""
    encoded, draw = documents(reference, count), np.random.default_rng(3)
    ends = np.sort(draw.integers(0, encoded.lengths[:, None], size=(count, 2)), axis=1).astype(np.int32)
    encoded.documents["answer"] = np.where(draw.random((count, 1)) < 0.2, 0, ends)
    return encoded


def loss_of(reference, encoded, *, later: int = 0) -> Callable[[np.ndarray], Any]:
    """The reference's loss of some documents; with `later` every answer ends that many tokens after its own end."""

    def loss(chosen: np.ndarray) -> Any:
        fields, total = torch_batch(reference, encoded, chosen), torch.zeros(())
        for place_in_batch, document in enumerate(chosen):  # each without padding, over which torch's softmax would go
            alone = {name: values[place_in_batch : place_in_batch + 1] for name, values in fields.items()}
            width = int(alone["attention_mask"].sum())
            first, last = encoded.documents["answer"][document]
            last = min(int(last) + later, width - 1)
            ends = {"start_positions": torch.tensor([int(first)]), "end_positions": torch.tensor([last])}
            total = total + reference(**{name: values[:, :width] for name, values in alone.items()}, **ends).loss
        return total / len(chosen)

    return loss


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_on_spans_follow_torch(name, tmp_path, record_property):
    """C33: the loss of each of 20 steps on packed windows agrees with torch's on each alone within 1e-4."""
    pair = paired(reference_model(name, "question_answering"), tmp_path)
    encoded = answered(pair.reference, 20)
    batches = batches_of(encoded)
    assert (batches[0]["index"] >= 0).sum(axis=1).max() > 1, "no row holds several windows: nothing is packed"
    ours, _ = our_losses(pair.model, pair.params, TASK, batches)
    theirs, _ = torch_losses(pair.reference, batches, loss_of(pair.reference, encoded))
    assert theirs[-4:].mean() < 0.8 * theirs[:4].mean(), "nothing was learned"
    record_property("parity", f"{CASES[name][0]}|question_answering|trajectory|{apart(ours, theirs):.1e}")
    assert apart(ours, theirs) < TOLERANCE


def test_the_comparison_sees_another_answer(tmp_path):
    """C33: negative control: answers that end a token later leave the trajectory."""
    pair = paired(reference_model("roberta-late-pad-tanh", "question_answering"), tmp_path)
    encoded = answered(pair.reference, 20)
    batches = batches_of(encoded)
    ours, _ = our_losses(pair.model, pair.params, TASK, batches)
    theirs, _ = torch_losses(pair.reference, batches, loss_of(pair.reference, encoded, later=1))
    assert apart(ours, theirs) > 10 * TOLERANCE
