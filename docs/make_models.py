"""Writes `docs/models.md` from what the parity tests measured, as pytest's `--junitxml=FILE` holds it.

A test says what it measured by `record_property("parity", "family|head|what|error")`; of several errors for one cell
the largest stands in the table. A cell that no test measured stays empty.
"""

import importlib.metadata
import platform
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree

from sft_jax.models.family import FAMILIES, find_family

PAGE = Path(__file__).with_name("models.md")
WHAT = ("logits", "gradients", "trajectory", "export", "generation", "published")
HEADER = """\
# Models and tasks

Each row is a kind of model with a kind of head, each number the largest difference from the torch reference
(`transformers`, float32, on a CPU) that a test run measured, on tiny models with odd sizes and random weights, padded
and packed. *Logits* are absolute, *gradients* relative to the largest; *trajectory* is the relative difference of 20
training losses; *export* is between the logits of the model that was trained here and of the directory that
`transformers` loads again; *generation* counts tokens that differ from `generate`, greedy and with 4 beams; *published*
is logits at a published size. An empty cell was not measured.

This page is made by `make models` (pytest tests/parity, then `docs/make_models.py`).
"""
# Of a processor, widest first: what decides how its libraries add up.
UNITS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
Cells = dict[tuple[str, str], dict[str, float]]


def measured(file: Path) -> Cells:
    """The largest error of each cell in a report of pytest."""
    cells: Cells = defaultdict(dict)
    for entry in ElementTree.parse(file).iter("property"):
        if entry.get("name") == "parity":
            family, head, what, error = str(entry.get("value")).split("|")
            row = cells[family, head]
            row[what] = max(row.get(what, 0.0), float(error))
    return cells


def when(file: Path) -> str:
    """The day on which a report of pytest was written."""
    suite = next(ElementTree.parse(file).iter("testsuite"))
    return datetime.fromisoformat(suite.get("timestamp", "")).date().isoformat()


def processor() -> str:
    """The name of this machine's processor, and whether it has units for products of matrices."""
    cpus = Path("/proc/cpuinfo")
    said = _said(cpus.read_text()) if cpus.exists() else {}
    units = [name for flag, name in UNITS.items() if flag in said.get("flags", "").split()]
    return " with ".join([said.get("model name") or platform.processor() or platform.machine(), *units[:1]])


def _said(text: str) -> dict[str, str]:
    pairs = (line.partition(":")[::2] for line in text.splitlines())
    return {name.strip(): value.strip() for name, value in pairs}


def page(cells: Cells, day: str) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    lines = [f"| model type | head | {' | '.join(WHAT)} |", f"|---|---|{'---|' * len(WHAT)}"]
    for (family, head), row in sorted(cells.items()):
        figures = [f"{row[what]:.0e}" if row.get(what) else "0" if what in row else "" for what in WHAT]
        lines.append(f"| {family} | {head} | {' | '.join(figures)} |")
    kinds = [f"- `{name}`: {', '.join(find_family({'model_type': name}, name).heads)}" for name in sorted(FAMILIES)]
    return "\n".join(
        [
            HEADER,
            f"Measured with {versions}, on {day}, on a processor that calls itself {processor()}.",
            "",
            *lines,
            "",
            "## Heads of each model type",
            "",
            *kinds,
            "",
        ]
    )


if __name__ == "__main__":
    report = Path(sys.argv[1])
    PAGE.write_text(page(measured(report), when(report)), encoding="utf-8")
