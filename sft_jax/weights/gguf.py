"""A GGUF file as a checkpoint: its metadata as `config.json`, its tensors under their Hugging Face names, unpacked.

Opening reads the header alone; tensors are read one at a time. What is not known to be the same model is refused.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.errors import ModelError, did_you_mean
from sft_jax.gguf import Header, read_header
from sft_jax.weights.files import Checkpoint, some
from sft_jax.weights.llamacpp import ARCHITECTURES, Architecture, Said, heads_of, restore

READABLE = ("F32", "F16", "BF16", "F64", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
            "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # fmt: skip
BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(.+)")
COUNTS = ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
          "attention.head_count_kv", "attention.key_length", "attention.sliding_window")  # fmt: skip
MOST = 1 << 31  # of any number of a configuration
# Key of `config.json` -> keys of the tokenizer that hold it; several ends of a text make a list.
IDS = {
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id", "eot_token_id"),
    "pad_token_id": ("padding_token_id",),
}


def open_gguf(file: Path) -> Checkpoint:
    """Open a GGUF file, reading its header only; raises ModelError for what is broken or not understood."""
    header = read_header(file)
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        hint = did_you_mean(str(name), ARCHITECTURES)
        raise ModelError(f"{file}: architecture {name!r:.40} is not read from GGUF files{hint} (known: {known})")
    architecture = ARCHITECTURES[name]
    said = {k.removeprefix(f"{name}."): v for k, v in header.metadata.items() if k.startswith(f"{name}.")}
    said = _with_defaults(said)
    names, unknown = _names(header, architecture)
    problems = unknown + [f"{name}.{problem}" for problem in _unfit(said, architecture)]
    problems = problems or _misfits(header, names, said, architecture)  # which take sound numbers for granted
    if problems:
        raise ModelError(some(str(file), problems))
    shapes = {
        theirs: header.tensors[ours].shape[:: -1 if ours.endswith(architecture.turned) else 1]
        for theirs, ours in names.items()
    }
    read = partial(_read, header, names, architecture, said)
    return Checkpoint(
        file, _config(header, said, architecture), dict(sorted(shapes.items())), dict.fromkeys(names, file), read
    )


def _with_defaults(said: dict[str, Any]) -> dict[str, Any]:
    """The metadata with what llama.cpp takes where a file does not say it."""
    heads, width = said.get("attention.head_count"), said.get("embedding_length")
    each = width // heads if type(heads) is int and type(width) is int and heads > 0 else 0
    return {"attention.head_count_kv": heads, "attention.key_length": each, "rope.freq_base": 10000.0, **said}


def _names(header: Header, architecture: Architecture) -> tuple[dict[str, str], list[str]]:
    """(name in the file by Hugging Face name, what is wrong with the others)."""
    names: dict[str, str] = {}
    problems = []
    for ours, tensor in header.tensors.items():
        stem, _, ending = ours.rpartition(".")
        block = BLOCK.fullmatch(stem)
        theirs = architecture.names.get(f"blk.{{i}}.{block[2]}" if block else stem)
        if theirs is None or ending not in ("weight", "bias"):
            problems.append(f"{ours!r:.80}: a tensor that this architecture does not have; give a plain model")
        elif tensor.kind not in READABLE:
            problems.append(f"{ours}: has type {tensor.kind}, not one of {', '.join(READABLE)}; give another file")
        else:
            names[f"{theirs.replace('{i}', block[1] if block else '')}.{ending}"] = ours
    return names, problems


def _unfit(said: Said, architecture: Architecture) -> list[str]:
    """What is wrong with the metadata on its own: `key: what`."""
    problems = []
    for key in architecture.keys.values():
        value, whole = said.get(key), key in COUNTS
        if key in ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping") and value is None:
            continue
        kinds = int if whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < MOST:
            problems.append(f"{key}: {value!r:.40}, expected a {'whole number' if whole else 'number'} above 0")
    turned = said.get("rope.dimension_count", said["attention.key_length"])
    if type(turned) is not int or turned != said["attention.key_length"]:
        problems.append(f"rope.dimension_count: {turned!r:.40}, where a head has {said['attention.key_length']}")
    for key, plain in {"rope.scaling.type": "none", "expert_count": 0}.items():
        if said.get(key, plain) != plain:
            problems.append(f"{key}: {said[key]!r:.40} is not supported; only {plain!r} is")
    return problems


def _misfits(header: Header, names: dict[str, str], said: Said, architecture: Architecture) -> list[str]:
    """Where the tensors are not those of the metadata."""
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2 or table.shape[1] != said["embedding_length"]:
        return [f"token_embd.weight: expected rows of {said['embedding_length']} numbers; fetch it again"]
    blocks = {int(block[1]) for ours in names.values() if (block := BLOCK.match(ours))}
    if blocks != set(range(len(blocks))) or len(blocks) != said["block_count"]:
        return [f"tensors of {len(blocks)} blocks, where block_count is {said['block_count']}; fetch it again"]
    return [
        f"{ours}: {header.tensors[ours].shape[0]} rows are not those of {heads} heads; fetch it again"
        for ours in names.values()
        if (heads := heads_of(architecture, ours, said)) and header.tensors[ours].shape[0] % (2 * heads)
    ]


def _config(header: Header, said: Said, architecture: Architecture) -> dict[str, Any]:
    """The metadata as `config.json` says it."""
    ids: dict[str, Any] = {}
    for ours, keys in IDS.items():
        found = sorted({n for key in keys if type(n := header.metadata.get(f"tokenizer.ggml.{key}")) is int})
        ids |= {ours: found[0] if len(found) == 1 else found} if found else {}
    return {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        **{ours: said[key] for ours, key in architecture.keys.items() if key in said},
        **architecture.more(said, header.tensors.keys()),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **ids,
    }


def _read(
    header: Header, names: dict[str, str], architecture: Architecture, said: Said, file: Path, name: str
) -> np.ndarray:
    """One tensor in float32, or in float64 where the file has it so."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    ours = names[name]
    tensor = header.tensors[ours]
    with open(file, "rb") as source:
        source.seek(tensor.begin)
        packed = np.frombuffer(source.read(tensor.size), np.uint8)
    if packed.size != tensor.size:
        raise ModelError(f"{file}: ends within {ours}; fetch it again")
    with np.errstate(all="ignore"):  # numbers that are not finite are the model's, and are found when it is trained
        if tensor.kind == "F64":
            numbers = packed.view("<f8")
        else:
            rows = packed.reshape(int(np.prod(tensor.shape[:-1])), -1)
            numbers = dequantize(rows, GGMLQuantizationType[tensor.kind])
        return restore(architecture, ours, numbers.reshape(tensor.shape), said)
