"""What a score is to be compared with: the majority class, and TF-IDF with logistic regression."""

import warnings
from collections.abc import Sequence

import numpy as np

Labels = Sequence[int] | np.ndarray


def majority(train: Labels, test: Labels) -> float:
    """Accuracy on the test split of always saying the commonest training label."""
    return float(np.mean(np.asarray(test) == np.bincount(train).argmax()))


def tfidf(texts: Sequence[str], labels: Labels, test_texts: Sequence[str], test_labels: Labels) -> float:
    """Accuracy of logistic regression on TF-IDF weights of words and word pairs; a strong setting for short texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(set(labels)) < 2:  # nothing to tell apart
        return majority(labels, test_labels)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=4, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations, which a baseline may run out of
        model.fit(words.fit_transform(texts), labels)
    return float(model.score(words.transform(test_texts), test_labels))
