"""Marian's tokenizer equals that of `transformers`, and sources and targets are the tokens that models are given."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from translations import pairs, write_marian, write_t5

from sft_jax.data import pairs as paired
from sft_jax.data.pairs import encode_pairs, encode_sources
from sft_jax.data.text import TextTokenizer, fingerprint, load_tokenizer, tokenizer_files
from sft_jax.errors import ModelError

TEXTS = ["bara cela dori", "  Bara,  cela!\n", "naïve 漢字 ½", ">>fr<< bara", ">>xx<< bara", "", "▁bara", "</s> bara"]


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Marian directory."""
    return write_marian(tmp_path_factory.mktemp("marian"))


@pytest.fixture(scope="module")
def reference(marian):
    """The tokenizer of `transformers` on it."""
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a package that normalises punctuation, which it does not need
        return transformers.MarianTokenizer.from_pretrained(marian)


def test_tokens_equal_those_of_transformers(marian, reference):
    """R57: sources by one model and targets by the other, each with its end; unknown pieces and codes alike."""
    tokenizer = load_tokenizer(marian)
    texts = [*TEXTS[:-1], *(text for pair in pairs(30, seed=3) for text in pair)]
    for text in texts:
        assert tokenizer.fast.encode(text).ids == reference(text).input_ids, text
        assert tokenizer.writer.encode(text).ids == reference(text_target=text).input_ids, text
    assert any(tokenizer.fast.encode(t).ids != tokenizer.writer.encode(t).ids for t in texts)


def test_texts_equal_those_of_transformers(marian, reference):
    """R57: what tokens mean, with and without the special ones among them."""
    tokenizer, draw = load_tokenizer(marian), np.random.default_rng(0)
    count = len(json.loads((marian / "vocab.json").read_text()))
    for _ in range(30):
        ids = draw.integers(0, count, 12).tolist()
        for skip in (True, False):
            expected = reference.decode(ids, skip_special_tokens=skip, use_source_tokenizer=False)
            assert tokenizer.writer.decode(ids, skip_special_tokens=skip) == expected


def test_files_go_into_exports_and_fingerprints(marian, tmp_path):
    """R57: both models and the ids are copied as they are, and a change of any of them is another tokenizer."""
    files = tokenizer_files(marian)
    assert {"source.spm", "target.spm", "vocab.json", "tokenizer_config.json"} <= files.keys()
    assert all(content == (marian / name).read_bytes() for name, content in files.items())
    digests = {fingerprint({**files, name: files[name] + b" "}) for name in ("source.spm", "target.spm", "vocab.json")}
    assert len({fingerprint(files), *digests}) == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("vocab.json", b"[1]", "vocab.json holds no ids by piece"),
        ("vocab.json", b'{"a": 0}', "vocab.json lacks </s>, <unk>"),
        ("target.spm", b"no model", "its tokenizer cannot be loaded"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, said):
    """R33: what is broken is one line that says which directory and how to mend it."""
    home = write_marian(tmp_path)
    (home / name).write_bytes(content)
    with pytest.raises(ModelError, match=said):
        load_tokenizer(home)


def spelled(tokenizer: TextTokenizer, ids: np.ndarray) -> str:
    """Tokens as pieces."""
    return " ".join(str(tokenizer.fast.id_to_token(number)) for number in ids.tolist())


def test_targets_are_read_one_token_later(tmp_path):
    """C6: a target is read with the start before it, and each token has the one after it to be learned, the end too."""
    tokenizer = load_tokenizer(write_t5(tmp_path))
    found = encode_pairs(tokenizer, ["bara cela", "dori"], ["alec arab", "irod"], 9, 9)
    assert spelled(tokenizer, found.tokens["input_ids"]) == "bara cela </s> dori </s>"
    target = found.target
    assert target and target.offsets.tolist() == [0, 3, 5] and target.tokens["token_weight"].tolist() == [1] * 5
    assert spelled(tokenizer, target.tokens["decoder_input_ids"]) == "<pad> alec arab <pad> irod"
    assert spelled(tokenizer, target.tokens["label"]) == "alec arab </s> irod </s>"


def test_what_is_too_long_is_cut(tmp_path):
    """C5 C9: a source keeps its end, a target loses it, since it does not end there; both are counted."""
    tokenizer = load_tokenizer(write_t5(tmp_path))
    found = encode_pairs(tokenizer, ["bara cela dori", "bara"], ["alec arab irod", "arab alec irod"], 3, 2)
    assert spelled(tokenizer, found.tokens["input_ids"]) == "bara cela </s> bara </s>" and found.truncated == 1
    assert found.target and found.target.truncated == 2
    assert spelled(tokenizer, found.target.tokens["label"]) == "alec arab arab alec"
    assert encode_sources(tokenizer, ["bara cela dori"], 3).tokens["input_ids"].tolist() == found.tokens[
        "input_ids"
    ].tolist()[:3]  # fmt: skip


def test_pairs_are_kept(marian, tmp_path, monkeypatch):
    """R11: the second time they come from the cache, equal in every field; another length is no find."""
    from dataclasses import replace

    tokenizer = replace(load_tokenizer(marian), home=tmp_path / "cache")
    given = list(zip(*pairs(9), strict=True))
    first = encode_pairs(tokenizer, *given, 20, 20)
    made: list[int] = []
    real = paired._pairs
    monkeypatch.setattr(paired, "_pairs", lambda *given: made.append(1) or real(*given))
    again = encode_pairs(tokenizer, *given, 20, 20)
    assert not made and first.target and again.target
    for one, other in ((first, again), (first.target, again.target)):
        assert one.tokens.keys() == other.tokens.keys() and one.truncated == other.truncated
        assert all(np.array_equal(one.tokens[n], other.tokens[n]) for n in one.tokens)
        assert np.array_equal(one.offsets, other.offsets)
    encode_pairs(tokenizer, *given, 20, 19)
    encode_pairs(replace(tokenizer, targets=tokenizer.fast), *given, 20, 20)
    assert len(made) == 2


def test_a_model_that_begins_with_nothing_is_refused(tmp_path):
    """C6: without a token that answers begin with nothing is guessed."""
    home = write_t5(tmp_path)
    config = json.loads((home / "config.json").read_text()) | {"decoder_start_token_id": None}
    (home / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(home)
    with pytest.raises(ModelError, match=r"decoder_start_token_id is None, expected the token that answers begin"):
        encode_pairs(tokenizer, ["bara"], ["arab"], 9, 9)
