"""Kernels of accelerators keep `attend`'s contract, and a model gets only what it and the machine can do.

On a CPU the kernels of jax are run by Pallas' interpreter, and cuDNN is followed as far as the compiler; tests marked
`gpu` compute there (`benchmarks/gpu.sh`).
"""

import functools
import re
import types
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attend import reference

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection
from sft_jax.errors import ConfigError
from sft_jax.models.family import Head, Model, build_model
from sft_jax.nn import flash, kernels
from sft_jax.nn.attention import Visible, attend, earlier, lengths_of, same_segment
from sft_jax.nn.devices import Over
from sft_jax.nn.kernels import Choice, Hardware, Needs, attend_by, choose
from sft_jax.nn.stack import POLICIES

TOKENS = 70  # of no block's size
LENGTHS = [[30, 12, 28], [25], [], [60, 10]]
ON_GPU = jax.default_backend() == "gpu"
ON_CPU = jax.default_backend() == "cpu"
GPU, TPU = (Hardware(platform, "bfloat16") for platform in ("gpu", "tpu"))
KERNELS = [
    *(
        pytest.param("splash", n, marks=pytest.mark.skipif(not ON_CPU, reason="a kernel for TPUs; a CPU interprets it"))
        for n in (64, 128)
    ),
    pytest.param(
        "cudnn",
        64,
        marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="cuDNN needs an NVIDIA GPU: benchmarks/gpu.sh")],
    ),
    pytest.param("flash", 64, marks=[pytest.mark.gpu] if ON_GPU else []),
]
BY = pytest.mark.parametrize("by", ["lengths", "mask"])


@functools.cache
def laid_out() -> tuple[np.ndarray, np.ndarray]:
    """(segments, positions) of packed, half-empty and empty rows."""
    ids, places = (np.zeros((len(LENGTHS), TOKENS), np.int32) for _ in range(2))
    for row, lengths in enumerate(LENGTHS):
        ids[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
        places[row, : sum(lengths)] = np.concatenate([np.arange(0), *map(np.arange, lengths)])
    return ids, places


def mask_of(causal: bool, window: int | None = None) -> jax.Array:
    """Which key each query may see."""
    ids, places = map(jnp.asarray, laid_out())
    seen = same_segment(ids)
    return seen & earlier(places, places, window) if causal else seen


def visible_to(causal: bool, by: str = "lengths", window: int | None = None) -> Visible:
    """The same, said in both ways or by the mask alone; there is a slot that no document is in."""
    batch = {"segment_ids": jnp.asarray(laid_out()[0]), "starts": jnp.zeros((len(LENGTHS), 4), jnp.int32)}
    return Visible(mask_of(causal, window), lengths_of(batch) if by == "lengths" else None, window)


def over(data: int, fsdp: int, tensor: int) -> Over:
    """So many devices."""
    return Over(meshes.make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor)), meshes.ROWS, meshes.HEADS)


