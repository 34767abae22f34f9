"""Twenty steps of token classification follow torch's, whose loss is the mean over the labelled tokens of a batch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch_reference import LABELS, TOLERANCE, documents, paired, reference_model, torch, torch_batch
from twenty_steps import CLIP, apart, batches_of, our_losses, torch_losses

from sft_jax.config.tasks import TokenClassification
from sft_jax.data.batch import Encoded
from sft_jax.tasks.task import build_task

IGNORED = -100  # what the reference leaves out of its loss


def labelled(encoded: Encoded) -> Encoded:
    """The documents with a label on about two thirds of their tokens, one at least in each."""
    draw = np.random.default_rng(4)
    count = int(encoded.offsets[-1])
    weight = (draw.random(count) < 0.66).astype(np.float32)
    weight[encoded.offsets[:-1]] = 1
    label = draw.integers(0, LABELS, count).astype(np.int32)
    tokens = {**encoded.tokens, "label": label, "token_weight": weight, "answers": weight}
    return replace(encoded, tokens=tokens, documents={})


def token_labels(encoded: Encoded, chosen: np.ndarray) -> np.ndarray:
    """What the reference takes for the labels of tokens: [documents, tokens of the longest]."""
    found = np.full((len(chosen), encoded.lengths[chosen].max()), IGNORED)
    for row, document in enumerate(chosen):
        places = encoded.places([document])
        of = np.where(encoded.tokens["token_weight"][places] > 0, encoded.tokens["label"][places], IGNORED)
        found[row, : len(of)] = of
    return found


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_twenty_steps_follow_torch(name, tmp_path, record_property):
    """C33 R17: packed here and padded there, the loss of each of 20 AdamW steps agrees with torch's within 1e-4."""
    pair = paired(reference_model(name, "token_classification"), tmp_path)
    encoded = labelled(documents(pair.reference, 20))
    names = [f"tag{number}" for number in range(LABELS)]
    task = build_task(TokenClassification(kind="token_classification", labels=names), {})
    batches = batches_of(encoded)
    ours, our_norms = our_losses(pair.model, pair.params, task, batches)

    def loss(chosen: np.ndarray) -> Any:
        labels = torch.from_numpy(token_labels(encoded, chosen).astype(np.int64))
        return pair.reference(**torch_batch(pair.reference, encoded, chosen), labels=labels).loss

    theirs, their_norms = torch_losses(pair.reference, batches, loss)
    assert their_norms.max() > CLIP, "nothing was clipped"
    record_property("parity", f"{name}|token_classification|trajectory|{apart(ours, theirs):.1e}")
    assert apart(ours, theirs) < TOLERANCE
    assert apart(our_norms, their_norms) < 10 * TOLERANCE
    others = replace(encoded, tokens={**encoded.tokens, "token_weight": np.ones_like(encoded.tokens["token_weight"])})
    wrong, _ = our_losses(pair.model, pair.params, task, replace(batches, encoded=others))
    assert apart(wrong, theirs) > 10 * TOLERANCE, "the control: tokens that are not labelled would be seen"
