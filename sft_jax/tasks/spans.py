"""Spans of a context: the tokens that an answer is in, and the best spans by the logits of their ends. On the host.

A span begins and ends in the context of one window; the windows of a row are one set of candidates, and a span that
stands in several of them has its best score. Letters: w windows, t tokens in a window, l tokens in a span.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sft_jax.data.batch import Encoded

WINDOWS = 64  # looked at together
NOWHERE = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Spans:
    """The best spans of each row, best first; a row whose context has no token has none."""

    rows: Int[np.ndarray, " rows"]  # which rows these are, ascending
    offsets: Int[np.ndarray, " rows+1"]  # where the spans of each begin
    begin: Int[np.ndarray, " spans"]  # characters of the context
    end: Int[np.ndarray, " spans"]
    score: Float[np.ndarray, " spans"]  # sum of the logits of both ends
    null: Float[np.ndarray, " rows"]  # the same of no answer: of the first token, in the window where it is least


def locate(
    encoded: Encoded, begins: Int[np.ndarray, " rows"], ends: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, "windows 2"]:
    """The first and the last token of each window that hold a character of its row's answer; 0 and 0, the first token
    of the window, where that holds not all of them, or there is none.
    """
    window = np.repeat(np.arange(len(encoded)), encoded.lengths)
    row = encoded.rows[window]
    begin, end = encoded.beside["begin"], encoded.beside["end"]
    held = np.flatnonzero((begin >= 0) & (begin < ends[row]) & (end > begins[row]))
    of, row = window[held], row[held]
    place = held - encoded.offsets[of]
    first, last = _extremes(place, place, of, len(encoded))
    least, most = _extremes(begin[held], end[held], of, len(encoded))
    row_least, row_most = _extremes(begin[held], end[held], row, len(begins))
    rows = encoded.rows
    whole = (most >= 0) & (least == row_least[rows]) & (most == row_most[rows])
    return np.where(whole[:, None], np.stack([first, last], axis=1), 0).astype(np.int32)


def best(kept: Float[np.ndarray, "tokens 2"], encoded: Encoded, count: int, longest: int) -> Spans:
    """At most `count` spans of a row, of at most `longest` tokens, by exact search."""
    parts = [
        _best_of(kept, encoded, np.arange(begin, min(begin + WINDOWS, len(encoded))), count, longest)
        for begin in range(0, len(encoded), WINDOWS)
    ]
    window, first, last = (np.concatenate([part[k] for part in parts]) for k in range(3))
    row, begin, end = encoded.rows[window], encoded.beside["begin"][first], encoded.beside["end"][last]
    score = kept[first, 0] + kept[last, 1]
    order = np.lexsort((-score, end, begin, row))  # of the same span the best comes first
    row, begin, end, score = (values[order] for values in (row, begin, end, score))
    fresh = np.ones(len(row), bool)
    fresh[1:] = (row[1:] != row[:-1]) | (begin[1:] != begin[:-1]) | (end[1:] != end[:-1])
    row, begin, end, score = (values[fresh] for values in (row, begin, end, score))
    order = np.lexsort((-score, row))
    row, begin, end, score = (values[order] for values in (row, begin, end, score))
    rows, firsts = np.unique(encoded.rows, return_index=True)
    among = np.arange(len(row)) - np.searchsorted(row, row) < count
    row, begin, end, score = (values[among] for values in (row, begin, end, score))
    null = np.minimum.reduceat(kept[encoded.offsets[:-1]].sum(axis=1), firsts)
    return Spans(rows, np.searchsorted(row, np.append(rows, NOWHERE)), begin, end, score, null)


def losses(
    kept: Float[np.ndarray, "tokens 2"], encoded: Encoded, answer: Int[np.ndarray, "windows 2"]
) -> Float[np.ndarray, " windows"]:
    """The loss of each window, as in training."""
    firsts = encoded.offsets[:-1]
    logits = kept.astype(np.float64)
    most = np.repeat(np.maximum.reduceat(logits, firsts), encoded.lengths, axis=0)
    sums = np.log(np.add.reduceat(np.exp(logits - most), firsts)) + most[firsts]
    right = np.stack([logits[firsts + answer[:, k], k] for k in range(2)], axis=1)
    return (sums - right).mean(axis=1)


def _best_of(
    kept: Float[np.ndarray, "tokens 2"], encoded: Encoded, windows: Int[np.ndarray, " w"], count: int, longest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(window, first token, last token) of the best spans of each window, in no order."""
    lengths = encoded.lengths[windows]
    width = int(lengths.max())
    longest = min(longest, width)
    tokens = np.minimum(encoded.offsets[windows][:, None] + np.arange(width), len(kept) - 1)
    of_context = (np.arange(width) < lengths[:, None]) & (encoded.beside["begin"][tokens] >= 0)
    start, end = (np.where(of_context, kept[tokens, k], -np.inf) for k in range(2))
    ends = np.pad(end, ((0, 0), (0, longest - 1)), constant_values=-np.inf)
    by_length = np.lib.stride_tricks.sliding_window_view(ends, longest, axis=1)  # [w, t, l]
    scores = (start[..., None] + by_length).reshape(len(windows), -1)
    if count == 1:
        top = scores.argmax(axis=1)[:, None]
    else:
        few = min(count, scores.shape[1])
        top = np.argpartition(scores, -few, axis=1)[:, -few:]
    window, place = np.nonzero(np.isfinite(np.take_along_axis(scores, top, axis=1)))
    chosen = top[window, place]
    first = encoded.offsets[windows[window]] + chosen // longest
    return windows[window], first, first + chosen % longest


def _extremes(
    low: np.ndarray, high: np.ndarray, of: Int[np.ndarray, " held"], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(least of the low ones, most of the high ones) of each; beyond all where it has none."""
    least, most = np.full(count, NOWHERE, np.int64), np.full(count, -1, np.int64)
    np.minimum.at(least, of, low)
    np.maximum.at(most, of, high)
    return least, most
