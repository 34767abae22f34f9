"""Configurations that are wrong: what is said of them, with which exit code, and that nothing was started for it."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.config.read import MAX_BYTES, read_config
from sft_jax.errors import ConfigError

CANARY = "canary-5f1d"
GOOD = """\
model: {{source: {home}}}
task: {{kind: sequence_classification}}
data:
  source: {{kind: files, train: {home}/train.csv, validation: {home}/train.csv}}
"""
# Overrides of a good configuration, and what is said of them.
OVERRIDES = {
    "unknown section": (["modle.source=x"], "modle: unknown key; did you mean 'model'?"),
    "unknown key": (["train.batchsize=8"], "train.batchsize: unknown key; did you mean 'batch_size'? (known: accum"),
    "key of another section": (["max_length=8"], "max_length: unknown key; did you mean 'data.max_length'?"),
    "unknown key in a list": (
        ["optim.groups=[{match: '**', lr_scal: 2}]"],
        "optim.groups.0.lr_scal: unknown key; did you mean 'lr_scale'? (known: lr_scale, match, weight_decay)",
    ),
    "key of another kind": (
        ["data.source.name=x/y"],
        "data.source.name: unknown key; it belongs to 'hub' and 'tfds', not to 'files' (known: delimiter, enc",
    ),
    "near key of this kind": (
        ["task={kind: regression, huber_dleta: 1}"],
        "task.huber_dleta: unknown key; did you mean 'huber_delta'? (known: huber_delta, kind, label, loss, text, text",
    ),
    "key of no kind": (
        ["data.source={kind: tfds, name: x, validation: test, zzz: 1}"],
        "data.source.zzz: unknown key (known: data_dir, kind, name, test, train, validation)",
    ),
    "key of another kind in a part": (
        ["data.source={kind: mixture, parts: [{name: a, source: {kind: hub, name: b, validation: c, data_dir: d}}]}"],
        "data.source.parts.0.source.data_dir: unknown key; it belongs to 'tfds', not to 'hub' (known: config, kind",
    ),
    "missing key of this kind": (
        ["data.source={kind: tfds, validation: test}"],
        "data.source.name: needed, but not given (Name such as `imdb_reviews`",
    ),
    "text for a number": (["train.batch_size=many"], "train.batch_size: expected a valid integer, got 'many'"),
    "fraction for a count": (["train.steps=1.5"], "train.steps: expected a valid integer"),
    "number for a text": (["run={dir: 2024}"], "run.dir: expected a valid string, got 2024"),
    "text for a section": (["train=8"], "train: expected keys below it, got 8"),
    "text for a source": (["data.source=here"], "data.source: expected keys below it, got 'here'"),
    "section for files": (
        ["data.source={kind: files, train: {a: 1}}"],
        "data.source.train: expected a valid string or a valid list",
    ),
    "number in a list": (["train={freeze: [head/**, 1]}"], "train.freeze.1: expected a valid string, got 1"),
    "list by number": (["optim.groups.0.lr_scale=2"], "optim.groups: expected a valid list"),
    "bad choice": (["optim.schedule.kind=linar"], "optim.schedule.kind: expected 'linear', 'cosine'"),
    "near choice": (["optim.schedule.kind=linar"], "got 'linar'; did you mean 'linear'?"),
    "bad choice of policy": (["run.resume=always"], "run.resume: expected 'auto', 'never', 'must', 'strict' or"),
    "choice or number": (["eval.every=often"], "eval.every: expected 'epoch' or 'never' or a valid integer, got 'of"),
    "zero for a count": (["train.batch_size=0"], "train.batch_size: expected greater than or equal to 1, got 0"),
    "share above one": (["model.dropout=2"], "model.dropout: expected less than or equal to 1, got 2"),
    "zero rate": (["optim.lr=0"], "optim.lr: expected greater than 0, got 0"),
    "endless": (["train.epochs=.inf"], "train.epochs: expected a finite number, got inf"),
    "not a number": (["optim.clip=.nan"], "optim.clip: expected a finite number, got nan"),
    "seed below zero": (["seed.init=-1"], "seed.init: expected greater than or equal to 0, got -1"),
    "seed of 33 bits": (["seed.dropout=4294967296"], "seed.dropout: expected less than 4294967296"),
    "missing section": (["task=null"], "task: expected keys below it, got None"),
    "missing key": (["model={head: new}"], "model.source: needed, but not given (A local directory"),
    "missing key in a list": (
        ["optim.groups=[{lr_scale: 2}]"],
        "optim.groups.0.match: needed, but not given (Pattern over parameter paths)",
    ),
    "missing file": (["data.source.train=/nowhere/a.csv"], "data.source.train: no file '/nowhere/a.csv' (looked in"),
    "missing file of a part": (
        [
            "data.source={kind: mixture, parts: [{name: a, source: {kind: files, train: /nowhere/a.csv}}]}",
            "eval.every=never",
        ],
        "data.source.parts.0.source.train: no file '/nowhere/a.csv' (looked in",
    ),
    "missing file of several": (["data.source.test=[/nowhere/b.csv]"], "data.source.test: no file '/nowhere/b.csv'"),
    "missing directory": (
        ["model.source=./nowhere"],
        "model.source: no directory './nowhere'; give a directory, a GGUF file",
    ),
    "unknown asset": (["model.source=asset:minilmm"], "model.source: no asset 'minilmm'; did you mean 'minilm'?"),
    "unknown file of an asset": (
        ["data.source.train=asset:movie_reviews/trian.csv"],
        "data.source.train: asset 'movie_reviews' has no file 'trian.csv'; did you mean 'train.csv'?",
    ),
    "not divisible": (
        ["train.batch_size=10", "train.accumulate=4"],
        "train.batch_size: 10 is not divisible by train.accumulate (4); make one a multiple of the other",
    ),
    "nothing left to train on": (
        ["data.split={validation: 0.5, test: 0.5}"],
        "data.split: validation and test together leave no row to train on; make them smaller",
    ),
    "row shorter than a document": (
        ["data.layout.length=64", "data.max_length=65"],
        "data.layout.length: 64 tokens cannot hold a document of data.max_length (65); lower max_length or leave",
    ),
    "no validation": (["data.source.validation=null"], "eval.every: there is no validation split; name data.source."),
    "unknown kind": (["data.source.kind=fils"], "data.source: kind: expected one of files, hub, tfds, mixture, got"),
    "no kind": (["data.source={train: x}"], "data.source: kind: needed, but not given; say which of the known kinds"),
    "unknown task": (["task.kind=sequence_clasification"], "task: kind: expected one of sequence_classification"),
    "empty axis": (["mesh.data=0"], "mesh: data: an axis of 0 devices; give -1 for all that are left, or a count"),
    "idle group": (["optim.groups=[{match: '**'}]"], "optim.groups.0: a group that changes nothing; give lr_scale or"),
    "no equals sign": (["train.steps"], "override 'train.steps': expected key.path=value"),
    "no key": (["=5"], "override '=5': expected key.path=value"),
    "value that is not YAML": (["train.freeze=[head"], "override 'train.freeze=[head': the value is not plain YAML"),
    "value nested deep": (["train.freeze=" + "[" * 5000], "the value is not plain YAML; quote it"),
    "tag in a value": (["optim.lr=!!python/name:os.system"], "the value is not plain YAML; quote it"),
    "variable": (["run.dir=${env:HF_TOKEN}"], "run.dir: '${...}' is not expanded; write the value, or give it as an"),
}
# Whole files, and what is said of them.
FILES = {
    "open bracket": (b"train: [", "line 1: not plain YAML: expected the node content"),
    "tab": (b"model:\n\tsource: x", "line 2: not plain YAML: found character '\\t'"),
    "key twice": (b"train:\n  steps: 1\n  steps: 2\n", "line 3: not plain YAML: 'steps' stands twice"),
    "alias": (b"a: &x {steps: 1}\nb: *x\n", "line 2: not plain YAML: aliases are not read; write it out"),
    "merge key": (b"<<: {steps: 1}\n", "line 1: not plain YAML: could not determine a constructor for the tag"),
    "control character": (b"run: \x01", "not plain YAML: unacceptable character"),
    "two documents": (b"a: 1\n---\nb: 2\n", "not plain YAML: but found another document"),
    "not UTF-8": (b"run: {dir: caf\xe9}", "not UTF-8 at byte 14; save it as UTF-8"),
    "nested deep": (b"[" * 5000, "nested too deep; a configuration has a few levels"),
    "a list": (b"- train\n", "holds a list; expected `section:` with keys below it"),
    "a word": (b"train", "holds a str; expected `section:` with keys below it"),
    "a list for a key": (b"? [a]\n: 1\n", "line 1: not plain YAML: found unhashable key"),
    "a number for a key": (b"1: 2", "1: expected a word for a key; quote it"),
    "nothing": (b"", "model: needed, but not given"),
    "too long": (b"#" * (MAX_BYTES + 1), f"a configuration has at most {MAX_BYTES}"),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with `good.yaml` and the files that it names; every bad configuration is one change of it."""
    (tmp_path / "train.csv").touch()
    (tmp_path / "good.yaml").write_text(GOOD.format(home=tmp_path))
    return tmp_path


