"""The manifest of a run: everything that its result depends on, as plain data with a schema, and its attempts.

Two runs that are to give the same bytes have manifests that differ in `attempts` alone; where one thing was changed,
the one field of that thing differs.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import BaseModel, ConfigDict, Field

from sft_jax.config.data import Files, Hub, Mixture, Tfds
from sft_jax.config.schema import Seeds
from sft_jax.data.batch import Encoded
from sft_jax.data.cache import chunks
from sft_jax.errors import reason

PACKAGES = ("sft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "transformers",
            "tokenizers", "datasets", "safetensors")  # fmt: skip
# Environment that changes results or speed. A list of what is written, so that no secret can be.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES",
         "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "SFT_NUM_PROCESSES")  # fmt: skip
MODEL_CONFIG = "config.json"  # among the weights: what is read of it
HOME = Path(__file__).parents[1]  # of the package
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Base of every part: an unknown key, a missing one and a wrong type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Split(Part):
    """The documents of a split."""

    rows: Count
    sha256: Digest
    """Of every token and label, in order."""
    scored: Digest | None
    """Of the texts and targets that scores are made of, in order; None of training rows."""


class Devices(Part):
    """The devices of all processes."""

    kind: str
    platform: str
    count: Count


class Host(Part):
    """The machine of the first process."""

    cpu: str
    cores: Count


class Git(Part):
    """A checkout: its commit, and whether files in it are not as they are there."""

    commit: str
    changed: bool


class Extension(Part):
    """More steps than the run was to have, by `run.extend`."""

    step: Count
    """The newest checkpoint then."""
    before: Count
    """Steps that the run was to have until then."""
    after: Count
    time: Time


class Attempt(Part):
    """One process that worked on the run."""

    command: list[str]
    """Its words, credentials left out."""
    started: Time
    finished: Time | None
    """None while it goes on, and where it was killed."""
    exit_code: int | None
    differs: dict[str, list[Any]]
    """What was not as when the run began: flattened key to [then, now]."""


class Manifest(Part):
    """The whole of `manifest.json`."""

    schema_: Annotated[Literal[3], Field(alias="schema")]
    config: Digest
    """Of the settings that change what is computed, seeds left out since they stand here."""
    seeds: dict[str, Count]
    files: dict[str, Digest]
    """The local files of rows, as the configuration names them."""
    data: dict[str, Split]
    task: Digest
    """Of what an export says of the task: its labels in order, its columns."""
    tokenizer: Digest
    weights: dict[str, Digest]
    """The weight files of the pretrained checkpoint, and its `config.json` as it is read."""
    mesh: dict[str, Count]
    devices: Devices
    host: Host
    processes: Count
    versions: dict[str, str]
    flags: dict[str, str]
    git: Git | None
    """Of the working directory, where it is in a repository."""
    code: Git | None
    """Of sft_jax itself, where it runs from a checkout."""
    extensions: list[Extension]
    attempts: list[Attempt]


def manifest(
    settings: Mapping[str, Any],
    seeds: Seeds,
    mesh: Mesh,
    *,
    data: Mapping[str, Any],  # split -> what `split` says of it
    files: Sequence[tuple[str, Path]],  # name -> where it lies
    model: Mapping[str, Any],  # task, tokenizer and weights
) -> dict[str, Any]:
    """Everything that a result depends on; `extensions` and `attempts` are still none."""
    device = jax.devices()[0]
    found = {
        "schema": 3,
        "config": sha256(settings),
        "seeds": seeds.model_dump(),
        "files": {name: file_sha256(file) for name, file in files},
        "data": dict(data),
        **model,
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "devices": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "host": {"cpu": processor(), "cores": os.cpu_count() or 0},
        "processes": jax.process_count(),
        "versions": versions(),
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "git": git_state(),
        "code": git_state(HOME),
        "extensions": [],
        "attempts": [],
    }
    return Manifest.model_validate(found).model_dump(by_alias=True)


def split(encoded: Encoded, scored: Iterable[Iterable[Any]] | None) -> dict[str, Any]:
    """What a manifest says of the documents of a split, and of the columns that its scores are made of."""
    written = None
    if scored is not None:
        digest = hashlib.sha256()
        for value in chain.from_iterable(scored):
            digest.update(repr(_plain(value)).encode() + b"\n")
        written = digest.hexdigest()
    return {"rows": len(encoded), "sha256": fingerprint(encoded), "scored": written}


def _plain(value: Any) -> Any:
    """A value in Python's own types, whether it was read now or kept in arrays; an image by its name."""
    if isinstance(value, tuple | list):
        return tuple(_plain(part) for part in value)
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def command(words: Sequence[str]) -> list[str]:
    """The words of a command line as a manifest may hold them: without credentials."""
    program = Path(words[0])
    name = "sft-jax" if program.parts[-2:] == ("sft_jax", "__main__.py") else program.name
    return [name, *(reason(word, most=1000) if word else word for word in words[1:])]


def utc_now() -> str:
    """The time now, in seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Python and the packages that results depend on."""
    return {
        "python": platform.python_version(),
        **{p: importlib.metadata.version(p) for p in PACKAGES},
    }


def local_files(source: Files | Hub | Tfds | Mixture) -> list[str]:
    """The files and directories of rows that a source names, as it names them, if they are local ones."""
    if isinstance(source, Mixture):
        found = [name for part in source.parts for name in local_files(part.source)]
    elif isinstance(source, Files):
        given = [getattr(source, split) for split in ("train", "validation", "test")]
        found = [name for names in given for name in ([names] if isinstance(names, str) else names or [])]
    else:
        found = [source.name] if isinstance(source, Hub) and Path(source.name).expanduser().is_dir() else []
    return list(dict.fromkeys(found))


def file_sha256(place: Path) -> str:
    """The sha256 of a file, or of all files in a directory with their names."""
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file())
        return sha256([[str(file.relative_to(place)), file_sha256(file)] for file in files])
    with open(place, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sha256(content: Any) -> str:
    """The sha256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(encoded: Encoded) -> str:
    """The sha256 of encoded documents: of every token, pixel and label, in order."""
    digest = hashlib.sha256()
    for name, array in sorted({**encoded.tokens, **encoded.documents, "offsets": encoded.offsets}.items()):
        digest.update(name.encode())
        for part in chunks(array):
            digest.update(np.ascontiguousarray(part).tobytes())
    for name, lazy in sorted(encoded.lazy.items()):
        digest.update(f"{name} {lazy.digest}".encode())
    if encoded.target is not None:
        digest.update(fingerprint(encoded.target).encode())
    return digest.hexdigest()


def processor() -> str:
    """What the processor calls itself."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(home: Path | None = None) -> dict[str, Any] | None:
    """Commit of the working directory and whether it has changes; None outside a repository.

    Of another directory, whether it itself has changes; None where the repository does not keep it.
    """

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, cwd=home)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None or (home is not None and not ask("ls-files", ".")):
        return None
    return {"commit": commit, "changed": bool(ask("status", "--porcelain", *(["."] if home else [])))}
