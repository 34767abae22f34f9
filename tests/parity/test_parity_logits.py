"""Logits equal those of `transformers`, on padded rows and on packed ones, for every family and model type."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from torch_reference import (
    CASES,
    TOLERANCE,
    documents,
    one_a_row,
    our_logits,
    paired,
    randomised,
    reference_model,
    several_a_row,
    torch,
    torch_logits,
)

# As published: google-bert/bert-base-uncased, distilbert/distilbert-base-uncased, FacebookAI/roberta-base.
PUBLISHED = {
    "bert": {"vocab_size": 30522},
    "distilbert": {"vocab_size": 30522},
    "roberta": {
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
}


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_of_padded_and_packed_rows_equal_the_reference(name, tmp_path):
    """C3 R17 R57: padded or packed, each document has the logits that `transformers` gives it, within 1e-4."""
    pair = paired(reference_model(name), tmp_path)
    encoded = documents(pair.reference, 12)
    expected = torch_logits(pair.reference, encoded)
    assert expected.std() > 0.1, "logits that hardly vary would agree whatever is computed"
    padded, packed = (our_logits(pair, layout(encoded)) for layout in (one_a_row, several_a_row))
    assert gap(padded, expected) < TOLERANCE
    assert gap(packed, expected) < TOLERANCE


@pytest.mark.parametrize(
    "spoil",
    ["types", "positions", "segments"],
)
def test_the_comparison_sees_a_wrong_input(spoil, tmp_path):
    """C3: negative control: lost token types, running positions or merged segments in packed rows are seen."""
    pair = paired(reference_model("bert"), tmp_path)
    encoded = documents(pair.reference, 12)
    batch = several_a_row(encoded)
    wrong = {
        "types": {"token_type_ids": np.zeros_like(batch["token_type_ids"])},
        "positions": {"position_ids": np.broadcast_to(np.arange(24, dtype=np.int32), batch["position_ids"].shape)},
        "segments": {"segment_ids": np.minimum(batch["segment_ids"], 1)},
    }[spoil]
    assert gap(our_logits(pair, {**batch, **wrong}), torch_logits(pair.reference, encoded)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_the_comparison_sees_every_parameter(name, tmp_path):
    """R57: negative control: another value in any one parameter changes the logits, so none is loaded by chance."""
    pair = paired(reference_model(name), tmp_path)
    encoded = documents(pair.reference, 4)
    batch, expected = one_a_row(encoded), torch_logits(pair.reference, encoded)
    for path, array in pair.params.items():
        # Adding the same number everywhere would cancel in the norms that follow.
        noise = np.random.default_rng(0).normal(size=array.shape).astype(np.float32)
        changed = dataclasses.replace(pair, params={**pair.params, path: array + noise})
        seen = gap(our_logits(changed, batch), expected) > 10 * TOLERANCE
        # The bias of the keys adds one number to all scores of a query, which the softmax takes away again.
        assert seen != path.endswith("attn/k/bias"), path


@pytest.mark.parametrize("family", PUBLISHED)
def test_logits_at_the_published_size(family):
    """R57: at the published base size (random weights) the logits of two rows of 16 tokens agree within 1e-4."""
    with tempfile.TemporaryDirectory() as directory:  # half a gigabyte, not to be kept as pytest keeps tmp_path
        pair = paired(randomised(family, PUBLISHED[family], seed=0, spread=0.02), Path(directory))
        assert sum(a.size for a in pair.params.values()) == sum(p.numel() for p in pair.reference.parameters())
        encoded = documents(pair.reference, 2, longest=16)
        expected = torch_logits(pair.reference, encoded)
        found = gap(our_logits(pair, one_a_row(encoded, 16)), expected)
    assert torch.from_numpy(expected).std() > 0.01
    assert found < TOLERANCE
