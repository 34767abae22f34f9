"""Sources and what they are answered with, in tokens of their own: the documents of an encoder-decoder.

A target is read with the token that begins all answers before it, and written with the one that ends it, so each token
has the one after it to be learned. A source that is too long loses its last tokens, or its first if the tokenizer says
so, but keeps its end; a target loses its end too, since it does not end there. Holds numpy only.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import tokenizers

from sft_jax.data.answers import frame, lacking
from sft_jax.data.batch import Encoded
from sft_jax.data.blocks import Maker, in_blocks
from sft_jax.data.columns import digest
from sft_jax.data.text import TextTokenizer, in_use, joined, offsets_of
from sft_jax.errors import ModelError

VERSION = "2"  # of what is kept; another one, and what is in caches is not found any more
START = "decoder_start_token_id"


def encode_pairs(
    tokenizer: TextTokenizer,
    sources: Sequence[str],
    targets: Sequence[str],
    max_length: int,
    max_target_length: int,
    prefix: str = "",
) -> Encoded:
    """Documents of sources, all with a prefix, with their targets; from the tokenizer's cache where they are there."""

    def parts() -> Iterator[str]:
        special, lengths = sorted(tokenizer.special.items()), (max_length, max_target_length, tokenizer.left)
        described = json.dumps([special, start(tokenizer), *lengths, prefix])
        sides = (side.to_str() for side in (tokenizer.fast, tokenizer.writer))
        yield from (VERSION, tokenizers.__version__, *sides, described, *digest(sources, targets))

    def of_block(given: Sequence[str], answers: Sequence[str]) -> Encoded:
        return _pairs(tokenizer, [prefix + text for text in given], answers, max_length, max_target_length)

    return in_blocks(tokenizer.home, parts, (sources, targets), lambda: Maker(of_block))


def encode_sources(tokenizer: TextTokenizer, sources: Sequence[str], max_length: int) -> Encoded:
    """Documents of sources that are to be answered."""
    before, after = frame(tokenizer)
    room = max(max_length - len(before) - len(after), 1)
    found = [_bare(ids, before, after) for ids in _ids(tokenizer, sources)]
    kept = slice(-room, None) if tokenizer.left else slice(room)
    whole = [[*before, *ids[kept], *after] for ids in found]
    return _documents({"input_ids": whole}, sum(len(ids) > room for ids in found))


def start(tokenizer: TextTokenizer) -> int:
    """The token that the model begins all answers with."""
    found = tokenizer.answers.get(START, tokenizer.answers.get("pad_token_id"))
    if type(found) is not int:
        raise ModelError(f"config.json: {START} is {found!r:.60}, expected the token that answers begin with")
    return found


def _pairs(
    tokenizer: TextTokenizer, sources: Sequence[str], targets: Sequence[str], max_length: int, max_target_length: int
) -> Encoded:
    writer = replace(tokenizer, fast=tokenizer.writer)
    before, after = frame(writer)
    whole = [[*before, *_bare(ids, before, after), *after] for ids in _ids(writer, targets)]
    labels = [ids[:max_target_length] for ids in whole]
    begin = start(tokenizer)
    target = _documents(
        {"decoder_input_ids": [[begin, *ids[:-1]] for ids in labels], "label": labels},
        sum(len(ids) > max_target_length for ids in whole),
    )
    target.tokens["token_weight"] = np.ones(len(target.tokens["label"]), np.float32)
    return replace(encode_sources(tokenizer, sources, max_length), target=target)


def _ids(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
    worker = tokenizer.fast
    worker.no_padding()
    worker.no_truncation()
    with in_use():
        return [found.ids for found in worker.encode_batch(list(texts), add_special_tokens=False)]


def _bare(ids: list[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The tokens of a text without those of its beginning and its end that it was written with."""
    first = len(before) - len(lacking(before, ids, at_end=False))
    last = len(after) - len(lacking(after, ids, at_end=True))
    return ids[first : len(ids) - last]


def _documents(fields: dict[str, list[list[int]]], truncated: int) -> Encoded:
    """Documents of these tokens; all fields have as many of each."""
    lengths = np.asarray([len(ids) for ids in next(iter(fields.values()))], np.int64)
    return Encoded({name: joined(ids) for name, ids in fields.items()}, offsets_of(lengths), {}, truncated)
