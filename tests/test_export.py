"""An export appears whole or not at all, says what it is, and predicts what was exported."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from conftest import TINY, write_model
from made_gguf import TEMPLATE, write_gguf

from sft_jax import export as exporting
from sft_jax.adapt.peft import read as read_adapter
from sft_jax.config.tasks import SequenceClassification
from sft_jax.data.text import load_tokenizer
from sft_jax.errors import ModelError, RunError
from sft_jax.export import About, base_name, export_model, model_card
from sft_jax.infer.predict import load_predictor
from sft_jax.models.family import build_model, load_model
from sft_jax.tasks.task import Task, build_task
from sft_jax.weights.files import find, open_checkpoint

LABELS = ["no", "perhaps", "yes"]
TEXTS = ["bara cela", "doro", "fenum gula hini jato kolum"]


def task_of(**section) -> Task:
    """A classification with three labels."""
    return build_task(SequenceClassification(kind="sequence_classification", labels=LABELS, **section), {})


def exported(source: Path, out: Path, task: Task | None = None, **options) -> Path:
    """A checkpoint as it is, exported."""
    task = task or task_of()
    checkpoint = open_checkpoint(source)
    model = build_model(checkpoint.config, task.head, str(source))
    matched, params = load_model(model, checkpoint)
    assert not matched.initialised
    export_model(out, model, params, About(checkpoint.config, task, source, 24, "# a card\n"), **options)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A classifier whose `config.json` speaks of another head, another type and another program."""
    stale = {
        "architectures": ["BertForMaskedLM"],
        "torch_dtype": "float16",
        "transformers_version": "2.0.0",
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "num_labels": 2,
        "problem_type": "regression",
        "gradient_checkpointing": False,
    }
    return write_model(tmp_path_factory.mktemp("source") / "model", stale, head=3)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def test_every_tensor_is_byte_equal(source, tmp_path):
    """R57: import and export of a float32 checkpoint: the same names, every tensor byte-equal."""
    before, after = open_checkpoint(source), open_checkpoint(exported(source, tmp_path / "out"))
    assert before.shapes == after.shapes
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.shapes)
    other = write_model(tmp_path / "other", seed=1, head=3)
    assert any(before.read(name).tobytes() != open_checkpoint(other).read(name).tobytes() for name in before.shapes)


def test_exporting_twice_gives_the_same_bytes(source, tmp_path):
    """R54: two exports of the same model are byte-identical, file by file."""
    assert contents(exported(source, tmp_path / "one")) == contents(exported(source, tmp_path / "two"))


def test_the_configuration_speaks_of_the_new_head(source, tmp_path):
    """R57: the export's `config.json` keeps the sizes, and replaces all that was said of another head or program."""
    config = json.loads((exported(source, tmp_path / "out", task_of(text="body")) / "config.json").read_text())
    assert {key: config[key] for key in TINY} == TINY
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["dtype"] == "float32" and "torch_dtype" not in config and "transformers_version" not in config
    assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
    assert config["label2id"] == {"no": 0, "perhaps": 1, "yes": 2}
    assert config["problem_type"] == "single_label_classification"
    assert config["gradient_checkpointing"] is False
    assert config["sft_jax_task"] == {
        "kind": "sequence_classification",
        "text": "body",
        "text_pair": None,
        "max_length": 24,
        "clean": {},
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"), ("roberta", "Roberta"), ("bert", "Bert")],
)
def test_the_class_is_that_of_the_model_type(name, expected, tmp_path):
    """R57: models that share a family are exported under the class of their own type."""
    source = write_model(tmp_path / "source", {"model_type": name}, head=3)
    config = json.loads((exported(source, tmp_path / "out") / "config.json").read_text())
    assert config["architectures"] == [f"{expected}ForSequenceClassification"]
    assert config["model_type"] == name


