"""Scores of answers in words equal the official ones, and the word table learns what words mean."""

import numpy as np
import pytest
import sacrebleu
from translations import pairs, translated

from sft_jax.tasks import answer_scores, word_table

WORDS = ["The", "cat", "sat", "on", "the", "mat", "–", "été", "42", "don't", "A.B."]


def texts(count: int, seed: int) -> list[str]:
    """Random texts of these words, some of them empty."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=int(draw.integers(0, 12)))) for _ in range(count)]


def test_bleu_and_chrf_are_those_of_sacrebleu():
    """On random texts and empty ones, and 100 of what is as expected."""
    said, expected = texts(30, 0), texts(30, 1)
    found = answer_scores.score(said, expected)
    assert tuple(found) == answer_scores.NAMES
    assert found["bleu"] == sacrebleu.corpus_bleu(said, [expected]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(said, [expected]).score > 0
    right = answer_scores.score(expected, expected)
    assert right["chrf"] == pytest.approx(100) and right["bleu"] == pytest.approx(100)
    assert set(answer_scores.score([], []).values()) == {0.0}


def test_rouge_is_that_of_rouge_score():
    """Equal to `rouge_score` without stemming, on random texts and empty ones."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    said, expected = texts(60, 2), texts(60, 3)
    each = [scorer.score(target, answer) for answer, target in zip(said, expected, strict=True)]
    official = {name: np.mean([one[name].fmeasure for one in each]) for name in ("rouge1", "rouge2", "rougeL")}
    assert answer_scores.rouge(said, expected) == pytest.approx(official, abs=1e-12)
    assert min(official.values()) > 0


def test_the_word_table_learns_what_words_mean():
    """Of pairs whose words stand in reverse order, each word is told from the others, so that all words are right."""
    train, test = pairs(300), pairs(20, seed=9)
    table = word_table.learn(*zip(*train, strict=True))
    assert all(table[word] == translated(word) for word in table) and len(table) == 40
    for first, last in (("le ", ""), ("", " le")):  # beside each word alike, and explained by another one
        common = word_table.learn(*zip(*((f"the {a}", f"{first}{b}{last}") for a, b in train), strict=True))
        assert common == {**table, "the": "le"}
    said = word_table.translate(table, [source for source, _ in test])
    assert answer_scores.rouge(said, [target for _, target in test])["rouge1"] == 1
    assert word_table.translate(table, ["bara unheard!"]) == ["arab unheard !"]
    assert word_table.learn([], []) == {} == word_table.learn([""], ["a"])
