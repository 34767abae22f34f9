"""What llama.cpp makes of a Hugging Face checkpoint, by architecture, so that it can be made undone.

Names of tensors, keys of `config.json`, and the numbers that it changes: the order of rotary pairs, gains that it
counts from 1, kernels that it turns. Holds no file. The source is llama.cpp's `convert_hf_to_gguf.py`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Name in the file -> Hugging Face name, both without `.weight` and `.bias`; `{i}` stands for the number of a layer.
LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
HEAD_NORMS = {
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
}
GEMMA2 = {
    **LLAMA,
    "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}
PHI3 = {
    **{ours: theirs for ours, theirs in LLAMA.items() if ours.rpartition(".")[2] not in ("attn_q", "attn_k", "attn_v")},
    "blk.{i}.attn_qkv": "model.layers.{i}.self_attn.qkv_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.gate_up_proj",
}
GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blk.{i}.attn_qkv": "transformer.h.{i}.attn.c_attn",
    "blk.{i}.attn_output": "transformer.h.{i}.attn.c_proj",
    "blk.{i}.ffn_norm": "transformer.h.{i}.ln_2",
    "blk.{i}.ffn_up": "transformer.h.{i}.mlp.c_fc",
    "blk.{i}.ffn_down": "transformer.h.{i}.mlp.c_proj",
}
# Key of `config.json` -> key in the file, after the name of the architecture; left out where the file lacks it.
KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
HEAD_KEYS = {**KEYS, "head_dim": "attention.key_length"}
GEMMA_KEYS = {
    **HEAD_KEYS,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GPT2_KEYS = {
    "n_positions": "context_length",
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
TURNED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # of GPT-2

Said = Mapping[str, Any]  # the metadata of an architecture, keys without its name


@dataclass(frozen=True)
class Architecture:
    """How the files of one architecture become Hugging Face checkpoints again."""

    model_type: str
    class_name: str  # that `transformers` reads it with
    names: Mapping[str, str]
    keys: Mapping[str, str]
    more: Callable[[Said, Collection[str]], dict[str, Any]]  # (metadata, names in the file) -> more of config.json
    paired: bool = False  # rows of queries and keys were reordered
    gains_from_one: bool = False
    turned: tuple[str, ...] = ()  # endings of the tensors that lie the other way round


def _llama(said: Said, names: Collection[str]) -> dict[str, Any]:
    biased = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return {"hidden_act": "silu", **{key: name in names for key, name in biased.items()}}


def _gemma(largest: int) -> Callable[[Said, Collection[str]], dict[str, Any]]:
    """`largest` is the number of layers of the one size that scales queries by another number."""

    def more(said: Said, names: Collection[str]) -> dict[str, Any]:
        per_head = said["embedding_length"] // said["attention.head_count"]
        scale = per_head if said["block_count"] == largest else said["attention.key_length"]
        return {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scale}

    return more


# `general.architecture` of a file -> how it is read. One entry an architecture.
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", LLAMA, HEAD_KEYS, _llama, paired=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", LLAMA, KEYS, lambda *_: {"hidden_act": "silu"}),
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", {**LLAMA, **HEAD_NORMS}, HEAD_KEYS,
        lambda *_: {"hidden_act": "silu", "attention_bias": False},
    ),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", GEMMA2, GEMMA_KEYS, _gemma(46), gains_from_one=True),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**GEMMA2, **HEAD_NORMS}, GEMMA_KEYS, _gemma(62), gains_from_one=True
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", PHI3, KEYS, lambda *_: {"hidden_act": "silu"}),
    "gpt2": Architecture(
        "gpt2", "GPT2LMHeadModel", GPT2, GPT2_KEYS, lambda *_: {"activation_function": "gelu_new"}, turned=TURNED
    ),
}  # fmt: skip


def restore(architecture: Architecture, name: str, numbers: np.ndarray, said: Said) -> np.ndarray:
    """The numbers of a tensor, by its name in the file, as the Hugging Face checkpoint has them."""
    if name.endswith(architecture.turned):
        return np.ascontiguousarray(numbers.T)
    if architecture.gains_from_one and name.endswith("norm.weight"):
        return numbers - 1
    heads = heads_of(architecture, name, said)
    if heads:  # rotary pairs lie side by side, and half a head apart there
        pairs = numbers.reshape(heads, -1, 2, *numbers.shape[1:])
        return pairs.swapaxes(1, 2).reshape(numbers.shape)
    return numbers


def heads_of(architecture: Architecture, name: str, said: Said) -> int | None:
    """How many heads the rows of a tensor are of, where they were reordered within each; else None."""
    key = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(name.split(".")[-2])
    return said[key] if architecture.paired and key else None
