"""The baselines that a score is compared with."""

import numpy as np
import pytest
from conftest import WORDS

from sft_jax.tasks.baselines import majority, tfidf


def learnable(count: int, seed: int) -> tuple[list[str], list[int]]:
    """Texts whose words tell the label, three classes."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count).tolist()
    return [" ".join(draw.choice(WORDS[10 * k : 10 * k + 10], 6)) for k in labels], labels


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [([0, 0, 1], [0, 1, 1, 1], 0.25), ([2, 2, 1], [2, 2], 1.0), ([1, 1, 0], [0, 0], 0.0)],
)
def test_the_majority_is_that_of_training(train, test, expected):
    """The label that training has most often is said everywhere, whatever the test split has most."""
    assert majority(train, test) == expected


def test_tfidf_learns_what_words_tell():
    """Where words tell the label it is always right, and where they do not it is no better than chance."""
    texts, labels = learnable(90, 0)
    test_texts, test_labels = learnable(60, 1)
    assert tfidf(texts, labels, test_texts, test_labels) == 1.0
    shuffled = np.random.default_rng(2).permutation(test_labels).tolist()
    assert tfidf(texts, labels, test_texts, shuffled) < 0.6
    assert majority(labels, test_labels) < 0.6


def test_tfidf_sees_pairs_of_words():
    """Word order matters to it: the same words in another order are told apart."""
    texts, labels = ["good not bad at all", "bad not good at all"] * 10, [1, 0] * 10
    assert tfidf(texts, labels, texts[:2], labels[:2]) == 1.0


def test_tfidf_of_one_class_is_the_majority():
    """Rows of a single class, as the first of a sorted source are, score as the majority does."""
    assert tfidf(["bara", "cela"], [1, 1], ["bara", "doro"], [1, 0]) == 0.5


def test_words_unknown_to_training_are_no_error():
    """Test rows without a single known word are scored all the same."""
    texts, labels = learnable(30, 3)
    assert 0 <= tfidf(texts, labels, ["unheard of", "?"], [0, 1]) <= 1
