"""Tiny GGUF files, written by llama.cpp's own library, in every architecture that is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

LAYERS, WIDTH, INNER, HEADS, GROUPS, EACH = 2, 32, 128, 4, 2, 8
# Vocabulary: the bytes, six merges, three special tokens, and one that is found whole in a text.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "1 2"]
SPECIAL = ["<|end|>", "<|user|>", "<|pad|>"]
WHOLE = "<think>"
TOKENS = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES), WHOLE]
KINDS = [3] * len(SPECIAL) + [1] * (len(BYTES) + len(MERGES)) + [4]
WORDS = len(TOKENS)
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
TOKENIZER = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": TOKENS,
    "token_type": KINDS,
    "merges": MERGES,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "padding_token_id": 2,
}
COMMON = {
    "vocab_size": WORDS,
    "context_length": 64,
    "embedding_length": WIDTH,
    "feed_forward_length": INNER,
    "block_count": LAYERS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": GROUPS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5000.0,
}
GPT2 = {k: v for k, v in COMMON.items() if "rms" not in k and "rope" not in k and "kv" not in k}
MORE: dict[str, dict[str, Any]] = {
    "llama": {"rope.dimension_count": EACH},
    "qwen2": {},
    "qwen3": {"attention.key_length": 128, "attention.value_length": 128},  # which transformers takes for granted
    "gemma2": {"attention.key_length": EACH, "attention.value_length": EACH, "attention.sliding_window": 16,
               "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"attention.key_length": EACH, "attention.value_length": EACH, "attention.sliding_window": 16},
    "phi3": {"rope.dimension_count": EACH},
    "gpt2": {"attention.layer_norm_epsilon": 1e-5, "context_length": 1024},
}  # fmt: skip


def tensors(architecture: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a model of an architecture, under the names and in the layout of the file."""
    each = MORE.get(architecture, {}).get("attention.key_length", EACH)
    inner = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    parts: dict[str, tuple[int, ...]] = {
        "attn_norm": (WIDTH,), "attn_q": (HEADS * each, WIDTH), "attn_k": (GROUPS * each, WIDTH),
        "attn_v": (GROUPS * each, WIDTH), "attn_output": (WIDTH, HEADS * each), "ffn_norm": (WIDTH,),
        **{f"ffn_{name}": shape for name, shape in inner.items()},
    }  # fmt: skip
    biases = ("attn_q", "attn_k", "attn_v") if architecture == "qwen2" else ()
    if architecture in ("qwen3", "gemma3"):
        parts |= {"attn_q_norm": (each,), "attn_k_norm": (each,)}
    if architecture in ("gemma2", "gemma3"):
        parts |= {"post_attention_norm": (WIDTH,), "post_ffw_norm": (WIDTH,)}
    whole = {"token_embd.weight": (WORDS, WIDTH), "output_norm.weight": (WIDTH,)}
    if architecture == "phi3":
        parts = {k: v for k, v in parts.items() if k not in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
        parts |= {"attn_qkv": ((HEADS + 2 * GROUPS) * each, WIDTH), "ffn_up": (2 * INNER, WIDTH)}
        whole["output.weight"] = (WORDS, WIDTH)
    if architecture == "gpt2":
        parts = {k: v for k, v in parts.items() if k not in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
        parts["attn_qkv"] = (3 * WIDTH, WIDTH)
        biases = tuple(parts)
        whole |= {"position_embd.weight": (1024, WIDTH), "output_norm.bias": (WIDTH,)}
    for i in range(LAYERS):
        whole |= {f"blk.{i}.{name}.weight": shape for name, shape in parts.items()}
        whole |= {f"blk.{i}.{name}.bias": parts[name][:1] for name in biases}
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in whole.items()}


def write_gguf(
    file: Path,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
    numbers: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write a file and give the tensors in it; a value of None takes a key out, `kinds` are those to quantise to."""
    writer = gguf.GGUFWriter(file, architecture)
    base = (GPT2 if architecture == "gpt2" else COMMON) | MORE.get(architecture, {})
    said = {f"{architecture}.{key}": value for key, value in {**base, **(metadata or {})}.items()}
    said |= {f"tokenizer.ggml.{key}": value for key, value in {**TOKENIZER, **(tokenizer or {})}.items()}
    for key, value in said.items():
        if value is not None:
            _add(writer, key, value)
    writer.add_chat_template(TEMPLATE)
    found = dict(numbers) if numbers is not None else tensors(architecture)
    for name, array in found.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        packed = array if array.dtype == np.uint8 else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
