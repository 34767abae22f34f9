"""The shapes that prediction declares, whatever comes: a few lengths and a few numbers of rows, each compiled once.

A program that answers one text after the other meets a new length with nearly every one. Lengths are rounded up to a
power of two, or to the model's own, and rows to a power of four, or to the batch size, so that there are soon no more
shapes to be met; `Predictor.warm_up` meets them before anyone waits.
"""

from sft_jax.data.batch import up_to

LEAST = 16  # tokens of the shortest


def declared(length: int, most: int) -> int:
    """The shortest declared length that holds a document of `length` tokens, of which none has more than `most`."""
    return min(max(LEAST, 1 << (length - 1).bit_length()), up_to(max(most, length), 8))


def sizes(most: int) -> list[int]:
    """All declared lengths of documents that have at most `most` tokens."""
    found = [LEAST]
    while found[-1] < most:
        found.append(2 * found[-1])
    return sorted({declared(min(size, most), most) for size in found})


def fewer_rows(count: int, batch_size: int) -> int:
    """The largest declared number of rows that is not above `count`: none are filler but in the last batch."""
    return next(rows for rows in reversed(_rows(batch_size)) if rows <= max(count, 1))


def more_rows(count: int, batch_size: int) -> int:
    """The smallest declared number of rows that holds `count`, which is at most the batch size."""
    return next(rows for rows in _rows(batch_size) if rows >= count)


def _rows(batch_size: int) -> list[int]:
    return [*(4**k for k in range(16) if 4**k < batch_size), batch_size]
