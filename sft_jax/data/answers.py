"""Texts of which some parts are answers, in tokens: what is to be learned is told by places in the text.

A token belongs to an answer if it holds a character of it, so one that reaches over the seam between a prompt and its
answer does; a special token that swallows the blanks beside it is where it is written itself. No id of a token is ever
asked for (a padding id may be that of the end, and a template need not mark its answers). Each token has a `label`, the
one that follows it, and a `token_weight`, that of the answer which that one is of, 0 of none; the last token of a
document predicts nothing. Holds numpy only.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from sft_jax.data.batch import Encoded
from sft_jax.data.blocks import Maker, in_blocks
from sft_jax.data.columns import digest
from sft_jax.data.rows import MOST_SHOWN
from sft_jax.data.text import TextTokenizer, in_use

VERSION = "5"  # of what is kept; another one, and what is in caches is not found any more
CUT = "cut before its answer"
SEAM = "answers are asked for by other tokens than they are trained after"
WEIGHTLESS = "all its answers weigh 0"
AS_ASKED = (CUT, WEIGHTLESS)  # what is lost because a configuration or a row says so; all else is wrong with a row
KINDS = {"input_ids": np.int32, "label": np.int32, "token_weight": np.float32}


class Passage(NamedTuple):
    """A text that becomes a document, and the characters of it that are to be learned, as (begin, end).

    `weights` has a number for each of `answers`, or none, which is 1 for each; what weighs 0 is not learned. `seams`
    are the places up to which the text asks for an answer; None says that they are where answers begin.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = ()
    seams: tuple[int, ...] | None = None


def encode_passages(
    tokenizer: TextTokenizer,
    passages: Sequence[Passage],
    max_length: int,
    *,
    framed: bool,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Encoded:
    """Documents of passages, cut on the right, or on the left if the tokenizer says so; one that has nothing left to be
    learned is lost, and counted.

    With `framed` the tokenizer puts around each what it puts around a text, and its end-of-text token after it, which
    is to be learned if the end of the text is; else the text has all it needs, as that of a chat template has. `rows`
    says which row each passage is of.
    """
    before, after = frame(tokenizer) if framed else ((), ())
    added = tokenizer.fast.get_added_tokens_decoder()
    whole = list(added)  # found whole in any text
    swallowing = {number: token.rstrip for number, token in added.items() if token.lstrip or token.rstrip}
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    kept: list[int] = []
    asked: list[_Asked] = []
    truncated = 0
    for number, found in enumerate(_encoded(tokenizer, [passage.text for passage in passages])):
        text, answers, weights, seams = passages[number]
        own, offsets = found.ids, found.offsets
        first, last = lacking(before, own, at_end=False), lacking(after, own, at_end=True)
        ids = np.asarray([*first, *own, *last], np.int32)
        begins, ends = _places(own, offsets, text, swallowing)
        weighs = np.zeros(len(ids), np.float32)
        inner = weighs[len(first) : len(ids) - len(last)]
        for (begin, end), weight in zip(answers, weights or [1.0] * len(answers), strict=True):
            np.maximum(inner, weight * ((begins < end) & (ends > begin)), out=inner, casting="unsafe")
            if end == len(text):
                weighs[len(ids) - len(last) :] = weight
        cut = len(ids) > max_length
        if cut and tokenizer.left:  # what stands before a text stays, as where the tokenizer itself cuts
            left = np.r_[: len(first), len(ids) - max_length + len(first) : len(ids)]
            ids, weighs = ids[left], weighs[left]
        learned = weighs[1:max_length]
        if learned.any():
            label = np.append(ids[1:max_length], 0)
            parts.append((ids[:max_length], label.astype(np.int32), np.append(learned, np.float32(0))))
            kept.append(number)
            truncated += cut
            places = [begin for begin, _ in answers] if seams is None else seams
            stands = np.flatnonzero(np.isin(own, whole))
            for seam in (seam for seam in places if seam):
                count = int(np.searchsorted(ends, seam, side="right"))
                over = count < len(own) and begins[count] < seam
                behind = int(np.searchsorted(stands, count))
                begin = int(stands[behind - 1]) if behind else 0
                tail = text[offsets[begin][0] if behind else 0 : seam]
                asked.append(_Asked(tail, None if over else tuple(own[begin:count])))
    missing = np.setdiff1d(np.arange(len(passages)), kept)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _, _ in parts], dtype=np.int64)])
    tokens = {
        name: np.concatenate([np.zeros(0, kind), *(part[k] for part in parts)])
        for k, (name, kind) in enumerate(KINDS.items())
    }
    of = np.arange(len(passages)) if rows is None else np.asarray(rows, np.int64)
    otherwise = _otherwise(tokenizer, asked)
    noted = {SEAM: otherwise} if otherwise else {}
    found = Encoded(tokens, offsets, {}, truncated, rows=of[kept], noted=noted)
    return with_lost(found, {CUT: of[missing].tolist()})


