"""How near answers in words come to those expected: BLEU and chrF as sacreBLEU computes them, and ROUGE.

BLEU and chrF are of the whole corpus, from 0 to 100; ROUGE is the mean over answers, from 0 to 1, and equal to
`rouge_score` without stemming, which compares lower-case words of ASCII letters and digits.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

WORD = re.compile(r"[a-z0-9]+")
NAMES = ("bleu", "chrf", "rouge1", "rouge2", "rougeL")


def score(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """All of `NAMES`."""
    import sacrebleu

    bleu = sacrebleu.corpus_bleu(list(answers), [list(expected)]).score if answers else 0.0
    return {"bleu": float(bleu), "chrf": chrf(answers, expected), **rouge(answers, expected)}


def chrf(answers: Sequence[str], expected: Sequence[str]) -> float:
    """F-score of n-grams of up to six letters, recall counting twice. Source: Popović, 2015, aclanthology W15-3049."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(answers), [list(expected)]).score) if answers else 0.0


def rouge(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """F-scores of words, pairs of words and the longest common subsequence. Source: Lin, 2004, W04-1013."""
    pairs = [(WORD.findall(a.lower()), WORD.findall(e.lower())) for a, e in zip(answers, expected, strict=True)]
    each = {
        "rouge1": [_f1(_shared(a, e, 1), len(a), len(e)) for a, e in pairs],
        "rouge2": [_f1(_shared(a, e, 2), len(a) - 1, len(e) - 1) for a, e in pairs],
        "rougeL": [_f1(_common(a, e), len(a), len(e)) for a, e in pairs],
    }
    return {name: float(np.mean(values)) if values else 0.0 for name, values in each.items()}


def _f1(shared: int, said: int, expected: int) -> float:
    return 2 * shared / (said + expected) if shared else 0.0


def _shared(a: list[str], b: list[str], size: int) -> int:
    grams = (Counter(zip(*(words[i:] for i in range(size)), strict=False)) for words in (a, b))
    return sum((next(grams) & next(grams)).values())


def _common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0  # of the row above, one to the left
        for place, other in enumerate(b, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
