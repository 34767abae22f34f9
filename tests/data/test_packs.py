"""Packs planned before training: every document once, full rows, the same everywhere, found again in a cache."""

from itertools import chain

import numpy as np
import pytest
from ragged import held, natural, ragged, same

from sft_jax.config.data import Augment
from sft_jax.data import packs
from sft_jax.data.augment import Augmentation
from sft_jax.data.batch import Shape, pack
from sft_jax.data.loader import TrainBatches, padding_share, prefetch
from sft_jax.data.order import Order
from sft_jax.data.packs import Packs, plan

LENGTHS = natural(3000)


def planned(seed: int = 0, batch_size: int = 16, augmentation: Augmentation | None = None) -> TrainBatches:
    """Two epochs of planned packs over 300 documents."""
    encoded = ragged(LENGTHS[:300].tolist())
    found = plan(encoded.lengths, 128, 16, seed)
    order = Order(len(found), found.in_a_step(batch_size), seed)
    shape = Shape(order.batch_size, 128, found.slots)
    return TrainBatches(encoded, order, (shape,), 2 * order.steps_per_epoch, augmentation, found)


def test_a_plan_is_a_partition_into_full_rows():
    """R17: every document stands in one pack, none is over-full, and a hundredth of the rows is padding."""
    found = plan(LENGTHS, 256, 32, 0)
    assert sorted(found.documents.tolist()) == list(range(3000))
    sizes = np.add.reduceat(LENGTHS[found.documents], found.offsets[:-1])
    assert sizes.max() <= 256 and found.slots <= 32
    assert 1 - LENGTHS.sum() / (len(found) * 256) < 0.012


def test_a_pack_holds_documents_of_all_lengths():
    """A pack is a fair sample: packs differ in how many documents they hold much less than with the longest first."""
    apart = np.diff(plan(np.sort(LENGTHS), 256, 32, 0).offsets).std()
    assert apart < 0.5 * np.std([len(row) for row in pack(LENGTHS.tolist(), 256, 32)])


@pytest.mark.parametrize("step", [0, 3, 7])
def test_a_step_reads_whole_packs(step):
    """R17 C3: each row of a batch is a pack with its own segments and positions that begin at 0."""
    batches = planned()
    read = batches.order.documents(step)
    for row, number in enumerate(read):
        documents = batches.packs.of(np.array([number])).tolist()
        assert batches[step]["index"][row, : len(documents)].tolist() == documents
    batch = batches[step]
    begins = np.take_along_axis(batch["position_ids"], batch["starts"], axis=1)
    assert not begins[batch["index"] >= 0].any()


def test_every_document_is_read_once_an_epoch_and_packs_are_shuffled():
    """C32: an epoch reads each document once, and the next one the same packs in another order."""
    batches = planned()
    first, second = (
        [held(batches[k]) for k in range(e * len(batches) // 2, (e + 1) * len(batches) // 2)] for e in (0, 1)
    )
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(300)) and first != second
    assert padding_share(batches) < 0.08


def test_any_start_reads_what_the_whole_reads():
    """C11 C12: the position in planned packs is one integer: from any step on, the batches are bit-equal."""
    batches = planned()
    for begin in (0, 5, len(batches) - 1):
        assert all(same(batch, batches[begin + k]) for k, batch in enumerate(prefetch(batches, begin, 3)))


def test_a_batch_holds_about_as_many_documents_as_asked_for():
    """The learning rate keeps its meaning: a step reads `train.batch_size` documents on average, to half a pack."""
    batches = planned(batch_size=20)
    packs_of = batches.packs
    mean = 300 / len(packs_of) * batches.order.batch_size
    assert abs(mean - 20) <= 300 / len(packs_of) / 2


def test_augmented_documents_stay_in_their_packs():
    """C11: documents that lost tokens stand where they stood, shorter, with the rest of their pack."""
    made = Augmentation(Augment(delete=0.3), 0, (), 0)
    plain, changed = planned()[2], planned(augmentation=made)[2]
    assert (plain["index"] == changed["index"]).all()
    assert (changed["segment_ids"] > 0).sum() < (plain["segment_ids"] > 0).sum()


def test_a_plan_is_kept_by_all_that_it_depends_on(tmp_path, monkeypatch):
    """C22: the same lengths, sizes and seed find the plan again; any other length, size or seed makes one anew."""
    made: list[int] = []
    real = packs._planned
    monkeypatch.setattr(packs, "_planned", lambda *given: made.append(1) or real(*given))

    def planned_anew(lengths=LENGTHS, length: int = 256, slots: int = 32, seed: int = 0) -> Packs:
        return plan(lengths, length, slots, seed, tmp_path / "packs")

    once, again = planned_anew(), planned_anew()
    assert len(made) == 1 and (once.documents == again.documents).all() and (once.offsets == again.offsets).all()
    planned_anew(lengths=LENGTHS[::-1].copy())
    planned_anew(length=264)
    planned_anew(slots=8)
    planned_anew(seed=1)
    assert len(made) == 5
