"""The data report: what encoded splits are in tokens, as plain data."""

import json

import pytest
from ragged import ragged

from sft_jax.data.report import QUANTILES, DataReport, SplitReport


def split_report(**given) -> SplitReport:
    """A split of which little is known."""
    known = {"read": 5, "used": 5, "cut": 0, "dropped": {}, "duplicates": 0, "conflicts": 0, "leaked": 0}
    return SplitReport(**{**known, "labels": {"a": 5}, "examples": {}, **given})


def test_lengths_and_shares():
    """C9: quantiles of the lengths, the share that was cut and the share of filler are those of the documents."""
    encoded = ragged([*range(1, 102)])
    before = DataReport({"train": split_report(), "test": split_report()})
    report = before.with_tokens({"train": encoded}, {"train": 0.25})
    tokens = report.splits["train"].tokens
    assert tokens is not None and report.splits["test"].tokens is None
    assert tokens.lengths == {name: 1 + share for name, share in QUANTILES.items()}
    assert (tokens.total, tokens.supervised, tokens.padding_share) == (101 * 51, None, 0.25)
    assert before.splits["train"].tokens is None, "reports are not changed, but made anew"


def test_a_report_is_plain_data():
    """C9: the report goes to JSON and back without loss."""
    made = split_report(dropped={"no text": 2}, examples={"no text": ["row 1: text is '', expected a text"]})
    report = DataReport({"train": made}).with_tokens({"train": ragged([3, 4])}, {"train": 0.0})
    plain = report.plain()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["splits"]["train"]["tokens"]["truncated_share"] == pytest.approx(0)
    assert plain["splits"]["train"]["examples"] == made.examples
