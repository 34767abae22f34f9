"""Checkpoint directories in the Hugging Face form: `config.json`, safetensors in one or several files, a tokenizer.

Directories are untrusted: only safetensors and JSON are read, shard names stay inside the directory, and keys of
`config.json` that load code are dropped. Knows no family and no device.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sft_jax import assets
from sft_jax.errors import ModelError, RunError, listing, reason
from sft_jax.gguf import ENDING as GGUF
from sft_jax.gguf import is_gguf

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EXPORTED = "model"  # where a run directory has the model that it came to
SHARD_BYTES = 5 << 30
# What a checkpoint's config.json may say that would make a reader fetch or run code, or name someone's machine.
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines", "_name_or_path")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
READABLE = ("F32", "F16", "BF16", "F64")  # types of tensors, as safetensors calls them
MOST_SHOWN = 20  # problems in one message
JSON_BYTES = 64 << 20
WANTED = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.jinja",
    "additional_chat_templates/*.jinja", "README.md",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its configuration and where each tensor lies. Tensors are read one at a time."""

    directory: Path  # or the GGUF file, which holds everything
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]  # tensor -> the file that holds it
    reader: Callable[[Path, str], np.ndarray]  # (file, tensor) -> its numbers
    remarks: tuple[str, ...] = ()  # what it says twice and differently, and which of both is taken

    def read(self, name: str) -> np.ndarray:
        """One tensor in the type that the file has; in float32 where it is quantised."""
        return self.reader(self.files[name], name)

    def digest(self) -> dict[str, str]:
        """The sha256 of each weight file."""
        found = {}
        for file in sorted(set(self.files.values())):
            with open(file, "rb") as content:
                found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
        return found


def find(source: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local place of a checkpoint: a directory, a GGUF file, an asset, or a snapshot of the hub repository of that
    name."""
    local = Path(assets.resolve(source)).expanduser()
    if local.is_dir():
        return _only_gguf(local) or local
    if is_gguf(local):
        return local
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or local.suffix == GGUF:
        raise ModelError(f"model '{source}': no such directory; give a directory, a GGUF file, a hub name or an asset")
    from huggingface_hub import snapshot_download

    wanted = [pattern for pattern in WANTED if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        raise ModelError(
            f"model '{source}': neither a local directory nor to be had from the hub ({reason(error)}); "
            f"check the name and the network, or give a local directory"
        ) from None


def open_checkpoint(directory: Path, *, weights: bool = True) -> Checkpoint:
    """Open a directory, reading headers only; raises ModelError for pickles, broken files and names that escape.

    A GGUF file is opened as the directory that it was made of. Without weights, none are looked for.
    """
    if is_gguf(directory):
        from sft_jax.weights.gguf import open_gguf

        return open_gguf(directory)
    check_links(directory, WANTED)
    if not (directory / CONFIG).is_file() and (directory / EXPORTED / CONFIG).is_file():
        raise ModelError(f"{directory}: is a run, not a model; its model is in {directory / EXPORTED}")
    config = read_config(directory)
    if not weights:
        return Checkpoint(directory, config, {}, {}, _read_safetensors)
    remarks: tuple[str, ...] = ()
    if (directory / SINGLE).is_file():  # before an index, as `transformers` does
        files = dict.fromkeys(_header(directory / SINGLE), directory / SINGLE)
        if (directory / INDEX).is_file():
            remarks = (f"{SINGLE} is read, as transformers does, and not the shards of {INDEX}; remove the older one",)
    elif (directory / INDEX).is_file():
        files = read_index(directory / INDEX, ".safetensors")
    else:
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in PICKLES) if directory.is_dir() else []
        if pickles:
            raise ModelError(
                f"{directory}: holds only {pickles[0]}, a format that can run code when it is opened; "
                f"make safetensors of it, which runs nothing: sft-jax convert {directory} NEW_DIRECTORY"
            )
        raise ModelError(
            f"{directory}: no {SINGLE} and no {INDEX}; give a directory that holds one, "
            f"or make one of torch's pickles: sft-jax convert"
        )
    held = {file: _header(file) for file in sorted(set(files.values()))}
    check_shards(directory, files, held)
    shapes = {name: held[file][name] for name, file in files.items()}
    return Checkpoint(directory, config, dict(sorted(shapes.items())), files, _read_safetensors, remarks)


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` as plain data, without the keys that would load code."""
    config = read_json(directory / CONFIG)
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
    write_config(directory, config)
    write_tensors(directory, tensors, shard_bytes)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def write_tensors(directory: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors, which must be contiguous, as one file of safetensors or as several with their index."""
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


@contextmanager
def new_directory(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A directory to fill, which takes its place at `out` whole when all went well, and else is as if never made.

    Raises RunError where `out` is there already and not an empty directory, unless it may be replaced.
    """
    if out.exists() and not replace and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out}: is there already, and not an empty directory; give a new one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        fresh, old = Path(work) / "model", Path(work) / "old"
        fresh.mkdir()
        yield fresh
        if out.exists():
            out.rename(old)  # put back if the new one cannot take its place
        try:
            fresh.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise


def copy_files(source: Path, names: Sequence[str], out: Path) -> None:
    """Copy those of the named files that a directory has."""
    for name in names:
        if (source / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)


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


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file of a checkpoint; raises ModelError for anything else."""
    try:
        if file.stat().st_size > JSON_BYTES:
            raise ModelError(f"{file}: more than {JSON_BYTES} bytes of JSON; fetch the checkpoint again")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}); give a checkpoint directory") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not JSON ({reason(error, 80)}); fetch the checkpoint again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, expected an object")
    return content


def read_index(index: Path, ending: str) -> dict[str, Path]:
    """The file of each tensor, as an index says; each lies beside it and has this ending."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: no weight_map; fetch the checkpoint again")
    problems = [
        f"{name!r:.80}: its file is named {str(file)!r:.80}; a shard lies beside the index"
        for name, file in weight_map.items()
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(ending)
    ]
    if problems:
        raise ModelError(some(str(index), problems))
    return {name: index.parent / file for name, file in weight_map.items()}


