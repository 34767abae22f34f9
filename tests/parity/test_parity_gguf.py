"""GGUF files against `transformers`, which reads them by a way of its own."""

import numpy as np
import pytest
from made_gguf import MORE, write_gguf

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from sft_jax.weights.files import open_checkpoint  # noqa: E402

SAME_SETTINGS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings", "model_type",
    "head_dim", "num_key_value_heads", "intermediate_size", "rms_norm_eps", "max_position_embeddings",
    "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "activation_function", "hidden_act",
)  # fmt: skip


@pytest.mark.parametrize("architecture", list(MORE))
def test_tensors_and_settings_are_those_of_transformers(architecture, tmp_path):
    """R57: names, shapes, numbers and settings of a GGUF file are those that `transformers` finds in it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_gguf(tmp_path / "model.gguf", architecture)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = open_checkpoint(tmp_path / "model.gguf")
    tied = {"lm_head.weight"} if ours.config["tie_word_embeddings"] else set()
    state = {name: value.numpy() for name, value in theirs.state_dict().items() if name not in tied}
    assert ours.shapes == {name: value.shape for name, value in sorted(state.items())}
    for name, value in state.items():
        np.testing.assert_array_equal(ours.read(name), value, err_msg=name)
    config = AutoConfig.for_model(**ours.config)
    for key in SAME_SETTINGS:
        assert getattr(config, key, None) == pytest.approx(getattr(theirs.config, key, None)), key
    assert type(theirs).__name__ == ours.config["architectures"][0]
