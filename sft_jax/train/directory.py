"""The run directory: what is in it, and whether a run may go on in it.

run.lock        who trains in it, while it is locked
config.yaml     the whole configuration, defaults included
manifest.json   versions, seeds, digests of data and weights, mesh, flags, git state
metrics.jsonl   a line for each interval and evaluation
checkpoints/    training states, and those that were moved aside
model/          the best model as a Hugging Face directory
summary.json    scores and seconds, when the run is done
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from sft_jax.config.read import parse_value, write_config
from sft_jax.config.schema import Config
from sft_jax.data.batch import Encoded
from sft_jax.errors import RunError, listing

# Keys that change how a run goes but not what it computes, so that a resumed run may differ in them.
FREE = ("run", "mesh", "data.prefetch", "train.log_every", "eval.baselines", "checkpoint.keep",
        "checkpoint.on_error")  # fmt: skip
PACKAGES = ("sft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "transformers",
            "tokenizers", "datasets", "safetensors")  # fmt: skip
# Environment that changes results or speed. A list of what is written, so that no secret can be.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES",
         "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "SFT_NUM_PROCESSES")  # fmt: skip
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has none


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
    if (directory / "checkpoints").exists() and not (directory / "checkpoints").is_dir():
        raise RunError(f"{directory / 'checkpoints'}: is a file; move it away, or give another run.dir")
    if not is_used(directory):
        return
    before = flatten(_read(directory / "config.yaml", parse_value))
    now = flatten(parse_value(write_config(config)))
    differing = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _is_free(key)
    ]
    if differing:
        where = f"{directory} holds another run; give another run.dir, or the same settings"
        raise RunError(listing(where, differing))


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Create the directory and keep other runs out of it; who is killed lets go of it by that.

    On a file system that has no locks, nobody is kept out.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        lock = open(directory / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"{directory}: cannot be written ({error.strerror}); give another run.dir") from None
    with lock:
        _take(lock, directory)
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            where = error.filename or directory
            raise RunError(f"{where}: {error.strerror}; make room, and the same command goes on") from None


def begin(config: Config, directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write down what run this is, or check that it is the one that began here, with the same data and weights."""
    if not is_used(directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        write_json(directory / "manifest.json", manifest)
        write_whole(directory / "config.yaml", write_config(config))
        return
    check(config, directory)  # again: another run may have begun since
    before = _read(directory / "manifest.json", json.loads)
    differing = [
        f"{what}: not what the run began with" for what in ("data", "weights") if before.get(what) != manifest[what]
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


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys in dotted form; lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    joined = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {key: value for part in joined for key, value in part.items()}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _take(lock: Any, directory: Path) -> None:
    """Lock the file and write into it who holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise RunError(f"{directory}: {holder} is training in it; wait, stop it, or give another run.dir") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},\n")
    lock.flush()


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file that a run wrote when it began."""
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); give another run.dir") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{file}: is damaged; put it back from a copy, or give another run.dir")
    return found