def check_shards(where: Path, files: Mapping[str, Path], held: Mapping[Path, Iterable[str]]) -> None:
    """Refuse files that hold (`held`) other tensors than an index (`files`) says, or one tensor twice."""
    holders: dict[str, list[Path]] = {}
    for file, names in held.items():
        for name in names:
            holders.setdefault(name, []).append(file)
    problems = [
        f"{name!r:.80}: expected in {files[name].name}, found in {' and '.join(f.name for f in found) or 'no file'}"
        for name in sorted(files)
        if (found := holders.get(name, [])) != [files[name]]
    ]
    problems += [f"{n!r:.80}: in {holders[n][0].name}, not in the index" for n in sorted(holders.keys() - files.keys())]
    if problems:
        raise ModelError(some(str(where), problems))


def check_links(directory: Path, patterns: Sequence[str]) -> None:
    """Refuse links out of a checkpoint, for files of these names.

    The cache of the hub is made of links from `snapshots/x` to `blobs` of the same repository, which are followed.
    """
    home = directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    problems = [
        f"{file.name}: is a link to another place; copy that file here if you trust it"
        for pattern in patterns
        for file in sorted(directory.glob(pattern))
        if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in (home, blobs))
    ]
    if problems:
        raise ModelError(some(str(directory), problems))


def some(where: str, problems: Sequence[str]) -> str:
    """A listing of the first problems, in which the others are counted."""
    return listing(where, problems[:MOST_SHOWN], max(0, len(problems) - MOST_SHOWN))


def _only_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory that holds no safetensors; which of several must be said."""
    found = sorted(directory.glob(f"*{GGUF}"))
    if not found or (directory / SINGLE).is_file() or (directory / INDEX).is_file():
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:MOST_SHOWN])
        raise ModelError(f"{directory}: holds {len(found)} GGUF files ({names}); give the one that is meant")
    check_links(directory, [f"*{GGUF}"])
    return found[0]


def open_tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a small file, such as an adapter's."""
    return {name: _read_safetensors(file, name) for name in _header(file)}


def _read_safetensors(file: Path, name: str) -> np.ndarray:
    with safe_open(file, framework="np") as tensors:
        kind = tensors.get_slice(name).get_dtype()
        if kind not in READABLE:
            raise ModelError(
                f"{file}: {name} has type {kind}, not one of {', '.join(READABLE)}; give the unquantised checkpoint"
            )
        return tensors.get_tensor(name)


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
