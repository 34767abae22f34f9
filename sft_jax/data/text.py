"""Tokenizers and tokenisation: one path for training, evaluation and prediction.

Texts are tokenised in parallel by threads of the tokenizer library, in this process: nothing is forked, which a process
that runs JAX would not survive. What they came to can be kept in a cache, under a hash of all that it depends on.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from sft_jax.data import cache
from sft_jax.errors import ConfigError, ModelError, reason

FAST = "tokenizer.json"
VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
# Files that a tokenizer consists of; copied as they are into an export.
FILES = (
    FAST, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip
VERSION = "1"  # of `tokenize`: another one, and what is in caches is not found any more


@dataclass(frozen=True)
class Cached:
    """A tokenizer whose work is kept in a directory, and not done twice."""

    tokenizer: Tokenizer
    home: Path


@dataclass(frozen=True)
class Tokens:
    """Tokenised documents, one after the other, and where each begins."""

    fields: dict[str, np.ndarray]  # int32 [tokens of all documents]: input_ids, token_type_ids
    offsets: np.ndarray  # int64 [documents + 1]
    truncated: int  # documents that were cut


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory, from data alone: code that comes with it is never run."""
    try:
        if (directory / FAST).is_file():
            return Tokenizer.from_file(str(directory / FAST))
        return _converted(directory)
    except Exception as error:  # the tokenizer libraries raise bare Exception for broken files
        raise ModelError(
            f"{directory}: its tokenizer cannot be loaded ({reason(error)}); fetch {FAST} again, or save one there"
        ) from None


def fingerprint(directory: Path) -> str:
    """The sha256 of the files that `load_tokenizer` reads."""
    digest = hashlib.sha256()
    for name in [FAST] if (directory / FAST).is_file() else [f for f in FILES if (directory / f).is_file()]:
        digest.update(name.encode() + b"\0" + (directory / name).read_bytes())
    return digest.hexdigest()


def tokenize(
    tokenizer: Tokenizer | Cached, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> Tokens:
    """Tokens of each text (or pair of texts), special tokens included, cut to `max_length`."""
    worker = tokenizer.tokenizer if isinstance(tokenizer, Cached) else tokenizer
    special = worker.num_special_tokens_to_add(pairs is not None)
    if max_length <= special:
        raise ConfigError(f"data.max_length: {max_length} leaves no room beside {special} special tokens; raise it")
    worker.no_padding()
    worker.enable_truncation(max_length)  # of a pair, the longer one is cut first
    if not isinstance(tokenizer, Cached):
        return _tokenized(worker, texts, pairs)
    name = cache.key(_origin(worker, texts, pairs, max_length))
    found = cache.load(tokenizer.home, name)
    if found is None:
        tokens = _tokenized(worker, texts, pairs)
        counted = {"offsets": tokens.offsets, "truncated": np.asarray(tokens.truncated)}
        cache.store(tokenizer.home, name, {**tokens.fields, **counted})
        return tokens
    offsets, truncated = found.pop("offsets"), int(found.pop("truncated"))
    return Tokens(found, offsets, truncated)


def _tokenized(tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None) -> Tokens:
    inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    try:
        encoded = tokenizer.encode_batch_fast(inputs)
    except BaseException as error:  # a panic in the library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{FAST}: it cannot be used ({reason(error)}); fetch it again") from None
    lengths = np.fromiter((len(e) for e in encoded), np.int64, len(encoded))
    fields = {
        "input_ids": np.concatenate([np.asarray(e.ids, np.int32) for e in encoded]),
        "token_type_ids": np.concatenate([np.asarray(e.type_ids, np.int32) for e in encoded]),
    }
    truncated = sum(bool(e.overflowing) for e in encoded)
    return Tokens(fields, np.concatenate([[0], np.cumsum(lengths)]), truncated)


def _origin(tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> Iterator[str]:
    """Everything that tokens depend on, in parts."""
    yield from (VERSION, tokenizers.__version__, tokenizer.to_str(), str(max_length), str(len(texts)))
    yield from texts
    yield from pairs or ()


def _converted(directory: Path) -> Tokenizer:
    """A tokenizer that has only the files of old releases (`vocab.txt`, `merges.txt`), by way of `transformers`."""
    if not any((directory / file).is_file() for file in VOCABULARIES):  # or an empty tokenizer would be made up
        raise FileNotFoundError(f"there is no {FAST} and none of {', '.join(VOCABULARIES)}")
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    return slow.backend_tokenizer
