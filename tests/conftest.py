"""What tests share: eight virtual devices, tiny checkpoints with tokenizers, small ragged data, configurations.

Nothing here needs the network, torch or an accelerator.
"""

import csv
import importlib.metadata
import json
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: the compiler's optimisations would cost more than they save, and before jax
# 0.11, which has no such choice, its older way to write loops takes half of the time.
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
OLDER = () if importlib.metadata.version("jaxlib") >= "0.11" else ("--xla_cpu_use_fusion_emitters=false",)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS, *OLDER])
# Equal programs are compiled once in a session: by this process, its workers, and the processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="sft-jax-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

import signal
from collections.abc import Callable
from pathlib import Path

# A shell starts its background jobs deaf to SIGINT, and what they start would be so too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from sft_jax import assets, machine

machine.quiet()
# Tokens that tests make are no concern of the user's cache; the assets that are there already are taken from it.
kept = tempfile.TemporaryDirectory(prefix="sft-jax-tests-", ignore_cleanup_errors=True)
assets.cache().mkdir(parents=True, exist_ok=True)
(Path(kept.name) / "assets").symlink_to(assets.cache().resolve())
os.environ["SFT_JAX_CACHE"] = kept.name

import jax
import numpy as np
import pytest
from hypothesis import settings
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from sft_jax.config.read import read_config
from sft_jax.config.schema import Config
from sft_jax.data.batch import Encoded
from sft_jax.models.family import Head, build_model
from sft_jax.tasks.task import Examples, Task
from sft_jax.weights.files import write_checkpoint
from sft_jax.weights.table import save

# `pytest tests/hostile --hypothesis-profile=long`: ten times the examples, drawn anew.
settings.register_profile("long", max_examples=1_000, deadline=None, derandomize=False, database=None)

WORDS = [
    f"{a}{b}" for a in ("bar", "cel", "dor", "fen", "gul", "hin", "jat", "kol") for b in ("a", "e", "i", "o", "um")
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TINY = {
    "model_type": "bert",
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,  # tests of dropout set model.dropout
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}

# One layer and one shape: the least to compile, for tests of whole runs that need no more.
SMALL = {"num_hidden_layers": 1}
ONE_SHAPE = "data.layout.kind=padded"


def write_tokenizer(directory: Path) -> None:
    """A WordPiece tokenizer over WORDS, as `tokenizer.json`."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def write_model(directory: Path, config: dict | None = None, seed: int = 0, head: int | None = None) -> Path:
    """A random checkpoint directory with tokenizer; with `head` outputs it holds a classification head as well."""
    config = {**TINY, **(config or {})}
    model = build_model(config, Head("sequence_classification", head or 2), "tiny")
    params = model.template.initial(jax.random.key(seed), model.template.keys)
    tensors = save(model.table, {p: np.asarray(a) for p, a in params.items()})
    kept = {n: t for n, t in tensors.items() if head or not n.startswith(("classifier", "pre_classifier"))}
    write_checkpoint(directory, config, kept)
    write_tokenizer(directory)
    return directory


def write_rows(file: Path, count: int, seed: int = 0, labels: int = 2, longest: int = 20) -> Path:
    """A CSV of ragged texts; the label is the kind of word that the text begins with, so that it can be learned."""
    draw = np.random.default_rng(seed)
    with open(file, "w", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["text", "label"])
        for _ in range(count):
            label = int(draw.integers(labels))
            first = WORDS[5 * label + int(draw.integers(5))]
            rest = draw.choice(WORDS, size=int(draw.integers(0, longest))).tolist()
            writer.writerow([" ".join([first, *rest]), label])
    return file


def questions(count: int, seed: int = 0, *, silent: bool = True, longest: int = 40) -> tuple[list, list, list]:
    """(questions, contexts, answers): the answer is the one word of its kind; some rows have none, if `silent`."""
    draw = np.random.default_rng(seed)
    texts, answers = [], []
    for number in range(count):
        words = draw.choice(WORDS[:35], size=int(draw.integers(4, longest))).tolist()
        place = int(draw.integers(len(words)))
        there = not (silent and number % 4 == 3)
        if there:
            words[place] = str(draw.choice(WORDS[35:]))
        begin = len(" ".join(["", *words[:place]]))
        answers.append(((begin, words[place]),) if there else ())
        texts.append(" ".join(words))
    return [WORDS[0]] * count, texts, answers


def write_questions(file: Path, count: int, seed: int = 0, *, silent: bool = True) -> Path:
    """JSON lines of questions in the form of SQuAD, contexts of up to 23 words."""
    with open(file, "w", encoding="utf-8") as sink:
        rows = zip(*questions(count, seed, silent=silent, longest=24), strict=True)
        for number, (question, context, answers) in enumerate(rows):
            right = {"text": [text for _, text in answers], "answer_start": [begin for begin, _ in answers]}
            row = {"id": f"q{number}", "question": question, "context": context, "answers": right}
            sink.write(json.dumps(row) + "\n")
    return file


def examples(**documents: np.ndarray) -> Examples:
    """Documents of one token each that have these fields, [documents] or [documents, k]."""
    count = len(next(iter(documents.values())))
    encoded = Encoded({"input_ids": np.zeros(count, np.int32)}, np.arange(count + 1), documents)
    return Examples(encoded, (["bara"] * count,))


def one(task: Task, outputs: np.ndarray) -> dict:
    """The record of a document with these outputs."""
    return task.decode(outputs[None], examples(label=np.zeros(1)))[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT directory without a head."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.csv (56 rows), validation.csv (21 rows) and test.csv (21 rows)."""
    home = tmp_path_factory.mktemp("rows")
    for seed, (split, count) in enumerate((("train", 56), ("validation", 21), ("test", 21))):
        write_rows(home / f"{split}.csv", count, seed)
    return home


@pytest.fixture
def configure(tiny: Path, rows: Path, tmp_path: Path) -> Callable[..., Config]:
    """`configure("key=value", ...)`: a small run on one device in a directory of its own."""

    def make(*overrides: str) -> Config:
        base = [
            f"run.dir={tmp_path / 'run'}",
            f"model.source={tiny}",
            "task.kind=sequence_classification",
            "data.source.kind=files",
            *(f"data.source.{split}={rows / split}.csv" for split in ("train", "validation", "test")),
            "data.max_length=32",
            "train.batch_size=8",
            "train.epochs=2",
            "train.log_every=1",
            "optim.lr=1e-3",
            "eval.batch_size=8",
            "mesh.data=1",
        ]
        return read_config([], [*base, *overrides])

    return make
