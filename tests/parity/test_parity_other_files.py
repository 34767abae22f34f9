"""Checkpoints as others leave them: what their files say is what is computed, as `transformers` does, or it is refused.

Each test names its fault in `cases/bugs.md` of issue 14.
"""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
from torch_reference import (
    CASES,
    TOLERANCE,
    Pair,
    documents,
    one_a_row,
    our_logits,
    paired,
    randomised,
    several_a_row,
    torch,
    torch_logits,
    transformers,
)

from sft_jax.data.batch import Encoded
from sft_jax.errors import ModelError
from sft_jax.models.family import Head, build_model, load_model, settled
from sft_jax.weights.files import INDEX, SINGLE, open_checkpoint, write_checkpoint

LOWER = {"num_hidden_layers": 2, "n_layer": 2}
SEES_BOTH_WAYS = ["gpt2", "llama", "mistral", "qwen2-late-windows", "phi3", "gemma", "gemma3"]


def reference_of(name: str, kind: str = "sequence_classification", **changes) -> "torch.nn.Module":
    """A reference of a case with other settings, of few layers."""
    family, settings = CASES[name]
    lower = {key: value for key, value in LOWER.items() if key in settings and "layer_types" not in settings}
    return randomised(family, {**copy.deepcopy(settings), **lower, "num_labels": 3, **changes}, 0, 0.3, kind)


def apart(pair: Pair, encoded: Encoded) -> float:
    """How far our logits, of padded rows and of packed ones, are from the reference's."""
    expected = torch_logits(pair.reference, encoded)
    return max(float(np.abs(our_logits(pair, lay(encoded)) - expected).max()) for lay in (one_a_row, several_a_row))


@pytest.mark.parametrize("name", SEES_BOTH_WAYS)
def test_a_decoder_that_sees_both_ways(name, tmp_path):
    """Fault C: `is_causal: false` makes a decoder bidirectional, windows and all, as it does in `transformers`."""
    pair = paired(reference_of(name, is_causal=False), tmp_path / "both")
    encoded = documents(pair.reference, 8)
    assert apart(pair, encoded) < TOLERANCE
    config = open_checkpoint(pair.directory).config
    causal = build_model({**config, "is_causal": True}, pair.model.head, name)
    wrong = dataclasses.replace(pair, forward=lambda p, b: causal.template.bind(p)(b))
    assert np.abs(our_logits(wrong, one_a_row(encoded)) - torch_logits(pair.reference, encoded)).max() > 0.05
    if "causal_lm" in pair.model.family.heads:
        with pytest.raises(ModelError, match="is_causal=false lets tokens see those that come later"):
            build_model(config, Head("causal_lm", 0), name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_padding_is_known_by_its_id(name, tmp_path):
    """Faults C and P: a text is read at its last token that has not the padding id, which may also end a turn."""
    pair = paired(reference_of(name), tmp_path)
    encoded = documents(pair.reference, 8)
    ids = encoded.tokens["input_ids"].copy()
    for document, filler in ((1, 3), (2, 1), (3, encoded.lengths[3])):
        ids[encoded.offsets[document + 1] - filler : encoded.offsets[document + 1]] = 0  # the padding id
    encoded = Encoded({**encoded.tokens, "input_ids": ids}, encoded.offsets, encoded.documents)
    assert apart(pair, encoded) < TOLERANCE
    deaf = build_model({**open_checkpoint(tmp_path).config, "pad_token_id": -1}, pair.model.head, name)
    wrong = dataclasses.replace(pair, forward=lambda p, b: deaf.template.bind(p)(b))
    assert np.abs(our_logits(wrong, one_a_row(encoded)) - torch_logits(pair.reference, encoded)).max() > 0.05


def spoil(directory, name: str, number: float) -> None:
    """Write a checkpoint again with a tensor that differs from its original; one that is not there is made of it."""
    checkpoint = open_checkpoint(directory)
    tensors = {key: checkpoint.read(key) for key in checkpoint.shapes}
    original = next(
        tensors[key] for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight", "shared.weight"))
    )
    noise = np.random.default_rng(0).normal(size=original.shape)
    write_checkpoint(directory, checkpoint.config, {**tensors, name: (original + number * noise).astype(np.float32)})


@pytest.mark.parametrize("name", ["llama-tied-biases", "qwen2", "gemma", "gpt2"])
def test_a_head_beside_a_flag_that_ties_it(name, tmp_path):
    """Fault D: `tie_word_embeddings: true` and a head with numbers of its own: both are kept, and said, as there."""
    pair = paired(reference_of(name, "causal_lm", tie_word_embeddings=True), tmp_path)
    head = pair.model.head
    spoil(tmp_path, "lm_head.weight", 0.0)
    assert settled(open_checkpoint(tmp_path), head) == open_checkpoint(tmp_path)
    spoil(tmp_path, "lm_head.weight", 0.3)
    checkpoint = settled(open_checkpoint(tmp_path), head)
    assert checkpoint.config["tie_word_embeddings"] is False and "lm_head.weight differs" in checkpoint.remarks[0]
    kept = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    model = build_model(checkpoint.config, head, name)
    params = load_model(model, checkpoint)[1]
    ours = Pair(kept, model, params, tmp_path, lambda p, b: model.template.bind(p)(b).dense())
    encoded = documents(kept, 6)
    assert np.abs(our_logits(ours, one_a_row(encoded)) - torch_logits(kept, encoded)).max() < TOLERANCE
    assert np.abs(our_logits(pair, one_a_row(encoded)) - torch_logits(kept, encoded)).max() > 0.05
    labelled = settled(open_checkpoint(tmp_path), Head("sequence_classification", 3))
    assert labelled.config["tie_word_embeddings"] is True  # which has no such head


def test_two_checkpoints_in_a_directory(tmp_path):
    """Fault E: a single file beside an index is what `transformers` reads, and it is said; alone nothing is said."""
    pair = paired(reference_of("llama"), tmp_path)
    tensors = {name: open_checkpoint(tmp_path).read(name) for name in open_checkpoint(tmp_path).shapes}
    shutil.move(tmp_path / SINGLE, tmp_path / "kept")
    older = {name: tensor + 1 for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, json.loads((tmp_path / "config.json").read_text()), older, shard_bytes=10_000)
    assert (tmp_path / INDEX).is_file() and not open_checkpoint(tmp_path).remarks
    shutil.move(tmp_path / "kept", tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    assert "and not the shards of model.safetensors.index.json" in checkpoint.remarks[0]
    there = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict()
    ours = {name: checkpoint.read(name) for name in checkpoint.shapes}
    assert all(np.array_equal(ours[name], there[name].numpy()) for name in ours)
    assert apart(pair, documents(pair.reference, 6)) < TOLERANCE