def refusal(files: list[Path], overrides: list[str]) -> str:
    """What is said of a configuration; it must have the form `where: what`, or be a list of such lines."""
    with pytest.raises(ConfigError) as caught:
        read_config(files, overrides)
    first, *lines = str(caught.value).splitlines()
    assert caught.value.exit_code == 2 and re.match(r"\S.*: \S", first)
    if lines:
        assert first.endswith(f": {len(lines)} problem" + "s" * (len(lines) > 1))
        assert all(re.match(r"  - \S.*: \S", line) for line in lines)
    return str(caught.value)


def test_good(home):
    """Control: the configuration that all bad ones are changes of is good."""
    assert read_config([home / "good.yaml"]).model.source == str(home)
    assert len(OVERRIDES) + len(FILES) >= 30


@pytest.mark.parametrize("case", OVERRIDES)
def test_bad_value(home, case):
    """R29: the key is named, with what was expected or the nearest right spelling; one mistake is one problem."""
    overrides, expected = OVERRIDES[case]
    message = refusal([home / "good.yaml"], overrides)
    assert expected in message
    assert ": 1 problem\n" in message


@pytest.mark.parametrize("case", FILES)
def test_bad_file(home, case):
    """R29: a file that cannot be read as a configuration is named, with the line where there is one."""
    content, expected = FILES[case]
    (home / "bad.yaml").write_bytes(content)
    message = refusal([home / "bad.yaml"], [])
    assert expected in message and message.startswith(str(home / "bad.yaml"))


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_no_file(home, name):
    """R29: a file that is not there, or is a directory, is named."""
    assert f"{home / name}: cannot be read (" in refusal([home / name], [])


