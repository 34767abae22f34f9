"""Twenty steps of causal language modelling follow torch's: answers alone supervised, packed here and padded there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_reference import TOLERANCE, torch, transformers
from twenty_steps import CLIP, apart, batches_of, our_losses, torch_losses

from sft_jax.config.tasks import CausalLM
from sft_jax.data.batch import Encoded
from sft_jax.models.family import Model, build_model, load_model
from sft_jax.tasks.task import Task, build_task
from sft_jax.weights.files import open_checkpoint

LONGEST, VOCABULARY = 19, 53
SETTINGS = {"kind": "causal_lm", "format": "completion"}
# Family -> what its configuration says. Sizes are odd on purpose; GPT-2's embeddings are tied, Llama's are not.
CASES = {
    "gpt2": {
        "n_embd": 20,
        "n_head": 5,
        "n_layer": 2,
        "n_positions": LONGEST + 4,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0),
    },
    "llama": {
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 37,
        "max_position_embeddings": LONGEST + 4,
        "tie_word_embeddings": False,
    },
}


def reference_model(name: str, directory: Path) -> "torch.nn.Module":
    """A random model of the family with a head on its vocabulary, saved too."""
    config = transformers.AutoConfig.for_model(name, vocab_size=VOCABULARY, pad_token_id=0, **CASES[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: at 0 and 1 a mistake would not be seen
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(directory))
    return model


def documents(count: int, seed: int = 0) -> Encoded:
    """Ragged documents of random tokens, the last part of each supervised."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, LONGEST + 1, size=count)
    ids = [draw.integers(1, VOCABULARY, size=n).astype(np.int32) for n in lengths]
    weights = [(np.arange(n) >= draw.integers(0, n - 1)).astype(np.float32) for n in lengths]
    for weight in weights:
        weight[-1] = 0
    tokens = {
        "input_ids": np.concatenate(ids),
        "label": np.concatenate([np.append(one[1:], 0) for one in ids]).astype(np.int32),
        "token_weight": np.concatenate(weights),
    }
    return Encoded(tokens, np.concatenate([[0], np.cumsum(lengths)]), {})


def loaded(directory: Path, smoothing: float = 0.0) -> tuple[Model, dict[str, np.ndarray], Task]:
    """(our model, its parameters, the task) of a directory."""
    task = build_task(CausalLM(**SETTINGS, label_smoothing=smoothing), {})
    checkpoint = open_checkpoint(directory)
    model = build_model(checkpoint.config, task.head, "here")
    matched, params = load_model(model, checkpoint)
    assert not matched.initialised
    return model, params, task


def loss_of(reference, encoded: Encoded, smoothing: float = 0.0) -> Callable[[np.ndarray], Any]:
    """The reference's loss of some documents, each in a padded row of its own."""
    mean = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)

    def loss(chosen: np.ndarray) -> Any:
        ids, mask, labels = (np.full((len(chosen), LONGEST), fill, np.int64) for fill in (0, 0, -100))
        for row, document in enumerate(chosen):
            span = slice(*encoded.offsets[document : document + 2])
            width = span.stop - span.start
            ids[row, :width], mask[row, :width] = encoded.tokens["input_ids"][span], 1
            learned = encoded.tokens["token_weight"][span][:-1] > 0
            labels[row, 1:width][learned] = ids[row, 1:width][learned]
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        logits = reference(**given).logits[:, :-1].reshape(-1, VOCABULARY)
        return mean(logits, torch.from_numpy(labels[:, 1:]).reshape(-1))

    return loss


@pytest.mark.parametrize(("name", "smoothing"), [("gpt2", 0.0), ("llama", 0.0), ("gpt2", 0.1)])
def test_twenty_steps_of_a_language_model_follow_torch(name, smoothing, tmp_path, record_property):
    """C33, R17: the loss of each of 20 steps on packed answers agrees with torch's on padded ones within 1e-4."""
    model = reference_model(name, tmp_path)
    encoded = documents(20)
    batches = batches_of(encoded, 2 * LONGEST)
    assert batches[0]["segment_ids"].max() > 1 and (batches[3]["index"] >= 0).sum() < 6, "packed, and a short batch"
    ours, our_norms = our_losses(*loaded(tmp_path, smoothing), batches)
    theirs, their_norms = torch_losses(model, batches, loss_of(model, encoded, smoothing))
    error = apart(ours, theirs)
    if not smoothing:
        record_property("parity", f"{name}|causal_lm|trajectory|{error:.1e}")
    assert their_norms.max() > 2 * CLIP and theirs[-4:].mean() < 0.9 * theirs[:4].mean()
    assert error < TOLERANCE
    assert apart(our_norms, their_norms) < 10 * TOLERANCE


def test_the_comparison_sees_an_unsupervised_token(tmp_path):
    """C4: negative control: one document whose prompt is supervised too leaves the trajectory."""
    model = reference_model("llama", tmp_path)
    encoded = documents(20)
    batches = batches_of(encoded, 2 * LONGEST, 2)
    theirs, _ = torch_losses(model, batches, loss_of(model, encoded))
    document = int(batches[1]["index"].max())
    encoded.tokens["token_weight"][encoded.offsets[document] : encoded.offsets[document + 1] - 1] = 1
    ours, _ = our_losses(*loaded(tmp_path), batches)
    assert apart(ours, theirs) > 10 * TOLERANCE
