"""Plain nested data as tables for people, whatever its keys: nothing is left out but what is counted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft_jax.tasks.task import Table
from sft_jax.train.directory import flatten

MOST = 40  # rows of one table that are shown
CLASSES = 30  # the largest matrix that is shown whole
PAIRS = 20  # of a larger one, the cells off the diagonal that are


class Sheet(NamedTuple):
    """A table with its title; the first column names the rows."""

    title: str
    heading: list[str]
    rows: list[list[Any]]
    more: int = 0  # rows that are not shown
    matrix: bool = False  # counts of the same names both ways, to be shaded by the share of their row
    bars: frozenset[int] = frozenset()  # columns of shares, to be drawn as bars too


def sheets(value: Any, title: str = "") -> list[Sheet]:
    """Nested data as tables: alike entries side by side, single values as name and value, the rest one level down."""
    if isinstance(value, Mapping) and len(value) > 1 and _alike(list(value.values())):
        columns = {str(name): flatten(inner) for name, inner in value.items()}
        names = list(dict.fromkeys(key for inner in columns.values() for key in inner))
        return [_sheet(title, ["", *columns], [[key, *(c.get(key) for c in columns.values())] for key in names])]
    if isinstance(value, Mapping):
        plain = [[str(name), inner] for name, inner in value.items() if not _is_nested(inner)]
        nested = [(str(name), inner) for name, inner in value.items() if _is_nested(inner)]
        found = [_sheet(title, ["", "value"], plain)] if plain else []
        return found + [s for name, inner in nested for s in sheets(inner, f"{title} › {name}" if title else name)]
    if _is_nested(value):
        entries = [flatten(entry) if isinstance(entry, Mapping) else {"value": entry} for entry in value]
        names = list(dict.fromkeys(key for entry in entries for key in entry))
        return [_sheet(title, ["", *names], [[str(i), *(e.get(n) for n in names)] for i, e in enumerate(entries, 1)])]
    return [_sheet(title, ["", "value"], [["", value]])]


def of_task(title: str, table: Table) -> Sheet:
    """A table of a task, as what it looks like: a matrix of counts, or shares that make bars."""
    heading, rows = [str(cell) for cell in table[0]], table[1:]
    if rows and heading[1:] == [str(row[0]) for row in rows] and len(rows) > 1:
        return Sheet(title, heading, rows, matrix=True) if len(rows) <= CLASSES else _pairs(title, heading, rows)
    columns = range(1, len(heading))
    shares = [c for c in columns if rows and all(isinstance(row[c], float) and 0 <= row[c] <= 1 for row in rows)]
    return _sheet(title, heading, rows)._replace(bars=frozenset(shares))


def figure(value: Any) -> str:
    """A value as a cell shows it: numbers short, absent ones as a dash."""
    if value is None or value in ({}, [], ()):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if 1e4 <= abs(value) < 1e9 or (1 < abs(value) < 1e4 and value.is_integer()):
            return f"{value:,.0f}"
        short = not math.isfinite(value) or 1e-4 <= abs(value) < 1e4 or value == 0
        return f"{value:.4f}" if short else f"{value:.2e}"
    if isinstance(value, list | tuple):
        return ", ".join(figure(entry) for entry in value)
    return str(value)


def is_number(value: Any) -> bool:
    """Whether a cell is set as a number, or as the lack of one."""
    return value is None or value in ({}, [], ()) or (isinstance(value, int | float) and not isinstance(value, bool))


def _sheet(title: str, heading: list[str], rows: list[list[Any]]) -> Sheet:
    return Sheet(title, heading, rows[:MOST], max(0, len(rows) - MOST))


def _pairs(title: str, heading: list[str], rows: list[list[Any]]) -> Sheet:
    """The commonest confusions of a matrix that is too large to be looked at."""
    cells = [(row[c], row[0], heading[c]) for r, row in enumerate(rows, 1) for c in range(1, len(row)) if r != c]
    found = sorted((cell for cell in cells if cell[0]), key=lambda cell: -cell[0])
    shown = [[truth, predicted, count] for count, truth, predicted in found[:PAIRS]]
    return Sheet(f"{title}: commonest confusions", ["truth", "predicted", "rows"], shown, len(found) - len(shown))


def _is_nested(value: Any) -> bool:
    """Whether a value needs a table of its own: filled, and more than a list of plain values."""
    if isinstance(value, list | tuple):
        return any(isinstance(entry, Mapping | list | tuple) for entry in value)
    return isinstance(value, Mapping) and bool(value)


def _alike(values: Sequence[Any]) -> bool:
    """Whether values are records of mostly the same keys."""
    if not all(isinstance(value, Mapping) and value for value in values):
        return False
    keys = [set(value) for value in values]
    return 2 * len(set.intersection(*keys)) >= len(set.union(*keys))
