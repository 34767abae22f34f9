"""What a score is to be compared with: the commonest answer, and a linear model of TF-IDF weights or pixels."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from sft_jax.data.images import Picture, in_threads
from sft_jax.data.processor import Size, resized
from sft_jax.tasks import metrics
from sft_jax.tasks.task import Texts

SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
SMALL, MOST_PICTURES = Size(28, 28), 10_000  # what pixels are compared in, and how many images a model of them takes
Features = tuple[Any, Any]  # sparse [training documents, words], [test documents, words]


def commonest_class(train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy of always saying the commonest class of training."""
    return float(np.mean(np.asarray(test) == np.bincount(train).argmax()))


def commonest_next(before: np.ndarray, label: np.ndarray, test_before: np.ndarray, test: np.ndarray) -> float:
    """Accuracy of saying what most often follows the same token in training; after others, the commonest of all."""
    pairs, often = np.unique(np.stack([before, label]), axis=1, return_counts=True)
    order = np.lexsort((often, pairs[0]))  # the last one of each token before is its commonest
    firsts, last = pairs[0][order], np.append(pairs[0][order][1:] != pairs[0][order][:-1], True)
    known, said = firsts[last], pairs[1][order][last]
    place = np.minimum(np.searchsorted(known, test_before), len(known) - 1)
    answer = np.where(known[place] == test_before, said[place], np.bincount(label).argmax())
    return float(np.mean(answer == test))


def commonest_answers(questions: Sequence[str], answers: Sequence[str], test: Sequence[str]) -> list[str]:
    """What each question is most often answered with in training; to a question that is not there, the commonest."""
    known: dict[str, Counter[str]] = {}
    for question, answer in zip(questions, answers, strict=True):
        known.setdefault(question, Counter())[answer] += 1
    every = Counter(answers)
    return [known.get(question, every).most_common(1)[0][0] for question in test]


def nearest_sentences(texts: Sequence[str], questions: Sequence[str], contexts: Sequence[str]) -> list[str]:
    """Of each context the sentence or line whose TF-IDF weights are most like those of its question."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(sublinear_tf=True)
    try:
        words.fit(texts)
    except ValueError:  # no word is left
        return list(contexts)
    parts = [[part for part in SENTENCE.split(context) if part.strip()] for context in contexts]
    sentences = words.transform([part for found in parts for part in found])
    of = np.repeat(np.arange(len(parts)), [len(found) for found in parts])
    likeness = np.asarray(sentences.multiply(words.transform(questions)[of]).sum(axis=1)).ravel()
    ends = np.cumsum([len(found) for found in parts])
    best = [int(likeness[end - len(found) : end].argmax()) for end, found in zip(ends, parts, strict=True)]
    return [found[place] for found, place in zip(parts, best, strict=True)]


def linear_classes(texts: Texts, train: np.ndarray, test_texts: Texts, test: np.ndarray) -> float:
    """Accuracy of logistic regression on TF-IDF weights of words and word pairs; a strong setting for short texts."""
    from sklearn.linear_model import LogisticRegression

    features = _tfidf(texts, test_texts)
    if features is None or len(set(train)) < 2:  # nothing to tell apart, or to tell by
        return commonest_class(train, test)
    with _quiet():
        model = LogisticRegression(C=4, max_iter=1000).fit(features[0], train)
    return float(model.score(features[1], test))


def linear_pixels(pictures: Sequence[Picture], train: np.ndarray, test: Sequence[Picture], label: np.ndarray) -> float:
    """Accuracy of logistic regression on the pixels of images made small; trained on the first `MOST_PICTURES`."""
    from sklearn.linear_model import LogisticRegression

    train = train[:MOST_PICTURES]
    if len(set(train)) < 2:
        return commonest_class(train, label)
    with _quiet():
        model = LogisticRegression(max_iter=100).fit(_small(pictures[:MOST_PICTURES]), train)
    return float(model.score(_small(test), label))


def commonest_label(train: np.ndarray, test: np.ndarray) -> float:
    """Micro F1 of always saying the commonest label of training alone; [documents, labels] of 0 and 1."""
    said = np.zeros_like(test)
    said[:, train.sum(axis=0).argmax()] = 1
    return _f1_micro(test, said)


def linear_labels(texts: Texts, train: np.ndarray, test_texts: Texts, test: np.ndarray) -> float:
    """Micro F1 of a logistic regression for each label on the TF-IDF weights."""
    from sklearn.linear_model import LogisticRegression

    features = _tfidf(texts, test_texts)
    if features is None:
        return commonest_label(train, test)
    said = np.tile(train[:1], (len(test), 1))  # of labels that all training documents have, or none
    with _quiet():
        for label in np.flatnonzero(train.min(axis=0) < train.max(axis=0)):
            model = LogisticRegression(C=4, max_iter=1000).fit(features[0], train[:, label])
            said[:, label] = model.predict(features[1])
    return _f1_micro(test, said)


def linear_number(texts: Texts, train: np.ndarray, test_texts: Texts, test: np.ndarray) -> float:
    """Pearson's correlation of ridge regression on the TF-IDF weights."""
    from sklearn.linear_model import Ridge

    features = _tfidf(texts, test_texts)
    if features is None:
        return 0.0
    values = Ridge().fit(features[0], train).predict(features[1])
    return metrics.pearson(np.asarray(values, np.float64), test.astype(np.float64))


def _tfidf(texts: Texts, test_texts: Texts) -> Features | None:
    """Weights of words and word pairs; each column of texts has words of its own. None where no word occurs twice."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = []
    for column, test_column in zip(texts, test_texts, strict=True):
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        try:
            found.append((words.fit_transform(column), words.transform(test_column)))
        except ValueError:  # no word is left
            continue
    return (hstack([a for a, _ in found]).tocsr(), hstack([b for _, b in found]).tocsr()) if found else None


def _small(pictures: Sequence[Picture]) -> np.ndarray:
    """[n, pixels and channels] from 0 to 1."""
    made = in_threads(
        lambda one: resized(one.pixels(), SMALL, Image.Resampling.BILINEAR), pictures, os.cpu_count() or 1
    )
    return np.stack(made).reshape(len(made), -1).astype(np.float32) / 255


def _f1_micro(truth: np.ndarray, said: np.ndarray) -> float:
    return float(metrics.precision_recall_f1((truth & said).sum(), said.sum(), truth.sum())[2])


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations, which a baseline may run out of
        yield
