"""Command lines of any words: every command answers with a result, a usage error or one message of ours."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
from conftest import SMALL, write_model, write_rows
from hostile import budget, told
from hypothesis import given
from hypothesis import strategies as st

from sft_jax import cli, jobs, machine, run
from sft_jax.__main__ import main
from sft_jax.errors import DataError, SftError

CODES = {0, 1, 2, 65, 69, 76}
OPTIONS = [
    "--help",
    "--raw",
    "--at",
    "--at=best",
    "--split",
    "--split=train",
    "--batch-size",
    "--batch-size=0",
    "-x",
    "--",
]


def commands() -> list[list[str]]:
    """Every command there is, by its words."""
    nested = [(name.name, name.typer_instance) for name in cli.app.registered_groups]
    below = [
        [group or "", one.name or one.callback.__name__] for group, app in nested for one in app.registered_commands
    ]
    return [[one.name or one.callback.__name__] for one in cli.app.registered_commands] + below


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, rows, a configuration, and things that are neither: the words may name them."""
    home = tmp_path_factory.mktemp("commands")
    write_model(home / "model", {**SMALL, "architectures": ["BertForSequenceClassification"]}, head=2)
    write_rows(home / "rows.csv", 20)
    (home / "good.yaml").write_text(
        f"model: {{source: {home}/model}}\ntask: {{kind: sequence_classification}}\nrun: {{dir: {home}/new}}\n"
        f"data: {{source: {{kind: files, train: {home}/rows.csv, validation: {home}/rows.csv}}}}\n"
    )
    (home / "junk").write_bytes(bytes(range(256)))
    (home / "torn").mkdir()
    for name in ("config.yaml", "config.json", "manifest.json", "metrics.jsonl", "ledger.jsonl", "summary.json"):
        (home / "torn" / name).write_bytes(b'{"a": [\xff')
    (home / "empty").mkdir()
    return home


def stop(*given: Any, **more: Any) -> NoReturn:
    """What is asked for is not done in these tests."""
    raise DataError("this test: goes no further; there is nothing to mend")


def said(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """(exit code, what stands on standard error) of `sft-jax` with these words; nothing is trained or fetched."""
    err = io.StringIO()
    with (
        monkeypatch.context() as patch,
        mock.patch.dict(os.environ, {machine.RELAUNCHED: "1"}),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["sft-jax", *words])
        patch.setattr(sys, "stdin", io.StringIO("bara\n"))
        patch.setattr(jobs, "train", stop)
        patch.setattr("huggingface_hub.snapshot_download", stop)
        patch.setattr("datasets.load_dataset", stop)
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), err.getvalue()
    return 0, err.getvalue()


@given(data=st.data())
@budget(100)
def test_any_words(home: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Whatever stands behind a command, no traceback is shown, and the exit code is one that there is."""
    names = ["good.yaml", "junk", "torn", "empty", "model", "rows.csv", "nowhere", "new", ""]
    word = (
        st.sampled_from([str(home / name) for name in names])
        | st.sampled_from(OPTIONS)
        | st.sampled_from(
            ["train.steps=2", "run.dir=", "=", "a=b", "mesh.data=x", "best", "quickstart", "hub/name", "[a"]
        )
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), max_size=8)
    )
    words = [*data.draw(st.sampled_from(commands())), *data.draw(st.lists(word, max_size=4))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("words"))
        code, text = said(words, patch)
    assert code in CODES and "Traceback" not in text, (words, text)
    usage = text.startswith(("Usage", "╭─ Error"))
    assert not usage or code == 2, (words, text)
    if code and not usage:
        try:
            told(SftError(text.rstrip("\n")))
        except AssertionError as error:
            raise AssertionError(f"sft-jax {words}: {error}") from None


def test_an_error_of_the_system_is_a_message(home: Path, monkeypatch):
    """A disk that is full, or a directory that may not be written, is no traceback either."""

    def full(*given: Any) -> NoReturn:
        raise OSError(28, "No space left on device", "/somewhere/metrics.jsonl")

    monkeypatch.setattr(run, "prepare", full)
    code, text = said(["train", str(home / "good.yaml")], monkeypatch)
    assert code == 74 and text.startswith("/somewhere/metrics.jsonl: No space left on device; ")
    told(SftError(text.rstrip("\n")))


def test_every_command_is_tried(home: Path, monkeypatch):
    """Negative control: the commands are those that help lists, and an error that is not ours does come out."""
    assert {words[0] for words in commands()} >= {"train", "evaluate", "predict", "export", "goodput", "config"}

    def broken(*given: Any) -> NoReturn:
        raise ValueError("ours")

    monkeypatch.setattr(run, "prepare", broken)
    with pytest.raises(ValueError, match="ours"):
        said(["train", str(home / "good.yaml")], monkeypatch)
    assert json.loads((home / "model" / "config.json").read_text())["model_type"] == "bert"
