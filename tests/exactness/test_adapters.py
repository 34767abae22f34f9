"""Adapters through the whole of training, over families: resume, merge, what moves and what does not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from bounds import UNIT, roundings
from chats import GPT2, LLAMA, write_decoder, write_talks
from conftest import write_model
from exact_runs import differing, gradient, metrics_lines, norm, take_steps, train_until
from pictures import VIT, write_pictures, write_vision
from safetensors.numpy import load_file
from translations import write_marian, write_pairs

from sft_jax import jobs, publish
from sft_jax.adapt import merge
from sft_jax.config.read import read_config
from sft_jax.config.schema import Config
from sft_jax.errors import ConfigError, RunError
from sft_jax.estimate import estimate, without_weights
from sft_jax.infer.predict import load_predictor
from sft_jax.jobs import train, trained
from sft_jax.nn.lora import is_adapter
from sft_jax.nn.quantised import Quantised
from sft_jax.run import initial, open_run, prepare
from sft_jax.train.state import abstract_frozen
from sft_jax.weights.table import save

# Family -> the model of some layers, what is learned with it.
FAMILIES = {
    "bert": (lambda home, n: write_model(home, {"num_hidden_layers": n}), "sequence_classification"),
    "gpt2": (lambda home, n: write_decoder(home, {**GPT2, "n_layer": n}), "causal_lm"),
    "llama": (lambda home, n: write_decoder(home, {**LLAMA, "num_hidden_layers": n}), "causal_lm"),
    "marian": (lambda home, n: write_marian(home, encoder_layers=n), "seq2seq"),
    "vit": (lambda home, n: write_vision(home, {**VIT, "num_hidden_layers": n}), "image_classification"),
}
# How adapters are made, and layers are held.
KINDS = {
    "lora": (),
    "rslora": ("adapter.scaling=root", "adapter.match=['**/attn/*','**/mlp/*']"),
    "dora": ("adapter.kind=dora",),
    "int8": ("adapter.base=int8", "train.compute_dtype=bfloat16"),
    "nf4": ("adapter.base=nf4", "adapter.kind=dora"),
    "scanned": ("train.scan=always", "train.remat=full", "adapter.base=nf4", "adapter.kind=dora"),
}
CASES = [*((family, "lora") for family in FAMILIES), *(("bert", kind) for kind in KINDS if kind != "lora")]
CASES += [("llama", "nf4"), ("vit", "dora")]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Config]:
    """`make(home, family, "key=value", ..., layers=1)`: a small run with adapters of rank 3, six steps in all."""
    home, models = tmp_path_factory.mktemp("adapters"), {}
    data = {
        "sequence_classification": [f"data.source.{s}={rows / s}.csv" for s in ("train", "validation")],
        "causal_lm": [
            f"data.source.{s}={write_talks(home / f'{s}.jsonl', n, n)}" for s, n in (("train", 24), ("validation", 6))
        ]
        + ["task.format=text", "eval.best_metric=loss", "data.max_length=24", "eval.samples=0"],
        "seq2seq": [
            f"data.source.{s}={write_pairs(home / f'{s}-pairs.jsonl', n, n)}"
            for s, n in (("train", 24), ("validation", 6))
        ]
        + ["eval.best_metric=loss", "eval.samples=0", "eval.answers=0"],
        "image_classification": [
            f"data.source.train={write_pictures(home / 'pictures', 24)}",
            "data.split.validation=0.2",
        ],
    }

    def configured(where: Path, family: str, *overrides: str, layers: int = 1) -> Config:
        (write, task), name = FAMILIES[family], f"{family}-{layers}"
        if name not in models:
            models[name] = write(home / name, layers)
        base = [
            f"run.dir={where}",
            f"model.source={models[name]}",
            f"task.kind={task}",
            "data.source.kind=files",
            *data[task],
            *([] if task == "image_classification" else ["data.layout.kind=padded"]),
            *([] if "image" in task or task == "causal_lm" else ["data.max_length=32"]),
            "train.batch_size=4",
            "train.steps=6",
            "train.log_every=1",
            "eval.every=6",
            "optim.lr=1e-2",
            "mesh.data=1",
            "adapter={rank: 3, alpha: 6}",
        ]
        return read_config([], [*base, *overrides])

    return configured


@pytest.mark.parametrize(("family", "kind"), CASES, ids=lambda value: value)
def test_resume_merge_and_frozen_parts(family: str, kind: str, make, tmp_path: Path):
    """C11, C17, C19, C27: stopped and resumed, all is the same bit for bit; the merged directory answers as the adapted
    model; what has no adapter is exported as it came; the optimizer and checkpoints hold the trainable part alone."""
    layers = 2 if kind == "scanned" else 1
    config = make(tmp_path / "whole", family, *KINDS[kind], layers=layers)
    run = prepare(config)
    train(run)
    parts = make(tmp_path / "parts", family, *KINDS[kind], layers=layers)
    train_until(parts, 4)
    train(prepare(parts))
    states = [trained(open_run(tmp_path / name), "latest")[0] for name in ("whole", "parts")]
    assert differing(*states) == []
    assert metrics_lines(tmp_path / "whole") == metrics_lines(tmp_path / "parts")
    files = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    state, start = states[0], jax.device_get(initial(run)[0].params)
    assert set(state.params) == set(run.trainable) and any(map(is_adapter, run.trainable))
    assert all(is_adapter(p) or p.startswith("head/") for p in run.trainable)
    moved = {path for path, array in start.items() if not np.array_equal(array, state.params[path])}
    assert {p for p in run.trainable if not p.endswith("/k/adapter/a")} - moved == set()
    exported, came = (
        load_file(tmp_path / "whole" / "model" / "model.safetensors"),
        load_file(Path(config.model.source) / "model.safetensors"),
    )
    adapted = {row.theirs for row in run.model.table.rows if row.ours.rpartition("/")[0] in run.model.adapters}
    for row in run.model.table.rows:
        if not row.head and row.theirs not in adapted and "train.compute_dtype=bfloat16" not in KINDS[kind]:
            np.testing.assert_array_equal(exported[row.theirs], came[row.theirs], err_msg=row.theirs)
    changed = [name for name in adapted if name.endswith("weight") and not np.array_equal(exported[name], came[name])]
    assert changed


@pytest.mark.parametrize("kind", ("lora", "dora"))
def test_a_new_adapter_changes_nothing(kind: str, make, tmp_path: Path):
    """C19: at step 0 the adapted model is the base: the first loss is that of the run without adapters."""
    head = "train.freeze=['embed/**','blocks/**']"
    plain = take_steps(prepare(make(tmp_path / "a", "bert", "adapter=null", head, "train.cache_features=never")), 1)
    adapted = take_steps(prepare(make(tmp_path / "b", "bert", *KINDS[kind])), 1)
    assert adapted.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)


def test_small_steps_move_every_adapter(make, tmp_path: Path):
    """C20: three steps at rate 1e-6 in bfloat16 move every leaf of every adapter and of the head."""
    more = ("optim.lr=1e-6", "optim.schedule.kind=constant", "train.compute_dtype=bfloat16", "optim.weight_decay=0")
    run = prepare(make(tmp_path / "run", "bert", "adapter.kind=dora", *more))
    before = jax.device_get(initial(run)[0].params)
    after = take_steps(run, 3).state
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.params)} == {"float32"}
    assert not [path for path in before if np.array_equal(before[path], after.params[path])]


def test_the_norm_is_that_of_adapters_and_head(make, tmp_path: Path):
    """C27: neither the gradient nor the optimizer knows anything of the base."""
    run = prepare(make(tmp_path / "run", "bert", "optim.name=sgd"))
    found = gradient(run, 0)
    assert set(found) == set(run.trainable)
    assert take_steps(run, 1).norms[0] == pytest.approx(norm(found), rel=1e-5)
    frozen = initial(run)[1]
    assert not set(frozen) & set(run.trainable) and set(frozen) | set(run.trainable) == set(run.model.template.keys)


def test_a_wrong_merge_is_seen(make, tmp_path: Path, monkeypatch):
    """C19: negative control; a merge by another factor is an error, and no directory is written."""
    run = prepare(make(tmp_path / "run", "bert"))
    right = merge.merge

    def wrong(plan, params):
        return right({path: replace(adapter, scale=1.01 * adapter.scale) for path, adapter in plan.items()}, params)

    monkeypatch.setattr(publish, "merge", wrong)
    with pytest.raises(RunError, match="logits differ"):
        train(run)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.match=['**/attn/w']", r"matches no layer; there are blocks/\*/attn/k"),
        ("adapter.match=['head/out']", r"the head has no adapter"),
        ("adapter.also=['**/attn/q/bias']", r"blocks/0/attn/q/bias is of a layer that has an adapter"),
        ("adapter.also=['nothing/**']", r"adapter.also"),
        ("model.weights=random", r"model.weights is random"),
    ],
)
def test_mistakes_are_named(override: str, message: str, make, tmp_path: Path):
    """A pattern that fits no layer, and what cannot be adapted, are errors before anything is compiled."""
    with pytest.raises(ConfigError, match=message):
        prepare(make(tmp_path / "run", "bert", override))


def test_tied_embeddings_have_no_adapter(make, tmp_path: Path):
    """C19: words that a tied head or another side reads again cannot have an adapter; of others they can."""
    for family in ("gpt2", "marian"):
        with pytest.raises(ConfigError, match="embed/word is read in two places"):
            prepare(make(tmp_path / "run", family, "adapter.match=['embed/*']"))
    for family in ("bert", "llama"):
        run = prepare(make(tmp_path / family, family, "adapter.match=['embed/word']", "adapter.kind=dora"))
        train(run)
        assert "embed/word/adapter/a" in run.trainable


def test_further_parameters_and_frozen_ones(make, tmp_path: Path):
    """`adapter.also` trains more, and `train.freeze` takes away, adapters too."""
    more = ("adapter.also=['**/attn_norm/**']", "train.freeze=['blocks/0/**']")
    run = prepare(make(tmp_path / "a", "bert", *more, layers=2))
    assert "blocks/1/attn_norm/scale" in run.trainable and "blocks/1/attn/q/adapter/a" in run.trainable
    assert not [path for path in run.trainable if path.startswith("blocks/0/")]
    train(run)


def test_quantised_kernels_are_held_small(make, tmp_path: Path):
    """Kernels under adapters are in 8 or 4 bits, the loss is that of float32 within their error, and near it."""
    losses, held = {}, {}
    for base in ("same", "int8", "nf4"):
        run = prepare(make(tmp_path / base, "bert", f"adapter.base={base}", "adapter.match=['**/mlp/*','**/attn/*']"))
        frozen = initial(run)[1]
        kernels = {path: frozen[f"{path}/kernel"] for path in run.model.adapters}
        assert all(isinstance(kernel, Quantised) is (base != "same") for kernel in kernels.values())
        held[base] = sum(kernel.nbytes for kernel in kernels.values())
        said = abstract_frozen(run.model.template, run.frozen, run.dtype, run.few)
        assert jax.tree.map(np.shape, jax.device_get(frozen)) == jax.tree.map(lambda a: a.shape, said)
        losses[base] = take_steps(run, 3).losses
    assert held["int8"] < held["same"] / 3 and held["nf4"] < 0.6 * held["same"]  # a block is 64 inputs, here filled up
    np.testing.assert_allclose(losses["int8"], losses["same"], rtol=5e-3)
    np.testing.assert_allclose(losses["nf4"], losses["same"], rtol=1e-1)
    assert not np.array_equal(losses["nf4"], losses["same"])


def test_a_merged_directory_answers_as_the_run(make, tmp_path: Path):
    """C17, C19: the new head and the adapters are in the exported directory; read again, it gives the run's scores."""
    run = prepare(make(tmp_path / "run", "bert", "adapter.kind=dora"))
    train(run)
    state, frozen, _ = trained(run, "best")
    whole = merge.merge(run.model.adapters, jax.device_get({**state.weights, **frozen}))
    tensors = save(run.model.table, whole)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert set(tensors) == set(exported)
    for name in tensors:
        np.testing.assert_array_equal(tensors[name], exported[name])
    texts = list(run.rows["validation"].texts[0])
    records = list(load_predictor(str(tmp_path / "run" / "model"))(texts))
    right = np.mean([r["label"] == t for r, t in zip(records, map(str, run.rows["validation"].targets), strict=True)])
    scores, _ = jobs.evaluate(open_run(tmp_path / "run"), "validation")
    assert right == pytest.approx(scores.metrics["accuracy"])


