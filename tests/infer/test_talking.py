"""Talking with a model: each answer is that of `predict` to the same messages, and commands are no turns."""

import io
import json
from pathlib import Path

import pytest
from chats import LLAMA, said, write_decoder
from conftest import write_model
from typer.testing import CliRunner

from sft_jax.cli import app
from sft_jax.errors import ConfigError, ModelError
from sft_jax.infer.chat import converse
from sft_jax.infer.predict import Predictor, load_predictor

SHORT = ["max_new_tokens=6"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder with a template, as others publish it, and the same as our export of a run with tools."""
    home = tmp_path_factory.mktemp("chat")
    classes = {**LLAMA, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 160}
    write_decoder(home / "foreign", classes, "chatml", seed=3)
    ours = {"kind": "causal_lm", "format": "chat", "tools": "tools", "max_length": 120}
    write_decoder(home / "ours", {**classes, "sft_jax_task": ours}, "chatml", seed=3)
    return home


@pytest.fixture(scope="module")
def model(home: Path) -> Predictor:
    """The second."""
    return load_predictor(str(home / "ours"), SHORT, chats=True)


def talk(model: Predictor, lines: list[str], system: str | None = None) -> tuple[list[str], list[str]]:
    """(answers, what else was said)."""
    answers, told = [], []
    converse(model, lines, answers.append, told.append, system)
    return answers, told


def test_answers_are_those_of_predict(model):
    """Newcomer 18: each turn is asked with the system's words and all turns before; what is forgotten is not."""
    answers, told = talk(model, ["Hi", "  ", "Again", "/reset", "Hi", "/quit", "never"], "Be kind.")
    assert len(answers) == 3 and told == ["all that was said is forgotten"]
    system, first = said("system", "Be kind."), said("user", "Hi")
    assert answers[0] == answers[2] == model({"messages": [system, first]})["answer"]
    second = [system, first, said("assistant", answers[0]), said("user", "Again")]
    assert answers[1] == model({"messages": second})["answer"] != answers[0]
    assert model(second)["answer"] == answers[1], "the messages of one conversation are one row"
    other, told = talk(model, ["Hi", "/rest"])
    assert other != answers[:1] and told == ["/rest is no command; /reset forgets what was said, /quit ends"]


def test_a_model_with_tools_needs_none(model):
    """Newcomer 2: a model that was trained with a column of tools answers texts and rows that have none."""
    assert model("Hi") == model({"messages": [said("user", "Hi")]})


def test_what_is_too_long_is_said(model):
    """A conversation that is longer than the model reads is answered without its beginning, which is said."""
    answers, told = talk(model, ["Hi", "a" * 110])
    assert len(answers) == 2
    assert told == ["the beginning was left out: the model reads 120 tokens; /reset begins anew"]


def test_the_command(home):
    """Without a terminal each line is a turn, and answers alone are on standard output; settings are obeyed."""
    found = CliRunner().invoke(app, ["chat", str(home / "ours"), "--set", *SHORT], input="Hi\n/reset\nHi\n")
    assert found.exit_code == 0, found.output
    loaded = load_predictor(str(home / "ours"), SHORT)
    answer = loaded("Hi")["answer"]
    printed = io.StringIO()
    print(answer, answer, sep="\n", file=printed)
    assert found.stdout == printed.getvalue() and "forgotten" in found.stderr


def test_a_decoder_of_others_talks_by_its_template(home):
    """A model of others that has a chat template answers as our export with the same weights does."""
    foreign = load_predictor(str(home / "foreign"), SHORT, chats=True)
    ours = load_predictor(str(home / "ours"), SHORT)
    assert foreign.max_length == 160
    assert foreign("Hi")["answer"] == ours("Hi")["answer"]
    plain = load_predictor(str(home / "foreign"), SHORT)
    assert plain("Hi")["answer"] != ours("Hi")["answer"], "predict goes on with its text"


def test_what_cannot_talk_is_refused(home, tmp_path):
    """A classifier, a model that was trained on plain texts, and one without a template are refused by name."""
    write_model(tmp_path / "class", {"architectures": ["BertForSequenceClassification"]}, head=2)
    with pytest.raises(ConfigError, match="is for sequence_classification, not to chat; ask it by sft-jax predict"):
        load_predictor(str(tmp_path / "class"), chats=True)
    config = json.loads((home / "ours" / "config.json").read_text())
    write_decoder(tmp_path / "text", {**config, "sft_jax_task": {"kind": "causal_lm", "format": "text"}}, "chatml")
    with pytest.raises(ConfigError, match="was trained for causal_lm, format text, not to chat"):
        load_predictor(str(tmp_path / "text"), chats=True)
    bare = write_decoder(tmp_path / "bare", {**LLAMA, "architectures": ["LlamaForCausalLM"]}, "chatml")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        load_predictor(str(bare), chats=True)("Hi")
