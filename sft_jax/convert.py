"""Weights that torch pickled, made into a Hugging Face directory of safetensors.

The pickles are read in a process of its own, with bounds on memory and time, by `weights/pickles.py`, which calls
nothing that they name. This process sees what came of it, checks that against the model's weight table, and only
then gives the directory its name.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sft_jax.data.text import FILES, NAMED, named_templates
from sft_jax.errors import ModelError, reason
from sft_jax.models.family import FAMILIES, Head, build_model
from sft_jax.weights.files import (
    CONFIG,
    INDEX,
    PICKLES,
    SINGLE,
    check_links,
    copy_files,
    new_directory,
    open_checkpoint,
    read_config,
    read_index,
)
from sft_jax.weights.table import match

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ALONG = (CONFIG, "generation_config.json", *FILES)
# -P: nothing is imported from where the command is given; our code is what this process has.
READER = "import sys; sys.path.insert(0, sys.argv[1]); from sft_jax.weights.pickles import main; main()"
ROOT = Path(__file__).parents[1]


def convert(source: Path, out: Path) -> list[str]:
    """Write the weights that torch pickled at `source` (a directory or one file) to a new directory; gives notes.

    Raises ModelError where the pickles hold anything but tensors, or others than the model of `config.json` needs.
    """
    home = source if source.is_dir() else source.parent
    files = _pickles(source)
    check_links(home, (*ALONG, f"{NAMED}/*", "*.bin"))
    config = read_config(home) if (home / CONFIG).is_file() else None
    with new_directory(out) as fresh:
        notes = _read(source, files, fresh)
        copy_files(home, (*ALONG, *named_templates(home)), fresh)
        if config is None:
            return [*notes, f"there is no {CONFIG} beside it: put that of the model it came from into {out}"]
        return [*notes, *_check(config, fresh, str(source))]


def _pickles(source: Path) -> dict[str, list[str] | None]:
    """The files to read, and the names that each must hold, where an index says so."""
    if source.is_file():
        return {str(source.absolute()): None}
    if not source.is_dir():
        raise ModelError(f"{source}: no such file or directory; give a file of torch.save, or a directory with one")
    if (source / SINGLE).is_file() or (source / INDEX).is_file():
        raise ModelError(f"{source}: holds safetensors already; there is nothing to convert")
    if (source / PICKLED_INDEX).is_file():
        files: dict[str, list[str] | None] = {}
        for name, file in read_index(source / PICKLED_INDEX, ".bin").items():
            files[str(file.absolute())] = [*(files.get(str(file.absolute())) or []), name]
        return files
    if (source / PICKLED).is_file():
        return {str((source / PICKLED).absolute()): None}
    others = sorted(file.name for file in source.iterdir() if file.suffix in PICKLES)
    raise ModelError(
        f"{source}: no {PICKLED} and no {PICKLED_INDEX}; "
        + (f"give one of its files: {', '.join(others)}" if others else "give a directory that holds one, or a file")
    )


def _read(source: Path, files: dict[str, list[str] | None], fresh: Path) -> list[str]:
    """Let the other process write the tensors of the pickles as safetensors; gives its notes."""
    asked = json.dumps({"files": files, "out": str(fresh.absolute())})
    command = [sys.executable, "-P", "-c", READER, str(ROOT)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # or threads would take up its memory
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment)
    try:
        said: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or ["no word"]
        raise ModelError(
            f"{source}: reading it was stopped with {done.returncode} ({reason(last[0])}); it is broken, or too large "
            f"for its bounds on memory and time; fetch it again"
        ) from None
    if "error" in said:
        raise ModelError(said["error"])
    return said["notes"]


def _check(config: dict[str, Any], fresh: Path, where: str) -> list[str]:
    """See that the tensors are those of the model that `config.json` describes; a head may be of any kind."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return [f"model type {kind!r:.40} is not known here, so names and shapes were not checked"]
    model = build_model(config, Head("sequence_classification", 2), where)
    match(model.table, model.template.shapes, open_checkpoint(fresh).shapes, where, anew="head")
    return []
