"""Rows of words in tokens: which word each token is of, and in which window each word is answered. Holds numpy only.

A row that is longer than a document may be becomes several, windows that overlap by `stride` tokens, so that no word is
lost. Each word is answered in one of them: the one in which it is whole and has most context on its narrower side; of
equal ones, the first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import Tokenizer, pre_tokenizers

from sft_jax.data import cache
from sft_jax.data.cache import Sink
from sft_jax.data.text import LENGTHS, TextTokenizer, in_use, joined, offsets_of
from sft_jax.errors import ConfigError

BLOCK = 1 << 10  # rows that are encoded at one time
VERSION = "3"  # of `tokenize_words`: another one, and what is in caches is not found any more


@dataclass(frozen=True)
class Windows:
    """Windows of rows of words, one after the other."""

    fields: dict[str, np.ndarray]  # int32 [tokens of all windows]: input_ids, token_type_ids
    word: np.ndarray  # int32 [tokens]: the word of its row that a token answers for; -1: none
    first: np.ndarray  # bool [tokens]: whether it is the first token of its word
    offsets: np.ndarray  # int64 [windows + 1]
    rows: np.ndarray  # int64 [windows]: the row that each is of


def tokenize_words(tokenizer: TextTokenizer, rows: Sequence[Sequence[str]], max_length: int, stride: int) -> Windows:
    """Windows of at most `max_length` tokens, special ones included; from the tokenizer's cache if they are there."""
    worker = split_already(tokenizer.fast)
    special = worker.num_special_tokens_to_add(False)
    if stride >= max_length - special:
        raise ConfigError(
            f"task.stride: windows of {max_length} tokens, {special} of them special, cannot overlap by {stride}; "
            f"lower it, or raise data.max_length"
        )
    worker.no_padding()
    worker.enable_truncation(max_length, stride=stride)

    def parts() -> Iterator[str]:
        yield from (VERSION, tokenizers.__version__, worker.to_str(), f"{max_length} {stride}")
        yield from (part for row in rows for part in (str(len(row)), *row))

    def make(sink: Sink) -> None:
        for begin in range(0, len(rows), BLOCK):
            block = _windows(worker, rows[begin : begin + BLOCK])
            found = {"word": block.word, "first": block.first, "rows": block.rows + begin}
            for name, array in {**block.fields, **found, LENGTHS: np.diff(block.offsets)}.items():
                sink.add(name, array)

    found = cache.made(tokenizer.home, parts, make)
    word, first, of, lengths = (found.pop(name) for name in ("word", "first", "rows", LENGTHS))
    return Windows(found, word, first, offsets_of(lengths), of)


def split_already(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer for words by themselves: one that tells words apart by the blank before them puts one there."""
    ours = Tokenizer.from_str(tokenizer.to_str())
    if isinstance(ours.pre_tokenizer, pre_tokenizers.ByteLevel):
        ours.pre_tokenizer.add_prefix_space = True
    return ours


def _windows(tokenizer: Tokenizer, rows: Sequence[Sequence[str]]) -> Windows:
    with in_use():
        encoded = tokenizer.encode_batch([list(row) for row in rows], is_pretokenized=True)
    every = [[found, *found.overflowing] for found in encoded]
    words = [[_numbers(window.word_ids) for window in windows] for windows in every]
    for windows in words:
        if len(windows) > 1:
            _answer_once(windows)
    flat = [window for windows in every for window in windows]
    word = np.concatenate([np.zeros(0, np.int32), *(window for windows in words for window in windows)])
    lengths = np.asarray([len(window.ids) for window in flat], np.int64)
    offsets = offsets_of(lengths)
    before = np.concatenate([[-1], word[:-1]])
    before[offsets[:-1][lengths > 0]] = -1  # the last word of the window before
    fields = {
        "input_ids": joined(window.ids for window in flat),
        "token_type_ids": joined(window.type_ids for window in flat),
    }
    of = np.repeat(np.arange(len(every)), [len(windows) for windows in every])
    return Windows(fields, word, (word >= 0) & (word != before), offsets, of)


def _numbers(words: Sequence[int | None]) -> np.ndarray:
    return np.asarray([-1 if word is None else word for word in words], np.int32)


def _answer_once(windows: list[np.ndarray]) -> None:
    """Leave each word to the window in which it is whole and has most context on its narrower side."""
    best: dict[int, tuple[int, int, int]] = {}  # word -> (tokens of it, context, minus the window)
    for number, window in enumerate(windows):
        places = np.flatnonzero(window >= 0)
        for word in np.unique(window[places]).tolist():
            own = places[window[places] == word]
            context = min(own[0] - places[0], places[-1] - own[-1])
            best[word] = max(best.get(word, (0, 0, -len(windows))), (len(own), int(context), -number))
    for number, window in enumerate(windows):
        others = [word for word in np.unique(window[window >= 0]).tolist() if best[word][2] != -number]
        window[np.isin(window, others)] = -1
