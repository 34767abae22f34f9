"""Tokenisation: the same ids as `transformers`, whatever the tokenizer file asks for besides."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SPECIAL, WORDS, write_tokenizer

from sft_jax.assets import ASSETS, cache
from sft_jax.data.text import load_tokenizer, tokenize
from sft_jax.errors import ConfigError, ModelError

ODD = "\t\n\u00a0\u200b\u200d\u2028\u202eéßİıñçœſ漢字かなカナ한글עבריתالعربيةไทย🎉👩🏽🇩🇪"
ODD += "'\"`´’“”…—–-_@#$%^&*()[]{}<>|\\/~=+"


def odd_texts(count: int, seed: int) -> list[str]:
    """Texts of words, unknown words, odd characters, special tokens as text, and of very different lengths."""
    draw = np.random.default_rng(seed)
    pieces = [*WORDS, *WORDS, "unknownword", "Film", "isn't", "100%", "[MASK]", "[SEP]", "http://a.b/c?d=e", *ODD]
    texts = [" ".join(draw.choice(pieces, size=int(draw.integers(1, 60)))) for _ in range(count - 3)]
    return [*texts, "a", "x" * 300, "".join(ODD)]


def unpacked(tokens) -> list[list[tuple[int, int]]]:
    """(id, type) of each token of each document."""
    pairs = list(zip(tokens.fields["input_ids"].tolist(), tokens.fields["token_type_ids"].tolist(), strict=True))
    return [pairs[a:b] for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def reference(directory: Path, texts, pairs, max_length: int) -> list[list[tuple[int, int]]]:
    """What `transformers` makes of the same texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    found = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_token_type_ids=True)
    return [list(zip(*both, strict=True)) for both in zip(found["input_ids"], found["token_type_ids"], strict=True)]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory) -> Path:
    """The tokenizer that `transformers` saved, `tokenizer.json` and `tokenizer_config.json`."""
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **names).save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize("max_length", [4, 7, 16, 512])
@pytest.mark.parametrize("paired", [False, True], ids=["texts", "pairs"])
def test_tokens_equal_those_of_transformers(max_length, paired, tokenizer_directory):
    """C7: ids, types and truncation of texts and of pairs are those of `AutoTokenizer`, token for token."""
    texts = odd_texts(120, 0)
    pairs = odd_texts(120, 1) if paired else None
    found = tokenize(load_tokenizer(tokenizer_directory), texts, pairs, max_length)
    assert unpacked(found) == reference(tokenizer_directory, texts, pairs, max_length)
    assert np.diff(found.offsets).max() <= max_length
    assert all(field.dtype == np.int32 for field in found.fields.values())


@pytest.mark.parametrize("paired", [False, True], ids=["texts", "pairs"])
def test_a_real_tokenizer_gives_the_ids_of_transformers(paired):
    """C7: on 200 odd texts the packaged MiniLM tokenizer gives the ids that `AutoTokenizer` gives."""
    directory = cache() / f"minilm-{ASSETS['minilm'].sha256[:12]}"
    if not (directory / "tokenizer.json").is_file():
        pytest.skip("asset:minilm is not in the cache; fetch it with any run on it")
    texts = odd_texts(200, 2)
    pairs = odd_texts(200, 3) if paired else None
    found = tokenize(load_tokenizer(directory), texts, pairs, 48)
    assert unpacked(found) == reference(directory, texts, pairs, 48)
    assert 0 < found.truncated < 200


@pytest.mark.parametrize("max_length", [3, 5, 6])
def test_documents_that_were_cut_are_counted(max_length, tokenizer_directory):
    """C9: the count is of the documents that lost a token, those that just fit not among them."""
    texts = [" ".join(["bara"] * n) for n in (1, 2, 3, 4, 5, 6)]
    found = tokenize(load_tokenizer(tokenizer_directory), texts, None, max_length)
    assert found.truncated == sum(n + 2 > max_length for n in (1, 2, 3, 4, 5, 6))
    assert np.diff(found.offsets).tolist() == [min(n + 2, max_length) for n in (1, 2, 3, 4, 5, 6)]
    assert found.fields["input_ids"][found.offsets[1:] - 1].tolist() == [3] * 6, "each still ends with [SEP]"


