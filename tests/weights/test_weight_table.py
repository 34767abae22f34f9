"""Matching a checkpoint with a table: every name it may have, every misfit in one message."""

import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import TINY, write_model

from sft_jax.errors import ModelError
from sft_jax.models.family import Head, Model, build_model, load_model
from sft_jax.weights.files import open_checkpoint, write_checkpoint
from sft_jax.weights.table import SAME, Row, Table, check_covers, fused, linear, load, match, save

HEAD_PATHS = ("head/dense/kernel", "head/dense/bias", "head/out/kernel", "head/out/bias")


def model_of(labels: int = 2) -> Model:
    """The tiny BERT."""
    return build_model(TINY, Head("sequence_classification", labels), "tiny")


@pytest.fixture(scope="module")
def tensors(tmp_path_factory) -> dict[str, np.ndarray]:
    """Everything that a tiny classifier's checkpoint holds, each number random."""
    checkpoint = open_checkpoint(write_model(tmp_path_factory.mktemp("classifier"), head=2))
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in checkpoint.shapes.items()}


def loaded(directory: Path, tensors: dict[str, np.ndarray], labels: int = 2, **options):
    """(what was matched, our arrays) of a checkpoint that holds these tensors."""
    write_checkpoint(directory, TINY, tensors)
    return load_model(model_of(labels), open_checkpoint(directory), **options)


def refusal(directory: Path, tensors: dict[str, np.ndarray], labels: int = 2, **options) -> list[str]:
    """The lines of the error that a checkpoint with these tensors gives, the directory taken out."""
    with pytest.raises(ModelError) as error:
        loaded(directory, tensors, labels, **options)
    return str(error.value).replace(str(directory), "DIR").splitlines()


def test_saving_is_the_inverse_of_loading(tensors, tmp_path):
    """R57: load and save again: the same names, every byte equal."""
    matched, arrays = loaded(tmp_path, tensors)
    assert sorted(matched.loaded) == sorted(model_of().template.keys)
    assert not matched.initialised and not matched.ignored
    again = save(model_of().table, arrays)
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_kernels_are_transposed(tensors, tmp_path):
    """R57: a torch Linear holds [outputs, inputs], ours [inputs, outputs]; tables of vectors stay as they are."""
    _, arrays = loaded(tmp_path, tensors)
    assert (arrays["blocks/1/mlp/up/kernel"] == tensors["bert.encoder.layer.1.intermediate.dense.weight"].T).all()
    assert (arrays["embed/word/embedding"] == tensors["bert.embeddings.word_embeddings.weight"]).all()


def test_old_names_of_norms(tensors, tmp_path):
    """R57: `LayerNorm.gamma` and `.beta` of the first releases are today's weight and bias."""
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    assert sum(n.endswith((".gamma", ".beta")) for n in old) == 10
    _, expected = loaded(tmp_path / "new", tensors)
    _, arrays = loaded(tmp_path / "old", old)
    assert all((arrays[path] == expected[path]).all() for path in expected)


def test_a_bare_encoder(tensors, tmp_path):
    """R57: names without the prefix load too, pooler included; only what is not there is left to be made."""
    bare = {n.removeprefix("bert."): t for n, t in tensors.items() if not n.startswith("classifier")}
    assert "pooler.dense.weight" in bare and "embeddings.LayerNorm.bias" in bare
    matched, arrays = loaded(tmp_path / "bare", bare)
    _, expected = loaded(tmp_path / "whole", tensors)
    assert matched.initialised == ("head/out/kernel", "head/out/bias")
    assert all((arrays[path] == expected[path]).all() for path in arrays)


def test_heads_of_other_tasks_are_left_out(tensors, tmp_path):
    """R57: position numbers and the heads of pretraining are not used, and are named as such."""
    more = {
        "bert.embeddings.position_ids": np.arange(48)[None],
        "cls.predictions.bias": np.zeros(45, np.float32),
        "qa_outputs.weight": np.zeros((2, 16), np.float32),
    }
    matched, _ = loaded(tmp_path, {**tensors, **more})
    assert sorted(matched.ignored) == sorted(more)


