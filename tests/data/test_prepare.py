"""The seeded, stratified cut of the rows into splits."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sft_jax.config.schema import Split
from sft_jax.data.prepare import cut
from sft_jax.errors import DataError

SHARES = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.45])
CLASSES = st.lists(st.integers(0, 4), min_size=1, max_size=120)


@given(classes=CLASSES, validation=SHARES, test=SHARES, seed=st.integers(-5, 2**40))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_cuts_are_disjoint_complete_and_stratified(classes, validation, test, seed):
    """R15: every row is in one split; each class is cut in the shares asked for, and trains with a row at least."""
    shares = Split(validation=validation, test=test)
    try:
        parts = cut(classes, shares, seed)
    except DataError:
        assume(False)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(classes)))
    assert set(parts) == {"train"} | {name for name in ("validation", "test") if getattr(shares, name)}
    labels = np.asarray(classes)
    assert set(labels[parts["train"]]) == set(classes), "every class trains"
    for kind in set(classes):
        count = classes.count(kind)
        for name in set(parts) - {"train"}:
            wanted, found = count * getattr(shares, name), int((labels[parts[name]] == kind).sum())
            assert found <= wanted + 0.5
            if count * (1 - validation - test) >= 1:  # enough rows that training gets its own by the shares
                assert found >= wanted - 0.5
    assert all(np.all(np.diff(rows) > 0) for rows in parts.values()), "in the order of the source"


def test_rows_that_train_are_not_tested_when_shares_are_large():
    """Two rows a class and a share that rounds to both of them still leave one of each to train on."""
    parts = cut([0, 0, 1, 1], Split(test=0.8), 0)
    assert len(parts["train"]) == 2 and len(parts["test"]) == 2
    assert not set(parts["train"]) & set(parts["test"])


def test_the_seed_alone_decides():
    """R21: the same seed cuts the same rows, whatever numpy's global state; other seeds cut others."""
    classes, shares = [0, 1, 2] * 40, Split(validation=0.1, test=0.2)
    found = []
    for seed in (0, 0, 1, 2, -1):
        np.random.seed(len(found))
        found.append({name: rows.tolist() for name, rows in cut(classes, shares, seed).items()})
    assert found[0] == found[1]
    assert len({tuple(f["test"]) for f in found}) == 4


def test_rows_of_a_class_are_drawn_not_taken_from_the_front():
    """A sorted source gives a test split from all over each class."""
    test = cut([0] * 200 + [1] * 200, Split(test=0.5), 3)["test"]
    halves = [int(((test >= begin) & (test < begin + 100)).sum()) for begin in range(0, 400, 100)]
    assert all(30 <= h <= 70 for h in halves)


def test_a_share_of_nothing_leaves_the_split_out():
    """Splits that nobody asked for do not appear, and all rows train."""
    parts = cut([0, 1] * 5, Split(), 0)
    assert list(parts) == ["train"] and parts["train"].tolist() == list(range(10))
    assert set(cut([0, 1] * 5, Split(test=0.2), 0)) == {"train", "test"}


def test_tiny_classes_stay_with_training():
    """A class of one row cannot be divided, so it trains."""
    parts = cut([0] * 20 + [1, 2], Split(validation=0.2, test=0.2), 0)
    assert {20, 21} <= set(parts["train"].tolist())
    assert len(parts["validation"]) == len(parts["test"]) == 4


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_share_of_no_row_is_an_error(name):
    """A share too small for the rows is named with its key, rather than giving an empty split."""
    with pytest.raises(DataError) as caught:
        cut([0, 0, 1, 1], Split(**{name: 0.1}), 0)
    assert str(caught.value) == f"data.split.{name}: 0.1 of 4 rows is no row; give a larger share"
