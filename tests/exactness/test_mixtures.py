"""Mixtures and augmentation are exact: a step's tokens depend on no host, and on nothing that was read before it."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from exact_runs import documents, settings, small_model

from sft_jax.data.loader import prefetch
from sft_jax.errors import DataError
from sft_jax.run import Run, prepare

AUGMENT = "data.augment={token_dropout: 0.1, swap: 0.2, delete: 0.1}"
STEPS = 20  # two epochs


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Run]:
    """`mixed("key=value", ...)`: 56 rows and 21 rows, of which the second are a third of each epoch of ten steps."""
    home, model = tmp_path_factory.mktemp("mixtures") / "run", small_model(tmp_path_factory)
    many = f"{{name: many, weight: 2, source: {{kind: files, train: {rows / 'train.csv'}}}}}"
    held_out = f"train: {rows / 'test.csv'}, validation: {rows / 'test.csv'}"
    few = f"{{name: few, source: {{kind: files, {held_out}}}}}"
    source = f"data.source={{kind: mixture, parts: [{many}, {few}]}}"
    return lambda *overrides: prepare(settings(home, model, rows, source, AUGMENT, *overrides))


def test_a_mixture_is_read_by_weight(mixed):
    """C32, C12: of each epoch two thirds are of one part, and over two epochs its rows are read equally often."""
    run = mixed()
    part = run.rows["train"].rows.part
    assert part is not None and np.bincount(part).tolist() == [56, 21] and len(run.data["validation"]) == 21
    read = np.zeros(77, int)
    for epoch in range(2):
        found = list(chain(*(documents(run.batches[10 * epoch + k]) for k in range(10))))
        assert np.bincount(part[found]).tolist() == [51, 26]
        read += np.bincount(found, minlength=77)
    assert all(np.ptp(read[part == number]) <= 1 for number in (0, 1))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_the_batches_of_one(mixed, hosts: int):
    """C32, R15: the slices of several hosts make up the tokens of a run on one device, over two epochs."""
    alone, run = mixed("data.layout.kind=padded"), mixed("data.layout.kind=padded", f"mesh.data={hosts}")
    for step in range(STEPS):
        whole = alone.batches[step]
        for name in ("index", "input_ids"):
            shards = run.put(run.batches[step])[name].addressable_shards
            assert len({shard.device for shard in shards}) == hosts
            ordered = sorted(shards, key=lambda shard: shard.index[0].start or 0)
            assert np.array_equal(np.concatenate([np.asarray(s.data) for s in ordered]), whole[name])


@pytest.mark.parametrize("kind", ["packed", "bucketed"])
def test_going_on_reads_what_would_have_been_read(mixed, kind: str):
    """C11, C12: a run that is prepared anew and goes on from any step reads the same augmented tokens, bit for bit."""
    layout = f"data.layout.kind={kind}"
    in_turn = list(prefetch(mixed(layout).batches, 0, 4))
    assert len(in_turn) == STEPS
    for begin in (1, 9, 10, 17):
        for k, batch in enumerate(prefetch(mixed(layout).batches, begin, 2)):
            assert all(np.array_equal(batch[name], in_turn[begin + k][name]) for name in batch)
    other = mixed(layout, "seed.data=1").batches[0]
    assert not np.array_equal(other["input_ids"], in_turn[0]["input_ids"])


def test_a_part_of_which_nothing_is_left(mixed):
    """C9: a part whose rows were all dropped is named; its weight is not given to the others in silence."""
    with pytest.raises(DataError, match=r"data\.source\.parts: no training row is left of few; drop fewer, or that"):
        mixed("data.leakage=drop")
    few = mixed("data.max_rows=10").rows["train"].rows.part
    assert few is not None and np.bincount(few).tolist() == [5, 5], "a trial has rows of each part"
