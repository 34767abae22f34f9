"""Tokenizers and tokenisation: one path for training, evaluation and prediction."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.errors import ModelError

# Files that a tokenizer consists of; copied as they are into an export.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """Tokenised documents, one after the other, and where each begins."""

    fields: dict[str, np.ndarray]  # int32 [tokens of all documents]: input_ids, token_type_ids
    offsets: np.ndarray  # int64 [documents + 1]
    truncated: int  # documents that were cut


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a checkpoint directory; code that comes with it is never run."""
    config = directory / "tokenizer_config.json"
    if config.is_file() and "auto_map" in _keys(config):
        raise ModelError(f"{config}: asks to run code of its own (auto_map), which is never done; remove it")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that torch is missing: it should be
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # tokenizers raise bare Exception for broken files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{directory}: its tokenizer cannot be loaded ({reason:.150})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{directory}: no fast tokenizer; save one as tokenizer.json")
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> Tokens:
    """Tokens of each text (or pair of texts), special tokens included, cut to `max_length`."""
    encoded = tokenizer(
        list(texts),
        list(pairs) if pairs is not None else None,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=True,
    )
    lengths = np.fromiter((len(ids) for ids in encoded["input_ids"]), np.int64, len(texts))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    fields = {
        name: np.fromiter((t for row in encoded[name] for t in row), np.int32, offsets[-1])
        for name in ("input_ids", "token_type_ids")
    }
    return Tokens(fields, offsets, sum(bool(e.overflowing) for e in encoded.encodings))


def _keys(file: Path) -> set[str]:
    try:
        return set(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not JSON ({error}); fetch the checkpoint again") from None
