"""What a user is told who made a mistake: one message, with what is wrong and what there is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import WORDS, write_model, write_rows
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.numpy import load_file, save_file

from sft_jax import console, jobs, run
from sft_jax.config.schema import Config
from sft_jax.errors import ConfigError, DataError, ModelError, RunError, SftError
from sft_jax.infer.predict import load_predictor, read_inputs
from sft_jax.train import directory

Make = Callable[..., Config]


def said(kind: type[SftError], config: Config, *parts: str) -> str:
    """What `prepare` says; it is of this kind, holds these parts, and came before anything was written."""
    with pytest.raises(SftError) as caught:
        run.prepare(config)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert [part for part in parts if part not in message] == [], message
    assert not Path(config.run.dir).exists(), "written before the mistake was found"
    return message


def csv_file(tmp_path: Path, *lines: str) -> str:
    """A CSV with these lines."""
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(tmp_path / "rows.csv")


# Columns.


@pytest.mark.parametrize("option", ["task.text", "task.text_pair", "task.label"])
def test_missing_column(configure: Make, option):
    """C21: a column that is not there is named, with those that are."""
    said(DataError, configure(f"{option}=sentence"), "no column 'sentence'; the rows have: text, label")


def test_column_missing_in_one_split(configure: Make, tmp_path):
    """C21: the split whose rows lack the column is named."""
    file = csv_file(tmp_path, "sentence,label", "bara,0")
    said(
        DataError,
        configure(f"data.source.test={file}"),
        "data.source.test: no column 'text'; the rows have: sentence, label",
    )


def test_unused_columns_are_listed(configure: Make, tmp_path):
    """C21: columns that are not read are named on the screen, and so are those that are."""
    file = csv_file(tmp_path, "label,source,text,id", *(f"{i % 2},web,{word},{i}" for i, word in enumerate(WORDS)))
    facts = console._data(run.prepare(configure(f"data.source.train={file}")))
    assert facts["columns"] == "text, label read; id, source not used"
    assert console._data(run.prepare(configure()))["columns"] == "text, label read; none not used"


# Texts and labels.


def test_empty_text(configure: Make, tmp_path):
    """C9: rows without a text are named by their places, five of them, and the rest is counted."""
    file = csv_file(tmp_path, "text,label", "bara,0", ",1", *(f" ,{i % 2}" for i in range(6)), "cela,1")
    message = said(
        DataError,
        configure(f"data.source.train={file}"),
        "data.source.train: 7 problems",
        "rows.csv, line 3: text is '', expected a text",
        "rows.csv, line 7: text is ' ', expected a text",
        "and 2 more",
        "mend the rows, or leave them out with data.bad_rows=drop",
    )
    assert "line 2:" not in message and "line 8:" not in message


def test_text_that_is_a_number(configure: Make, tmp_path):
    """A number of JSON is no text; the digits of a CSV are (T)."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}\n{"text": 1, "label": 1}\n')
    config = configure(f"data.source.train={tmp_path / 'rows.jsonl'}")
    said(DataError, config, "data.source.train", "line 2: text is 1, expected a text")
    file = csv_file(tmp_path, "text,label", "1,0", "2,1")
    assert run.prepare(configure(f"data.source.train={file}")).rows["train"].texts == (["1", "2"],)


def test_label_out_of_range(configure: Make, tmp_path, monkeypatch):
    """C25: label 9 with 9 classes fails before anything is compiled, with the value, the row and the range."""
    monkeypatch.setattr("sft_jax.train.step.Program.compile", lambda *a: pytest.fail("compiled"))
    names = ", ".join(f"kind {i}" for i in range(9))
    file = csv_file(tmp_path, "text,label", *(f"{word},{i % 9}" for i, word in enumerate(WORDS)), "bara,9")
    config = configure(f"data.source.train={file}", f"task.labels=[{names}]")
    said(DataError, config, f"rows.csv, line {len(WORDS) + 2}: label is 9", f"9 labels ({names})", "from 0 to 8")
    last = configure(f"data.source.train={file}", f"task.labels=[{names}, kind 9]")
    assert run.prepare(last).task.head.size == 10


@pytest.mark.parametrize("value", ["-1", "0.5", "", "nope"])
def test_label_that_is_none(configure: Make, tmp_path, value):
    """C25: a label that is below 0, a fraction, missing or an unknown word is refused, never wrapped around."""
    file = csv_file(tmp_path, "text,label", "bara,0", f"cela,{value}")
    expected = "expected one of the 2 labels (0, 1)" if value else "label is not there, expected a label"
    said(DataError, configure(f"data.source.test={file}"), "data.source.test", "label is", expected)


