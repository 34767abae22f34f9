"""What must hold on a GPU as it does on a CPU: isolation, losses, the same bits when asked for, one program a shape.

`benchmarks/gpu.sh` runs this; elsewhere it is skipped.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_SHAPE, SMALL, write_model
from safetensors.numpy import load_file

from sft_jax import run as runs
from sft_jax.config.read import write_config
from sft_jax.models.family import Head, build_model
from sft_jax.nn.heads import LazyLogits
from sft_jax.nn.kernels import Hardware
from sft_jax.tasks import vocabulary as vocabularies
from sft_jax.tasks.vocabulary import token_loss

PLATFORM = jax.default_backend()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PLATFORM != "gpu", reason="needs an NVIDIA GPU: benchmarks/gpu.sh"),
]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(("backend", "slots"), [("xla", 0), ("cudnn", 0), ("cudnn", 3)])
def test_documents_of_a_row_do_not_see_each_other(backend, slots):
    """C3: with one document's tokens changed, the hidden states of the other stay bit-equal, whatever computes them."""
    hardware = Hardware(PLATFORM, "bfloat16")
    model = build_model(LLAMA, Head("causal_lm", 0), "tiny", attention=backend, hardware=hardware)
    params = model.template.initial(jax.random.key(0), model.template.keys)
    params = {path: array.astype(jnp.bfloat16) for path, array in params.items()}
    segments = np.repeat([1, 2, 0], [100, 120, 36])[None].astype(np.int32)
    places = np.concatenate([np.arange(100), np.arange(120), np.zeros(36, int)])[None].astype(np.int32)
    ids = np.random.default_rng(0).integers(1, 128, segments.shape).astype(np.int32)
    changed = np.where(segments == 1, 127 - ids, ids)

    @jax.jit
    def hidden(ids: jax.Array) -> jax.Array:
        batch = {"input_ids": ids, "segment_ids": jnp.asarray(segments), "position_ids": jnp.asarray(places)}
        batch |= {"starts": jnp.zeros((1, slots), jnp.int32)} if slots else {}
        return model.template.bind(params)(batch).hidden

    before, after = (np.asarray(hidden(jnp.asarray(given)), np.float32) for given in (ids, changed))
    assert (before[segments == 2] == after[segments == 2]).all()
    assert (before[segments == 1] != after[segments == 1]).any(), "the change does nothing"


def test_cross_entropy_in_chunks(monkeypatch):
    """C30: losses over a vocabulary are those of float64, in as many chunks as there are, and so is their gradient."""
    draw, rows, tokens, vocabulary = np.random.default_rng(0), 4, 512, 1 << 16
    hidden, table = (draw.normal(size=shape).astype(np.float32) / 8 for shape in ((rows, tokens, 64), (vocabulary, 64)))
    label, wanted = draw.integers(0, vocabulary, (rows, tokens)).astype(np.int32), draw.random((rows, tokens)) < 0.5
    monkeypatch.setattr(vocabularies, "CHUNK_BYTES_EACH", rows * tokens * vocabulary)  # a quarter

    def total(hidden: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            logits = LazyLogits(hidden, jnp.asarray(table))
            return token_loss(logits, jnp.asarray(label), jnp.asarray(wanted, jnp.float32))

    found, gradient = jax.jit(jax.value_and_grad(total))(jnp.asarray(hidden))
    wide, expected, slope = table.astype(np.float64), 0.0, np.zeros((tokens, 64))
    for number in range(rows):
        logits = hidden[number].astype(np.float64) @ wide.T
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        share = shifted / shifted.sum(axis=1, keepdims=True)
        of_label = share[np.arange(tokens), label[number]]
        expected -= np.log(of_label)[wanted[number]].sum()
        if number == 0:
            share[np.arange(tokens), label[0]] -= 1
            slope = (share @ wide) * wanted[0][:, None]
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert np.linalg.norm(np.asarray(gradient[0]) - slope) < 1e-3 * np.linalg.norm(slope)


def test_one_program(configure, tmp_path):
    """C29: steps of one shape compile once, in the first."""
    model = write_model(tmp_path / "model", SMALL)
    run = runs.prepare(configure(f"model.source={model}", ONE_SHAPE, "train.compute_dtype=bfloat16"))
    state, frozen = runs.initial(run)
    program = runs.train_program(run, state, frozen)
    found: list[float] = []

    def listen(event: str, seconds: float, **more: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    batches = [run.put(run.batches[number]) for number in range(3)]
    executable = program.compile(batches[0])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for batch in batches:
            state, _ = program.compile(batch)(state, frozen, batch)
        jax.block_until_ready(state)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert program.compiled == 1 and program.compile(batches[0]) is executable and found == []


def test_the_same_bits_each_time(configure, tmp_path):
    """R38: with `run.deterministic` the same command, run twice from nothing, exports the same bits."""
    model = write_model(tmp_path / "model", SMALL)
    weights = []
    for name in ("one", "other"):
        config = configure(
            f"model.source={model}", f"run.dir={tmp_path / name}", "run.deterministic=true", "train.epochs=1"
        )
        file = tmp_path / f"{name}.yaml"
        file.write_text(write_config(config))
        environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, "-m", "sft_jax", "train", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    one, other = weights
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
