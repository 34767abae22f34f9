"""How answers are compared, as the official script of SQuAD 2.0 does it: exact match and F1 of words. On the host.

Source: `evaluate-v2.0.py` (arXiv 1806.03822); of several right answers the nearest counts. Figures are shares, not
per cent.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

NAMES: tuple[str, ...] = ("exact_match", "f1")
APART: tuple[str, ...] = (
    "exact_match_answered",
    "f1_answered",
    "exact_match_unanswered",
)  # of the rows with an answer, and without
ARTICLES = re.compile(r"\b(a|an|the)\b")
MARKS = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and superfluous white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(MARKS)).split())


def scores(said: Sequence[str], truth: Sequence[Sequence[str]]) -> Float[np.ndarray, "rows 2"]:
    """(exact match, F1) of each answer with the nearest of the right ones; where there is none, only "" is right."""
    found = np.zeros((len(said), 2))
    for row, (answer, right) in enumerate(zip(said, truth, strict=True)):
        words = normalise(answer).split()
        known = {normalise(text) for text in right} - {""} or {""}
        found[row] = " ".join(words) in known, max(_f1(words, text.split()) for text in known)
    return found


def figures(values: Float[np.ndarray, "rows 2"], answered: Bool[np.ndarray, " rows"], apart: bool) -> dict[str, float]:
    """The means of the scores; with `apart` also of the rows that have an answer, and of those that have none."""
    found: dict[str, float] = dict(zip(NAMES, _means(values), strict=True))
    if apart:
        exact, _ = _means(values[~answered])
        found |= dict(zip(APART, (*_means(values[answered]), exact), strict=True))
    return found


def best_threshold(
    values: Float[np.ndarray, " rows"], answered: Bool[np.ndarray, " rows"], apart: Float[np.ndarray, " rows"]
) -> tuple[float, float]:
    """(threshold, mean score): from where on "no answer" is best said, if `apart` is how far it scores above others.

    `values` are the scores of the answers, were they always given.
    """
    order = np.argsort(apart, kind="stable")
    given = np.concatenate([[0.0], np.cumsum(np.where(answered, values, 0.0)[order])])
    held_back = np.concatenate([[0], np.cumsum(~answered[order])])
    totals = given + held_back[-1] - held_back  # by how many answers are given, those first that are surest
    sorted_apart = apart[order]
    possible = np.concatenate([[True], sorted_apart[1:] > sorted_apart[:-1], [True]])
    count = int(np.argmax(np.where(possible, totals, -1)))
    ends = np.concatenate([sorted_apart[:1] - 1, sorted_apart, sorted_apart[-1:] + 1])
    return float(ends[count : count + 2].mean()), float(totals[count] / len(values))


def _f1(words: Sequence[str], right: Sequence[str]) -> float:
    if not words or not right:
        return float(words == right)
    same = sum((Counter(words) & Counter(right)).values())
    return 2 * same / (len(words) + len(right))


def _means(values: Float[np.ndarray, "rows 2"]) -> tuple[float, float]:
    """0 of no rows."""
    exact, f1 = values.mean(axis=0) if len(values) else (0.0, 0.0)
    return float(exact), float(f1)