def encode_numbers(
    numbers: Sequence[Sequence[int]], max_length: int, weights: Sequence[Sequence[float] | None] | None = None
) -> Encoded:
    """Documents of tokens as they are given, each with its weight (None: 1 each), cut on the right as passages are."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    kept: list[int] = []
    light: list[int] = []
    for row, given in enumerate(numbers):
        ids = np.asarray(given, np.int32)
        own = None if weights is None else weights[row]
        learned = np.ones(len(ids), np.float32) if own is None else np.asarray(own, np.float32)
        if learned[1:max_length].any() or weights is None:
            label = np.append(ids[1:max_length], 0).astype(np.int32)
            parts.append((ids[:max_length], label, np.append(learned[1:max_length], np.float32(0))))
            kept.append(row)
        elif not learned[1:].any():
            light.append(row)
    tokens = {
        name: np.concatenate([np.zeros(0, kind), *(part[k] for part in parts)])
        for k, (name, kind) in enumerate(KINDS.items())
    }
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _, _ in parts], dtype=np.int64)])
    cut = [row for row in range(len(numbers)) if row not in {*kept, *light}]
    truncated = sum(len(numbers[row]) > max_length for row in kept)
    found = Encoded(tokens, offsets, {}, truncated, rows=np.asarray(kept, np.int64))
    return with_lost(found, {CUT: cut, WEIGHTLESS: light})


def with_lost(encoded: Encoded, lost: Mapping[str, Sequence[int]]) -> Encoded:
    """The same documents, with the rows besides that became none, by the reason."""
    counts = {why: len(rows) for why, rows in lost.items() if rows}
    first = {why: list(rows[:MOST_SHOWN]) for why, rows in lost.items() if rows}
    return replace(encoded, lost={**counts, **encoded.lost}, lost_rows={**first, **encoded.lost_rows})


def encode_prompts(tokenizer: TextTokenizer, texts: Sequence[str], max_length: int, *, framed: bool) -> Encoded:
    """Documents of texts that are to be gone on with, as `encode_passages` begins them; all in them has a weight.

    Those that are too long lose their first tokens.
    """
    before, _ = frame(tokenizer) if framed else ((), ())
    found = [one.ids for one in _encoded(tokenizer, texts)]
    ids = [np.asarray([*lacking(before, one, at_end=False), *one], np.int32) for one in found]
    offsets = np.concatenate([[0], np.cumsum([min(len(one), max_length) for one in ids], dtype=np.int64)])
    whole = np.concatenate([np.zeros(0, np.int32), *(one[-max_length:] for one in ids)])
    last = np.isin(np.arange(len(whole)), offsets[1:] - 1)
    label = np.where(last, 0, np.append(whole[1:], 0)).astype(np.int32)
    tokens = {"input_ids": whole, "label": label, "token_weight": (~last).astype(np.float32)}
    return Encoded(tokens, offsets, {}, sum(len(one) > max_length for one in ids))


def frame(tokenizer: TextTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before a text, ids after it): what the tokenizer puts there, and its end-of-text token where it has one."""
    processor = getattr(tokenizer.fast, "post_processor", None)
    if isinstance(tokenizer.fast, tokenizers.Tokenizer):
        before, after = _put_by(json.loads(processor.__getstate__())) if processor else ((), ())
    else:
        before, after = (), tuple(tokenizer.fast.encode("").ids)
    end = tokenizer.id("eos_token")
    return before, after if end is None or end in after else (*after, end)


