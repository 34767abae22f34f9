"""The tokenizer of a GGUF file: the model's own tokens, and a directory that says the same."""

import json
import random
import re
from pathlib import Path

import pytest
from made_gguf import TEMPLATE, TOKENS, WHOLE, write_gguf

from sft_jax import assets
from sft_jax.data.text import FAST, SETTINGS, fingerprint, load_tokenizer, tokenizer_files
from sft_jax.gguf import read_header

SMOLLM2 = assets.cache() / f"smollm2-{assets.ASSETS['smollm2'].sha256[:12]}" / assets.ASSETS["smollm2"].files[0]
real = pytest.mark.skipif(not SMOLLM2.is_file(), reason="asset:smollm2 is not in the cache; fetch it by using it once")
PIECES = (
    "hello", " world", "12345", " 12", "½", "٣", "\n", "\t", "  ", "   ", "<|im_start|>", "<|im_end|>", "é", "日本語",
    "🙂", "👩‍👩‍👧", "'s", "'LL", "don't", "_", "--", "…", "\u00a0", "\r\n", "\u200b", "a\u0301", "Ünïcode",
    "<repo_name>", "#",
    "()", "%d", "x=1", "http://a.b/c?d=1", "ﬁ", "\ufeff", "З", "ا",
)  # fmt: skip


def tokens(file: Path, text: str) -> list[str]:
    """The tokens of a text."""
    return load_tokenizer(file).fast.encode(text).tokens


def test_vocabulary_and_special_tokens(tmp_path):
    """R57: ids are places in the file's list; control tokens are special, those of users are found whole in a text."""
    write_gguf(tmp_path / "model.gguf")
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    assert [tokenizer.fast.id_to_token(i) for i in range(len(TOKENS))] == TOKENS
    assert tokenizer.fast.get_vocab_size() == len(TOKENS)
    assert tokenizer.special == {"bos_token": "<|user|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    assert tokenizer.id("eos_token") == 0 and tokenizer.id("unk_token") is None and tokenizer.template == TEMPLATE
    encoded = tokenizer.fast.encode(f"hello<|end|>{WHOLE}é")
    assert encoded.tokens == ["hello", "<|end|>", WHOLE, "Ã", "©"]
    assert tokenizer.fast.decode(encoded.ids) == f"hello{WHOLE}é"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["hello", "Ġ", "Ġ", "12", "a", "Ì", "ģ"]),
        ("smollm", ["hello", "ĠĠ", "1", "2", "a", "Ì", "ģ"]),
        ("llama-bpe", ["<|user|>", "hello", "Ġ", "Ġ", "12", "a", "Ì", "ģ"]),
        ("qwen2", ["hello", "Ġ", "Ġ", "1", "2", "Ã", "¡"]),
    ],
)
def test_texts_are_split_as_the_model_splits_them(pre, expected, tmp_path):
    """C7: digits alone or together, blanks, normal form and the token at the beginning are those of each kind."""
    write_gguf(tmp_path / "model.gguf", tokenizer={"pre": pre})
    assert tokens(tmp_path / "model.gguf", "hello  12a\u0301") == expected


def test_what_texts_begin_and_end_with(tmp_path):
    """C7: the file decides whether texts begin or end with a token of their own, whatever its kind is."""
    write_gguf(tmp_path / "model.gguf", tokenizer={"pre": "llama-bpe", "add_bos_token": False, "add_eos_token": True})
    tokenizer = load_tokenizer(tmp_path / "model.gguf").fast
    assert tokenizer.encode("12").tokens == ["12", "<|end|>"]
    assert tokenizer.encode("12", "hello").tokens == ["12", "<|end|>", "hello", "<|end|>"]
    write_gguf(tmp_path / "both.gguf", tokenizer={"add_bos_token": True})
    assert tokens(tmp_path / "both.gguf", "12") == ["<|user|>", "12"]


def test_the_files_of_a_directory_say_the_same(tmp_path):
    """R57: written as a directory's files, the tokenizer and the template are the same for us and `transformers`."""
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "model.gguf", tokenizer={"pre": "smollm"})
    home = tmp_path / "home"
    home.mkdir()
    for name, content in tokenizer_files(tmp_path / "model.gguf").items():
        (home / name).write_bytes(content)
    ours, copy = load_tokenizer(tmp_path / "model.gguf"), load_tokenizer(home)
    assert copy.fast.to_str() == ours.fast.to_str()
    assert copy.special == ours.special and copy.template == ours.template == TEMPLATE
    assert fingerprint(tokenizer_files(home)) == fingerprint(tokenizer_files(tmp_path / "model.gguf"))
    theirs = AutoTokenizer.from_pretrained(home)
    text = "hello  12<|end|> é"
    assert theirs(text)["input_ids"] == ours.fast.encode(text).ids and theirs.eos_token_id == 0
    assert theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|user|>x<|end|>"


def test_another_tokenizer_has_another_fingerprint(tmp_path):
    """R52: the fingerprint changes with the way of splitting, the special tokens and the template, not with weights."""
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", "qwen2")
    write_gguf(tmp_path / "c.gguf", tokenizer={"pre": "smollm"})
    write_gguf(tmp_path / "d.gguf", tokenizer={"eos_token_id": 2})
    prints = [fingerprint(tokenizer_files(tmp_path / f"{letter}.gguf")) for letter in "abcd"]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@real
def test_ids_are_those_of_transformers():
    """C7: on odd texts, SmolLM2's ids are those that `transformers` gives, but for digits after blanks.

    There `transformers` leaves out that the model's own tokenizer takes each digit alone, and splits the blanks.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(SMOLLM2.parent), gguf_file=SMOLLM2.name)
    ours = load_tokenizer(SMOLLM2).fast
    draw = random.Random(0)
    texts = ["".join(draw.choice(PIECES) for _ in range(draw.randint(0, 14))) for _ in range(200)]
    other = [text for text in texts if ours.encode(text).ids != theirs(text)["input_ids"]]
    assert len(other) < 40 and all(re.search(r"\s\s+[\d½]|\s½", text) for text in other)
    assert all(ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text for text in texts)
    assert ours.encode("  12345").tokens == ["ĠĠ", "1", "2", "3", "4", "5"]


@real
def test_special_tokens_of_smollm2():
    """C6: pad and end are one token in SmolLM2, and the template renders turns that end with it."""
    tokenizer = load_tokenizer(SMOLLM2)
    assert tokenizer.id("pad_token") == tokenizer.id("eos_token") == 2 and tokenizer.id("bos_token") == 1
    assert tokenizer.template is not None and "<|im_end|>" in tokenizer.template
    settings = json.loads(tokenizer_files(SMOLLM2)[SETTINGS])
    assert settings["chat_template"] == tokenizer.template and settings["eos_token"] == "<|im_end|>"
    assert (
        len(read_header(SMOLLM2).tensors) == 272
        and json.loads(tokenizer_files(SMOLLM2)[FAST])["model"]["type"] == "BPE"
    )
