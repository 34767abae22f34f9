"""Batches by number and their background preparation: the same batches, from any start, and each document once."""

import itertools

import numpy as np
import pytest
from ragged import held, natural, ragged, same

from sft_jax.config.data import Layout
from sft_jax.data.batch import Shape, declare
from sft_jax.data.loader import EvalBatches, TrainBatches, padding_share, prefetch
from sft_jax.data.order import Order


def train_batches(kind: str = "packed", steps: int = 17) -> TrainBatches:
    """17 steps over 50 documents, 8 at a time: two epochs and a bit."""
    encoded, order = ragged(natural(50).tolist()), Order(50, 8, 0)
    return TrainBatches(encoded, order, declare(Layout(kind=kind), encoded, order, 1), steps)


@pytest.mark.parametrize("kind", ["packed", "bucketed", "padded"])
@pytest.mark.parametrize("begin", [0, 1, 6, 7, 13, 16, 17])
def test_prefetching_gives_what_indexing_gives(kind, begin):
    """C11, C12: from any step, within an epoch or at its end, prefetched batches are bit-equal to indexed ones."""
    batches = train_batches(kind)
    found = list(prefetch(batches, begin, ahead=3))
    assert len(found) == len(batches) - begin
    assert all(same(batch, batches[begin + k]) for k, batch in enumerate(found))


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_the_depth_of_the_prefetch_changes_nothing(ahead):
    """R18: one batch ahead or all of them, the same batches in the same order."""
    batches = train_batches()
    assert [held(b) for b in prefetch(batches, 0, ahead)] == [held(batches[k]) for k in range(len(batches))]


def test_going_on_twice_reads_the_same_rows():
    """C11, C12: a run that stops at step 5, and again at step 11, reads what an unbroken one reads."""
    batches = train_batches()
    unbroken = [held(b) for b in prefetch(batches, 0, 4)]
    pieces = [(0, 5), (5, 11), (11, 17)]
    resumed = [held(b) for begin, end in pieces for b in itertools.islice(prefetch(batches, begin, 4), end - begin)]
    assert resumed == unbroken


def test_a_mistake_in_the_background_reaches_the_loop():
    """R25: an error while a batch is prepared is raised where the batch is read, not swallowed."""

    class Broken:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, step: int):
            if step == 2:
                raise RuntimeError("no batch 2")
            return {"weight": np.ones((1, 1), np.float32)}

    running = prefetch(Broken(), 0, 2)
    assert next(running) and next(running)
    with pytest.raises(RuntimeError, match="no batch 2"):
        next(running)


@pytest.mark.parametrize("count", [1, 2, 7, 21, 64])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("slots", [1, 4])
def test_evaluation_reads_every_document_once(count, batch_size, multiple, slots):
    """C16: one document or many, fewer than a batch or more, on 1, 2 or 4 devices: each has weight 1 once."""
    encoded = ragged(natural(count, longest=32).tolist())
    batches = EvalBatches.of(encoded, Shape(16, 32, slots), batch_size, multiple)
    found = [batches[k] for k in range(len(batches))]
    assert sorted(itertools.chain(*map(held, found))) == list(range(count))
    assert sum(b["weight"].sum() for b in found) == count
    assert len({(b["segment_ids"].shape, b["weight"].shape) for b in found}) == 1, "one shape (C29)"
    assert batches.shape.rows % multiple == 0
    assert all(held(b) for b in found), "no batch of filler alone"


def test_a_large_batch_size_makes_one_batch():
    """An evaluation batch larger than the data is no larger than the data needs."""
    encoded = ragged([8, 8, 8])
    batches = EvalBatches.of(encoded, Shape(32, 8, 1), 500, 2)
    assert len(batches) == 1 and batches.shape == Shape(4, 8, 1)


def test_evaluation_batches_hold_about_as_many_documents_as_asked():
    """Packed rows are counted so that a batch holds the documents that `eval.batch_size` names."""
    encoded = ragged(natural(512).tolist())
    batches = EvalBatches.of(encoded, Shape(8, 128, 16), 64, 1)
    sizes = [len(held(batches[k])) for k in range(len(batches))]
    assert 0.9 * 64 <= np.mean(sizes) <= 1.2 * 64


def test_documents_longer_than_those_of_training_are_evaluated_whole():
    """C16: rows grow for a longer document of the evaluation split; nothing is cut or dropped."""
    encoded = ragged([3, 30, 5, 41])
    batches = EvalBatches.of(encoded, Shape(4, 16, 2), 4, 1)
    assert batches.shape.length == 48
    found = [batches[k] for k in range(len(batches))]
    tokens = np.concatenate([b["input_ids"][b["segment_ids"] > 0] for b in found])
    assert sorted(tokens.tolist()) == list(range(1, 80))


def test_padding_share_counts_filler_tokens():
    """The share of filler is that of the tokens in the rectangles of one pass."""
    encoded = ragged([8, 4])
    order = Order(2, 2, 0)
    assert padding_share(TrainBatches(encoded, order, (Shape(2, 8, 1),), 10)) == 0.25
    assert padding_share(TrainBatches(encoded, order, (Shape(4, 8, 1),), 10)) == 0.625
    assert padding_share(EvalBatches.of(ragged([8, 4, 4]), Shape(2, 8, 2), 3, 1)) == 0
    packed, bucketed, padded = (padding_share(train_batches(kind)) for kind in ("packed", "bucketed", "padded"))
    assert packed < padded and bucketed < padded


@pytest.mark.parametrize("count", [1, 5, 63, 64, 65, 127, 128, 1000])
def test_padding_share_reads_no_more_than_it_says(count):
    """Sampling for the padding share stays within its bound, however long a pass is."""
    read = []

    class Counted:
        def __len__(self) -> int:
            return count

        def __getitem__(self, number: int):
            read.append(number)
            return {"segment_ids": np.array([[1, 0]])}

    assert padding_share(Counted(), most=64) == 0.5
    assert min(count, 32) <= len(read) <= 64 and len(set(read)) == len(read)
