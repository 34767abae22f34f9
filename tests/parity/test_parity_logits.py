"""Logits equal those of `transformers`, on padded rows and on packed ones, for every family and model type."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from torch_reference import (
    CASES,
    DECODERS,
    FAMILIES,
    TOLERANCE,
    documents,
    gap,
    heads_of,
    one_a_row,
    our_logits,
    paired,
    randomised,
    reference_model,
    rounded,
    several_a_row,
    torch,
    torch_logits,
)

# Each case with its family's first kind of head, and one of each family with all of them.
DEEP = {*FAMILIES, *DECODERS}
RUNS = [(name, kind) for name in CASES for kind in heads_of(name) if name in DEEP or kind == heads_of(name)[0]]
# As published: google-bert/bert-base-uncased, distilbert/distilbert-base-uncased, FacebookAI/roberta-base,
# openai-community/gpt2, HuggingFaceTB/SmolLM2-135M.
PUBLISHED = {
    "bert": {"vocab_size": 30522},
    "distilbert": {"vocab_size": 30522},
    "roberta": {
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "gpt2": {"pad_token_id": 0},
    "llama": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "pad_token_id": 0,
    },
}


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_logits_of_padded_and_packed_rows_equal_the_reference(name, kind, tmp_path, record_property):
    """C3 R17 R57: padded or packed, a document or token has the logits of `transformers`, but for rounding."""
    pair = paired(reference_model(name, kind), tmp_path)
    encoded = documents(pair.reference, 12)
    expected = torch_logits(pair.reference, encoded)
    assert expected.std() > 0.1, "logits that hardly vary would agree whatever is computed"
    gaps = [gap(our_logits(pair, layout(encoded)), expected) for layout in (one_a_row, several_a_row)]
    record_property("parity", f"{CASES[name][0]}|{kind}|logits|{max(gaps):.1e}")
    assert max(gaps) < rounded(pair.reference, lambda reference: torch_logits(reference, encoded), gap)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        *(("bert", spoil) for spoil in ("types", "positions", "segments")),
        *(("gpt2", spoil) for spoil in ("positions", "segments")),
        ("gemma3", "segments"),
    ],
)
def test_the_comparison_sees_a_wrong_input(name, spoil, tmp_path):
    """C3: negative control: lost token types, running positions or merged segments in packed rows are seen.

    Rotary positions are relative: where documents are apart, it does not matter where each begins to count.
    """
    pair = paired(reference_model(name), tmp_path)
    encoded = documents(pair.reference, 12)
    batch = several_a_row(encoded)
    wrong = {
        "types": {"token_type_ids": np.zeros_like(batch["token_type_ids"])},
        "positions": {"position_ids": np.broadcast_to(np.arange(24, dtype=np.int32), batch["position_ids"].shape)},
        "segments": {"segment_ids": np.minimum(batch["segment_ids"], 1)},
    }[spoil]
    assert gap(our_logits(pair, {**batch, **wrong}), torch_logits(pair.reference, encoded)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3", "phi3", "gemma2"])
def test_the_comparison_sees_every_parameter(name, tmp_path):
    """R57: negative control: another value in any one parameter changes the logits, so none is loaded by chance."""
    pair = paired(reference_model(name, heads_of(name)[0]), tmp_path)
    encoded = documents(pair.reference, 4)
    batch, expected = one_a_row(encoded), torch_logits(pair.reference, encoded)
    for path, array in pair.params.items():
        # Adding the same number everywhere would cancel in the norms that follow.
        noise = np.random.default_rng(0).normal(size=array.shape).astype(np.float32)
        changed = dataclasses.replace(pair, params={**pair.params, path: array + noise})
        seen = gap(our_logits(changed, batch), expected) > 10 * TOLERANCE
        # The bias of the keys adds one number to all scores of a query, which the softmax takes away again; where
        # keys are turned, the number depends on the distance.
        assert seen != (path.endswith("attn/k/bias") and "embed/position/embedding" in pair.params), path


@pytest.mark.parametrize("family", PUBLISHED)
def test_logits_at_the_published_size(family, record_property):
    """R57: at the published base size (random weights) the logits of two rows of 16 tokens agree but for rounding."""
    kind = heads_of(family)[0]
    with tempfile.TemporaryDirectory() as directory:  # half a gigabyte, not to be kept as pytest keeps tmp_path
        pair = paired(randomised(family, PUBLISHED[family], 0, 0.02, kind), Path(directory))
        assert sum(a.size for a in pair.params.values()) == sum(p.numel() for p in pair.reference.parameters())
        encoded = documents(pair.reference, 2, longest=16)
        expected = torch_logits(pair.reference, encoded)
        found = gap(our_logits(pair, one_a_row(encoded, 16)), expected)
        allowed = rounded(pair.reference, lambda reference: torch_logits(reference, encoded), gap)
    record_property("parity", f"{family}|{kind}|published|{found:.1e}")
    assert torch.from_numpy(expected).std() > 0.01
    assert found < allowed
