"""Augmentation: drawn from seed, document and visit alone; special tokens stay, and documents never grow."""

import itertools
import json

import numpy as np
import pytest
from conftest import WORDS, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import held, natural, same

from sft_jax.config.data import Augment, Layout
from sft_jax.data.augment import Augmentation, augmentation
from sft_jax.data.batch import Encoded, declare
from sft_jax.data.loader import TrainBatches, prefetch
from sft_jax.data.order import Mixing, Order
from sft_jax.data.text import load_tokenizer, tokenize
from sft_jax.errors import ConfigError

CLS, SEP, MASK = 2, 3, 4
ALL = Augment(token_dropout=0.2, swap=0.3, delete=0.2)
SHARES = st.sampled_from([0.0, 0.1, 0.5, 1.0])


def documents(lengths, pair: bool = False) -> Encoded:
    """`[CLS] … [SEP]` of ordinary tokens from 10 on, all different in a document; or pairs, with their types."""
    rows = []
    for length in lengths:
        words = list(range(10, 10 + length))
        second = [*words[length // 2 :], SEP] if pair else []
        first = [CLS, *(words[: length // 2] if pair else words), SEP]
        rows.append(([*first, *second], [0] * len(first) + [1] * len(second)))
    offsets = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    ids, types = (np.concatenate([np.array(row[k], np.int32) for row in rows]) for k in (0, 1))
    return Encoded({"input_ids": ids, "token_type_ids": types}, offsets, {"label": np.arange(len(rows)) + 100})


def rows_of(encoded: Encoded) -> list[list[tuple[int, int]]]:
    """(id, type) of each token of each document."""
    pairs = list(zip(encoded.tokens["input_ids"].tolist(), encoded.tokens["token_type_ids"].tolist(), strict=True))
    return [pairs[a:b] for a, b in itertools.pairwise(encoded.offsets.tolist())]


def changed(section: Augment, encoded: Encoded, visit: int = 0, seed: int = 0) -> list[list[tuple[int, int]]]:
    """All documents on one visit."""
    every = np.arange(len(encoded))
    return rows_of(Augmentation(section, seed, (CLS, SEP), MASK)(encoded, every, np.full(len(encoded), visit)))


@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    dropout=SHARES, swap=SHARES, delete=SHARES, pair=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@settings(deadline=None, max_examples=100, derandomize=True)
def test_what_augmentation_may_do(lengths, dropout, swap, delete, pair, seed):
    """C11: tokens stay in their text and with their type, special ones in place, one ordinary one stays at least."""
    encoded = documents(lengths, pair)
    section = Augment(token_dropout=dropout, swap=swap, delete=delete)
    for before, after in zip(rows_of(encoded), changed(section, encoded, seed=seed), strict=True):
        assert len(after) <= len(before)
        assert [t for t in after if t[0] in (CLS, SEP)] == [t for t in before if t[0] in (CLS, SEP)]
        assert after[0][0] == CLS and after[-1][0] == SEP
        for kind in range(1 + pair):
            texts = [[i for i, k in row if k == kind and i not in (CLS, SEP)] for row in (before, after)]
            ordinary = [i for i in texts[1] if i != MASK]
            assert ordinary and set(ordinary) <= set(texts[0]) and len(set(ordinary)) == len(ordinary)
            if not delete:
                assert len(texts[0]) == len(texts[1])
            if not dropout:
                assert MASK not in texts[1]
            if not swap:
                assert ordinary == sorted(ordinary)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["token_dropout", "swap", "delete"])
def test_rates(kind, share):
    """C26: the share of tokens that are dropped, moved or taken out is the one that was asked for."""
    count, length = 200, 100
    before = documents([length] * count)
    found = changed(Augment(**{kind: share}), before)
    ids = [[i for i, _ in row] for row in found]
    touched = {
        "token_dropout": sum(row.count(MASK) for row in ids),
        "swap": sum(i not in (MASK, 10 + n) for row in ids for n, i in enumerate(row[1:-1])),
        "delete": sum(length + 2 - len(row) for row in ids),
    }
    assert touched[kind] / (count * length) == pytest.approx(share, abs=0.015)  # six standard deviations
    if kind != "delete":  # which moves those behind
        assert sum(touched.values()) == touched[kind]


def test_a_draw_depends_on_seed_document_and_visit_alone():
    """C11, C32: whatever was read before or is read beside it, a document on a visit is the same; others are others."""
    encoded = documents([30] * 12)
    alone = Augmentation(ALL, 0, (CLS, SEP), MASK)
    every = [changed(ALL, encoded, visit) for visit in range(3)]
    mixed = [(5, 2), (0, 0), (11, 1), (5, 0), (5, 2)]
    numbers, visits = (np.array(column) for column in zip(*mixed, strict=True))
    assert rows_of(alone(encoded, numbers, visits)) == [every[visit][number] for number, visit in mixed]
    seen = [str(row) for visit in every for row in visit] + [str(row) for row in changed(ALL, encoded, seed=1)]
    assert len(set(seen)) == 4 * 12


def test_draws_are_stable():
    """C11: what a seed draws is written down here: a resumed run may have another version of numpy."""
    (row,) = changed(ALL, documents([12]), visit=3, seed=7)
    assert [i for i, _ in row] == [2, 11, 12, 13, 4, 15, 4, 4, 16, 19, 20, 4, 3]


def batches_of(kind: str, section: Augment | None, mixing: Mixing | None = None) -> TrainBatches:
    """Two epochs and a bit over 50 documents of very different lengths."""
    encoded = documents((natural(50, longest=60) - 1).tolist())
    order = Order(50, 8, 0, mixing)
    made = None if section is None else Augmentation(section, 0, (CLS, SEP), MASK)
    return TrainBatches(encoded, order, declare(Layout(kind=kind), encoded, order, 1), 17, made)


@pytest.mark.parametrize("kind", ["packed", "bucketed", "padded"])
def test_batches_of_augmented_documents(kind):
    """C11, C12, C29: a batch has the documents it would have, in a declared shape, whatever was read before it."""
    batches, plain = batches_of(kind, Augment(delete=0.5, swap=0.2)), batches_of(kind, None)
    in_turn = list(prefetch(batches, 0, 3))
    assert all(same(in_turn[k], batches[k]) for k in (16, 3, 9, 3))
    assert all(same(batch, in_turn[9 + k]) for k, batch in enumerate(prefetch(batches, 9, 2)))
    for k, batch in enumerate(in_turn):
        assert held(batch) == held(plain[k])
        real = batch["index"] >= 0
        assert np.array_equal(batch["label"][real], batch["index"][real] + 100)
        assert any(batch["segment_ids"].shape == (shape.rows, shape.length) for shape in batches.shapes)
        assert (batch["segment_ids"] > 0).sum() < (plain[k]["segment_ids"] > 0).sum()
        for r, n in zip(*np.nonzero(batch["weight"]), strict=True):
            tokens = batch["input_ids"][r][batch["segment_ids"][r] == n + 1]
            assert (
                tokens[0] == CLS
                and tokens[-1] == SEP
                and batch["starts"][r, n] == np.argmax(batch["segment_ids"][r] == n + 1)
            )


def test_epochs_of_a_mixture_are_visits():
    """C11: a document that a small part gives twice in an epoch is another one each time."""
    part = np.array([0] * 48 + [1, 1])
    batches = batches_of("padded", Augment(swap=1.0), Mixing(part, (1.0, 1.0)))
    first = [batches[k] for k in range(batches.order.steps_per_epoch)]
    rows = [tuple(b["input_ids"][r]) for b in first for r, d in enumerate(b["index"][:, 0]) if d == 48]
    assert len(rows) in (12, 13) and len(set(rows)) > 10


def test_off_is_off(tmp_path):
    """C26: without augmentation nothing is made that could change a batch."""
    write_tokenizer(tmp_path)
    assert augmentation(Augment(), 0, load_tokenizer(tmp_path)) is None
    assert same(batches_of("packed", Augment())[3], batches_of("packed", None)[3]), "and rates of 0 change nothing"


def test_special_tokens_of_a_tokenizer(tmp_path):
    """C26: what the tokenizer puts around texts is special; dropped tokens become its mask, else its unknown token."""
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    made = augmentation(ALL, 3, tokenizer)
    assert made == Augmentation(ALL, 3, (CLS, SEP), MASK)
    tokens = tokenize(tokenizer, [" ".join(WORDS)], [" ".join(WORDS)], 90)
    encoded = Encoded(tokens.fields, tokens.offsets, {})
    (row,) = rows_of(made(encoded, np.array([0]), np.array([0])))
    assert [t for t in row if t[0] in (CLS, SEP)] == [(CLS, 0), (SEP, 0), (SEP, 1)] and (MASK, 1) in row
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    for word, number in (("[MASK]", 1), ("[UNK]", None)):
        written["model"]["vocab"][f"no {word}"] = written["model"]["vocab"].pop(word)
        (tmp_path / "tokenizer.json").write_text(json.dumps(written))
        if number is not None:
            assert augmentation(ALL, 3, load_tokenizer(tmp_path)).dropped == number
    with pytest.raises(ConfigError, match=r"data\.augment\.token_dropout: the tokenizer has none of \[MASK\], <mask>"):
        augmentation(ALL, 3, load_tokenizer(tmp_path))
    assert augmentation(Augment(swap=0.1), 3, load_tokenizer(tmp_path)), "which needs no such token"
