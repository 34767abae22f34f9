"""Translation word by word, with a table learned from pairs: what a translator is to be compared with.

The table is IBM model 1, of which word of the source each word of the target came from. Source: Brown et al., 1993,
aclanthology J93-2003.
"""

import re
from collections.abc import Sequence

import numpy as np

WORDS = re.compile(r"\w+|[^\w\s]")
PASSES = 5
MOST_PAIRS, MOST_WORDS = 10_000, 50  # of pairs that are learned from, and of words in one


def learn(sources: Sequence[str], targets: Sequence[str], passes: int = PASSES) -> dict[str, str]:
    """Each word of the sources, and the word of the targets that most probably comes from it."""
    pairs = [
        (WORDS.findall(source)[:MOST_WORDS], WORDS.findall(target)[:MOST_WORDS])
        for source, target in list(zip(sources, targets, strict=True))[:MOST_PAIRS]
    ]
    known: tuple[dict[str, int], dict[str, int]] = ({}, {})
    ids = [[[k.setdefault(w, len(k)) for w in words] for k, words in zip(known, pair, strict=True)] for pair in pairs]
    if not any(s and t for s, t in ids):
        return {}
    # One entry for each word of a target with each word of its source; `place` tells the words of targets apart.
    begins = np.cumsum([0, *(len(target) for _, target in ids)])
    place = np.concatenate([np.repeat(b + np.arange(len(t)), len(s)) for b, (s, t) in zip(begins, ids, strict=False)])
    source = np.concatenate([np.tile(np.asarray(s, np.int64), len(t)) for s, t in ids])
    target = np.concatenate([np.repeat(np.asarray(t, np.int64), len(s)) for s, t in ids])
    kinds, which = np.unique(source * len(known[1]) + target, return_inverse=True)
    of, to = np.divmod(kinds, len(known[1]))
    chance = np.ones(len(kinds))
    for _ in range(passes):
        each = chance[which]
        each /= np.bincount(place, each)[place]
        counts = np.bincount(which, each, len(kinds))
        chance = counts / np.bincount(of, counts)[of]
    order = np.lexsort((chance, of))
    last = np.append(of[order][1:] != of[order][:-1], True)
    names = list(known[0]), list(known[1])
    return {names[0][s]: names[1][t] for s, t in zip(of[order][last], to[order][last], strict=True)}


def translate(table: dict[str, str], sources: Sequence[str]) -> list[str]:
    """Each source word by word; words that are not in the table stay as they are."""
    return [" ".join(table.get(word) or word for word in WORDS.findall(source)) for source in sources]