def inputs(size: int, dtype: str = "float32", heads: int = 4, shared: int = 2) -> list[jax.Array]:
    """Queries, keys and values, the latter of fewer heads."""
    draw = np.random.default_rng(0)
    counts = (heads, heads // shared, heads // shared)
    return [jnp.asarray(draw.normal(size=(len(LENGTHS), TOKENS, count, size)), dtype) for count in counts]


def gradients(
    backend: str | Choice, visible: Visible, given: list[jax.Array], causal: bool, **dropout: Any
) -> tuple[jax.Array, ...]:
    """Outputs of a backend, then the gradients of a loss that looks at all of them, filler too."""

    choice = Choice(backend) if isinstance(backend, str) else backend

    def loss(*given: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend_by(choice, *given, visible, causal=causal, **dropout)
        wide = out.astype(jnp.float32)
        return (jnp.sin(wide) + jnp.square(wide)).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), found = run(*given)
    return out, *found


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@BY
@pytest.mark.parametrize(("backend", "size"), KERNELS)
def test_a_kernel_equals_the_definition(backend, size, by, causal):
    """C3 C34: outputs are those of float64, gradients those of XLA; filler gives zeros and gets none."""
    dtype, tolerance = ("float32", 1e-5) if ON_CPU else ("bfloat16", 3e-2)
    visible, given = visible_to(causal, by), inputs(size, dtype)
    out, *found = gradients(backend, visible, given, causal)
    wide = [np.asarray(array, np.float64) for array in given]
    expected = reference(wide[0], wide[1].repeat(2, axis=2), wide[2].repeat(2, axis=2), np.asarray(visible.mask))
    assert np.abs(np.asarray(out, np.float64) - expected).max() < tolerance
    _, *exact = gradients("xla", visible, [array.astype(jnp.float32) for array in given], causal)
    filler = laid_out()[0] == 0
    for mine, theirs in zip(found, exact, strict=True):
        mine, theirs = (np.asarray(array, np.float64) for array in (mine, theirs))
        assert np.linalg.norm(mine - theirs) < tolerance * np.linalg.norm(theirs)
        assert (mine[filler] == 0).all()
    assert (np.asarray(out, np.float32)[filler] == 0).all()


@pytest.mark.parametrize("broken", [False, True], ids=["isolated", "control"])
@BY
@pytest.mark.parametrize(("backend", "size"), KERNELS)
def test_another_document_changes_nothing(backend, size, by, broken):
    """C3: with one document perturbed, outputs of another in the same row stay bit-equal; merged, they move."""
    ids, _ = laid_out()
    mask = np.minimum(ids, 1) if broken else ids
    second = ids == 2
    before = inputs(size, "float32" if ON_CPU else "bfloat16")
    after = [jnp.where(jnp.asarray(second)[:, :, None, None], array, 3 * array + 1) for array in before]
    batch = {"segment_ids": jnp.asarray(mask), "starts": jnp.zeros((len(LENGTHS), 3), jnp.int32)}
    visible = Visible(same_segment(batch["segment_ids"]), lengths_of(batch) if by == "lengths" else None)
    one, other = (
        np.asarray(attend_by(Choice(backend), *given, visible, causal=False), np.float32) for given in (before, after)
    )
    assert (one[second] == other[second]).all() == (not broken)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_dropout_is_the_same_in_the_kernel(causal, shared):
    """R38: `flash` drops what `attend` does, forward and backward, of rows that are no whole blocks; not without a
    key, and another one drops something else."""
    dtype, tolerance = ("float32", 1e-5) if ON_CPU else ("bfloat16", 3e-2)
    visible, given = visible_to(causal), inputs(32, dtype, shared=shared)
    key, other = jnp.asarray([[5, 77], [6, 77]], jnp.uint32)
    found = gradients("flash", visible, given, causal, rate=0.3, key=key)
    exact = gradients("xla", visible, [array.astype(jnp.float32) for array in given], causal, rate=0.3, key=key)
    for mine, theirs in zip(found, exact, strict=True):
        mine, theirs = (np.asarray(array, np.float64) for array in (mine, theirs))
        assert np.linalg.norm(mine - theirs) < tolerance * np.linalg.norm(theirs)
    plain, dropped = (gradients("flash", visible, given, causal, rate=0.3, key=k) for k in (None, other))
    for without in (plain, dropped):
        apart = np.asarray(without[0] - found[0], np.float64)
        assert np.linalg.norm(apart) > 0.1 * np.linalg.norm(np.asarray(found[0], np.float64))


@pytest.mark.skipif(not ON_CPU, reason="needs eight devices")
@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 1, 1), (1, 1, 4), (8, 1, 1)], ids=str)
@pytest.mark.parametrize("backend", ["splash", "flash"])
def test_each_device_computes_its_own(backend, shape):
    """R38 D1: on several devices each has its rows and heads, or copies where they do not divide; numbers, gradients
    and dropout are those of one, and documents, queries and keys stay where they are."""
    dropout = {"rate": 0.3, "key": jnp.asarray([5, 77], jnp.uint32)} if backend == "flash" else {}
    visible, given = visible_to(True), inputs(64)
    devices = over(*shape)
    found = gradients(Choice(backend, over=devices), visible, given, True, **dropout)
    for mine, theirs in zip(found, gradients("xla", visible, given, True, **dropout), strict=True):
        assert np.linalg.norm(mine - theirs) < 1e-5 * np.linalg.norm(theirs)
    if shape == (2, 2, 2):
        lying = NamedSharding(devices.mesh, P(("data", "fsdp"), None, "tensor"))
        placed = [jax.device_put(array, lying) for array in given]

        def loss(*given: jax.Array) -> jax.Array:
            return attend_by(Choice(backend, over=devices), *given, visible, causal=True, **dropout).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=(lying,) * 3).lower(*placed).compile()
        assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())


