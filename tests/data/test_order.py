"""The order of training rows: complete, seeded, the same in every process, and sought in constant time."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data import order
from sft_jax.data.order import Order, permutation, random_bits

SEEDS = st.integers(-(2**63), 2**64 - 1)
# What a process makes of the order, as one digest over seeds and epochs.
DIGEST = """
import hashlib
from sft_jax.data.order import Order
whole = hashlib.sha256()
for seed in (0, 7, -1):
    rows = Order(count=103, batch_size=8, seed=seed)
    for step in range(3 * rows.steps_per_epoch):
        whole.update(rows.documents(step).astype("<i8").tobytes())
print(whole.hexdigest())
"""


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
    """C12, C32: processes with other hash seeds and thread counts make the same order, bit for bit."""
    found = []
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        found.append(done.stdout.strip())
    whole = hashlib.sha256()
    for seed in (0, 7, -1):
        rows = Order(count=103, batch_size=8, seed=seed)
        for step in range(3 * rows.steps_per_epoch):
            whole.update(rows.documents(step).astype("<i8").tobytes())
    assert found == [whole.hexdigest()] * 2


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
