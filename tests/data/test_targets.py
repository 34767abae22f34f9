"""Documents with a target of their own, and what is made of documents when a batch is."""

import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
from ragged import ragged

from sft_jax.config.data import Layout
from sft_jax.data.batch import Encoded, Shape, collate, declare
from sft_jax.data.loader import EvalBatches, TrainBatches
from sft_jax.data.order import Order
from sft_jax.train.manifest import fingerprint

SOURCES, TARGETS = [5, 9, 3, 14, 7, 2, 11, 6], [8, 4, 3, 20, 1, 6, 9, 2]


def answered() -> Encoded:
    """Documents whose source tokens count up from 100 times their number, and those of the target from minus that."""
    source, target = ragged(SOURCES), ragged(TARGETS)
    number = np.repeat(np.arange(len(TARGETS)), TARGETS)
    tokens = {"decoder_input_ids": -100 * number - np.arange(len(number)), "label": number + 1}
    return replace(source, target=Encoded(tokens, target.offsets, {}))


def stands(batch: dict, name: str, segments: str, document: int) -> list[int]:
    """The tokens of a document in a batch, wherever it was put."""
    (row,), (slot,) = np.nonzero(batch["index"] == document)
    return batch[name][row][batch[segments][row] == slot + 1].tolist()


@pytest.mark.parametrize("kind", ["packed", "bucketed", "padded"])
def test_targets_stand_beside_their_sources(kind):
    """R17: in every layout each document's source and target are whole, in one row, under one number, once an epoch."""
    encoded = answered()
    order = Order(len(encoded), 3, 0)
    batches = TrainBatches(encoded, order, declare(Layout(kind=kind), encoded, order, 1), 3)
    seen = []
    for step in range(3):
        batch = batches[step]
        for document in batch["index"][batch["index"] >= 0].tolist():
            seen.append(document)
            for part, name, segments in (
                (encoded, "input_ids", "segment_ids"),
                (encoded.target, "decoder_input_ids", "decoder_segment_ids"),
            ):
                source = slice(*part.offsets[document : document + 2])
                assert stands(batch, name, segments, document) == part.tokens[name][source].tolist()
                places = segments.replace("segment", "position")
                assert stands(batch, places, segments, document) == list(range(part.lengths[document]))
        filler = batch["decoder_segment_ids"] == 0
        assert not batch["label"][filler].any()
    assert sorted(seen) == list(range(len(encoded)))


def test_both_sides_of_a_row_have_room():
    """Shapes are made for both lengths: a bucket is shorter on both, and evaluation holds any document."""
    encoded = answered()
    order = Order(len(encoded), 2, 0)
    buckets = declare(Layout(kind="bucketed", buckets=2), encoded, order, 1)
    assert len(buckets) == 2 and buckets[0].length < buckets[1].length and buckets[0].target < buckets[1].target
    (padded,) = declare(Layout(kind="padded"), encoded, order, 1)
    assert padded == Shape(2, 16, 1, 24)
    few = encoded.select(np.array([4, 5]))
    small = declare(Layout(), few, Order(2, 2, 0), 1)[-1]
    evals = EvalBatches.of(encoded, small, 4, 1)
    found = np.concatenate([evals[n]["index"].ravel() for n in range(len(evals))])
    assert sorted(found[found >= 0]) == list(range(len(encoded)))


@dataclass(frozen=True)
class Squares:
    """Images of one grey level: ten times the document, and one more for each visit."""

    digest: str = "squares"

    def __call__(self, documents, visits):
        grey = 10 * documents + (0 if visits is None else visits)
        return np.broadcast_to(grey[:, None, None, None], (len(documents), 2, 2, 3)).astype(np.float32)


def pictures(count: int) -> Encoded:
    """Images as documents of one token."""
    return Encoded({}, np.arange(count + 1), {"label": np.arange(count)}, lazy={"pixel_values": Squares()})


def test_pixels_are_made_with_the_batch():
    """C32, C16: one image a row, by document and visit alone; filler rows are 0; evaluation draws nothing."""
    encoded = pickle.loads(pickle.dumps(pictures(5)))
    order = Order(5, 3, 0)
    batches = TrainBatches(encoded, order, declare(Layout(), encoded, order, 4), 4)
    assert batches.shapes == (Shape(4, 1, 1),)
    for step in range(4):
        batch = batches[step]
        documents, visits = order.visits(step)
        assert batch["index"][:3, 0].tolist()[: len(documents)] == documents.tolist()
        assert batch["pixel_values"][: len(documents), 0, 0, 0].tolist() == (10 * documents + visits).tolist()
        assert batch["pixel_values"].shape == (4, 2, 2, 3) and not batch["pixel_values"][len(documents) :].any()
    evals = EvalBatches.of(encoded, batches.shapes[0], 4, 1)
    assert np.concatenate([evals[n]["pixel_values"][:, 0, 0, 0] for n in range(len(evals))])[:5].tolist() == [
        0, 10, 20, 30, 40]  # fmt: skip
    picked = encoded.select(np.array([4, 1]))
    assert collate(picked, [[0], [1]], Shape(2, 1, 1))["pixel_values"][:, 0, 0, 0].tolist() == [40, 10]
    assert len({fingerprint(part) for part in (encoded, picked, encoded.select(np.array([1, 4])))}) == 3
