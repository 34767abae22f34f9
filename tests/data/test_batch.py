"""Batches: packing, declared shapes and collation, against what they promise and against brute force."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import held, natural, ragged

from sft_jax.config.data import Layout
from sft_jax.data.batch import Shape, collate, declare, lay_out, pack, place, thresholds, up_to
from sft_jax.data.loader import TrainBatches
from sft_jax.data.order import Order

KINDS = ("packed", "bucketed", "padded")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def first_fit_in_turn(lengths, capacity: int) -> int:
    """Rows that a careless packer needs: it closes a row when the next document does not fit."""
    rows, room = 0, 0
    for length in lengths:
        if length > room:
            rows, room = rows + 1, capacity
        room -= length
    return rows


@given(lengths=LENGTHS, room=st.integers(0, 30), slots=st.integers(1, 9))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_packing_is_a_partition(lengths, room, slots):
    """R17: every document is in exactly one row, and no row exceeds its tokens or its slots."""
    capacity = max(lengths) + room
    rows = pack(lengths, capacity, slots)
    assert sorted(d for row in rows for d in row) == list(range(len(lengths)))
    assert all(row for row in rows), "no empty row"
    assert max(sum(lengths[d] for d in row) for row in rows) <= capacity
    assert max(len(row) for row in rows) <= slots
    assert rows == pack(lengths, capacity, slots), "twice the same"


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), room=st.integers(0, 6))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_packing_is_near_the_best_there_is(lengths, room):
    """Best fit, longest first, needs at most 11/9 of the fewest rows and 6/9 more, by trying all assignments."""
    capacity = max(lengths) + room

    def fits(count: int) -> bool:
        def put(d: int, left: tuple[int, ...]) -> bool:
            if d == len(lengths):
                return True
            choices = {room: i for i, room in enumerate(left) if room >= lengths[d]}
            return any(put(d + 1, (*left[:i], left[i] - lengths[d], *left[i + 1 :])) for i in choices.values())

        return put(0, (capacity,) * count)

    best = next(count for count in itertools.count(1) if fits(count))
    assert best <= len(pack(lengths, capacity, len(lengths))) <= 11 / 9 * best + 6 / 9


def test_a_document_goes_where_least_room_is_left():
    """Six and four, then five, three and two fill two rows of ten; the roomiest row first would need three."""
    assert pack([6, 5, 4, 3, 2], 10, 5) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("seed", range(3))
def test_packing_wastes_little_on_natural_lengths(seed):
    """A batch of sentence lengths needs at most 3 % more rows than its tokens fill, where a careless packer fails."""
    lengths = natural(2048, seed).tolist()
    bound = math.ceil(sum(lengths) / 128)
    assert len(pack(lengths, 128, 16)) <= 1.03 * bound
    assert first_fit_in_turn(lengths, 128) > 1.03 * bound


@given(
    values=st.lists(st.integers(1, 25), min_size=1, max_size=30),
    count=st.integers(1, 5),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_thresholds_are_the_best_there_are(values, count):
    """No other choice of as many thresholds wastes less, by trying them all."""

    def cost(chosen) -> int:
        return sum(min(t for t in chosen if t >= value) for value in values)

    found = thresholds(values, count)
    assert len(found) == len(set(found)) <= count and set(found) <= set(values) and max(values) in found
    others = [c for c in itertools.combinations(sorted(set(values)), len(found)) if c[-1] == max(values)]
    assert cost(found) == min(cost(c) for c in others)
    assert len(found) == min(count, len(set(values))), "a further threshold always saves something"


@given(
    kind=st.sampled_from(KINDS),
    lengths=LENGTHS,
    batch_size=st.integers(1, 20),
    multiple=st.sampled_from([1, 2, 3, 8]),
    buckets=st.integers(1, 4),
    length=st.sampled_from([None, 40, 44, 64]),
)
@settings(deadline=None, max_examples=120, derandomize=True)
def test_declared_shapes_hold_any_batch(kind, lengths, batch_size, multiple, buckets, length):
    """C29: there are at most `buckets` + 1 shapes, rows divide by devices, and no batch of any epoch outgrows them."""
    encoded, order = ragged(lengths), Order(len(lengths), batch_size, 3)
    shapes = declare(Layout(kind=kind, length=length, buckets=buckets), encoded, order, multiple)
    assert list(shapes) == sorted(set(shapes)) and len(shapes) <= (1 if kind == "padded" else buckets + 1)
    assert all(s.rows % multiple == 0 for s in shapes)
    assert all(s.length % 8 == 0 for s in shapes if s.length != length)
    assert all((s.slots == 1) or kind == "packed" for s in shapes)
    longest_first = np.argsort(-encoded.lengths)[:batch_size]  # the worst batch that there could be
    for documents in [longest_first, *(order.documents(k) for k in range(3 * order.steps_per_epoch))]:
        rows, shape = place(encoded, documents, shapes)
        assert shape in shapes
        assert sorted(d for row in rows for d in row) == sorted(documents.tolist())
        assert held(collate(encoded, rows, shape)) == sorted(documents.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_no_sample_foretold_still_fits(kind):
    """C29: of 2,000 steps not all are looked at, and later epochs are not: the largest shape holds what they bring."""
    lengths = [8] * 2000
    order = Order(2000, 1, 0)
    lengths[int(order.documents(1)[0])] = 64  # every fourth step is looked at, from step 0 on
    for length in (None, 72):
        shapes = declare(Layout(kind=kind, length=length), ragged(lengths), order, 1)
        assert place(ragged(lengths), order.documents(1), shapes)[1].length >= 64

    lengths = [8, 64] * 100  # a batch of long ones alone, which chance has not made in the first epoch
    encoded, order = ragged(lengths), Order(200, 16, 0)
    long = [d for d in range(200) if lengths[d] == 64][:16]
    rows, shape = place(encoded, long, declare(Layout(kind=kind), encoded, order, 1))
    assert held(collate(encoded, rows, shape)) == long


def test_usual_batches_get_smaller_shapes():
    """C29: with ragged rows both bucketed and packed use a smaller shape than the one that holds any batch."""
    encoded, order = ragged(natural(400).tolist()), Order(400, 16, 0)
    (padded,) = declare(Layout(kind="padded"), encoded, order, 2)
    for kind in ("bucketed", "packed"):
        shapes = declare(Layout(kind=kind), encoded, order, 2)
        used = [place(encoded, order.documents(k), shapes)[1] for k in range(order.steps_per_epoch)]
        tokens = sum(s.rows * s.length for s in used)
        assert tokens < 0.9 * len(used) * padded.rows * padded.length


def test_declared_shapes_depend_on_data_seed_and_batch_size_alone():
    """C29, C32: the same run declares the same shapes; devices only round the rows up."""
    encoded, order = ragged(natural(300).tolist()), Order(300, 24, 1)
    one = declare(Layout(), encoded, order, 1)
    assert one == declare(Layout(), encoded, order, 1)
    four = declare(Layout(), encoded, order, 4)
    assert four[-1].rows == up_to(one[-1].rows, 4) and four[-1].length == one[-1].length


def test_the_smallest_shape_that_fits_is_taken():
    """C29: neither a row nor a token more than the smallest declared shape that holds the batch."""
    encoded = ragged([5, 9, 12, 16])
    shapes = (Shape(2, 8, 1), Shape(2, 16, 1), Shape(4, 16, 1))
    assert place(encoded, [0], shapes)[1] == Shape(2, 8, 1)
    assert place(encoded, [0, 1], shapes)[1] == Shape(2, 16, 1)
    assert place(encoded, [0, 1, 2], shapes)[1] == Shape(4, 16, 1)
    packed = (Shape(1, 16, 2), Shape(2, 16, 2), Shape(4, 16, 2))
    assert place(encoded, [0, 1], packed)[1] == Shape(1, 16, 2)  # 5 + 9 in one row
    assert place(encoded, [1, 2], packed)[1] == Shape(2, 16, 2)
    assert place(encoded, [0, 1, 2, 3], packed)[1] == Shape(4, 16, 2)  # 5 + 9, 12, 16


def test_rows_and_slots_of_a_shape_are_kept():
    """R17: a shape of one slot holds one document a row, a shape of two never three, however short they are."""
    encoded = ragged([2] * 6)
    assert lay_out(encoded, [4, 2, 0], Shape(8, 16, 1)) == [[4], [2], [0]]
    assert [len(row) for row in lay_out(encoded, range(6), Shape(8, 16, 2))] == [2, 2, 2]


@given(lengths=LENGTHS, slots=st.integers(1, 6), room=st.integers(0, 20), spare=st.integers(0, 3))
@settings(deadline=None, max_examples=80, derandomize=True)
def test_collating_keeps_every_token_once(lengths, slots, room, spare):
    """R17, C16: tokens, segments, positions, starts and labels are right, and filler is 0 with weight 0."""
    encoded = ragged(lengths)
    chosen = np.random.default_rng(len(lengths)).permutation(len(lengths))[: max(1, len(lengths) // 2)]
    shape = Shape(10**6, max(lengths) + room, slots)
    rows = lay_out(encoded, chosen, shape)
    batch = collate(encoded, rows, shape._replace(rows=len(rows) + spare))

    segments, tokens = batch["segment_ids"], batch["input_ids"]
    expected = np.concatenate([np.arange(encoded.offsets[d], encoded.offsets[d + 1]) + 1 for d in sorted(chosen)])
    assert np.array_equal(np.sort(tokens[segments > 0]), expected), "every token of every document once"
    assert np.array_equal(batch["token_type_ids"][segments > 0], tokens[segments > 0] % 2)
    assert held(batch) == sorted(chosen.tolist())
    for r, n in zip(*np.nonzero(batch["index"] >= 0), strict=True):
        document = batch["index"][r, n]
        (where,) = np.nonzero(segments[r] == n + 1)
        begin, length = batch["starts"][r, n], lengths[document]
        assert np.array_equal(where, np.arange(begin, begin + length)), "together, from its start"
        assert np.array_equal(tokens[r, where], np.arange(encoded.offsets[document], encoded.offsets[document + 1]) + 1)
        assert np.array_equal(batch["position_ids"][r, where], np.arange(length)), "positions begin at 0"
        assert batch["label"][r, n] == document + 100 and batch["weight"][r, n] == 1

    filler = segments == 0
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert not batch[name][filler].any()
    empty = batch["index"] < 0
    assert not batch["weight"][empty].any() and not batch["label"][empty].any() and not batch["starts"][empty].any()
    assert batch["weight"].sum() == len(chosen) and batch["weight"].dtype == np.float32
    assert segments[np.arange(len(segments))[:, None], batch["starts"]].shape == empty.shape, "starts are in the row"


def test_layouts_hold_the_same_documents():
    """R17: packed, bucketed and padded batches of a step hold the same documents, tokens and labels."""
    encoded, order = ragged(natural(90).tolist()), Order(90, 16, 2)
    runs = [TrainBatches(encoded, order, declare(Layout(kind=k), encoded, order, 2), 12) for k in KINDS]
    for step in range(12):
        batches = [run[step] for run in runs]
        assert held(batches[0]) == sorted(order.documents(step).tolist())
        for other in batches[1:]:
            assert held(other) == held(batches[0])
            for name, real in (("input_ids", "segment_ids"), ("label", "weight")):
                one, two = (np.sort(b[name][b[real] > 0]) for b in (batches[0], other))
                assert np.array_equal(one, two)


def test_batches_do_not_depend_on_the_number_of_devices():
    """C32, R15: rows rounded up for 1, 2, 3, 4 or 8 devices hold the same documents at each step of two epochs."""
    encoded, order = ragged(natural(50).tolist()), Order(50, 12, 0)
    steps = 2 * order.steps_per_epoch
    ids = {}
    for devices in (1, 2, 3, 4, 8):
        run = TrainBatches(encoded, order, declare(Layout(), encoded, order, devices), steps)
        batches = [run[k] for k in range(steps)]
        assert all(len(b["segment_ids"]) % devices == 0 for b in batches)
        ids[devices] = [held(b) for b in batches]
    assert all(found == ids[1] for found in ids.values())
    for epoch in range(2):
        read = ids[1][epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch]
        assert sorted(itertools.chain(*read)) == list(range(50))


def test_shapes_are_named_for_people():
    """A shape reads as rows times tokens, with its slots where there are several."""
    assert str(Shape(4, 32, 1)) == "4 × 32"
    assert str(Shape(4, 32, 3)) == "4 × 32 (3 slots)"


def test_documents_may_have_several_numbers_each():
    """C16: what a document has in k places stands in [r, n, k], and filler has zeros."""
    encoded = ragged([3, 2, 4])
    answers = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
    batch = collate(
        replace(encoded, documents={**encoded.documents, "answers": answers}), [[2, 0], [1]], Shape(2, 8, 3)
    )
    assert batch["answers"].shape == (2, 3, 2) and batch["answers"].dtype == np.float32
    assert batch["answers"].tolist() == [[[5, 6], [1, 2], [0, 0]], [[3, 4], [0, 0], [0, 0]]]
    assert batch["label"].tolist() == [[102, 100, 0], [101, 0, 0]]
    assert encoded.documents["label"].tolist() == [100, 101, 102], "the documents themselves are not touched"


@given(lengths=LENGTHS, seed=st.integers(0, 5))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_selected_documents_are_whole(lengths, seed):
    """C11: any documents in any order, repeated ones among them, have their own tokens and labels."""
    encoded = ragged(lengths)
    picked = np.random.default_rng(seed).integers(0, len(lengths), 5)
    found = encoded.select(picked)
    for number, document in enumerate(picked):
        for name, values in encoded.tokens.items():
            own = values[encoded.offsets[document] : encoded.offsets[document + 1]]
            assert np.array_equal(found.tokens[name][found.offsets[number] : found.offsets[number + 1]], own)
    assert found.documents["label"].tolist() == (picked + 100).tolist() and len(found) == 5
