"""What devices send each other: kernels to those that divide them, sums of gradients, and never activations.

XLA decides this, by where parameters lie and what a model says of its activations; what it decided is read in the
compiled program.
"""

import math
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chats import LLAMA
from conftest import TINY
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pictures import VIT

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection
from sft_jax.models.family import Head, build_model
from sft_jax.nn import stack
from sft_jax.nn.devices import Over
from sft_jax.nn.heads import LazyLogits
from sft_jax.nn.kernels import Hardware
from sft_jax.tasks import vocabulary
from sft_jax.tasks.vocabulary import token_loss

SENT = re.compile(r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
TOKENS = 16
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
MODELS = {
    "bert": ({**TINY, **WIDE}, Head("sequence_classification", 2)),
    "llama": ({**LLAMA, **WIDE, "vocab_size": 64}, Head("causal_lm", 0)),
    "vit": ({**VIT, **WIDE}, Head("image_classification", 2)),
}


def over(fsdp: int, tensor: int = 1) -> Over:
    """All devices, as a run has them."""
    mesh = meshes.make_mesh(MeshSection(data=-1, fsdp=fsdp, tensor=tensor))
    return Over(mesh, meshes.ROWS, meshes.HEADS)


def sent(text: str) -> Counter[str]:
    """Bytes of the results of collectives in a compiled program: those of its loops, and those of the rest."""
    found: Counter[str] = Counter()
    where = ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            where = "program" if line.startswith("ENTRY") else "loops"
        if match := SENT.search(line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            found[where] += sum(BYTES[kind] * math.prod(map(int, filter(None, s.split(",")))) for kind, s in shapes)
    return found


def gradient_of(name: str, rows: int, devices: Over) -> Counter[str]:
    """What is sent for the gradient of a model on so many rows."""
    config, head = MODELS[name]
    model = build_model(config, head, "tiny", hardware=Hardware("cpu", "float32", devices))
    shape = (rows, TOKENS)
    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32) for key in ("input_ids", "segment_ids", "position_ids")}
    batch |= {"token_type_ids": batch["input_ids"], "starts": jax.ShapeDtypeStruct((rows, 2), jnp.int32)}
    size = config.get("image_size", 0)
    batch["pixel_values"] = jax.ShapeDtypeStruct((rows, size, size, 3), jnp.float32)
    params = {key: jax.ShapeDtypeStruct(model.template.shapes[key], jnp.float32) for key in model.template.keys}
    lying = meshes.param_shardings(devices.mesh, model.table.axes, model.template.shapes)

    def total(params: dict, batch: dict) -> jax.Array:
        found = model.template.bind(params)(batch)
        if isinstance(found, LazyLogits):
            return token_loss(found, batch["input_ids"], (batch["segment_ids"] > 0).astype(jnp.float32))
        return jnp.square(found).sum()

    step = jax.jit(jax.grad(total), in_shardings=(lying, meshes.batch_sharding(devices.mesh)), out_shardings=lying)
    return sent(step.lower(params, batch).compile().as_text())


@pytest.mark.parametrize("name", MODELS)
def test_activations_stay_where_they_are(name, monkeypatch):
    """D1: with parameters divided over `fsdp`, what is sent does not grow with the rows, but for the vectors of words
    that were looked up and their gradient; in a model that says nothing of its activations it does."""
    devices, few, many = over(fsdp=8), 8, 64
    tokens = (VIT["image_size"] // VIT["patch_size"]) ** 2 + 1 if name == "vit" else TOKENS
    activations = 4 * (many - few) * tokens * WIDE["hidden_size"]
    allowed = activations / 2 if name == "vit" else 3 * activations  # of images, one kernel or the other

    def growth() -> int:
        one, other = (gradient_of(name, rows, devices)["program"] for rows in (few, many))
        return other - one

    assert growth() < allowed
    monkeypatch.setattr(stack, "by_rows", lambda x, over: x)
    assert growth() > allowed + activations, "XLA finds it by itself: nothing need be said"


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 2)], ids=["data", "fsdp", "data, fsdp and tensor"])
def test_the_gradient_of_the_vocabulary_is_added_up_once(shape, monkeypatch):
    """C30 D1: each device adds its chunks up by itself; a loss that does not know of devices sends a gradient a chunk.

    Loss and gradients are those of one device.
    """
    rows, tokens, size, words = 8, 12, 16, 64
    draw = np.random.default_rng(0)
    hidden, table = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((rows, tokens, size), (words, size)))
    label = jnp.asarray(draw.integers(0, words, (rows, tokens)))
    weight = jnp.asarray(draw.random((rows, tokens)) < 0.7, jnp.float32)
    devices = over(*shape)
    mesh = devices.mesh
    lying = (NamedSharding(mesh, P(meshes.ROWS)), NamedSharding(mesh, P("tensor", "fsdp")))
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * rows * words * 5)

    def loss(known: Over | None, hidden: jax.Array, table: jax.Array) -> jax.Array:
        return token_loss(LazyLogits(hidden, table, over=known), label, weight, 0.1)

    def both(known: Over | None) -> tuple[Counter[str], tuple]:
        whole = jax.value_and_grad(partial(loss, known), argnums=(0, 1))
        executable = jax.jit(whole, in_shardings=lying, out_shardings=(None, lying)).lower(hidden, table).compile()
        return sent(executable.as_text()), executable(*map(jax.device_put, (hidden, table), lying))

    (apart, (found, slopes)), (together, _) = both(devices), both(None)
    own = words * size * 4 // mesh.shape["tensor"]
    assert together["loops"] >= own / mesh.shape["fsdp"] > apart["loops"]
    expected, exact = jax.value_and_grad(partial(loss, None), argnums=(0, 1))(hidden, table)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for mine, theirs in zip(slopes, exact, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