def test_every_misfit_is_in_one_message(tensors, tmp_path):
    """C26: a lost, a misspelt and a misshapen tensor are reported together, with the near miss, as in the design."""
    wrong = dict(tensors)
    del wrong["bert.encoder.layer.1.output.dense.bias"]
    wrong["bert.embeddings.LayerNorm.weigth"] = wrong.pop("bert.embeddings.LayerNorm.weight")
    wrong["bert.embeddings.word_embeddings.weight"] = np.zeros((44, 16), np.float32)
    wrong["something.else"] = np.zeros(3, np.float32)
    assert refusal(tmp_path, wrong) == [
        "bert: checkpoint 'DIR' is not what its config.json says; fetch both again: 5 problems",
        "  - bert.embeddings.word_embeddings.weight: shape (44, 16) for embed/word/embedding, expected (45, 16)",
        "  - bert.embeddings.LayerNorm.weight: not in the checkpoint (needed for embed/norm/scale); "
        "did you mean 'bert.embeddings.LayerNorm.weigth'?",
        "  - bert.encoder.layer.1.output.dense.bias: not in the checkpoint (needed for blocks/1/mlp/down/bias)",
        "  - bert.embeddings.LayerNorm.weigth: in the checkpoint, matched by no row; "
        "did you mean 'bert.embeddings.LayerNorm.weight'?",
        "  - something.else: in the checkpoint, matched by no row",
    ]


def test_a_missing_layer_is_not_silently_made(tensors, tmp_path):
    """C17: a backbone that is not there in full is refused; nothing of it is ever drawn at random."""
    wrong = {name: tensor for name, tensor in tensors.items() if ".layer.1." not in name}
    lines = refusal(tmp_path, wrong, anew="head")
    assert lines[0] == "bert: checkpoint 'DIR' is not what its config.json says; fetch both again: 16 problems"
    assert all("not in the checkpoint (needed for blocks/1/" in line for line in lines[1:])


def test_a_layer_too_many_is_not_silently_dropped(tensors, tmp_path):
    """C26: a checkpoint with more layers than its `config.json` says is refused."""
    more = {n.replace(".layer.1.", ".layer.2."): t for n, t in tensors.items() if ".layer.1." in n}
    lines = refusal(tmp_path, {**tensors, **more})
    assert lines[0] == "bert: checkpoint 'DIR' is not what its config.json says; fetch both again: 16 problems"
    assert all("in the checkpoint, matched by no row" in line for line in lines[1:])


def test_a_head_of_another_size(tensors, tmp_path):
    """C17 C23: a head with other outputs is refused with the remedy; the remedy works and keeps the backbone."""
    remedy = "; set model.head=new to begin with a fresh one"
    assert refusal(tmp_path, tensors, labels=5) == [
        "bert: checkpoint 'DIR' is not what its config.json says; fetch both again: 2 problems",
        f"  - classifier.weight: shape (16, 2) for head/out/kernel, expected (16, 5){remedy}",
        f"  - classifier.bias: shape (2,) for head/out/bias, expected (5,){remedy}",
    ]
    matched, arrays = loaded(tmp_path, tensors, labels=5, anew="head")
    assert matched.initialised == HEAD_PATHS
    assert sorted([*arrays, *HEAD_PATHS]) == sorted(model_of(5).template.keys)


def test_a_new_head_replaces_one_that_fits(tensors, tmp_path):
    """C23: with `model.head=new` not even a head of the right size is used; without it, it is."""
    assert loaded(tmp_path, tensors, anew="head")[0].initialised == HEAD_PATHS
    assert loaded(tmp_path, tensors)[0].initialised == ()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types_of_numbers(dtype, tensors, tmp_path):
    """C20: half, bfloat16 and double checkpoints load, every number as it is in the file."""
    stored = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    _, arrays = loaded(tmp_path, stored)
    assert {a.dtype for a in arrays.values()} == {np.dtype(dtype)}
    again = save(model_of().table, {path: np.asarray(a, np.float32) for path, a in arrays.items()})
    assert all((again[name] == stored[name].astype(np.float32)).all() for name in stored)