def test_label_near_miss(configure: Make, tmp_path):
    """C25: a misspelt label is shown with its row and the nearest right one."""
    file = csv_file(tmp_path, "text,label", "bara,positive", "cela,negative", "dora,postive")
    config = configure(f"data.source.train={file}", "task.labels=[negative, positive]", *ALONE)
    said(
        DataError,
        config,
        "rows.csv, line 4: label is 'postive'; did you mean 'positive'?; expected one of the 2 labels",
    )


def test_label_of_another_split(configure: Make, tmp_path):
    """C25: a label of the validation rows that no training row has is named with its split."""
    said(
        DataError,
        configure(f"data.source.validation={write_rows(tmp_path / 'rows.csv', 30, labels=3)}"),
        "data.source.validation",
        "label is 2; expected one of the 2 labels (0, 1)",
    )


def test_class_label_out_of_range(configure: Make, tmp_path):
    """C25: numbers with names in the source are checked against the names that the run has."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict({"text": WORDS[:9], "label": [0, 1, 2] * 3}, features=features).save_to_disk(tmp_path / "saved")
    source = f"data.source={{kind: hub, name: {tmp_path / 'saved'}}}"
    assert run.prepare(configure(source, "eval.every=never")).task.labels == ("a", "b", "c")
    said(DataError, configure(source, "eval.every=never", "task.labels=[a, b]"), "label", "2 labels (a, b)")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["bara,1", "cela,1"], "column 'label' holds 1 label; classification needs two or more"),
        (
            ["bara,0.5", "cela,1.5"],
            "column 'label' holds values such as 0.5, not labels; name another column in task.lab",
        ),
    ],
)
def test_labels_that_are_none(configure: Make, tmp_path, lines, expected):
    """A column that holds one label, or measurements, cannot be classified."""
    said(DataError, configure(f"data.source.train={csv_file(tmp_path, 'text,label', *lines)}"), expected)


@pytest.mark.parametrize("labels", ["[]", "[one]", "[a, b, a]"])
def test_labels_twice(configure: Make, labels):
    """Names of labels have to be two or more, each once."""
    said(ConfigError, configure(f"task.labels={labels}"), "task.labels: ", "give two labels or more, each once")


def test_bad_rows_of_several_splits(configure: Make, tmp_path):
    """C9, C25: what is wrong in one split does not hide what is wrong in another; all is said at once."""
    file = csv_file(tmp_path, "text,label", "bara,nope", ",1")
    splits = [f"data.source.{split}={file}" for split in ("validation", "test")]
    parts = [f"data.source.{split}: 2 problems" for split in ("validation", "test")]
    said(DataError, configure(*splits), *parts, "label is 'nope'; expected one of", "text is '', expected a text")


def test_too_many_bad_rows(configure: Make, tmp_path):
    """C9: where many rows of a split would be dropped, the column is the likelier mistake."""
    file = csv_file(tmp_path, "text,label", "bara,0", "cela,nope", "dora,nope")
    config = configure(f"data.source.test={file}", "data.bad_rows=drop")
    said(DataError, config, "data.source.test: 2 of 3 rows cannot be used (unknown label: 2)")


# Files and splits.


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "", "a.csv is empty; its first line names the columns"),
        ("a.csv", "text,label\n", "a.csv"),
        ("a.jsonl", '{"text": "bara"\n', "a.jsonl, line 1: not JSON ("),
        ("a.parquet", "text", "cannot be read as parquet"),
        ("a.doc", "text", "files ending in .doc; give files of one kind among .csv, .tsv"),
    ],
)
def test_unreadable_rows(configure: Make, tmp_path, name, content, expected):
    """A file of rows that is empty, broken or of an unknown kind is named with the split that it is for."""
    (tmp_path / name).write_text(content)
    said(DataError, configure(f"data.source.validation={tmp_path / name}"), "data.source.validation: ", expected)


def test_split_twice(configure: Make):
    """A share of a split that the source has is refused."""
    said(ConfigError, configure("data.split.test=0.2"), "data.split.test: the source has a split of its own; drop one")


def test_split_of_nothing(configure: Make):
    """A share that comes to no row is refused."""
    config = configure("data.source.test=null", "data.split.test=0.001")
    said(DataError, config, "data.split.test: 0.001 of 56 rows is no row; give a larger share")


# Model, metric, parameters, optimizer, mesh.


def test_unknown_metric(configure: Make):
    """C18: a metric that the task does not have is refused at once, with the nearest and all there are."""
    with pytest.raises(ConfigError) as caught:
        configure("eval.best_metric=acuracy")
    message = str(caught.value)
    assert "eval.best_metric: sequence_classification has no metric 'acuracy'; did you mean 'accuracy'?" in message
    known = run.prepare(configure()).task.metric_names
    assert f"(known: {', '.join(known)}" in message and "f1_macro" in known
    many = configure("eval.best_metric=top5_accuracy")  # that two labels have no five likeliest, rows must tell
    said(ConfigError, many, "eval.best_metric: ", "has no metric 'top5_accuracy'", f"(known: {', '.join(known)})")


def test_document_longer_than_the_model(configure: Make, tiny):
    """More tokens than the model has positions are refused, with both numbers."""
    config = configure("data.max_length=49")
    said(ConfigError, config, f"data.max_length: 49 tokens, but {tiny} has positions for 48; lower it")
    assert run.prepare(configure("data.max_length=48")).model.max_length == 48


def test_document_shorter_than_its_special_tokens(configure: Make):
    """A length that holds the special tokens alone would silently train on nothing."""
    said(ConfigError, configure("data.max_length=2"), "data.max_length: 2 leaves no room beside 2 special tokens")


def test_freeze_nothing(configure: Make):
    """Patterns that match no parameter are all named, with the nearest paths."""
    config = configure("train.freeze=[embed/**, haed/**, blocks/0/attn/query/kernel]")
    message = said(ConfigError, config, "train.freeze: 2 problems", "'haed/**' matches no parameter")
    assert "'blocks/0/attn/query/kernel' matches no parameter; the nearest are blocks/" in message
    assert "'embed/**'" not in message


def test_freeze_all(configure: Make):
    """Something has to be left to train."""
    said(ConfigError, configure("train.freeze=['**']"), "train.freeze: every parameter is frozen; leave something to")


def test_group_of_nothing(configure: Make):
    """A group whose pattern matches no parameter is refused."""
    config = configure("optim.groups=[{match: haed/out/bias, lr_scale: 2}]")
    said(ConfigError, config, "optim.groups: 1 problem", "'haed/out/bias' matches no parameter", "head/out/bias")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["optim.name=adamwe"],
            ["optim.name: optax has no optimizer 'adamwe'; did you mean 'adamw'? (known: ", " sgd"],
        ),
        (["optim.name=clip_by_global_norm"], ["optim.name: optax has no optimizer 'clip_by_global_norm'"]),
        (["optim.name=lbfgs"], ["optim.name: lbfgs cannot be used here (", "name another, or mend optim.options"]),
        (["optim.options={b_1: 1}"], ["optim.options.b_1: adamw has no such argument; did you mean 'b1'? (known: b1"]),
        (["optim.options={b1: no}"], ["optim.name: adamw cannot be used here (", "mend optim.options"]),
        (
            ["optim.options={weight_decay: 1}"],
            ["optim.options.weight_decay: is set by optim.weight_decay; set it there"],
        ),
        (["optim.options={learning_rate: 1}"], ["optim.options.learning_rate: is set by optim.lr; set it there"]),
    ],
)
def test_optimizer(configure: Make, overrides, parts):
    """An optimizer or an argument that there is not, or that cannot work, is refused with the nearest that can."""
    said(ConfigError, configure(*overrides), *parts)


@pytest.mark.parametrize("mesh", ["data: 3, tensor: 3", "data: -1, tensor: 3", "data: 16"])
def test_mesh(configure: Make, mesh):
    """A mesh that does not fit the devices is refused with the number of devices."""
    said(ConfigError, configure(f"mesh={{{mesh}}}"), "mesh: data=", "cannot be laid over 8 devices; make their product")


def test_head_of_another_size(configure: Make, tmp_path):
    """A head that the checkpoint holds for other labels is refused, with the way to begin a new one."""
    source = write_model(tmp_path / "model", {"num_hidden_layers": 1}, head=3)
    remedy = "set model.head=new to begin with a fresh one"
    said(ModelError, configure(f"model.source={source}"), "classifier.weight: shape", remedy)
    assert run.prepare(configure(f"model.source={source}", "model.head=new")).matched.initialised


# Run directories.


@pytest.fixture
def begun(configure: Make) -> Config:
    """The configuration of a run that began."""
    config = configure()
    jobs.begin_directory(run.prepare(config))
    return config


def test_resume_with_other_settings(begun, configure: Make):
    """A directory of another run is refused, with each key that differs and both values."""
    with pytest.raises(RunError) as caught:
        run.prepare(configure("optim.lr=2e-3", "seed.data=5", "train.log_every=3", "mesh.data=2"))
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("holds another run; give another run.dir, or the same settings: 3 problems")
    seeds = ["  - seed.data: 0 there, 5 now", "  - seed.split: 0 there, 5 now"]
    assert lines == ["  - optim.lr: 0.001 there, 0.002 now", *seeds]
    assert run.prepare(configure("train.log_every=3", "mesh.data=2")).directory == Path(begun.run.dir)


def test_resume_with_other_rows(begun, configure: Make, rows, tmp_path, tiny):
    """A directory is refused where the rows or the weights are not those that the run began with."""
    again = run.prepare(configure())
    file = Path(begun.run.dir) / "manifest.json"
    for what, name in (("data", "train"), ("weights", "model.safetensors")):
        manifest = json.loads(file.read_text())
        other = {**manifest, what: {**manifest[what], name: {"sha256": "other"}}}
        file.write_text(json.dumps(other))
        where = "put back what it reads, or give another run"
        with pytest.raises(RunError, match=rf"{where}: 1 problem\n  - {what}: {name} is not what the run"):
            jobs.begin_directory(again)
        file.write_text(json.dumps(manifest))
    jobs.begin_directory(again)


def test_resume_policy(begun, configure: Make, tmp_path):
    """`never` refuses a used directory, `must` an empty one, and a file is no directory."""
    with pytest.raises(RunError, match=r"holds a run, and run.resume is never; give another run.dir"):
        run.prepare(configure("run.resume=never"))
    said(RunError, configure("run.resume=must", f"run.dir={tmp_path / 'new'}"), "holds no run, and run.resume is must")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file: is a file; give another run.dir"):
        run.prepare(configure(f"run.dir={tmp_path / 'file'}"))


def test_open_what_is_no_run(tmp_path):
    """A directory without a run is refused."""
    with pytest.raises(RunError, match=r"holds no run \(no config.yaml\); give the run.dir of a `sft-jax train`"):
        run.open_run(tmp_path)


def test_open_a_run_with_an_odd_name(configure: Make, tmp_path):
    """The name of a run directory is a path, not YAML: no character of it means anything."""
    home = tmp_path / "2024: {a} #1"
    config = configure()
    directory.begin(config, home, {}, 14, 7)
    assert run.open_run(home).directory == home


def test_unknown_split(begun):
    """A split that the run does not have is refused, with those that it has."""
    with pytest.raises(ConfigError, match="split 'tset': this run has validation, test; name one of them"):
        jobs.evaluate(run.open_run(Path(begun.run.dir)), "tset")


def test_unknown_checkpoint(begun):
    """What is neither best nor latest is refused, and so is a run without a checkpoint."""
    opened = run.open_run(Path(begun.run.dir))
    with pytest.raises(ConfigError, match=r"--at: expected best or latest, got 'lates'; did you mean 'latest'\?"):
        jobs.evaluate(opened, "test", "lates")
    with pytest.raises(RunError, match="no checkpoint yet; train first"):
        jobs.evaluate(opened, "test", "latest")


# Prediction.


def test_predict_without_a_head(tiny, tmp_path):
    """A directory that was never fine-tuned is refused: it names no task, or has no head for it."""
    with pytest.raises(ModelError, match=r"its config.json names no task that is known"):
        load_predictor(str(tiny))
    source = write_model(tmp_path / "model", {"architectures": ["BertForSequenceClassification"]})
    with pytest.raises(SftError, match=r"holds no head for sequence_classification .*missing.*; fine-tune it first"):
        load_predictor(str(source))


def test_predict_from_what_cannot_be_read(tmp_path):
    """Inputs that are not there, not text or not JSON are refused, each in one message."""
    source = write_model(tmp_path / "model", {"architectures": ["BertForSequenceClassification"]}, head=2)
    predictor = load_predictor(str(source))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("nowhere.txt", "nowhere.csv"):
        with pytest.raises(DataError, match=f"{name}.*cannot be read"):
            read_inputs(str(tmp_path / name), predictor.task)
    with pytest.raises(
        DataError, match=r"latin\.txt, line 1: not UTF-8 \(byte 0xe9 at character 4\); save the file as"
    ):
        list(predictor(read_inputs(str(tmp_path / "latin.txt"), predictor.task)))
    with pytest.raises(DataError, match=r"input: 1 problem\n  - line 2: not JSON .*; mend the line"):
        list(predictor(read_inputs("", predictor.task, ['{"text": "bara"}', '{"text": '])))
    with pytest.raises(DataError, match=r"input: no column 'text'; the rows have: sentence; .*--columns text=OTHER"):
        list(predictor(read_inputs("", predictor.task, ['{"sentence": "bara"}'])))


ALONE = ("data.source.validation=null", "data.source.test=null", "eval.every=never")


def test_a_head_for_other_labels_is_not_taken_for_this_one(tmp_path, configure):
    """A checkpoint's head whose labels have other names or another order is refused, with both remedies."""
    source = write_model(tmp_path / "other", {"id2label": {"0": "good", "1": "bad"}}, head=2)
    with pytest.raises(ModelError, match=r"head is for good, bad, the task has 0, 1; .*model\.head=new"):
        run.prepare(configure(f"model.source={source}"))
    assert run.prepare(configure(f"model.source={source}", "model.head=new")).matched.initialised
    assert not run.prepare(configure(f"model.source={source}", "task.labels=[good, bad]")).matched.initialised


