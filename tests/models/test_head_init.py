"""A new head begins from the seed alone: not from the process, the device, the hash seed or the rest of the model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY

from sft_jax.errors import ModelError
from sft_jax.models.family import Head, build_model, load_model
from sft_jax.weights.files import open_checkpoint, read_config

# What a run does for a checkpoint without a head, in a process of its own.
PROGRAM = """
import sys, hashlib, jax.numpy as jnp, numpy as np
from pathlib import Path
from sft_jax.config.schema import MeshSection
from sft_jax.config.training import OptimSection, TrainSection
from sft_jax.mesh import make_mesh
from sft_jax.models.family import Head, build_model, load_model
from sft_jax.train.optim import build_optimizer
from sft_jax.train.state import beginning, initial_state, place
from sft_jax.weights.files import open_checkpoint

checkpoint = open_checkpoint(Path(sys.argv[1]))
model = build_model(checkpoint.config, Head("sequence_classification", 3), "tiny")
matched, arrays = load_model(model, checkpoint)
paths = model.template.keys
begin = beginning(build_optimizer(OptimSection(), 10, paths), TrainSection())
placement = place(make_mesh(MeshSection()), model.template, model.table.axes, frozenset(), begin)
state, _ = initial_state(model.template, arrays, frozenset(), begin, placement, int(sys.argv[2]), jnp.dtype("float32"))
for path in paths:
    kind = "new" if path in matched.initialised else "old"
    print(kind, path, hashlib.sha256(np.asarray(state.params[path]).tobytes()).hexdigest())
"""


def hashes(source: Path, seed: int, devices: int, hash_seed: int) -> dict[str, dict[str, str]]:
    """The sha256 of each parameter as a fresh process begins with it, by what is new and what was loaded."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONHASHSEED": str(hash_seed),
    }
    command = [sys.executable, "-c", PROGRAM, str(source), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = {"new": {}, "old": {}}
    for line in done.stdout.splitlines():
        kind, path, digest = line.split()
        found[kind][path] = digest
    return found


def test_a_new_head_is_bit_equal_in_two_processes(tiny):
    """C23 R19: same seed, two processes, other hash seeds and device counts: bit-equal; another seed: another head."""
    first, second = hashes(tiny, 5, 1, 1), hashes(tiny, 5, 4, 2)
    other = hashes(tiny, 6, 1, 1)
    assert {"head/out/kernel", "head/out/bias"} <= set(first["new"])
    assert first == second
    assert first["old"] == other["old"]
    kernels = [path for path in first["new"] if path.endswith("kernel")]
    assert all(first["new"][path] != other["new"][path] for path in kernels)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_new_head_does_not_depend_on_the_backbone(layers):
    """C23: the head begins the same under any number of layers, and its kernels differ from each other."""
    here = build_model(TINY, Head("sequence_classification", 3), "tiny").template
    there = build_model({**TINY, "num_hidden_layers": layers}, Head("sequence_classification", 3), "tiny").template
    paths = [path for path in here.keys if path.startswith("head/")]
    key = jax.random.key(0)
    ours, theirs = here.initial(key, paths), there.initial(key, there.keys)
    assert all((np.asarray(ours[path]) == np.asarray(theirs[path])).all() for path in paths)
    assert ours["head/dense/kernel"].std() > 0


def test_random_weights_need_none(tiny, tmp_path):
    """C23: `model.weights: random` begins from the seed alone, needs no weights in the directory, and reads none."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "model.safetensors").unlink()
    model = build_model(read_config(bare), Head("sequence_classification", 2), str(bare))
    for source in (tiny, bare):
        matched, arrays = load_model(model, open_checkpoint(source, weights=False), anew="all")
        assert not arrays and sorted(matched.initialised) == sorted(model.template.keys)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        open_checkpoint(bare)
