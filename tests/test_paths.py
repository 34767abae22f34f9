"""The pattern language over parameter paths."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.errors import ConfigError
from sft_jax.paths import first_match, matches, select

PATHS = [
    "embed/word/embedding",
    "embed/norm/scale",
    *(f"blocks/{i}/attn/{part}/{leaf}" for i in (0, 1, 11) for part in "qkvo" for leaf in ("kernel", "bias")),
    "head/out/kernel",
    "head/out/bias",
]


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [
        ("head/out/bias", ["head/out/bias"], ["head/out/biases", "ahead/out/bias", "head/out"]),
        ("head/*/bias", ["head/out/bias"], ["head/bias", "head/out/more/bias"]),
        ("blocks/*/attn/q*/kernel", ["blocks/0/attn/q/kernel", "blocks/3/attn/qkv/kernel"], ["blocks/0/attn/k/kernel"]),
        ("embed/**", ["embed", "embed/norm/scale", "embed/a/b/c"], ["embedding/a"]),
        ("**/bias", ["bias", "head/bias", "a/b/c/bias"], ["head/bias/x", "head/abias"]),
        ("a/**/z", ["a/z", "a/b/z", "a/b/c/z"], ["a/bz", "az"]),
        ("**", ["a", "a/b/c"], []),
        ("**/{bias,scale}", ["head/bias", "embed/norm/scale"], ["head/kernel"]),
        ("blocks/{0..5}/**", ["blocks/0/x", "blocks/5/x"], ["blocks/6/x", "blocks/05/x", "blocks/50/x"]),
        ("blocks/{1,8..10}/x", ["blocks/1/x", "blocks/9/x", "blocks/10/x"], ["blocks/2/x", "blocks/0/x"]),
        ("attn/{q*, v}/kernel", ["attn/qkv/kernel", "attn/v/kernel"], ["attn/k/kernel"]),
        ("a.b+c/(d)", ["a.b+c/(d)"], ["axb+c/(d)", "a.bbc/(d)", "a.b+c/d"]),
    ],
)
def test_pattern(pattern, fitting, other):
    """Each form of a pattern fits what it should, whole paths alone, and nothing else."""
    assert [path for path in fitting if not matches(pattern, path)] == []
    assert [path for path in other if matches(pattern, path)] == []


@given(st.lists(st.text("ab.*+?[](){}|^$\\,", min_size=1).filter(lambda s: not set(s) & set("*{}")), min_size=1))
@settings(max_examples=50, deadline=None, database=None)
def test_plain_path_fits_itself(segments):
    """A path without stars and braces is a pattern that fits itself, whatever characters are in it."""
    path = "/".join(segments)
    assert matches(path, path) and not matches(path, f"{path}a")


@pytest.mark.parametrize("pattern", ["head/{a", "head/a}", "head/{a,{b}}"])
def test_open_brace(pattern):
    """A brace that does not close is an error, not a letter."""
    with pytest.raises(ConfigError, match="a brace is not closed"):
        matches(pattern, "head/a")


def test_select():
    """The paths that any pattern fits, each once."""
    found = select(["head/**", "**/bias"], PATHS, "train.freeze")
    assert found == {path for path in PATHS if path.startswith("head/") or path.endswith("/bias")}
    assert select([], PATHS, "train.freeze") == frozenset()


def test_idle_patterns_are_errors():
    """Every pattern that fits nothing is named, beside what it may have meant."""
    with pytest.raises(ConfigError) as caught:
        select(["haed/out/bias", "head/**", "blocks/{2..9}/attn/q/kernel"], PATHS, "train.freeze")
    message = str(caught.value)
    assert message.startswith("train.freeze: 2 problems")
    assert "'haed/out/bias' matches no parameter; the nearest are head/out/bias" in message
    assert "'blocks/{2..9}/attn/q/kernel' matches no parameter" in message and "'head/**'" not in message


def test_first_match():
    """The first pattern wins, a path that none fits has None, and a pattern in another's shadow is allowed."""
    found = first_match(["head/**", "**/bias", "head/out/bias"], PATHS, "optim.groups")
    assert found["head/out/bias"] == 0 and found["blocks/1/attn/q/bias"] == 1
    assert found["embed/word/embedding"] is None and found.keys() == set(PATHS)
