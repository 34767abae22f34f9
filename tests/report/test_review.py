"""What is kept of a tested split: bins, quantiles, a sample, and the worst mistakes."""

import itertools
import json

import numpy as np
import pytest
from made_runs import LABELS, prepared, review

from sft_jax.report.review import calibration, quantiles, summarise, worst
from sft_jax.tasks.metrics import calibration_error, count_calibration
from sft_jax.tasks.task import Review


def answers(truth, predicted, loss, confidence=None) -> Review:
    """A review of a few rows."""
    right = np.asarray([t == p for t, p in zip(truth, predicted, strict=True)])
    return Review(truth, predicted, right, confidence, np.asarray(loss, float))


def short(kind: str, rows: int, seed: int = 0, most: int = 20) -> dict:
    """The short form of made-up answers."""
    draw = np.random.default_rng(seed)
    found, _ = review(kind, rows, draw)
    return summarise(found, prepared(rows, draw), ("text", "other"), draw.integers(3, 60, rows), None, most)


def test_calibration_by_hand():
    """The bins hold each row once, ends included, and the error is the mean gap, weighted by rows: the metric's."""
    confidence = np.asarray([0.0, 0.05, 0.31, 0.39, 0.95, 1.0, 1.0], np.float32)
    right = np.asarray([False, True, True, False, True, True, False])
    found = calibration(confidence, right)
    assert [(round(15 * b["from"]), b["rows"]) for b in found["bins"]] == [(0, 2), (4, 1), (5, 1), (14, 3)]
    gaps = 2 * abs(0.025 - 0.5) + abs(0.31 - 1) + abs(0.39 - 0) + 3 * abs(2.95 / 3 - 2 / 3)
    counted = count_calibration(confidence[:, None], right[:, None], np.ones((7, 1)))
    assert found["ece"] == pytest.approx(gaps / 7, rel=1e-6) == pytest.approx(calibration_error(counted), rel=1e-6)


def test_calibration_of_what_is_calibrated():
    """Answers that are right as often as their confidence says have almost no error; boastful ones have much."""
    draw = np.random.default_rng(0)
    confidence = draw.random(20000)
    assert calibration(confidence, draw.random(20000) < confidence)["ece"] < 0.02
    assert calibration(np.ones(100), np.zeros(100, bool))["ece"] == 1.0


@pytest.mark.parametrize("lengths", [np.arange(1, 81), np.repeat([3, 5, 9], [70, 20, 10]), np.full(9, 4)])
def test_quantiles_hold_each_row_once(lengths):
    """C16: ranges of length are disjoint, in order, hold every row once, and their scores are those of their rows."""
    values = np.random.default_rng(1).random(len(lengths))
    parts = quantiles(lengths, values)
    assert sum(part["rows"] for part in parts) == len(lengths) and len(parts) <= 8
    assert all(one["to"] < other["from"] for one, other in itertools.pairwise(parts))
    for part in parts:
        inside = (lengths >= part["from"]) & (lengths <= part["to"])
        assert part["rows"] == inside.sum() and part["score"] == pytest.approx(values[inside].mean(), rel=1e-12)


def test_worst_come_first():
    """Mistakes are those that are wrong, the worst first and of equals the earlier; where asked, every row is one."""
    found = answers(list("aabba"), list("ababb"), [9.0, 1.0, 3.0, 0.1, 3.0])
    assert worst(found, 20, every=False).tolist() == [2, 4, 1]
    assert worst(found, 2, every=False).tolist() == [2, 4]
    assert worst(found, 3, every=True).tolist() == [0, 2, 4]


def test_numbers_are_told_from_labels():
    """Answers without confidence that read as numbers have errors; labels that are called by numbers do not."""
    rows = prepared(3, np.random.default_rng(0))
    lengths = np.asarray([4, 5, 6])
    truth, predicted = ["1", "2", "3"], ["1", "2.5", "1"]
    numbers = summarise(answers(truth, predicted, [0, 0.25, 4]), rows, ("a", "b"), lengths, None, 9)
    assert numbers["length"]["score"] == "mean absolute error" and numbers["numbers"]["predicted"] == [1.0, 2.5, 1.0]
    assert sum(numbers["numbers"]["histogram"]["rows"]) == 3
    assert [m["truth"] for m in numbers["mistakes"]] == ["3", "2", "1"]
    sure = answers(truth, predicted, [0, 0.25, 4], confidence=np.asarray([0.5, 0.5, 0.5]))
    labels = summarise(sure, rows, ("a", "b"), lengths, None, 9)
    assert labels["numbers"] is None and labels["length"]["score"] == "share right"
    assert [m["truth"] for m in labels["mistakes"]] == ["3", "2"]


def test_mistakes_name_their_place():
    """A mistake has its file and line, its texts (long ones cut, and how much), its group and its answers."""
    draw = np.random.default_rng(0)
    rows = prepared(4, draw)
    found = answers([LABELS[0]] * 4, [LABELS[1]] * 4, [4, 3, 2, 1], confidence=np.full(4, 0.5))
    kept = summarise(found, rows, ("text", "other"), np.asarray([3, 4, 5, 6]), list("xyzx"), 2)["mistakes"]
    assert [(m["place"], m["group"]) for m in kept] == [(rows.rows.place(0), "x"), (rows.rows.place(1), "y")]
    assert kept[0]["place"].endswith(".csv, line 2") and kept[0]["confidence"] == 0.5
    long, other = kept[0]["texts"]
    assert long["column"] == "text" and long["more"] == len(rows.texts[0][0]) - len(long["text"]) > 0
    assert other == {"column": "other", "text": rows.texts[1][0], "more": 0}


@pytest.mark.parametrize("kind", ["labels", "several", "numbers"])
def test_size_does_not_grow(kind):
    """C15: what is kept of ten times as many rows is hardly larger, and is JSON."""
    small, large = (len(json.dumps(short(kind, rows))) for rows in (1000, 10000))
    assert large < 1.1 * small