def lacking(put: Sequence[int], ids: Sequence[int], *, at_end: bool) -> Sequence[int]:
    """Those of the ids around a text that it does not have already, having been written with them."""
    for count in range(min(len(put), len(ids)), 0, -1):
        if at_end and list(ids[-count:]) == list(put[:count]):
            return put[count:]
        if not at_end and list(ids[:count]) == list(put[-count:]):
            return put[:-count]
    return put


def inside(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens hold a character of an answer."""
    begins, ends = _spans(offsets)
    found = np.zeros(len(begins), bool)
    for begin, end in answers:
        found |= (begins < end) & (ends > begin)
    return found


def _spans(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(where tokens begin, where they end).

    Tokenizers take blanks off the places that they give, so a token begins where the one before it ended; those that
    make up one character have the same place.
    """
    places = np.asarray(offsets, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(places[:, 1])
    before = np.concatenate([[0], ends[:-1]])
    return np.where(places[:, 0] == places[:, 1], before, np.minimum(places[:, 0], before)), ends


def _places(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str, swallowing: Mapping[int, bool]
) -> tuple[np.ndarray, np.ndarray]:
    """(where tokens begin, where they end); those that swallow blanks begin and end as they are written.

    `swallowing` has the ids of those, and whether they take what is behind them.
    """
    begins, ends = _spans(offsets)
    for number in [number for number, token in enumerate(ids) if token in swallowing] if swallowing else []:
        written = text[slice(*offsets[number])]
        begins[number] = offsets[number][0] + len(written) - len(written.lstrip())
        ends[number] = begins[number] + len(written.strip())
        if swallowing[ids[number]] and number + 1 < len(begins):  # no blank is left for what follows
            begins[number + 1] = offsets[number + 1][0]
    return begins, ends


class _Asked(NamedTuple):
    """What asks for an answer, from its last token that is found whole in any text: what follows is split alone."""

    text: str
    ids: tuple[int, ...] | None  # that the document has for it; None where a token reaches over its end


def _otherwise(tokenizer: TextTokenizer, asked: Sequence[_Asked]) -> int:
    """How many answers are asked for by other tokens than their documents have before them."""
    texts = list(dict.fromkeys(one.text for one in asked if one.ids is not None))
    alone = dict(zip(texts, (tuple(found.ids) for found in _encoded(tokenizer, texts)), strict=True))
    return sum(one.ids is None or alone[one.text] != one.ids for one in asked)


def _put_by(processor: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before, ids after) that a processor of `tokenizer.json` puts around a text."""
    kind = processor["type"]
    if kind == "Sequence":
        before: tuple[int, ...] = ()
        after: tuple[int, ...] = ()
        for one in processor["processors"]:
            first, last = _put_by(one)
            before, after = (*first, *before), (*after, *last)
        return before, after
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (processor["cls"][1],), (processor["sep"][1],)
    if kind != "TemplateProcessing":
        return (), ()  # such as ByteLevel, which changes places alone
    sides: tuple[list[int], list[int]] = ([], [])
    side = 0
    for piece in processor["single"]:
        if "Sequence" in piece:
            side = 1
        else:
            sides[side].extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return tuple(sides[0]), tuple(sides[1])


def cached(
    tokenizer: TextTokenizer,
    origin: Iterable[str],
    columns: Sequence[Sequence[str]],
    begin: Callable[[], Maker],
) -> Encoded:
    """What a maker gives of columns of texts, block by block, from the tokenizer's cache where it is there.

    `origin` is all that it depends on besides.
    """
    tokenizer.fast.no_truncation()
    tokenizer.fast.no_padding()

    def parts() -> Iterator[str]:
        named = [sorted(tokenizer.named.items()), sorted(tokenizer.special.items())]
        described = json.dumps([tokenizer.template, *named, tokenizer.left])
        yield from (VERSION, tokenizers.__version__, tokenizer.fast.to_str(), described, *origin)
        yield from digest(*columns)

    return in_blocks(tokenizer.home, parts, columns, begin)


def _encoded(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    worker = tokenizer.fast
    worker.no_padding()
    worker.no_truncation()
    with in_use():
        return worker.encode_batch(list(texts), add_special_tokens=False)