def test_one_table_must_name_what_the_template_has():
    """C31: negative control: a table and a template that differ are a failure, not a warning."""
    model = model_of()
    check_covers(model.table, model.template.keys)
    with pytest.raises(AssertionError, match="extra/path"):
        check_covers(model.table, [*model.template.keys, "extra/path"])
    with pytest.raises(AssertionError, match="head/out/bias"):
        check_covers(model.table, [key for key in model.template.keys if key != "head/out/bias"])


def test_a_checkpoint_of_another_kind_is_refused_at_once():
    """R32: where hundreds of names misfit, the message counts all and shows some, within a second or two."""
    model = build_model({**TINY, "num_hidden_layers": 24}, Head("sequence_classification", 2), "tiny")
    shapes = model.template.shapes
    other = {
        r.theirs.replace("bert.encoder.layer", "model.h"): r.layout.shape(shapes[r.ours]) for r in model.table.rows
    }
    begin = time.monotonic()
    with pytest.raises(ModelError) as error:
        match(model.table, shapes, other, "DIR")
    assert time.monotonic() - begin < 5
    lines = str(error.value).splitlines()
    assert (
        lines[0] == f"bert: checkpoint 'DIR' is not what its config.json says; fetch both again: {2 * 24 * 16} problems"
    )
    assert lines[-1] == f"  - and {2 * 24 * 16 - (len(lines) - 2)} more" and len(lines) < 30


def test_matching_reads_shapes_alone(tensors):
    """R30: whether a checkpoint fits is known from the headers, without reading a number."""
    model = model_of()
    matched = match(model.table, model.template.shapes, {n: t.shape for n, t in tensors.items()}, "nowhere")
    assert matched.loaded["head/dense/kernel"] == "bert.pooler.dense.weight"


def fused_table(kind: str) -> Table:
    """Two layers, of 3 and 2 outputs, in one tensor: as torch has them ("rows") or as GPT-2 does ("columns")."""
    layout = {"layout": SAME} if kind == "columns" else {}
    parts = ((linear(name, "both", "embed heads", **layout), size) for name, size in (("a", 3), ("b", 2)))
    return Table("two", (*fused(parts), Row("c", "alone", SAME, ".")))


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_fused_layers_are_parted_and_joined(kind):
    """R57: layers that one tensor holds are loaded apart, kernels and biases, and saved as one, every byte equal."""
    table, draw = fused_table(kind), np.random.default_rng(0)
    weight = draw.normal(size=(5, 4)).astype(np.float32)
    tensors = {"both.weight": weight if kind == "rows" else weight.T, "both.bias": draw.normal(size=5), "alone": weight}
    shapes = {"a/kernel": (4, 3), "a/bias": (3,), "b/kernel": (4, 2), "b/bias": (2,), "c": (5, 4)}
    matched = match(table, shapes, {n: t.shape for n, t in tensors.items()}, "here")
    assert not matched.initialised and not matched.ignored
    arrays = load(table, matched, tensors.__getitem__)
    assert (arrays["a/kernel"] == weight[:3].T).all() and (arrays["b/kernel"] == weight[3:].T).all()
    assert (arrays["b/bias"] == tensors["both.bias"][3:]).all()
    again = save(table, arrays)
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == np.ascontiguousarray(tensors[name]).tobytes() for name in tensors)


@pytest.mark.parametrize("outputs", [4, 6])
def test_a_fused_tensor_of_another_size_is_refused(outputs):
    """R32: a tensor that holds too little or too much is named once for each layer, and never cut to fit."""
    shapes = {"a/kernel": (4, 3), "a/bias": (3,), "b/kernel": (4, 2), "b/bias": (2,), "c": (5, 4)}
    found = {"both.weight": (outputs, 4), "both.bias": (5,), "alone": (5, 4)}
    with pytest.raises(ModelError) as error:
        match(fused_table("rows"), shapes, found, "here")
    lines = str(error.value).splitlines()
    assert f"  - both.weight: shape (4, {outputs}) for a/kernel, expected (4, 3)" in lines and len(lines) == 3
