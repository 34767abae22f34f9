"""Plain nested data as tables."""

import math

from hypothesis import given
from hypothesis import strategies as st

from sft_jax.report.tables import MOST, figure, of_task, sheets

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
nested = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
)


def leaves(value) -> list:
    """Everything in nested data that is no container."""
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [value]


@given(nested)
def test_nothing_is_left_out(value):
    """Whatever the data, each table is a rectangle, and each value stands in some cell or in a list in one."""
    found = sheets(value)
    assert all(len(row) == len(sheet.heading) for sheet in found for row in sheet.rows)
    shown = [repr(leaf) for sheet in found for row in sheet.rows for cell in row for leaf in leaves(cell)]
    for leaf in map(repr, leaves(value)):
        assert leaf in shown
        shown.remove(leaf)
    assert all(isinstance(figure(cell), str) for sheet in found for row in sheet.rows for cell in row)


def test_alike_entries_stand_side_by_side():
    """Splits with the same keys make one table; what is alone makes one of its own, one level down."""
    split = {"read": 9, "dropped": {"no text": 1}}
    found = sheets({"splits": {"train": split, "test": {**split, "read": 4}}, "leakage": {"rows": 2}, "seed": 0})
    assert [(sheet.title, sheet.heading) for sheet in found] == [
        ("", ["", "value"]),
        ("splits", ["", "train", "test"]),
        ("leakage", ["", "value"]),
    ]
    assert found[1].rows == [["read", 9, 4], ["dropped.no text", 1, 1]]


def test_long_tables_are_cut_and_counted():
    """Rows past the most that are shown are counted."""
    (found,) = sheets([{"place": i} for i in range(MOST + 7)])
    assert len(found.rows) == MOST and found.more == 7


def test_tables_of_a_task():
    """Counts of the same names both ways are a matrix, of very many its commonest confusions; shares make bars."""
    matrix = of_task("m", [["", "a", "b"], ["a", 5, 1], ["b", 0, 3]])
    assert matrix.matrix and not matrix.bars
    names = [f"n{i}" for i in range(50)]
    counts = [[n, *(int(r == c) * 9 + (r == 3 and c == 4) * 7 for c in range(50))] for r, n in enumerate(names)]
    large = of_task("m", [["", *names], *counts])
    assert not large.matrix and large.rows == [["n3", "n4", 7]]
    bars = of_task("p", [["label", "F1", "rows"], ["a", 0.5, 4], ["b", 1.0, 9]])
    assert bars.bars == {1} and not bars.matrix
    assert not of_task("p", [["label", "error"], ["a", 0.5], ["b", 1.5]]).bars
    assert of_task("nothing", [["label", "F1"]]).rows == []


def test_figures():
    """Numbers are short, and what is no number is said as it is."""
    shown = {
        0.84151: "0.8415",
        0.0: "0.0000",
        2e-5: "2.00e-05",
        7e-4: "0.0007",
        12345.6: "12,346",
        12345: "12,345",
        15.0: "15",
        1.0: "1.0000",
    }
    assert {value: figure(value) for value in shown} == shown
    assert figure(True) == "yes" and figure({}) == figure([]) == "–"
    assert (figure(None), figure(math.nan), figure([1, "a"]), figure(-math.inf)) == ("–", "nan", "1, a", "-inf")
