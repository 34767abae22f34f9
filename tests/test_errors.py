"""The form of messages: what another program says is quoted on one line, cut, and without credentials."""

import pytest

from sft_jax.config.read import read_config
from sft_jax.errors import ConfigError, reason

CANARY = "cAnArY0123456789AbCdEf"
TOKEN = "hf_" + CANARY + "GhIjKlMnOp"


@pytest.mark.parametrize(
    ("error", "most", "said"),
    [
        (OSError("one\n  two\tthree"), 150, "one two three"),
        (KeyError(), 150, "KeyError"),
        (ValueError("  \n "), 150, "ValueError"),
        ("a" * 200, 150, "a" * 150),
        (ValueError("a" * 200), 20, "a" * 20),
    ],
)
def test_reason(error, most, said):
    """What is quoted stands on one line of bounded length; an error without words is called by its type."""
    assert reason(error, most) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"401 for https://me:{CANARY}@host.example/a@b?x=1", "401 for https://***@host.example/a@b?x=1"),
        (f"https://{CANARY}@host/a", "https://***@host/a"),
        (f"sent Authorization: Bearer {CANARY}, got 403", "sent Authorization: Bearer *** got 403"),
        (f"{{'authorization': 'Basic {CANARY}='}}", "{'authorization': 'Basic ***"),
        (f"GET /a?X-Amz-Signature={CANARY}&b=2&token={CANARY}", "GET /a?X-Amz-Signature=***&b=2&token=***"),
        (f"token {TOKEN} is not valid", "token hf_*** is not valid"),
        (f"the key ({CANARY}) was refused", "the key (***) was refused"),
        ("a" * 140 + f" hf_{CANARY}", "a" * 140 + " hf_***"),
    ],
)
def test_credentials_are_not_quoted(text, said, monkeypatch):
    """R37: passwords in addresses, headers, signed links, hub tokens and what the environment keeps secret are out."""
    monkeypatch.setenv("MADE_UP_API_KEY", CANARY if text.startswith("the key") else "another-0123456789")
    assert reason(RuntimeError(text)) == said


def test_what_is_no_secret_is_quoted():
    """R37: control: ordinary messages come through whole."""
    for text in (
        "404 Client Error: Repository Not Found for url: https://huggingface.co/api/models/a/b?expand=true",
        "expected a token of class Bearer, got none; see hf_transfer, a@b and key=value",
    ):
        assert reason(text) == text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.source", f"someone/model?{TOKEN}"),
        ("model.revision", TOKEN),
        ("run.dir", f"https://me:{CANARY}@host/runs"),
        ("task.labels", f"[good, {TOKEN}]"),
        ("train.steps", TOKEN),
    ],
)
def test_a_configuration_holds_no_secret(key, value, tmp_path):
    """R37: a token or password in a configuration, which every run directory keeps, is refused and not shown."""
    base = [f"model.source={tmp_path}", "task.kind=sequence_classification", "data.source={kind: hub, name: a/b}"]
    read_config([], [*base, "eval.every=never"])
    with pytest.raises(ConfigError) as caught:
        read_config([], [*base, "eval.every=never", "train.stepz=3", f"{key}={value}"])
    assert f"  - {key}" in str(caught.value) and "token or a password" in str(caught.value)
    assert CANARY not in str(caught.value)
