"""The order of training rows: complete, seeded, the same in every process, and sought in constant time."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data import order
from sft_jax.data.order import Mixing, Order, permutation, random_bits, shares

SEEDS = st.integers(-(2**63), 2**64 - 1)
# What a process makes of the order, as one digest over seeds and epochs.
DIGEST = """
import hashlib
import numpy as np
from sft_jax.data.order import Mixing, Order
for mixing in (None, Mixing(np.arange(103) % 3, (1.0, 5.0, 0.5))):
    whole = hashlib.sha256()
    for seed in (0, 7, -1):
        rows = Order(103, 8, seed, mixing)
        for step in range(3 * rows.steps_per_epoch):
            whole.update(rows.documents(step).astype("<i8").tobytes())
    print(whole.hexdigest())
"""
# What it comes to, without a mixture and with one: published results depend on it.
MADE = [
    "d2a9559a0521dc4163980fdcab44fa03479987d7c34006939c284273a78be839",
    "1e9606ada3c00d21cae04a31ee308118c792934060320207dc2918126a4eb165",
]


@given(count=st.integers(1, 200), batch_size=st.integers(1, 70), seed=SEEDS, epoch=st.integers(0, 5))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_an_epoch_reads_every_document_once(count, batch_size, seed, epoch):
    """C12, C32: the steps of any epoch hold every document exactly once, the last of them what is left over."""
    rows = Order(count, batch_size, seed)
    begin = epoch * rows.steps_per_epoch
    steps = [rows.documents(begin + k) for k in range(rows.steps_per_epoch)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(count))
    assert [len(s) for s in steps[:-1]] == [batch_size] * (len(steps) - 1)
    assert len(steps[-1]) == (count - 1) % batch_size + 1


def test_the_last_batch_of_an_epoch_is_short():
    """A batch never reaches over the end of an epoch, nor is a row dropped to avoid it."""
    rows = Order(count=21, batch_size=8, seed=0)
    assert rows.steps_per_epoch == 3
    assert [len(rows.documents(k)) for k in range(6)] == [8, 8, 5, 8, 8, 5]


def test_epochs_and_seeds_have_orders_of_their_own():
    """R21: no two of several epochs and seeds share an order, seeds below 0 and above 2**63 included."""
    seeds = (0, 1, 2, 7, 2**32, 2**63 - 1, 2**63, 2**63 + 1, -1, -2)
    found = {tuple(permutation(seed, epoch, 50).tolist()) for seed in seeds for epoch in range(3)}
    assert len(found) == 3 * len(seeds)


def test_the_first_epoch_is_not_the_order_of_the_split():
    """The split draws from a stream of its own, so that it says nothing about the order of the rows."""
    split = np.argsort(random_bits(5, 0, 50), kind="stable")
    assert not np.array_equal(split, permutation(5, 0, 50))


def test_a_permutation_is_even():
    """Every document stands at every place about equally often, as after a fair shuffle."""
    count, epochs = 6, 1200
    places = np.zeros((count, count))
    for epoch in range(epochs):
        places[np.arange(count), permutation(3, epoch, count)] += 1
    expected = epochs / count
    chi_square = ((places - expected) ** 2 / expected).sum()
    assert chi_square < 60  # 25 degrees of freedom: a fair shuffle exceeds this once in 10,000 seeds


def test_another_process_reads_the_same_rows():
    """C12, C32: processes with other hash seeds and thread counts make the order written down here, bit for bit."""
    found = []
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        found.append(done.stdout.split())
    assert found == [MADE, MADE]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_seeking_makes_one_permutation(share, monkeypatch):
    """C12: any step costs the one permutation of its epoch, at 90 % as at 0 %, however many epochs lie before it."""
    drawn = []

    def counted(seed: int, stream: int, count: int) -> np.ndarray:
        drawn.append((seed, stream, count))
        return random_bits(seed, stream, count)

    monkeypatch.setattr(order, "random_bits", counted)
    permutation.cache_clear()
    rows = Order(count=1000, batch_size=10, seed=4)
    step = 37 * rows.steps_per_epoch + int(share * rows.steps_per_epoch)
    rows.documents(step)
    assert drawn == [(4, 38, 1000)]
    for later in range(step, step + 5):
        rows.documents(later)
    assert len(drawn) == 1, "the permutation of an epoch is made once"
    permutation.cache_clear()


def test_steps_do_not_depend_on_those_read_before():
    """C12: reading backwards, at random or twice gives what reading in turn gives."""
    rows = Order(count=45, batch_size=7, seed=9)
    steps = list(range(4 * rows.steps_per_epoch))
    in_turn = [rows.documents(k).tolist() for k in steps]
    for k in [*reversed(steps), *np.random.default_rng(0).permutation(steps).tolist()]:
        assert rows.documents(k).tolist() == in_turn[k]


# Mixtures.

PARTS = st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.1, 1.0, 2.0, 7.5])), min_size=2, max_size=4)


def mixture(parts, batch_size: int = 8, seed: int = 0) -> Order:
    """Parts of so many rows and such weights, their rows interleaved."""
    part = np.concatenate([np.full(size, number) for number, (size, _) in enumerate(parts)])
    part = part[permutation(99, 0, len(part))]
    return Order(len(part), batch_size, seed, Mixing(part, tuple(weight for _, weight in parts)))


def epoch_of(rows: Order, epoch: int) -> np.ndarray:
    """The documents of an epoch, in order."""
    begin = epoch * rows.steps_per_epoch
    return np.concatenate([rows.documents(begin + k) for k in range(rows.steps_per_epoch)])


@given(parts=PARTS, batch_size=st.integers(1, 40), seed=SEEDS)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_parts_have_their_shares_and_rows_their_turns(parts, batch_size, seed):
    """C12, C32: each part's share of every epoch is exact, and its rows are read equally often, whatever its weight."""
    rows = mixture(parts, batch_size, seed)
    part, count, whole = rows.mixing.part, rows.count, sum(weight for _, weight in parts)
    read = np.zeros(count, int)
    for epoch in range(5):
        found = epoch_of(rows, epoch)
        assert len(found) == count == sum(size for size, _ in parts)
        given_by = np.bincount(part[found], minlength=len(parts))
        assert all(abs(n - count * weight / whole) < 1 for n, (_, weight) in zip(given_by, parts, strict=True))
        assert given_by.tolist() == shares(count, rows.mixing.weights)
        read += np.bincount(found, minlength=count)
        for number in range(len(parts)):
            assert np.ptp(read[part == number]) <= 1


