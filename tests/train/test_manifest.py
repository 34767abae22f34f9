"""The manifest of a run: it has a schema, and when one thing is changed, one field differs."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import ONE_SHAPE, SMALL, write_model, write_rows
from pydantic import ValidationError

from sft_jax import jobs
from sft_jax.config.data import Files, Hub, Mixture, Part
from sft_jax.config.schema import Config
from sft_jax.errors import NonFiniteError
from sft_jax.jobs import begin_directory
from sft_jax.run import prepare
from sft_jax.train.directory import differences
from sft_jax.train.manifest import Manifest, command, file_sha256, git_state, local_files

Make = Callable[..., Config]


@pytest.fixture
def manifest_of(configure: Make, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`manifest_of("key=value", ...)`: the manifest of a run on files that a test may change, each in its own place."""
    model = write_model(tmp_path / "model", SMALL)
    file = write_rows(tmp_path / "train.csv", 24)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([f"{lines[0]},id", *(f"{line},{n}" for n, line in enumerate(lines[1:]))]) + "\n")
    numbers = iter(range(100))

    def make(*overrides: str) -> dict[str, Any]:
        base = [f"model.source={model}", f"data.source.train={file}", f"run.dir={tmp_path / str(next(numbers))}"]
        return begin_directory(prepare(configure(*base, ONE_SHAPE, *overrides)))

    return make


def change(file: Path, old: bytes, new: bytes) -> None:
    """Put `new` in the place of the first `old`."""
    content = file.read_bytes()
    assert old in content and len(old) == len(new)
    file.write_bytes(content.replace(old, new, 1))


def test_exactly_what_was_changed_differs(manifest_of, tmp_path: Path, monkeypatch):
    """R52: one thing is changed at a time, and the manifest differs in the field of that thing alone."""
    before = manifest_of()
    train = tmp_path / "train.csv"

    def changed(*overrides: str) -> list[str]:
        return list(differences(before, manifest_of(*overrides)))

    assert changed() == []
    assert changed("train.log_every=7", "data.prefetch=1") == []
    assert changed("optim.lr=2e-3") == ["config"]
    assert changed("seed.dropout=1") == ["seeds.dropout"] and changed("seed.init=1") == ["seeds.init"]
    assert changed("mesh.data=2") == ["mesh.data"]
    version = importlib.metadata.version
    for target, name, value, field in (
        (importlib.metadata, "version", lambda p: "9.9" if p == "tokenizers" else version(p), "versions.tokenizers"),
        (jax, "device_count", lambda: 4, "devices.count"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert changed() == [field]
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false")
        assert changed() == ["flags.XLA_FLAGS"]
    change(tmp_path / "model" / "tokenizer.json", b"[MASK]", b"[MASC]")  # no text has it
    assert changed() == ["tokenizer"]
    change(tmp_path / "model" / "tokenizer.json", b"[MASC]", b"[MASK]")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert changed() == ["weights.model.safetensors"]
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    change(train, b",23\n", b",24\n")  # of a column that is not read
    assert changed() == [f"files.{train}"]
    change(train, b",24\n", b",23\n")
    assert changed() == []
    change(train, b"fena", b"fene")
    assert changed() == ["data.train.sha256", f"files.{train}"]


def test_it_has_a_schema(manifest_of):
    """R52: a manifest fits its schema, and what lacks a field, has another or a wrong type does not."""
    found = manifest_of()
    Manifest.model_validate_json(json.dumps(found))
    assert found["schema"] == 3 and (found["git"] is None or found["git"]["commit"])
    for key in found:
        with pytest.raises(ValidationError):
            Manifest.model_validate({k: v for k, v in found.items() if k != key})
    wrong = ({"more": 1}, {"schema": 1}, {"tokenizer": "x"}, {"processes": "1"}, {"data": {"train": {"rows": 1}}})
    for one in wrong:
        with pytest.raises(ValidationError):
            Manifest.model_validate({**found, **one})


def test_every_attempt_is_written_down(configure: Make, tmp_path: Path, monkeypatch):
    """R52: command, times and exit code of each process stand in the manifest, and what was not as it began."""
    source = write_model(tmp_path / "model", SMALL)
    base = (f"model.source={source}", ONE_SHAPE)
    file = tmp_path / "run" / "manifest.json"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sft-jax", "train", "a.yaml", f"x=hf_{'a' * 30}"])
    seen = []

    def failing(*given: Any) -> Any:
        seen.append(json.loads(file.read_text())["attempts"][-1])
        raise NonFiniteError("step 1: loss nan; lower optim.lr")

    monkeypatch.setattr(jobs, "_train", failing)
    with pytest.raises(NonFiniteError):
        jobs.train(prepare(configure(*base)))
    monkeypatch.setattr(jobs, "_train", lambda *given: None)
    jobs.train(prepare(configure(*base, "mesh.data=2")))
    found = json.loads(file.read_text())
    Manifest.model_validate(found)
    first, second = found["attempts"]
    assert (seen[0]["finished"], seen[0]["exit_code"]) == (None, None), "as a process that is killed leaves it"
    assert (first["exit_code"], second["exit_code"]) == (76, 0)
    assert first["command"] == ["sft-jax", "train", "a.yaml", "x=hf_***"]
    assert first["started"] <= first["finished"] <= second["started"] <= second["finished"]
    assert (first["differs"], second["differs"]) == ({}, {"mesh.data": [1, 2]})


def test_words_of_a_command():
    """R52, R37: a module that is run is called by the command's name, and credentials are not kept."""
    words = ["/x/sft_jax/__main__.py", "train", "", "model.source=https://me:secret@host/x", "run.dir=a b"]
    assert command(words) == ["sft-jax", "train", "", "model.source=https://***@host/x", "run.dir=a b"]


def test_files_are_those_of_every_part(tmp_path: Path):
    """R52: the files of all splits and parts of a mixture are named once, a saved data set too, one of the hub not."""
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "a.arrow").write_text("a")
    files = Files(kind="files", train=["a.csv", "b.csv"], validation="b.csv", test="asset:x/y.csv")
    saved, hub = (Hub(kind="hub", name=name) for name in (str(tmp_path / "saved"), "some/data"))
    parts = [Part(name=str(n), source=source) for n, source in enumerate((files, saved, hub))]
    found = local_files(Mixture(kind="mixture", parts=parts))
    assert found == ["a.csv", "b.csv", "asset:x/y.csv", str(tmp_path / "saved")]
    before = file_sha256(tmp_path / "saved")
    (tmp_path / "saved" / "a.arrow").rename(tmp_path / "saved" / "b.arrow")
    assert file_sha256(tmp_path / "saved") != before


def test_the_code_that_ran_is_named(tmp_path: Path):
    """newcomer 22: the commit of a checkout and whether it has changes stand there; a directory that a repository does
    not keep, such as an environment in a project of others, has none."""

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    kept, beside = tmp_path / "kept", tmp_path / "beside"
    for home in (kept, beside):
        home.mkdir()
        (home / "a.py").write_text("1")
    git("init", "-q")
    git("add", "kept")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert git_state(kept) == {"commit": commit, "changed": False} and git_state(beside) is None
    (kept / "a.py").write_text("2")
    assert git_state(kept) == {"commit": commit, "changed": True}
