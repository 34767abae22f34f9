"""Answers in words through `predict`: settings by name, drawn tokens that are those they should be, clear mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_model

from sft_jax.config.generation import Generation
from sft_jax.config.read import read_settings
from sft_jax.errors import ConfigError
from sft_jax.infer.predict import load_predictor
from sft_jax.infer.search import likeliest, search


def answers(logits: np.ndarray, count: int, **settings) -> np.ndarray:
    """One token drawn for each of `count` rows from these logits."""
    rows = jnp.asarray(np.tile(logits, (count, 1)), jnp.float32)
    zeros, numbers = jnp.zeros(count, jnp.int32), jnp.arange(count)
    section = Generation(max_new_tokens=1, **settings)
    found = search(lambda t, p, n, c: (rows, c), rows, jnp.zeros((count, 1)), zeros, numbers, section, ())
    return np.asarray(found.tokens[:, 0])


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """R40: at temperature 2 the shares of 20,000 draws are those of softmax(logits / 2), to four standard errors."""
    logits, count = np.array([2.0, 0.0, 1.0, -1.0]), 20_000
    chances = np.asarray(jax.nn.softmax(logits / 2))
    shares = np.bincount(answers(logits, count, temperature=2.0), minlength=4) / count
    assert (np.abs(shares - chances) < 4 * np.sqrt(chances * (1 - chances) / count)).all()
    assert (answers(logits, 50) == 0).all(), "without a temperature the likeliest is taken"
    again, other = (answers(logits, 50, temperature=2.0, seed=seed) for seed in (0, 1))
    assert (again == answers(logits, 50, temperature=2.0)).all() and (again != other).any(), "the seed decides"


@pytest.mark.parametrize(
    ("top_k", "top_p", "left"),
    [(None, 1.0, [0, 1, 2, 3]), (2, 1.0, [0, 2]), (9, 1.0, [0, 1, 2, 3]), (None, 0.6, [0]), (None, 0.85, [0, 2])],
)
def test_only_the_likeliest_are_drawn(top_k, top_p, left):
    """R40: `top_k` leaves so many tokens, `top_p` the fewest that have so much probability together."""
    logits = jnp.asarray([[2.0, 0.0, 1.0, -1.0]])  # probabilities 0.64, 0.09, 0.24, 0.03
    assert np.flatnonzero(np.isfinite(np.asarray(likeliest(logits, top_k, top_p))[0])).tolist() == left


def test_settings_are_checked_by_name():
    """C26: a setting that does not exist, and one of another kind, are named, all in one message."""
    with pytest.raises(ConfigError) as caught:
        read_settings(Generation, "--set", ["num_beans=4", "temperature=hot"])
    message = str(caught.value)
    assert "num_beans: no such setting" in message and "num_beams" in message and "temperature: " in message
    assert read_settings(Generation, "--set", ["num_beams=4", "top_p=0.9"]) == {"num_beams": 4, "top_p": 0.9}


def test_a_classifier_takes_no_settings(tmp_path):
    """C26: settings of answers are refused where there are none."""
    home = write_model(tmp_path / "model", {"architectures": ["BertForSequenceClassification"]}, head=2)
    with pytest.raises(
        ConfigError, match=r"--set num_beams=4: sequence_classification does not answer in words; leave"
    ):
        load_predictor(str(home), ["num_beams=4"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 2, "temperature": 1.0}, "num_beams: beams are searched and not drawn"),
        ({"top_k": 5}, "temperature: at 0 nothing is drawn, so top_k and top_p do nothing"),
    ],
)
def test_settings_that_do_nothing_together_are_refused(settings, said):
    """C26: an option that could do nothing is an error."""
    with pytest.raises(ValueError, match=said):
        Generation(**settings)
