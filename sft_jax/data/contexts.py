"""Questions with their contexts in tokens, and where in its context each token stands. Holds numpy only.

A context that is too long beside its question becomes several windows that overlap by `stride` tokens; the question is
whole in each of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from sft_jax.data.batch import Encoded
from sft_jax.data.blocks import Maker, in_blocks
from sft_jax.data.columns import digest
from sft_jax.data.text import TextTokenizer, in_use, joined, offsets_of
from sft_jax.errors import ConfigError

VERSION = "2"  # of `tokenize_contexts`: another one, and what is in caches is not found any more
LOST = "question too long"


def tokenize_contexts(
    tokenizer: TextTokenizer,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int,
    stride: int,
    *,
    cut: bool,
) -> Encoded:
    """Windows of at most `max_length` tokens, special ones included; from the tokenizer's cache if they are there.

    Beside each token stand `begin` and `end`, its characters in the context; both are -1 where it is not of it. A
    question that leaves too little room beside it is cut if so asked, else its row is lost and counted.
    """
    worker = tokenizer.fast
    special = worker.num_special_tokens_to_add(True)
    if stride >= max_length - special:
        raise ConfigError(
            f"task.stride: windows of {max_length} tokens, {special} of them special, cannot overlap by {stride}; "
            f"lower it, or raise data.max_length"
        )

    def parts() -> Iterator[str]:
        worker.no_padding()
        worker.no_truncation()
        yield from (VERSION, tokenizers.__version__, worker.to_str(), f"contexts {max_length} {stride} {cut}")
        yield from digest(questions, contexts)

    def of_block(asked: Sequence[str], given: Sequence[str]) -> Encoded:
        return _windows(worker, asked, given, max_length, stride, cut)

    return in_blocks(tokenizer.home, parts, (questions, contexts), lambda: Maker(of_block))


def _windows(
    worker: Tokenizer, questions: Sequence[str], contexts: Sequence[str], max_length: int, stride: int, cut: bool
) -> Encoded:
    worker.no_padding()
    worker.no_truncation()  # what was set for the windows of another block
    with in_use():
        pairs, rows, shortened = _fitting(worker, questions, contexts, max_length, stride, cut)
        worker.enable_truncation(max_length, stride=stride, strategy="only_second")
        every = [[found, *found.overflowing] for found in worker.encode_batch(pairs)]
    flat = [window for windows in every for window in windows]
    types = joined([window.type_ids for window in flat])
    places = np.concatenate([np.zeros((0, 2), np.int32), *(np.asarray(w.offsets, np.int32) for w in flat)])
    sequence = joined([[-1 if s is None else s for s in window.sequence_ids] for window in flat])
    begin, end = np.where(sequence[:, None] == 1, places, -1).T
    offsets = offsets_of(np.asarray([len(window.ids) for window in flat], np.int64))
    of = np.repeat(np.asarray(rows, np.int64), [len(windows) for windows in every])
    # The library forgets in later windows which type a template gives to contexts: that of the first ones holds.
    again = np.repeat(np.append(False, of[1:] == of[:-1])[: len(of)], np.diff(offsets))
    types[sequence == 1] = types[(sequence == 1) & ~again].max(initial=0)
    whole = {"input_ids": joined([window.ids for window in flat]), "token_type_ids": types}
    beside = {"begin": np.ascontiguousarray(begin), "end": np.ascontiguousarray(end)}
    lost = _lost(len(questions) - len(rows))
    return Encoded(whole, offsets, {}, shortened, rows=of, beside=beside, lost=lost)


def _fitting(
    worker: Tokenizer, questions: Sequence[str], contexts: Sequence[str], max_length: int, stride: int, cut: bool
) -> tuple[list[Any], list[int], int]:
    """(questions with their contexts, the row of each, how many were cut): those that leave room for a window, or need
    none."""
    room = max_length - worker.num_special_tokens_to_add(True) - stride  # in a window, beside what overlaps
    pairs, rows, shortened = [], [], 0
    asked = worker.encode_batch(list(questions), add_special_tokens=False)
    for row, (question, context, tokens) in enumerate(zip(questions, contexts, asked, strict=True)):
        if len(tokens) >= room and len(worker.encode(question, context)) > max_length:
            if not cut:
                continue
            shortened += 1
            shorter = (question[: tokens.offsets[count - 1][1]] for count in range(room - 1, 0, -1))
            question = next((text for text in shorter if len(worker.encode(text, add_special_tokens=False)) < room), "")
        pairs.append((question, context))
        rows.append(row)
    return pairs, rows, shortened


def _lost(count: int) -> dict[str, int]:
    return {LOST: count} if count else {}