def test_all_at_once(home):
    """R29: problems of values, files, overrides and whole sections come together in one message, one line each."""
    overrides = [
        "train.stepz=3",
        "optim.lr=-1",
        "seed.init=x",
        "run.dir=${HOME}",
        "data.source.test=/nowhere/c.csv",
        "x",
    ]
    message = refusal([home / "good.yaml"], overrides)
    assert message.startswith(f"{home}/good.yaml + 6 overrides: 6 problems\n")
    for key in ("train.stepz", "optim.lr", "seed.init", "run.dir", "data.source.test", "override 'x'"):
        assert f"  - {key}: " in message


@pytest.mark.parametrize(
    "content",
    [
        "run: {dir: !!python/object/apply:os.system ['touch CANARY']}",
        "run: !!python/object/new:subprocess.Popen [['touch', 'CANARY']]",
        "run: {dir: !!python/name:os.environ ''}",
        "run: {dir: !!python/module:antigravity ''}",
        "!include {a: 1}",
        "run: {dir: !ENV HF_TOKEN}",
    ],
)
def test_tags(home, content, monkeypatch):
    """R36: a tag that would make an object is refused, and nothing was run."""
    monkeypatch.chdir(home)
    (home / "bad.yaml").write_text(content)
    assert "not plain YAML: could not determine a constructor for the tag" in refusal([home / "bad.yaml"], [])
    assert not (home / "CANARY").exists()


def test_alias_bomb(home):
    """R36: nine levels of nine aliases each, which would be 387 million words, are refused at the first alias."""
    levels = ["a0: &a0 [lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (home / "bad.yaml").write_text("\n".join(levels))
    assert "line 2: not plain YAML: aliases are not read" in refusal([home / "bad.yaml"], [])


@pytest.mark.parametrize(
    "override",
    ["run.dir=${env:HF_TOKEN}", "model.source=${HF_TOKEN}", "train.freeze=['${oc.env:HF_TOKEN}']"],
)
def test_no_expansion(home, override, monkeypatch):
    """R36: a variable of the environment is refused rather than expanded, and its value is not shown."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    message = refusal([home / "good.yaml"], [override])
    assert f"{override.partition('=')[0]}" in message and "is not expanded" in message and CANARY not in message


@given(st.binary(max_size=60) | st.text("{}[]:,-*&!|>'\"#%@ \nab1", max_size=40).map(str.encode))
@settings(max_examples=150, deadline=None, database=None)
def test_any_bytes(tmp_path_factory, content):
    """R29: whatever stands in a file, it is never a traceback."""
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    refusal([file], [])


@pytest.mark.parametrize("command", [["config", "check"], ["config", "show"], ["train"]])
def test_exit_code(home, command):
    """R29: the real command leaves with 2, in less than two seconds of processor time, before jax is imported."""
    words = [*command, str(home / "good.yaml"), "train.stepz=3", "run.dir=${env:HF_TOKEN}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sft_jax", *words],
        env={**os.environ, "HF_TOKEN": CANARY},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == ""
    assert "yaml" in imported and not {"jax", "flax", "datasets", "sft_jax.run"} & imported
    assert said[0].endswith("good.yaml + 2 overrides: 2 problems") and len(said) == 3
    assert CANARY not in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