def test_settings_inside_the_tokenizer_file_are_overridden(tmp_path):
    """C6, fault N: of truncation and padding that `tokenizer.json` brings along the side is obeyed, as there, and
    nothing else."""
    write_tokenizer(tmp_path)
    texts = ["bara bare bari baro barum cela", "bara"]
    plain = tokenize(load_tokenizer(tmp_path), texts, None, 20)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "OnlyFirst", "stride": 1}
    written["padding"] = {
        "strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": 8,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    loaded = load_tokenizer(tmp_path)
    assert loaded.fast.padding and loaded.fast.truncation, "the file does bring them along"
    assert unpacked(tokenize(loaded, texts, None, 20)) == unpacked(plain)
    shorter = unpacked(tokenize(loaded, texts, None, 5))
    assert shorter[0] == [unpacked(plain)[0][0], *unpacked(plain)[0][-4:]], "the beginning is cut, not the end"


def test_a_length_is_not_remembered(tokenizer_directory):
    """Tokenising short and then long gives the long document whole."""
    tokenizer = load_tokenizer(tokenizer_directory)
    assert tokenize(tokenizer, ["bara " * 9], None, 5).offsets[-1] == 5
    assert tokenize(tokenizer, ["bara " * 9], None, 50).offsets[-1] == 11


@pytest.mark.parametrize(("pairs", "special"), [(None, 2), (["cela"], 3)])
def test_a_length_without_room_for_text_is_refused(pairs, special, tokenizer_directory):
    """C9: special tokens alone must not be all that is left of a document."""
    tokenizer = load_tokenizer(tokenizer_directory)
    assert tokenize(tokenizer, ["bara"], pairs, special + 1).offsets[-1] == special + 1
    with pytest.raises(ConfigError) as caught:
        tokenize(tokenizer, ["bara"], pairs, special)
    expected = f"data.max_length: {special} leaves no room beside {special} special tokens; raise it"
    assert str(caught.value) == expected


def test_texts_without_words_are_documents_still(tokenizer_directory):
    """A text that is all unknown or all spaces has its special tokens and its place among the others."""
    found = unpacked(tokenize(load_tokenizer(tokenizer_directory), ["bara", " ", "漢", "bara"], None, 8))
    assert [len(document) for document in found] == [3, 2, 3, 3]
    assert found[0] == found[3]


def test_files_of_old_releases_are_converted(tmp_path):
    """A directory that has `vocab.txt` and no `tokenizer.json` gives the ids of `AutoTokenizer`."""
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    texts = ["bara bare", "Cela [SEP] unknown"]
    found = unpacked(tokenize(load_tokenizer(tmp_path), texts, None, 16))
    assert found == reference(tmp_path, texts, None, 16)
    assert [i for i, _ in found[0]] == [2, 5, 6, 3]


@pytest.mark.parametrize("content", ["", "{", "{}", "[1, 2]", '{"version": "1.0", "model": {"type": "Nonesuch"}}'])
def test_a_broken_tokenizer_is_one_clear_line(content, tmp_path):
    """A tokenizer file that is cut off or is no tokenizer is named with the remedy in one line."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: its tokenizer cannot be loaded (") and "\n" not in message
    assert message.endswith("; fetch tokenizer.json again, or save one there")


def test_a_directory_without_tokenizer_is_one_clear_line(tmp_path):
    """No tokenizer file at all is an error, where `transformers` would make up one that knows no word."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match=r"no tokenizer\.json and none of vocab\.txt, .*\); fetch tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path):
    """R33: a tokenizer that names Python files to import is not imported, whether of the fast or of the old form."""
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    write_tokenizer(tmp_path)
    load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with contextlib.suppress(ModelError):  # to refuse is as good as to do without
        load_tokenizer(tmp_path)
    assert not canary.exists()


def test_what_is_said_of_answers_in_two_files(tmp_path):
    """Fault E: beside `generation_config.json` the rules of answers in `config.json` are not read, as there."""
    write_tokenizer(tmp_path)
    said = {"model_type": "bert", "forced_eos_token_id": 3, "no_repeat_ngram_size": 2, "decoder_start_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert load_tokenizer(tmp_path).answers == said
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_tokenizer(tmp_path).answers == {"decoder_start_token_id": 5, "eos_token_id": 7}
