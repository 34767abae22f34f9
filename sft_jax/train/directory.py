"""The run directory: what is in it, and whether a run may go on in it.

config.yaml     the whole configuration, defaults included
manifest.json   versions, seeds, digests of data and weights, mesh, flags, git state
metrics.jsonl   a line for each interval and evaluation
events/         the same for TensorBoard
checkpoints/    training states
model/          the best model as a Hugging Face directory
summary.json    scores and seconds, when the run is done
review.json     how the rows of the test split were answered, in short
report.html     all of this for people
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sft_jax.config.read import parse_value, write_config
from sft_jax.config.schema import Config
from sft_jax.data.batch import Encoded
from sft_jax.errors import RunError, listing

# Keys that change how a run goes but not what it computes, so that a resumed run may differ in them.
FREE = ("run", "mesh", "data.prefetch", "train.log_every", "eval.baselines", "checkpoint.keep")
PACKAGES = ("sft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "transformers",
            "tokenizers", "datasets", "safetensors")  # fmt: skip
# Environment that changes results or speed. A list of what is written, so that no secret can be.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES",
         "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "SFT_NUM_PROCESSES")  # fmt: skip


def is_used(directory: Path) -> bool:
    """Whether a run began here."""
    return (directory / "config.yaml").is_file()


def check(config: Config, directory: Path) -> None:
    """Refuse a directory that this run may not go on in; says why, and what to do."""
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory}: is a file; give another run.dir")
    if config.run.resume == "never" and is_used(directory):
        raise RunError(f"{directory}: holds a run, and run.resume is never; give another run.dir")
    if config.run.resume == "must" and not is_used(directory):
        raise RunError(f"{directory}: holds no run, and run.resume is must; check run.dir")
    if not is_used(directory):
        return
    before = parse_value((directory / "config.yaml").read_text(encoding="utf-8"))
    now = parse_value(write_config(config))
    differing = [
        f"{key}: {there!r} there, {here!r} now"
        for key, (there, here) in differences(before, now).items()
        if not _is_free(key)
    ]
    if differing:
        where = f"{directory} holds another run; give another run.dir, or the same settings"
        raise RunError(listing(where, differing))


def begin(config: Config, directory: Path, manifest: Mapping[str, Any]) -> None:
    """Create the directory, or check that data and weights are those that the run began with."""
    if not is_used(directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        write_json(directory / "manifest.json", manifest)
        write_whole(directory / "config.yaml", write_config(config))
        return
    before = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    differing = [
        f"{what}: not what the run began with" for what in ("data", "weights") if before[what] != manifest[what]
    ]
    if differing:
        raise RunError(listing(f"{directory}: cannot go on; give another run.dir", differing))


def manifest(config: Config, mesh: Mesh, data: Mapping[str, Encoded], weights: Mapping[str, str]) -> dict[str, Any]:
    """Everything that a result depends on, as plain data."""
    device = jax.devices()[0]
    return {
        "schema": 1,
        "seeds": config.seed.model_dump(),
        "data": {split: {"rows": len(found), "sha256": fingerprint(found)} for split, found in data.items()},
        "weights": dict(weights),
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "devices": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
        },
        "processes": jax.process_count(),
        "versions": versions(),
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "git": git_state(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that results depend on."""
    return {
        "python": platform.python_version(),
        **{p: importlib.metadata.version(p) for p in PACKAGES},
    }


def fingerprint(encoded: Encoded) -> str:
    """The sha256 of encoded documents: of every token and label, in order."""
    digest = hashlib.sha256()
    for name, array in sorted({**encoded.tokens, **encoded.documents, "offsets": encoded.offsets}.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether it has changes; None outside a repository."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(ask("status", "--porcelain"))}


def write_json(file: Path, content: Any) -> None:
    """Write plain data as a JSON file."""
    write_whole(file, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.rename(file)


def differences(*trees: Any) -> dict[str, tuple[Any, ...]]:
    """Dotted key -> its value in each tree, for the keys in which they differ; None where a tree lacks the key."""
    flat = [{key: value for key, value in flatten(tree).items() if value != {}} for tree in trees]
    values = {key: tuple(tree.get(key) for tree in flat) for key in sorted(set().union(*flat))}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys in dotted form; lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    joined = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {key: value for part in joined for key, value in part.items()}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)
