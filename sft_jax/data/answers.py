"""Texts of which some parts are answers, in tokens: what is to be learned is told by places in the text.

A token belongs to an answer if it holds a character of it, so one that reaches over the seam between a prompt and its
answer does; no id of a token is ever asked for (a padding id may be that of the end, and a template need not mark its
answers). Each token has a `label`, the one that follows it, and a `token_weight`, 1 where that one is of an answer; the
last token of a document predicts nothing. Holds numpy only.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from sft_jax.data import cache
from sft_jax.data.batch import Encoded
from sft_jax.data.text import TextTokenizer, in_use

VERSION = "1"  # of what is kept; another one, and what is in caches is not found any more
CUT = "cut before its answer"
LOST = "lost"


class Passage(NamedTuple):
    """A text that becomes a document, and the characters of it that are to be learned, as (begin, end).

    `weights` has a number for each of `answers`, or none, which is 1 for each; what weighs 0 is not learned.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = ()


def encode_passages(
    tokenizer: TextTokenizer,
    passages: Sequence[Passage],
    max_length: int,
    *,
    framed: bool,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Encoded:
    """Documents of passages, cut on the right; one that has nothing left to be learned is lost, and counted.

    With `framed` the tokenizer puts around each what it puts around a text, and its end-of-text token after it, which
    is to be learned if the end of the text is; else the text has all it needs, as that of a chat template has. `rows`
    says which row each passage is of.
    """
    before, after = frame(tokenizer) if framed else ((), ())
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    kept: list[int] = []
    truncated = 0
    for number, found in enumerate(_encoded(tokenizer, [passage.text for passage in passages])):
        text, answers, _ = passages[number]
        ids = np.asarray([*before, *found.ids, *after], np.int32)
        asked = np.zeros(len(ids), bool)
        asked[len(before) : len(ids) - len(after)] = inside(found.offsets, answers)
        asked[len(ids) - len(after) :] = bool(answers) and answers[-1][1] == len(text)
        learned = asked[1:max_length].astype(np.float32)
        if learned.any():
            label = np.append(ids[1:max_length], 0)
            parts.append((ids[:max_length], label.astype(np.int32), np.append(learned, np.float32(0))))
            kept.append(number)
            truncated += len(ids) > max_length
    lost = {CUT: len(passages) - len(kept)} if len(kept) < len(passages) else {}
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _, _ in parts], dtype=np.int64)])
    kinds = {"input_ids": np.int32, "label": np.int32, "token_weight": np.float32}
    tokens = {
        name: np.concatenate([np.zeros(0, kind), *(part[k] for part in parts)])
        for k, (name, kind) in enumerate(kinds.items())
    }
    of = np.arange(len(passages)) if rows is None else np.asarray(rows, np.int64)
    return Encoded(tokens, offsets, {}, truncated, rows=of[kept], lost=lost)


def encode_prompts(tokenizer: TextTokenizer, texts: Sequence[str], max_length: int, *, framed: bool) -> Encoded:
    """Documents of texts that are to be gone on with, as `encode_passages` begins them; all in them has a weight.

    Those that are too long lose their first tokens.
    """
    before, _ = frame(tokenizer) if framed else ((), ())
    ids = [np.asarray([*before, *found.ids], np.int32) for found in _encoded(tokenizer, texts)]
    offsets = np.concatenate([[0], np.cumsum([min(len(one), max_length) for one in ids], dtype=np.int64)])
    whole = np.concatenate([np.zeros(0, np.int32), *(one[-max_length:] for one in ids)])
    last = np.isin(np.arange(len(whole)), offsets[1:] - 1)
    label = np.where(last, 0, np.append(whole[1:], 0)).astype(np.int32)
    tokens = {"input_ids": whole, "label": label, "token_weight": (~last).astype(np.float32)}
    return Encoded(tokens, offsets, {}, sum(len(one) > max_length for one in ids))


def frame(tokenizer: TextTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before a text, ids after it): what the tokenizer puts there, and its end-of-text token where it has one."""
    bare, whole = (tokenizer.fast.encode("a", add_special_tokens=special).ids for special in (False, True))
    places = range(len(whole) - len(bare) + 1)
    begin = next((place for place in places if whole[place : place + len(bare)] == bare), 0)
    before, after = whole[:begin], whole[begin + len(bare) :]
    end = tokenizer.id("eos_token")
    return tuple(before), tuple(after if end is None or end in after else [*after, end])


def inside(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens hold a character of an answer.

    Tokenizers take blanks off the places that they give, so a token begins where the one before it ended; those that
    make up one character have the same place.
    """
    places = np.asarray(offsets, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(places[:, 1])
    before = np.concatenate([[0], ends[:-1]])
    begins = np.where(places[:, 0] == places[:, 1], before, np.minimum(places[:, 0], before))
    found = np.zeros(len(places), bool)
    for begin, end in answers:
        found |= (begins < end) & (ends > begin)
    return found


def cached(tokenizer: TextTokenizer, origin: Iterable[str], make: Callable[[], Encoded]) -> Encoded:
    """What `make` gives, from the tokenizer's cache where it is there; `origin` is all that it depends on besides."""
    if tokenizer.home is None:
        return make()
    tokenizer.fast.no_truncation()
    tokenizer.fast.no_padding()
    described = json.dumps([tokenizer.template, sorted(tokenizer.special.items())])
    name = cache.key([VERSION, tokenizers.__version__, tokenizer.fast.to_str(), described, *origin])
    found = cache.load(tokenizer.home, name)
    if found is None:
        encoded = make()
        lost = np.frombuffer(json.dumps(encoded.lost).encode(), np.uint8)
        more = {"offsets": encoded.offsets, "rows": encoded.rows, "truncated": np.asarray(encoded.truncated)}
        cache.store(tokenizer.home, name, {**encoded.tokens, **more, LOST: lost})
        return encoded
    offsets, rows, truncated, lost = (found.pop(key) for key in ("offsets", "rows", "truncated", LOST))
    return Encoded(found, offsets, {}, int(truncated), rows=rows, lost=json.loads(lost.tobytes()))


def _encoded(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    worker = tokenizer.fast
    worker.no_padding()
    worker.no_truncation()
    with in_use():
        return worker.encode_batch(list(texts), add_special_tokens=False)