@pytest.mark.skipif(not ON_CPU, reason="needs several devices")
@pytest.mark.parametrize("backend", ["splash", "flash"])
def test_what_a_kernel_gives_is_kept(backend):
    """R38: `train.remat: dots` does not run a kernel again for its gradient, on one device and on several."""
    visible, given = visible_to(True), inputs(64)

    def calls(devices: Over | None, policy: str) -> int:
        @functools.partial(jax.checkpoint, policy=POLICIES[policy])
        def block(*given: jax.Array) -> jax.Array:
            return jnp.sin(attend_by(Choice(backend, over=devices), *given, visible, causal=True))

        whole = jax.value_and_grad(lambda *given: block(*given).sum(), argnums=(0, 1, 2))
        traced = jax.make_jaxpr(whole)(*given)
        live, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
        return str(live).count("pallas_call[")

    for devices in (None, over(2, 1, 1)):
        assert calls(devices, "dots") == 3 and calls(devices, "full") == 4


def test_splash_knows_windows():
    """C3 R57: of layers that see the last tokens alone Splash computes these, packed or not; unknown, XLA does."""
    if not ON_CPU:
        pytest.skip("a CPU interprets it")
    given = inputs(128)
    for window in (5, 2, 40):
        visible = visible_to(True, window=window)
        exact = gradients("xla", visible, given, True)
        for mine, theirs in zip(gradients("splash", visible, given, True), exact, strict=True):
            assert np.linalg.norm(mine - theirs) < 1e-5 * np.linalg.norm(theirs)
    whole = attend_by(Choice("splash"), *given, visible_to(True), causal=True)
    assert np.abs(whole - exact[0]).max() > 0.1, "the window does nothing"
    unknown = visible_to(True, "mask", 5)
    found = attend_by(Choice("splash"), *given, unknown, causal=True)
    assert (found == attend(*given, unknown.mask)).all()


def test_blocks_of_other_documents_are_not_read():
    """R38: of long rows, blocks that hold no key of a query's document are left out, in both directions."""
    lengths = jnp.asarray([[130, 0, 70], [10, 20, 0], [0, 0, 0]], jnp.int32)
    document, first, last, read_first, read_last = flash.layout(lengths, 4 * flash.BLOCK, causal=True)
    assert np.array_equal(np.bincount(document[0], minlength=4), [56, 130, 0, 70])
    assert first.tolist() == [[0, 0, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]] and (last == jnp.arange(1, 5)).all()
    assert (read_first == jnp.arange(4)).all() and read_last.tolist()[0] == [3, 3, 4, 4]
    _, *both = flash.layout(lengths, 4 * flash.BLOCK, causal=False)
    assert [a.tolist()[0] for a in both] == [[0, 0, 0, 2], [3, 3, 4, 4]] * 2


def test_scores_are_bounded_where_a_kernel_can():
    """R57: Splash bounds scores as `attend` does."""
    if not ON_CPU:
        pytest.skip("a CPU interprets it")
    given, visible = inputs(128, shared=1), visible_to(True)
    exact = attend(*given, visible.mask, softcap=2.0, scale=0.5)
    found = attend_by(Choice("splash"), *given, visible, causal=True, softcap=2.0, scale=0.5)
    assert np.abs(found - exact).max() < 1e-5
    assert np.abs(attend(*given, visible.mask, scale=0.5) - exact).max() > 0.1, "the bound does nothing"


@pytest.mark.parametrize("window", [None, 5])
def test_segments_are_found_in_the_mask(window):
    """C3: documents are known by their first token where all of it is seen; a window hides it."""
    ids, _ = laid_out()
    begins = np.where(ids > 0, [[1 + (row == i).argmax() for i in row] for row in ids], 0)
    assert (np.asarray(kernels.segments_of(mask_of(False))) == begins).all()
    assert (np.asarray(kernels.segments_of(mask_of(True, window))) == begins).all() == (window is None)