def test_a_tokenizer_of_another_model_is_refused(tmp_path, configure):
    """A token number beyond the model's table would be NaN on the device; it is named on the host."""
    source = write_model(tmp_path / "small", {"vocab_size": 20})
    with pytest.raises(DataError, match=r"input_ids up to \d+, the model has 20 of them"):
        run.prepare(configure(f"model.source={source}"))


def test_a_head_for_another_kind_of_problem_is_not_taken_for_this_one(tmp_path, configure):
    """A head that was trained for several labels is not one for one of them, though their names agree."""
    names = {"id2label": {"0": "0", "1": "1"}, "problem_type": "multi_label_classification"}
    source = write_model(tmp_path / "other", names, head=2)
    with pytest.raises(ModelError, match=r"head is for multi_label_classification, the task is single_label_.*=new"):
        run.prepare(configure(f"model.source={source}"))
    assert run.prepare(configure(f"model.source={source}", "model.head=new")).matched.initialised


def test_a_head_for_a_number_is_taken_whatever_it_is_called(tmp_path, configure):
    """One output has no order to get wrong: the name of the column that it was trained on is nobody's mistake."""
    named = {"id2label": {"0": "stars"}, "problem_type": "regression"}
    source = write_model(tmp_path / "other", named, head=1)
    settings = ("task.kind=regression", "task.label=label", "eval.best_metric=pearson")
    assert not run.prepare(configure(f"model.source={source}", *settings)).matched.initialised


