"""`predictions.jsonl`: what a run answers to each row of its test split, beside what is right.

Made block by block, so that only a line is held at a time however many rows there are. Knows no task: a record is what
`predict` gives of the same row.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.prepare import Prepared
from sft_jax.tasks.task import Examples, Record, Task

FILE = "predictions.jsonl"
ROWS = 1_000  # of a block


def write_predictions(
    file: Path, task: Task, kept: np.ndarray, examples: Examples, rows: Prepared, answers: Sequence[str] = ()
) -> None:
    """Write a line for each row, in order; the file appears whole. `answers` are those of the first rows, in words."""
    fresh = file.with_name(f".{file.name}.new")
    with open(fresh, "w", encoding="utf-8") as sink:
        for line in predictions(task, kept, examples, rows, answers):
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
    fresh.rename(file)


def predictions(
    task: Task, kept: np.ndarray, examples: Examples, rows: Prepared, answers: Sequence[str] = ()
) -> Iterator[Record]:
    """For each row where it stands, its `id` if it has one, the truth, and the record; a row of which no document was
    made is `lost`."""
    encoded = examples.encoded
    for begin in range(0, len(rows), ROWS):
        block = np.arange(begin, min(begin + ROWS, len(rows)))
        first, last = np.searchsorted(encoded.rows, (begin, begin + ROWS))
        part, found = examples.select(np.arange(first, last)), dict[int, Record]()
        if last > first:
            ends = (first, last) if task.grain == "document" else encoded.offsets[[first, last]]
            numbers = np.unique(part.encoded.rows).tolist()
            found = dict(zip(numbers, task.decode(kept[ends[0] : ends[1]], part), strict=True))
        for row, named in zip(block.tolist(), _names(rows, block), strict=True):
            record = found.get(row, {"lost": True})
            said = {"answer": answers[row]} if row < len(answers) else {}
            truth = _truth(task.labels, rows.targets[row], record)
            yield {"row": row + 1, "place": rows.rows.place(row), **named, "truth": truth, **said, **record}


def _names(rows: Prepared, block: np.ndarray) -> list[Record]:
    if "id" not in rows.rows.names:
        return [{} for _ in block]
    return [{"id": name} if isinstance(name, str | int) else {} for name in rows.rows.select(block).column("id")]


def _truth(labels: Sequence[str], target: Any, record: Record) -> Any:
    """A target as plain data, in the words of the record."""
    if isinstance(target, tuple):
        if target and isinstance(target[0], tuple):  # answers and where they stand
            return [text for _, text in target]
        if len(target) == len(labels) and "tags" not in record:  # a 0 or 1 for each label
            return [name for name, bit in zip(labels, target, strict=True) if bit]
        return [labels[number] for number in target]
    return labels[target] if isinstance(target, int) and "score" not in record else target