def test_shares_add_up():
    """Shares are rounded by largest remainder, so that they add up; the first part gains where they are equal."""
    assert shares(10, (1.0, 1.0, 1.0)) == [4, 3, 3]
    assert shares(7, (0.5, 0.25, 0.25)) == [3, 2, 2]
    assert shares(5, (1e-9, 1.0)) == [0, 5]
    assert shares(3, (2.0,)) == [3]


def test_a_mixture_of_one_part_is_no_mixture():
    """C12: one part, whatever its weight, gives the order of rows without parts: published results depend on it."""
    plain, one = Order(21, 8, 4), Order(21, 8, 4, Mixing(np.zeros(21, int), (3.0,)))
    for step in range(9):
        assert [a.tolist() for a in plain.visits(step)] == [a.tolist() for a in one.visits(step)]


def test_visits_count_how_often_a_document_was_read():
    """C11: a document's visits are 0, 1, 2, … in the order of its passes, in a mixture and without one."""
    for rows in (Order(21, 8, 0), mixture([(3, 5.0), (20, 1.0)])):
        read: dict[int, list[int]] = {}
        for step in range(4 * rows.steps_per_epoch):
            for document, visit in zip(*rows.visits(step), strict=True):
                read.setdefault(int(document), []).append(int(visit))
        assert all(sorted(visits) == list(range(len(visits))) for visits in read.values())
        assert max(len(visits) for visits in read.values()) >= 4


def test_passes_and_parts_have_orders_of_their_own():
    """R21: no two passes of a part are in the same order, and no two parts of a size; other seeds are others again."""
    found = []
    for seed in (0, 1):
        mixing = Mixing(np.arange(20) % 2, (1.0, 1.0))
        for epoch in range(3):  # which is one pass of each part
            drawn, _ = order._drawn(seed, epoch, mixing)
            found += [tuple((drawn[:10] // 2).tolist()), tuple((drawn[10:] // 2).tolist())]
    assert {tuple(sorted(rows)) for rows in found} == {tuple(range(10))} and len(set(found)) == 12


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_seeking_in_a_mixture_costs_the_same_everywhere(share, monkeypatch):
    """C12: a step costs one permutation of its epoch and those of the passes that reach into it, however late it is."""
    drawn = []

    def counted(seed: int, stream: int, count: int) -> np.ndarray:
        drawn.append(count)
        return random_bits(seed, stream, count)

    rows = mixture([(600, 1.0), (400, 1.0)], 10, seed=5)  # 500 each: a part of a pass, and one or two passes and a bit
    monkeypatch.setattr(order, "random_bits", counted)
    permutation.cache_clear()
    step = 1000 * rows.steps_per_epoch + int(share * rows.steps_per_epoch)
    rows.documents(step)
    assert sorted(set(drawn)) == [400, 600, 1000] and len(drawn) <= 6
    before = len(drawn)
    rows.documents(step + 1)
    assert len(drawn) == before, "made once for an epoch"
    permutation.cache_clear()


def test_steps_of_a_mixture_do_not_depend_on_those_read_before():
    """C12: reading backwards, or twice, gives what reading in turn gives."""
    rows = mixture([(13, 2.0), (30, 1.0), (2, 0.5)])
    steps = list(range(4 * rows.steps_per_epoch))
    in_turn = [rows.documents(k).tolist() for k in steps]
    assert [rows.documents(k).tolist() for k in reversed(steps)] == in_turn[::-1]
