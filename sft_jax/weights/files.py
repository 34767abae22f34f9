"""Checkpoint directories in the Hugging Face form: `config.json`, safetensors in one or several files, a tokenizer.

Directories are untrusted: only safetensors and JSON are read, shard names stay inside the directory, and keys of
`config.json` that load code are dropped. Knows no family and no device.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sft_jax.errors import ModelError, listing, reason

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
# What a checkpoint's config.json may say that would make a reader fetch or run code, or name someone's machine.
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines", "_name_or_path")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
READABLE = ("F32", "F16", "BF16", "F64")  # types of tensors, as safetensors calls them
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "README.md")


@dataclass(frozen=True)
class Checkpoint:
    """An opened directory: its configuration and where each tensor lies. Tensors are read one at a time."""

    directory: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]  # tensor -> the file that holds it

    def read(self, name: str) -> np.ndarray:
        """One tensor in the type that the file has."""
        file = self.files[name]
        with safe_open(file, framework="np") as tensors:
            kind = tensors.get_slice(name).get_dtype()
            if kind not in READABLE:
                raise ModelError(
                    f"{file}: {name} has type {kind}, not one of {', '.join(READABLE)}; give the unquantised checkpoint"
                )
            return tensors.get_tensor(name)

    def digest(self) -> dict[str, str]:
        """The sha256 of each weight file."""
        found = {}
        for file in sorted(set(self.files.values())):
            with open(file, "rb") as content:
                found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
        return found


def find(source: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local directory of a checkpoint: itself, or a snapshot of the hub repository of that name."""
    local = Path(source).expanduser()
    if local.is_dir():
        return local
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"model '{source}': no such directory; give a directory, a hub name or an asset")
    from huggingface_hub import snapshot_download

    wanted = [pattern for pattern in WANTED if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        raise ModelError(
            f"model '{source}': neither a local directory nor to be had from the hub ({reason(error)}); "
            f"check the name and the network, or give a local directory"
        ) from None


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a directory, reading headers only; raises ModelError for pickles, broken files and names that escape."""
    config = read_config(directory)
    if (directory / INDEX).is_file():
        files = _read_index(directory)
    elif (directory / SINGLE).is_file():
        files = dict.fromkeys(_header(directory / SINGLE), directory / SINGLE)
    else:
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in PICKLES) if directory.is_dir() else []
        if pickles:
            raise ModelError(
                f"{directory}: holds only {pickles[0]}, a format that can run code when it is opened; "
                f"convert it to safetensors where you trust it, and try again"
            )
        raise ModelError(f"{directory}: no {SINGLE} and no {INDEX}; give a directory that holds one")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values())):
        shapes |= {name: shape for name, shape in _header(file).items() if files.get(name) == file}
    lost = sorted(set(files) - set(shapes))
    if lost:
        problems = [f"{name}: named by {INDEX}, not in {files[name].name}" for name in lost]
        raise ModelError(listing(str(directory), problems))
    return Checkpoint(directory, config, shapes, files)


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` as plain data, without the keys that would load code."""
    config = _read_json(directory / CONFIG)
    if "quantization_config" in config:
        raise ModelError(f"{directory / CONFIG}: a quantised checkpoint; give the original, unquantised one")
    return {
        key: value
        for key, value in config.items()
        if key not in CODE_KEYS and not (key.startswith("_") and "implementation" in key)
    }


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `config.json` and the tensors, over several files where they are larger than `shard_bytes`."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        save_file(dict(tensors), directory / SINGLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: tensors[n] for n in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Mapping[str, np.ndarray], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        if shards[-1] and size + tensors[name].nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].nbytes
    return shards


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}); give a checkpoint directory") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not JSON ({reason(error, 80)}); fetch the checkpoint again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, expected an object")
    return content


def _read_index(directory: Path) -> dict[str, Path]:
    weight_map = _read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{directory / INDEX}: no weight_map; fetch the checkpoint again")
    problems = [
        f"{name}: its file is named {str(file)!r:.80}; a shard lies beside the index"
        for name, file in weight_map.items()
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors")
    ]
    if problems:
        raise ModelError(listing(str(directory / INDEX), problems))
    return {name: directory / file for name, file in weight_map.items()}


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({reason(error, 100)}); fetch it again") from None


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers arrays of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes.values())
