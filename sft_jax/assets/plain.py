"""Plain files out of an archive: some of its own, or rows as CSV or JSON lines, the same bytes each time."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax.archives import members


def copy(archive: Path, out: Path, folder: str, files: Sequence[str]) -> None:
    """The named files of one folder of an archive, as they are."""
    for name, content in members(archive):
        inside, _, file = name.rpartition("/")
        if inside == folder and file in files:
            (out / file).write_bytes(content)


def write_csv(file: Path, rows: Iterable[Sequence[object]]) -> None:
    """Rows of cells, the first of which names the columns."""
    with open(file, "w", encoding="utf-8", newline="") as sink:
        csv.writer(sink).writerows(rows)


def write_json(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """An object a line."""
    with open(file, "w", encoding="utf-8", newline="\n") as sink:
        sink.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