def test_class_weights_of_no_label(configure: Make, monkeypatch):
    """C25: a weight for what is no label is refused before anything is compiled, with the nearest that is one."""
    monkeypatch.setattr("sft_jax.train.step.Program.compile", lambda *a: pytest.fail("compiled"))
    config = configure("task.labels=[negative, positive]", "task.class_weights={postive: 2}")
    said(ConfigError, config, "task.class_weights: 1 problem", "'postive' is no label; did you mean 'positive'?")


@pytest.mark.parametrize(
    ("kind", "metric", "value", "expected"),
    [
        (
            "multi_label_classification",
            "f1_micro",
            "joy|feer",
            "label has 'feer'; did you mean 'fear'?; expected one of",
        ),
        ("regression", "pearson", "good", "label is 'good', expected a finite number"),
    ],
)
def test_bad_answers_of_other_tasks(configure: Make, tmp_path, kind, metric, value, expected):
    """C25: what is no label and no number is named with its split and row before anything is compiled."""
    lines = {"multi_label_classification": ["bara,joy|fear", "cela,"], "regression": ["bara,1", "cela,2.5"]}[kind]
    train = csv_file(tmp_path, "text,label", *lines)
    (tmp_path / "test.csv").write_text(f"text,label\nbara,{value}\n")
    task = [f"task.kind={kind}", "task.label=label", f"eval.best_metric={metric}", *ALONE]
    separator = ["task.separator='|'"] if kind == "multi_label_classification" else []
    config = configure(*task, *separator, f"data.source.train={train}", f"data.source.test={tmp_path / 'test.csv'}")
    said(DataError, config, "data.source.test: 1 problem", "test.csv, line 2", expected)


def test_half_a_layer_is_refused(tmp_path, configure):
    """C17: a head whose bias was lost is not made up."""
    source = write_model(tmp_path / "half", head=2)
    tensors = load_file(source / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "classifier.bias"}, source / "model.safetensors")
    with pytest.raises(ModelError, match=r"classifier\.bias: not in the checkpoint, which has the rest of that layer"):
        run.prepare(configure(f"model.source={source}"))