@pytest.mark.skipif(not ON_CPU, reason="on a GPU it is computed")
def test_cudnn_is_what_a_gpu_is_told(monkeypatch):
    """R38: compiled for CUDA, both passes call cuDNN's fused attention and no product of all pairs is left.

    On Hopper they are told where documents begin, and the mask is not made; before it they are given the mask, and so
    they are of heads that share keys by a jax that computes these places wrongly.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(
        fused_attention_stablehlo, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91500)
    )
    given = inputs(64, "bfloat16")

    def text(backend: str, by: str, hopper: bool, version: tuple[int, ...] = kernels.RIGHT_SINCE) -> str:
        monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda version: hopper)
        monkeypatch.setattr(jax, "__version_info__", version)

        def loss(*given: jax.Array) -> jax.Array:
            return attend_by(Choice(backend), *given, visible_to(True, by), causal=True).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*given).lower(lowering_platforms=("cuda",)).as_text()

    with monkeypatch.context() as few:
        few.setattr(kernels, "MOST_SLOTS", 3 / 64)  # there are four
        assert "__cudnn$fmhaScaleBiasSoftmax(" in text("cudnn", "lengths", True)
    for how in (("mask", True), ("lengths", False), ("lengths", True, (0, 10, 2))):
        found = text("cudnn", *how)
        assert "__cudnn$fmhaScaleBiasSoftmax(" in found and "__cudnn$fmhaScaleBiasSoftmaxBackward(" in found
        assert "dot_general" not in found
    found = text("cudnn", "lengths", True)
    assert "__cudnn$fmhaSoftmax(" in found and "__cudnn$fmhaSoftmaxBackward(" in found
    assert "PADDING_CAUSAL" in found and "dot_general" not in found and f"{TOKENS}x{TOKENS}x" not in found
    assert "__cudnn" not in text("xla", "lengths", True) and "dot_general" in text("xla", "lengths", True)


LONG_ROWS, DROPPED = (Choice(name, kernels.LONG) for name in ("cudnn", "flash"))
ON_TPU = Choice("splash", kernels.LONG_ON_TPU)


@pytest.mark.parametrize(
    ("hardware", "needs", "expected"),
    [
        (GPU, Needs(64), LONG_ROWS),
        (GPU, Needs(128, window=True), LONG_ROWS),
        (Hardware("gpu", "float32"), Needs(64), Choice()),
        (Hardware("cpu", "bfloat16"), Needs(64), Choice()),
        (TPU, Needs(128), ON_TPU),
        (TPU, Needs(256, softcap=50.0, window=True), ON_TPU),
        (TPU, Needs(64, dropout=0.1), Choice()),
        (GPU, Needs(64, dropout=0.1), DROPPED),
        (GPU, Needs(64, dropout=0.1, window=True), Choice()),
        (GPU, Needs(64, softcap=50.0), Choice()),
        (GPU, Needs(60), Choice()),
        (GPU, Needs(256), Choice()),
    ],
)
def test_auto(hardware, needs, expected):
    """R38: `auto` takes cuDNN where it can do all that is needed, with dropout our kernel, on TPUs Splash, else XLA;
    never fails, and knows of all devices."""
    assert choose("auto", hardware, needs) == expected
    several = over(2, 1, 1) if ON_CPU else None
    kernel = expected if expected == Choice() else replace(expected, over=several)
    assert choose("auto", replace(hardware, over=several), needs) == kernel


@pytest.mark.parametrize(
    ("asked", "hardware", "needs", "said"),
    [
        ("cudnn", Hardware("cpu", "bfloat16"), Needs(64), "cudnn does not run on cpu; set it to auto or xla"),
        ("cudnn", TPU, Needs(64), "cudnn does not run on tpu"),
        ("splash", GPU, Needs(128), "splash does not run on gpu"),
        (
            "cudnn",
            GPU,
            Needs(64, dropout=0.1),
            r"draws no dropout, and the model's rate is 0.1 \(model.dropout=0 would",
        ),
        ("splash", TPU, Needs(128, dropout=0.1), "draws no dropout"),
        ("flash", TPU, Needs(64), "does not run on tpu"),
        ("flash", Hardware("gpu", "float32"), Needs(64), r"does not compute in float32"),
        ("flash", GPU, Needs(80), "has no heads of size 80"),
        ("flash", GPU, Needs(64, window=True), "sees whole documents"),
        ("flash", GPU, Needs(64, softcap=50.0), "does not bound scores"),
        ("cudnn", GPU, Needs(64, softcap=50.0), "does not bound scores"),
        ("cudnn", Hardware("gpu", "float32"), Needs(64), r"does not compute in float32 \(train.compute_dtype=bfl"),
        ("cudnn", GPU, Needs(60), "has no heads of size 60"),
        ("splash", TPU, Needs(60), "has no heads of size 60"),
    ],
)
def test_what_cannot_be_is_refused(asked, hardware, needs, said):
    """R38: a backend that was asked for by name does all that is needed or is refused, with the way out."""
    with pytest.raises(ConfigError, match=f"train.attention: {asked} .*{said.removeprefix(asked + ' ')}"):
        choose(asked, hardware, needs)
    assert choose("xla", hardware, needs) == Choice()


def test_without_triton_there_is_xla(monkeypatch):
    """R38: of a jax that has no Triton any more, `auto` takes XLA, and our kernel is refused by name."""
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert choose("auto", GPU, Needs(64, dropout=0.1)) == Choice() and choose("auto", GPU, Needs(64)) == LONG_ROWS
    with pytest.raises(ConfigError, match="flash is written for Triton, which this jax has no more; set it to auto"):
        choose("flash", GPU, Needs(64))


def test_short_rows_stay_with_xla():
    """R38: `auto` leaves rows alone that are shorter than it pays for, and caches, whose keys are more than queries."""
    given, visible = inputs(64), visible_to(True)
    exact = attend(*given, visible.mask)
    assert (attend_by(Choice("cudnn", TOKENS + 1), *given, visible, causal=True) == exact).all()
    queries, *rest = given
    first = visible.mask[:, :1]
    found = attend_by(Choice("cudnn"), queries[:, :1], *rest, Visible(first), causal=True)
    assert (found == attend(queries[:, :1], *rest, first)).all()


def attentions(model: Model) -> list:
    """The modules of a model that have a backend."""
    module = jax.tree.unflatten(model.template.treedef, model.template.leaves)
    return [node for _, node in nnx.iter_graph(module) if isinstance(getattr(node, "backend", None), Choice)]


def test_every_layer_of_a_model_computes_by_it():
    """R38: a model is built with the backend in each of its blocks, and computes the same by it."""
    ids, places = laid_out()
    batch = {
        "input_ids": jnp.asarray(ids * 3 % 40),
        "segment_ids": jnp.asarray(ids),
        "position_ids": jnp.asarray(places),
    }
    batch |= {"token_type_ids": jnp.zeros_like(batch["input_ids"]), "starts": jnp.zeros((len(LENGTHS), 3), jnp.int32)}
    config, head = (
        {**TINY, "hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": TOKENS},
        Head("token_classification", 2),
    )
    built = {name: build_model(config, head, "tiny", attention=name, hardware=TPU) for name in ("xla", "splash")}
    params = built["xla"].template.initial(jax.random.key(0), built["xla"].template.keys)
    one, other = (np.asarray(model.template.bind(params)(batch)) for model in built.values())
    assert np.abs(one - other)[ids > 0].max() < 1e-4
    texts = [jax.make_jaxpr(lambda p, m=model: m.template.bind(p)(batch))(params) for model in built.values()]
    assert ["pallas_call" in str(text) for text in texts] == [False, True]
    chosen = {name: [n.backend.name for n in attentions(model)] for name, model in built.items()}
    assert chosen == {name: [name] * TINY["num_hidden_layers"] for name in built}


def test_a_family_without_such_attention():
    """R38: ResNet has none that a kernel could compute, which is said where one was asked for by name."""
    config = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    head = Head("image_classification", 2)
    with pytest.raises(ConfigError, match=r"train.attention: tiny has no attention that cudnn could compute"):
        build_model(config, head, "tiny", attention="cudnn", hardware=GPU)
    build_model(config, head, "tiny", attention="auto", hardware=GPU)