def test_quantised_kernels_lie_as_kernels_do(make, tmp_path: Path):
    """R7: on a mesh of data, fsdp and tensor the steps are those of one device; codes are divided as kernels are."""
    more = ("adapter.match=['**/mlp/*','**/attn/*']", "adapter.base=nf4", "adapter.kind=dora")
    alone = take_steps(prepare(make(tmp_path / "a", "bert", *more)), 3)
    run = prepare(make(tmp_path / "b", "bert", *more, "mesh={data: 1, fsdp: 2, tensor: 2}"))
    codes = initial(run)[1]["blocks/0/attn/q/kernel"].codes
    assert codes.sharding.shard_shape(codes.shape) == (codes.shape[0] // 2, codes.shape[1] // 2)
    np.testing.assert_allclose(take_steps(run, 3).losses, alone.losses, rtol=1e-5)
    train(run)


SCANNED = [("llama", "lora"), ("llama", "nf4"), ("bert", "dora"), ("marian", "lora"), ("vit", "int8")]


@pytest.mark.parametrize(("family", "kind"), SCANNED, ids=lambda value: value)
def test_scanned_layers_with_adapters(family: str, kind: str, make, tmp_path: Path):
    """C11, C19: adapters and few-bit kernels of layers that are held as one array train as those of a loop do.

    In float32, all of them: six steps of bfloat16 round as much as they move.
    """
    exported = {}
    for scan in ("always", "never"):
        more = (*KINDS[kind], "train.compute_dtype=float32", "model.dropout=0.1", f"train.scan={scan}")
        run = prepare(make(tmp_path / scan, family, *more, layers=2))
        stacked = [key for key in run.model.template.keys if "{" in key]
        assert any(map(is_adapter, stacked)) is (scan == "always")
        train(run)
        exported[scan] = load_file(tmp_path / scan / "model" / "model.safetensors")
    start = load_file(Path(run.config.model.source) / "model.safetensors")
    assert exported["always"].keys() == exported["never"].keys()
    moved = {name: exported["never"][name] - array for name, array in start.items() if name in exported["never"]}
    apart = {name: exported["always"][name] - exported["never"][name] for name in moved}
    assert (
        norm(apart) < roundings() * UNIT * norm(start) < 1e-3 * norm(moved)
    )  # or all might be equal for want of training


def test_what_is_estimated_of_adapters(make, tmp_path: Path):
    """R18: without weights the same is trained, and what is frozen takes what its codes take."""
    config = make(tmp_path / "run", "bert", *KINDS["scanned"], layers=2)
    run, kept = prepare(config), jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    try:
        blind = without_weights(config)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    assert run.trainable == blind.trainable
    held = sum(array.nbytes for array in jax.tree.leaves(initial(run)[1]))
    assert estimate(blind).frozen == held