def test_the_tokenizer_comes_along_unchanged(source, tmp_path):
    """C7, fault P: every file of the tokenizer is copied byte by byte, read or not; others stay behind."""
    home = tmp_path / "source"
    shutil.copytree(source, home)
    others = {"tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "tokenizer.model", "qwen.tiktoken"}
    for name in others:
        (home / name).write_text("{}\n")
    for name in ("training_args.bin", "modeling_evil.py", "optimizer.pt"):
        (home / name).write_bytes(b"no")
    out = contents(exported(home, tmp_path / "out"))
    kept = {"tokenizer.json", *others}
    assert set(out) == kept | {"config.json", "model.safetensors", "README.md"}
    assert all(out[name] == (home / name).read_bytes() for name in kept)


def test_predictions_are_those_of_what_was_exported(source, tmp_path):
    """R57: the predictor of an export gives the logits of the source bit by bit, and the names of the labels."""
    out = exported(source, tmp_path / "out")
    records = list(load_predictor(str(out))(TEXTS, raw=True))
    checkpoint = open_checkpoint(source)
    model = build_model(checkpoint.config, task_of().head, "x")
    params = load_model(model, checkpoint)[1]
    predictor = load_predictor(str(out))
    assert predictor.max_length == 24
    expected = []
    for text in TEXTS:
        ids = np.asarray([predictor.tokenizer.fast.encode(text).ids], np.int32)
        batch = {"input_ids": ids, "token_type_ids": 0 * ids, "segment_ids": 0 * ids + 1}
        batch |= {"position_ids": np.arange(ids.size, dtype=np.int32)[None], "starts": np.zeros((1, 1), np.int32)}
        expected.append(np.asarray(jax.jit(lambda p, b: model.template.bind(p)(b))(params, batch))[0, 0])
    assert np.abs(np.asarray([r["logits"] for r in records]) - expected).max() < 1e-5
    assert [r["label"] for r in records] == [LABELS[i] for i in np.argmax(expected, axis=1)]


def test_a_directory_with_files_is_not_overwritten(source, tmp_path):
    """R27: a directory that holds anything is refused and left alone, unless replacing it was asked for."""
    out = tmp_path / "out"
    out.mkdir()
    exported(source, out)  # an empty one may be used
    (out / "mine.txt").write_text("precious")
    before = contents(out)
    with pytest.raises(RunError, match="not an empty directory; give a new one"):
        exported(source, out)
    assert contents(out) == before
    exported(source, out, replace=True)
    assert "mine.txt" not in contents(out)


@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("moment", ["write_checkpoint", "tokenizer", "rename", "last rename"])
def test_a_failed_export_leaves_no_half(moment, there, source, tmp_path, monkeypatch):
    """R57: whatever fails while writing, there is no half-written directory, and one that was there is as it was."""
    home = tmp_path / "home"
    out = home / "model"
    if there:
        exported(source, out)
    before = contents(home) if there else {}

    rename = Path.rename

    def fail(*_, **__):
        raise OSError("disk full")

    def fail_last(self, target):
        return fail() if self.parent.name.startswith(".model-") and self.name == "model" else rename(self, target)

    target, name, failing = {
        "write_checkpoint": (exporting, "write_checkpoint", fail),
        "tokenizer": (Path, "write_bytes", fail),
        "rename": (Path, "rename", fail),
        "last rename": (Path, "rename", fail_last),
    }[moment]
    with monkeypatch.context() as patched:
        patched.setattr(target, name, failing)
        with pytest.raises(OSError, match="disk full"):
            exported(source, out, replace=True)
    assert contents(home) == before
    assert [p.name for p in home.iterdir()] == (["model"] if there else [])
    exported(source, out, replace=True)
    assert open_checkpoint(out).shapes


def test_a_gguf_file_becomes_a_directory(tmp_path):
    """R57: a model out of a GGUF file is exported as any other, with the files of its tokenizer and its template."""
    from transformers import AutoConfig, AutoTokenizer

    write_gguf(tmp_path / "model.gguf", tokenizer={"pre": "smollm"})
    before, task = open_checkpoint(tmp_path / "model.gguf"), task_of()
    model = build_model(before.config, task.head, "model.gguf")
    matched, params = load_model(model, before, anew="head")
    head = {path: np.ones(model.template.shapes[path], np.float32) for path in matched.initialised}
    export_model(tmp_path / "out", model, {**params, **head}, About(before.config, task, before.directory, 24, "card"))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    after = open_checkpoint(tmp_path / "out")
    assert set(after.shapes) - set(before.shapes) == {"score.weight"}
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.shapes)
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 5000.0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("hello  12")["input_ids"] == load_tokenizer(tmp_path / "model.gguf").fast.encode("hello  12").ids
    assert theirs.chat_template == TEMPLATE and theirs.eos_token == "<|end|>"
    assert len(list(load_predictor(str(tmp_path / "out"))(["hello"]))) == 1


def test_numbers_of_any_type_are_written_as_float32(source, tmp_path):
    """R57: what was trained in another type is exported in float32, as `config.json` says."""
    checkpoint = open_checkpoint(source)
    task = task_of()
    model = build_model(checkpoint.config, task.head, "x")
    params = load_model(model, checkpoint)[1]
    halves = {path: jax.numpy.asarray(array, jax.numpy.bfloat16) for path, array in params.items()}
    export_model(tmp_path / "out", model, halves, About(checkpoint.config, task, source, 24, "card"))
    after = open_checkpoint(tmp_path / "out")
    assert {after.read(name).dtype for name in after.shapes} == {np.dtype(np.float32)}


def test_the_base_of_an_adapter_is_found(tmp_path, monkeypatch):
    """An adapter names its base by a whole path, an asset by where it lies, and a hub name as it is; its card loads it
    by peft."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert base_name("base", tmp_path / "base") == str(tmp_path / "base")
    assert base_name("asset:smollm2", tmp_path / "cache" / "smollm2") == str(tmp_path / "cache" / "smollm2")
    assert base_name("google/gemma-2b", tmp_path / "snapshots" / "x") == "google/gemma-2b"
    card = model_card("asset:smollm2", task_of(), {"adapter": "lora of rank 8"}, {}, adapter_of="/cache/smollm2")
    assert 'AutoModelForSequenceClassification.from_pretrained("/cache/smollm2", num_labels=3)' in card
    assert "peft.PeftModel.from_pretrained(base" in card and "pipeline(" not in card and "merged" not in card


def test_a_run_is_no_model(source, tmp_path):
    """A run directory where a model or an adapter is meant says where that is."""
    exported(source, tmp_path / "run" / "model")
    with pytest.raises(ModelError, match=f"is a run, not a model; its model is in {tmp_path / 'run' / 'model'}"):
        open_checkpoint(find(str(tmp_path / "run")))
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"is a run, not an adapter; its adapter is in {tmp_path / 'run' / 'adapter'}"):
        read_adapter(tmp_path / "run", build_model(TINY, task_of().head, "").table, {})


def test_the_model_card():
    """R52: the card begins with readable metadata and tells origin, settings, labels and scores."""
    card = model_card("somewhere/tiny-bert", task_of(), {"steps": "14", "seeds": "init 3"}, {"accuracy": 0.87654})
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "transformers",
        "tags": ["sft_jax"],
        "pipeline_tag": "text-classification",
    }
    for said in ("# tiny-bert, fine-tuned", "`somewhere/tiny-bert`", "no, perhaps, yes", "| steps | 14 |",
                 "| seeds | init 3 |", "| accuracy | 0.8765 |"):  # fmt: skip
        assert said in text
    assert "held-out" not in model_card("x", task_of(), {}, {})
