"""The baselines that a score is compared with."""

import numpy as np
import pytest
from conftest import WORDS

from sft_jax.tasks.baselines import commonest_class, commonest_label, linear_classes, linear_labels, linear_number


def learnable(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts whose words tell the label, three classes."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    return [" ".join(draw.choice(WORDS[10 * k : 10 * k + 10], 6)) for k in labels], labels


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [([0, 0, 1], [0, 1, 1, 1], 0.25), ([2, 2, 1], [2, 2], 1.0), ([1, 1, 0], [0, 0], 0.0)],
)
def test_the_majority_is_that_of_training(train, test, expected):
    """The label that training has most often is said everywhere, whatever the test split has most."""
    assert commonest_class(np.array(train), np.array(test)) == expected


def test_words_tell_a_class():
    """Where words tell the label it is always right, and where they do not it is no better than chance."""
    texts, labels = learnable(90, 0)
    test_texts, test_labels = learnable(60, 1)
    assert linear_classes([texts], labels, [test_texts], test_labels) == 1.0
    shuffled = np.random.default_rng(2).permutation(test_labels)
    assert linear_classes([texts], labels, [test_texts], shuffled) < 0.6
    assert commonest_class(labels, test_labels) < 0.6


def test_pairs_of_words_are_seen():
    """Word order matters to it: the same words in another order are told apart."""
    texts, labels = ["good not bad at all", "bad not good at all"] * 10, np.array([1, 0] * 10)
    assert linear_classes([texts], labels, [texts[:2]], labels[:2]) == 1.0


def test_both_texts_of_a_pair_are_read():
    """The second text alone can tell the label, and a word in it is another than the same word in the first."""
    labels = np.array([1, 0] * 12)
    same, telling = ["bara"] * 24, ["cela", "dora"] * 12
    assert linear_classes([same, telling], labels, [same, telling], labels) == 1.0
    assert linear_classes([same, same], labels, [same, same], labels) == 0.5
    crossed = ["cela", "dora"] * 6 + ["dora", "cela"] * 6
    first = np.array([1, 0] * 6 + [1, 0] * 6)
    assert linear_classes([telling, crossed], first, [telling, crossed], first) == 1.0


def test_one_class_is_the_majority():
    """Rows of a single class, as the first of a sorted source are, score as the majority does."""
    assert linear_classes([["bara", "cela"]], np.array([1, 1]), [["bara", "doro"]], np.array([1, 0])) == 0.5


def test_texts_without_a_common_word_are_no_error():
    """Where no word stands in two rows there is nothing to learn from, and test rows may know no word at all."""
    texts, labels = ["bara", "cela", "doro"], np.array([0, 1, 1])
    assert linear_classes([texts], labels, [texts], labels) == commonest_class(labels, labels)
    assert linear_number([texts], labels, [texts], labels) == 0.0
    several = np.array([[1, 0], [1, 0], [0, 1]])
    assert linear_labels([texts], several, [texts], several) == commonest_label(several, several) > 0
    texts, labels = learnable(30, 3)
    assert 0 <= linear_classes([texts], labels, [["unheard of", "?"]], np.array([0, 1])) <= 1


def test_words_tell_several_labels():
    """A label for each word: found by words, while the commonest alone gets a part; constant labels are kept."""
    texts, labels = learnable(90, 4)
    several = np.stack([labels == 0, labels != 2, labels >= 0], axis=1).astype(np.int32)
    assert linear_labels([texts], several, [texts], several) == 1.0
    assert 0.3 < commonest_label(several, several) < 0.8


def test_words_tell_a_number():
    """Ridge regression follows numbers that words tell, and is near nothing where they do not."""
    texts, labels = learnable(90, 5)
    test_texts, test_labels = learnable(60, 6)
    assert linear_number([texts], labels * 1.5, [test_texts], test_labels * 1.5) > 0.95
    shuffled = np.random.default_rng(2).permutation(test_labels)
    assert abs(linear_number([texts], labels, [test_texts], shuffled)) < 0.4
