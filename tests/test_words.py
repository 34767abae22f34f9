"""Words of a command line: what is a file, what is a setting, and what a setting is given."""

import json
from pathlib import Path

import pytest
from test_cli import sft_jax_command

from sft_jax.config.read import read_config
from sft_jax.errors import ConfigError
from sft_jax.paths import matches

GOOD = """\
model: {{source: {home}}}
task: {{kind: seq2seq}}
data: {{source: {{kind: files, train: {home}/rows.csv, validation: {home}/rows.csv}}}}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `good.yaml`, which is the working directory."""
    (tmp_path / "rows.csv").write_text("source,target\na,b\n")
    (tmp_path / "good.yaml").write_text(GOOD.format(home=tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["lr=3e-5", "a=b=c", "run.dir=x"])
def test_a_word_that_is_there_is_a_file(home: Path, name: str):
    """Fault R: a configuration under a directory with `=` in its name is read, also as `./`; what is no setting and
    not there is said to be a file that is not there."""
    (home / name).mkdir()
    (home / name / "config.yaml").write_text((home / "good.yaml").read_text())
    for word in (f"{name}/config.yaml", f"./{name}/config.yaml", home / name / "config.yaml"):
        assert sft_jax_command("config", "check", word).out == "ok\n"
    said = sft_jax_command("config", "check", f"./{name}/confg.yaml")
    assert said.code == 2 and f"{name}/confg.yaml: cannot be read (No such file or directory)" in said.err


def test_what_is_no_configuration_is_told_what_to_give(home: Path):
    """newcomer 4: a run directory, or its manifest, is answered with the file to give."""
    (home / "run").mkdir()
    (home / "run" / "config.yaml").write_text((home / "good.yaml").read_text())
    (home / "run" / "manifest.json").write_text("{}")
    assert sft_jax_command("config", "check", "run").err == "run: is a directory; give run/config.yaml\n"
    said = sft_jax_command("config", "check", "run/manifest.json").err
    assert said == "run/manifest.json: is no configuration; give run/config.yaml\n"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("run.dir", "runs/exp #3", "runs/exp #3"),
        ("run.dir", "[x]/{a: b}", "[x]/{a: b}"),
        ("run.dir", "'quoted #3'", "quoted #3"),
        ("run.dir", "it's", "it's"),
        ("run.dir", "2026-01-31", "2026-01-31"),
        ("run.dir", "null", "null"),
        ("task.prefix", "summarize: ", "summarize: "),
        ("task.prefix", "", ""),
        ("task.prefix", '"- "', "- "),
        ("model.revision", "1234567", "1234567"),
        ("model.revision", "12e4567", "12e4567"),
        ("model.revision", "null", None),
        ("data.source.train", "rows.csv", "rows.csv"),
        ("data.source.train", "[rows.csv, good.yaml]", ["rows.csv", "good.yaml"]),
        ("train.freeze", "[embed/**, 'blocks/{0,1}/**', 1.0]", ["embed/**", "blocks/{0,1}/**", "1.0"]),
        ("optim.lr", "3e-5", 3e-5),
        ("optim.options.b2", "0.98", 0.98),
        ("optim.options.nesterov", "true", True),
        ("optim.options.mode", "a #b", "a #b"),
        ("eval.every", "5", 5),
        ("eval.every", "never", "never"),
        ("train.unfreeze", "[{match: a, at: 3}]", [{"match": "a", "at": 3.0}]),
    ],
)
def test_values_are_taken_as_they_are_written(home: Path, key: str, text: str, value):
    """Fault R: a text is what stands behind the `=`, comments, colons, blanks and all, but for quotes around all of it;
    lists, numbers and choices are YAML as before."""
    found = read_config(["good.yaml"], [f"{key}={text}"]).model_dump()
    for part in key.split("."):
        found = found[part]
    assert found == value


def test_bytes_that_are_no_text_are_named(home: Path):
    """Fault R, the kind: what a terminal of another encoding gives is refused, and not a traceback later."""
    with pytest.raises(ConfigError, match="holds bytes that are no UTF-8; write it in UTF-8"):
        read_config(["good.yaml"], ["run.dir=\udcff"])


def test_version(home: Path):
    """newcomer 1: the version is to be had."""
    said = sft_jax_command("--version")
    assert said.code == 0 and said.out.startswith("sft-jax 0.")


def test_a_file_that_cannot_be_written_is_named(home: Path):
    """Brief: no traceback for a place inside of a file."""
    said = sft_jax_command("config", "cp", "quickstart", "good.yaml/mine.yaml")
    assert said.code == 2 and said.err.startswith("good.yaml/mine.yaml: cannot be written (")


def test_parameters_are_listed(tiny: Path):
    """newcomer 3: paths, shapes and names in the checkpoint, blocks that are alike together in a pattern that fits."""
    said = sft_jax_command("model", "show", tiny)
    lines = [line.split("  ") for line in said.out.splitlines()]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert rows["blocks/{0..1}/attn/q/kernel"] == ["16 × 16", "bert.encoder.layer.{0..1}.attention.self.query.weight"]
    assert matches("blocks/{0..1}/attn/q/kernel", "blocks/1/attn/q/kernel")
    assert rows["embed/word/embedding"][1] == "bert.embeddings.word_embeddings.weight"
    config = json.loads((tiny / "config.json").read_text())
    assert rows["embed/word/embedding"][0] == f"{config['vocab_size']} × {config['hidden_size']}"
