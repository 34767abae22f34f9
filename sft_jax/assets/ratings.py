"""VADER's rated sentences: C.J. Hutto and E. Gilbert's texts of four domains, each rated by about twenty people."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sft_jax.archives import members
from sft_jax.assets.plain import write_csv

# What the ratings are of, and what their files are called.
DOMAINS = {
    "movie": "movieReviewSnippets",
    "tweet": "tweets",
    "product": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
}


def movie_reviews(archive: Path, out: Path) -> None:
    """Rated movie-review sentences as two CSV files: label 1 where the mean rating is above 0, 0 where below.

    The split is the one that the published figures of this data set in the documentation were measured on.
    """
    from sklearn.model_selection import train_test_split

    lines = _rated(archive)["movieReviewSnippets_GroundTruth.txt"].splitlines()
    rated = [(cells[2].strip(), float(cells[1])) for cells in (line.split("\t") for line in lines)]
    rows = [(text, score, int(score > 0)) for text, score in rated if score != 0]
    parts = train_test_split(rows, test_size=0.2, random_state=0, stratify=[row[2] for row in rows])
    for file, part in zip(("train.csv", "test.csv"), parts, strict=True):
        write_csv(out / file, [("sentence", "score", "label"), *part])


class Rated(NamedTuple):
    """A sentence that about twenty people have rated, each from -4 to 4."""

    sentence: str
    score: float  # the mean
    domain: str
    sentiment: str
    raters: int
    traits: str  # joined by commas


def rated_sentences(archive: Path, out: Path) -> None:
    """Rated sentences of four domains, and pairs of them of which one was rated higher, as CSV files.

    `sentiment` is negative where the mean rating is at most -0.5, positive where it is at least 0.5, else neutral.
    `traits` are those that are true of: `positive` (the mean is above 0), `strong` (the mean is 2 or more away from 0),
    `mild` (from 0.25 to below 1 away), `unanimous` (all ratings on one side of 0) and `plain` (0 is at least two fifths
    of the ratings). Sentences of which the mean that is given is not the mean of the ratings are left out: texts that
    were changed after they were rated. A fifth of each domain and sentiment is for the test, and equal sentences, in
    whatever case, are on one side.

    A pair is of one domain and one side; the means are half a point or more apart, and as often the first is higher.
    """
    rows = _read_rated(_rated(archive))
    for split, part, count in zip(("train", "test"), _parted(rows), (8000, 2000), strict=True):
        write_csv(out / f"all-{split}.csv", [(*Rated._fields,), *part])
        pairs = _pairs(part, min(count, len(part)), seed=0)
        write_csv(out / f"pairs-{split}.csv", [("sentence", "other", "preferred"), *pairs])


def _rated(archive: Path) -> dict[str, str]:
    """The texts by the names of their files."""
    folder, inner = "vaderSentiment-3.3.2/additional_resources", "hutto_ICWSM_2014"
    packed = archive.with_name(f"{inner}.tar.gz")
    packed.write_bytes(dict(members(archive))[f"{folder}/{inner}.tar.gz"])
    texts = {name.rpartition("/")[2]: content for name, content in members(packed) if name.endswith(".txt")}
    return {name: content.decode("utf-8", "replace").removeprefix("\ufeff") for name, content in texts.items()}


def _read_rated(texts: dict[str, str]) -> list[Rated]:
    rows = []
    for domain, name in DOMAINS.items():
        lines = (line.split("\t") for line in texts[f"{name}_anonDataRatings.txt"].splitlines())
        ratings = {cells[0]: [int(rating) for rating in cells[3].strip("[]").split(",")] for cells in lines}
        for line in texts[f"{name}_GroundTruth.txt"].splitlines():
            number, score, sentence = line.split("\t")
            given, mean = ratings[number], float(score)
            if abs(mean - sum(given) / len(given)) < 0.01:
                kind = "negative" if mean <= -0.5 else "positive" if mean >= 0.5 else "neutral"
                rows.append(Rated(sentence.strip(), mean, domain, kind, len(given), _traits(mean, given)))
    return rows


def _traits(mean: float, ratings: list[int]) -> str:
    true = {
        "positive": mean > 0,
        "strong": abs(mean) >= 2,
        "mild": 0.25 <= abs(mean) < 1,
        "unanimous": min(ratings) > 0 or max(ratings) < 0,
        "plain": ratings.count(0) / len(ratings) >= 0.4,
    }
    return ",".join(name for name, holds in true.items() if holds)


def _parted(rows: list[Rated]) -> Iterator[list[Rated]]:
    """(rows to train on, rows to test on)."""
    from sklearn.model_selection import train_test_split

    same: dict[str, list[Rated]] = {}
    for row in rows:
        same.setdefault(row.sentence.casefold(), []).append(row)
    groups = list(same.values())
    kinds = [f"{group[0].domain} {group[0].sentiment}" for group in groups]
    for part in train_test_split(groups, test_size=0.2, random_state=0, stratify=kinds):
        yield [row for group in part for row in group]


def _pairs(rows: list[Rated], count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    draw, seen = random.Random(seed), set()
    domains = {row.domain: [other for other in rows if other.domain == row.domain] for row in rows}
    while len(seen) < count:
        one = rows[draw.randrange(len(rows))]
        other = domains[one.domain][draw.randrange(len(domains[one.domain]))]
        high, low = sorted((one, other), key=lambda row: row.score, reverse=True)
        pair = (high.sentence, low.sentence)
        if high.score - low.score >= 0.5 and pair not in seen:
            yield (*pair, "first") if len(seen) % 2 else (low.sentence, high.sentence, "second")
            seen.add(pair)
