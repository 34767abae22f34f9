"""Documents made some rows at a time, in arrays that lie on disk once they are large. Holds numpy only."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sft_jax.data import cache
from sft_jax.data.batch import Encoded
from sft_jax.data.cache import Arrays, Sink
from sft_jax.data.columns import ranges
from sft_jax.data.rows import MOST_SHOWN
from sft_jax.data.text import offsets_of

# Names of what is kept; those of tokens, of what is beside them and of targets have a word before them.
LENGTHS, ROWS, TRUNCATED, COUNTED = "lengths", "rows", "truncated", "counted"
TOKENS, BESIDE, TARGET = "tokens ", "beside ", "target "


class Maker(NamedTuple):
    """What makes documents of blocks of rows, the first to the last."""

    encode: Callable[..., Encoded]  # of as many columns; a row's documents are its own, whatever stands in its block
    noted: Callable[[], dict[str, int]] = dict  # what is to be said of all blocks, beside what each says


def in_blocks(
    home: Path | None,
    parts: Callable[[], Iterable[str | bytes]],
    columns: Sequence[Sequence[str]],
    begin: Callable[[], Maker],
) -> Encoded:
    """What a maker makes of columns of texts, which it is given in blocks of rows; from a cache where it is there.

    `parts` are all that the documents depend on.
    """

    def make(sink: Sink) -> None:
        maker = begin()
        for first, last in ranges(*columns):
            block = maker.encode(*(column[first:last] for column in columns))
            lost_rows = {why: [first + row for row in rows] for why, rows in block.lost_rows.items()}
            _put(sink, replace(block, rows=block.rows + first, lost_rows=lost_rows))
        sink.add(COUNTED, _line({}, {}, maker.noted()))

    return _taken(cache.made(home, parts, make))


def _put(sink: Sink, block: Encoded, name: str = "") -> None:
    for kind, arrays in ((TOKENS, block.tokens), (BESIDE, block.beside)):
        for field, values in arrays.items():
            sink.add(name + kind + field, values)
    sink.add(name + LENGTHS, block.lengths.astype(np.int32))
    sink.add(name + ROWS, block.rows)
    sink.add(name + TRUNCATED, np.asarray([block.truncated]))
    sink.add(name + COUNTED, _line(block.lost, block.lost_rows, block.noted))
    if block.target is not None:
        _put(sink, block.target, name + TARGET)


def _taken(arrays: Arrays) -> Encoded:
    lost, lost_rows, noted = Counter[str](), dict[str, list[int]](), Counter[str]()
    for line in arrays[COUNTED].tobytes().splitlines():
        more_lost, more_rows, more_noted = json.loads(line)
        lost.update(more_lost)
        noted.update(more_noted)
        for why, rows in more_rows.items():
            lost_rows[why] = [*lost_rows.get(why, []), *rows][:MOST_SHOWN]
    offsets = offsets_of(arrays[LENGTHS])
    target = _under(arrays, TARGET)
    return Encoded(
        _under(arrays, TOKENS),
        offsets,
        {},
        int(arrays[TRUNCATED].sum()),
        rows=arrays[ROWS],
        beside=_under(arrays, BESIDE),
        lost=dict(lost),
        lost_rows=lost_rows,
        noted=dict(noted),
        target=_taken(target) if target else None,
    )


def _line(lost: Mapping[str, int], lost_rows: Mapping[str, list[int]], noted: Mapping[str, int]) -> np.ndarray:
    return np.frombuffer(json.dumps([lost, lost_rows, noted]).encode() + b"\n", np.uint8)


def _under(arrays: Mapping[str, np.ndarray], name: str) -> Arrays:
    return {key.removeprefix(name): array for key, array in arrays.items() if key.startswith(name)}
