"""Answers of encoder-decoders equal those of `transformers`, token for token, by the rules of the model's files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_parity_seq2seq import MARIAN, T5, loaded, reference_model
from torch_reference import torch

from sft_jax.config.generation import ANYTHING, Generation, Rules
from sft_jax.data.batch import Encoded
from sft_jax.data.text import TextTokenizer
from sft_jax.infer.generate import Generator
from sft_jax.tasks import seq2seq

MOST = 11
ENDS = tuple(range(1, 52, 4))  # so many of the 53 tokens that some answers end early
RULES = {"bad_words_ids": [[52], [7]], "forced_eos_token_id": 1}
CASES = {
    "marian": ("marian", {**MARIAN, "eos_token_id": list(ENDS)}, RULES),
    # With more decoder layers than encoder layers, the cache of the reference is too small.
    "t5": ("t5", {**T5, "num_layers": 3, "eos_token_id": list(ENDS)}, {}),
}
SEARCHES = {
    "greedy": {},
    "4 beams": {"num_beams": 4},
    "4 beams, short": {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True},
    "4 beams, long, to the end": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    "3 beams, long": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(name, the reference, our model, its parameters, what its files say of answers)."""
    family, settings, said = CASES[request.param]
    directory = tmp_path_factory.mktemp("generation") / request.param
    reference = reference_model(family, settings, 0.5, seed=5)
    for name, value in said.items():
        setattr(reference.generation_config, name, value)
    reference.save_pretrained(directory)
    model, params = loaded(directory)
    written = {**json.loads((directory / "config.json").read_text()), **_said(directory)}
    return request.param, reference, model, {p: jnp.asarray(a) for p, a in params.items()}, written


def _said(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "generation_config.json").read_text())


def sources(count: int = 11, longest: int = 15) -> Encoded:
    """Sources of 1 to `longest` random tokens."""
    draw = np.random.default_rng(2)
    lengths = np.concatenate([[1, longest], draw.integers(2, longest, count - 2)])
    ids = draw.integers(8, 52, lengths.sum()).astype(np.int32)
    return Encoded({"input_ids": ids}, np.concatenate([[0], np.cumsum(lengths)]), {})


def theirs(reference: Any, given: Encoded, **settings: Any) -> list[list[int]]:
    """What the reference generates, up to the token that ends an answer; sources padded on the right."""
    ids = np.full((len(given), int(given.lengths.max())), reference.config.pad_token_id, np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(given.lengths):
        ids[row, :length], mask[row, :length] = given.tokens["input_ids"][given.places([row])], 1
    with torch.no_grad():
        found = reference.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=MOST,
            do_sample=False,
            **settings,
        )
    rows = found.numpy()[:, 1:].tolist()
    ends = [next((n for n, token in enumerate(row) if token in ENDS), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def ours(pair: Any, given: Encoded, rules: Rules, settings: dict) -> list[list[int]]:
    """Our answers."""
    _, _, model, params, _ = pair
    generator = Generator(model, Generation(max_new_tokens=MOST, **settings), ENDS, rules)
    return [answer.ids for answer in generator(params, given, 4)]


@pytest.mark.parametrize("search", SEARCHES)
def test_answers_equal_those_of_the_reference(pair, search, record_property):
    """R40 C5: greedy and with beams every token of every answer is that of `generate`; some answers end early.

    Marian's never say what they may not, and are ended where they would be longer than they may.
    """
    given, settings = sources(), SEARCHES[search]
    rules = seq2seq.rules(TextTokenizer(None, answers=pair[4]))
    found, expected = ours(pair, given, rules, settings), theirs(pair[1], given, **settings)
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    record_property("parity", f"{pair[0]}|seq2seq|generation|{wrong}")
    assert found == expected
    assert len({len(answer) for answer in found}) > 1 or "long" in search
    if pair[0] == "marian":
        assert rules == Rules(banned=(52, 7), last=1) and not {7, 52} & {t for answer in found for t in answer}
        assert max(map(len, found)) < MOST, "the last token is one that ends"


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ({"forced_bos_token_id": 30}, {"num_beams": 2}),
        ({"min_length": 6}, {}),
        ({"min_new_tokens": 6}, {"num_beams": 3}),
    ],
    ids=["first", "least", "least and beams"],
)
@pytest.mark.parametrize("pair", ["t5"], indirect=True)
def test_other_rules_equal_those_of_the_reference(pair, said, settings):
    """R57: what an answer must begin with, and how long it is at least."""
    given = sources()
    rules = seq2seq.rules(TextTokenizer(None, answers={**pair[4], **said}))
    found = ours(pair, given, rules, settings)
    assert found == theirs(pair[1], given, **settings, **said)
    assert found != ours(pair, given, ANYTHING, settings), "the rule does something"


@pytest.mark.parametrize("settings", [{}, {"num_beams": 4}], ids=["greedy", "beams"])
@pytest.mark.parametrize("pair", ["t5"], indirect=True)
def test_banned_tokens_equal_those_of_the_reference(pair, settings):
    """R57: the token that is said most is said no more; those that end an answer are never banned, whoever says so."""
    given = sources()
    free = ours(pair, given, ANYTHING, settings)
    common = Counter(token for answer in free for token in answer).most_common(1)[0][0]
    said = {"bad_words_ids": [[common], *([end] for end in ENDS)]}
    found = ours(pair, given, seq2seq.rules(TextTokenizer(None, answers={**pair[4], **said})), settings)
    assert found == theirs(pair[1], given, **settings, **said)
    assert not any(common in answer for answer in found) and min(map(len, found)) < MOST


@pytest.mark.parametrize("pair", ["marian"], indirect=True)
def test_the_comparison_sees_a_lost_rule(pair):
    """Negative control: without the rules of its files Marian answers otherwise."""
    given = sources()
    assert ours(pair, given, ANYTHING, {}) != theirs(pair[1], given)


@pytest.mark.parametrize("pair", ["t5"], indirect=True)
def test_the_batch_changes_no_answer(pair):
    """C24 R40: an answer is the same alone and among sources of other lengths; each of two buckets compiles once."""
    given, before = sources(longest=19), Generator._answers._cache_size()
    together = ours(pair, given, ANYTHING, {"num_beams": 2})
    assert Generator._answers._cache_size() - before == 2
    alone = [ours(pair, given.select(np.array([n])), ANYTHING, {"num_beams": 2})[0] for n in (0, 1, 4)]
    assert alone == [together[n] for n in (0, 1, 4)]
