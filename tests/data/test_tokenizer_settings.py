"""What the files beside `tokenizer.json` change is what `AutoTokenizer` of `transformers` makes of them (fault N)."""

import ast
import importlib.util
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    ByteLevelBPETokenizer,
    SentencePieceUnigramTokenizer,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer
from transformers import logging as transformers_logging

from sft_jax.data.answers import Passage, encode_passages
from sft_jax.data.pairs import encode_sources
from sft_jax.data.settings import ALIASES, OTHERS, OWN
from sft_jax.data.text import load_tokenizer, tokenize
from sft_jax.errors import ModelError

TEXTS = [
    "The FILM was, sadly, not good!",
    "naïve CAFÉ — 漢字 and ½",
    " leading and   many    spaces\ttabs ",
    "[MASK] a <mask> in <s> the </s> text <|endoftext|> <extra_id_3> X1 <new>",
    "a long text " * 9,
    "don't we'Ve 12345 <s>the film",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TOKEN = {"lstrip": True, "rstrip": False, "normalized": True, "single_word": False, "special": False}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"truncation_side": "left"},
    {"do_lower_case": False, "tokenize_chinese_chars": False},
    {"strip_accents": False, "do_lower_case": True},
    {"add_prefix_space": True, "legacy": True},
    {"add_prefix_space": False, "trim_offsets": False},
    {"add_bos_token": True, "add_eos_token": True, "padding_side": "left"},
    {"model_input_names": ["input_ids", "attention_mask"]},
    {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
    {"extra_special_tokens": {"image_token": "<new>"}, "clean_up_tokenization_spaces": True},
    {"additional_special_tokens": ["X1"], "mask_token": "<new>"},
    {"added_tokens_decoder": {"400": {"content": "<new>", **TOKEN}}, "from_slow": True},
    {"pad_token": "film", "eos_token": "text"},
]
BESIDE = {"special_tokens_map.json": {"pad_token": "<new>", "cls_token": "the"}, "added_tokens.json": {"X1": 900}}
# Kind of `tokenizer.json` -> (model type, class) of those that read it.
READ_BY = {
    "words": [("bert", None), ("bert", "PreTrainedTokenizerFast"), ("distilbert", "DistilBertTokenizerFast")],
    "bytes": [
        ("gpt2", None),
        ("roberta", None),
        ("qwen3", "Qwen2TokenizerFast"),
        ("llama", "LlamaTokenizerFast"),
        ("qwen2", "LlamaTokenizerFast"),
        ("phi3", "GPT2Tokenizer"),
    ],
    "scores": [("xlm-roberta", None), ("camembert", "CamembertTokenizer"), ("t5", None), ("t5", "TokenizersBackend")],
    "merges": [("llama", "LlamaTokenizer"), ("gemma", None), ("mistral", "LlamaTokenizer"), ("llama", "Nonesuch")],
}
CASES = [(kind, *reader) for kind, readers in READ_BY.items() for reader in readers]


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """A `tokenizer.json` of each kind that says otherwise than its class does in most respects."""
    corpus = [*TEXTS, "the film was good and bad, goodly badly"] * 3
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    pieces += [*(f"##{c}" for c in string.ascii_lowercase), "the", "The", "film", "##ly", ",", "漢", "##é", "FILM"]
    words = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False, strip_accents=False)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [SEP] $B:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    raw = ByteLevelBPETokenizer(add_prefix_space=True)
    raw.train_from_iterator(corpus, 330, special_tokens=[*SPECIAL, "<|endoftext|>"], show_progress=False)
    whole = Tokenizer.from_str(raw.to_str())
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 0)]
    )
    scores = SentencePieceUnigramTokenizer()
    scores.train_from_iterator(corpus, 110, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    merges = Tokenizer(models.BPE(unk_token="<unk>"))
    merges.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    merges.train_from_iterator(corpus, trainer)
    return {"words": words.to_str(), "bytes": whole.to_str(), "scores": scores.to_str(), "merges": merges.to_str()}


def written(home: Path, whole: str, model_type: str, settings: dict[str, Any], beside: dict[str, Any]) -> Path:
    """A directory with these files."""
    for old in home.iterdir():
        old.unlink()
    files = {"tokenizer_config.json": settings, "config.json": {"model_type": model_type}, **beside}
    for name, content in files.items():
        (home / name).write_text(json.dumps(content))
    (home / "tokenizer.json").write_text(whole)
    return home


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "model_type", "name"), CASES)
def test_settings_are_obeyed_as_by_auto_tokenizer(kind, model_type, name, made, tmp_path):
    """Fault N: ids of texts and pairs, whole and cut, and decoded texts equal those of `AutoTokenizer`."""
    transformers_logging.set_verbosity_error()
    declared = {"tokenizer_class": name} if name else {}
    tried = [*((settings, {}) for settings in SETTINGS), *(({}, {file: said}) for file, said in BESIDE.items())]
    plain: list[Any] = []
    for settings, beside in tried:
        home = written(tmp_path, made[kind], model_type, {**declared, **settings}, beside)
        theirs, ours = AutoTokenizer.from_pretrained(str(home)), load_tokenizer(home)
        for length in (8, 100):
            for pairs in (None, TEXTS[::-1]):
                expected = theirs(TEXTS, pairs, truncation=True, max_length=length)
                found = tokenize(ours, TEXTS, pairs, length)
                flat = [number for ids in expected["input_ids"] for number in ids]
                assert found.fields["input_ids"].tolist() == flat, (settings, beside, length)
                types = [number for row in expected.get("token_type_ids", []) for number in row] or [0] * len(flat)
                if model_type == "bert":  # the only one whose model reads them
                    assert found.fields["token_type_ids"].tolist() == types, (settings, beside, length)
        ids = theirs("the film , was good . do n't")["input_ids"]
        assert ours.text(ids) == theirs.decode(ids, skip_special_tokens=True)
        plain.append((flat, ours.left))
    assert len({str(one) for one in plain}) > 2  # control: settings do something


@pytest.mark.parametrize("side", ["left", "right"])
def test_sources_are_cut_where_texts_are(side, made, tmp_path):
    """Fault N: what an encoder-decoder reads loses the end that the tokenizer names, and keeps its own end token."""
    home = written(tmp_path, made["scores"], "t5", {"truncation_side": side}, {})
    texts = [TEXTS[0], TEXTS[4]]  # in which all is known
    expected = AutoTokenizer.from_pretrained(str(home))(texts, truncation=True, max_length=8)["input_ids"]
    found = encode_sources(load_tokenizer(home), texts, 8)
    assert found.tokens["input_ids"].tolist() == [number for ids in expected for number in ids]


@pytest.mark.parametrize(("kind", "model_type", "settings", "said"), [
    ("words", "bert", {"split_special_tokens": True}, "split_special_tokens=True is not supported"),
    ("words", "bert", {"truncation_side": "middle"}, "truncation_side is 'middle', expected left or right"),
    ("words", "gpt2", {}, "holds a WordPiece, and GPT2Tokenizer, by which transformers reads it, is for a BPE"),
    ("bytes", "gpt2", {"tokenizer_class": "WhisperTokenizerFast"}, "WhisperTokenizer builds a tokenizer of its own"),
])  # fmt: skip
def test_what_is_not_obeyed_is_refused_by_name(kind, model_type, settings, said, made, tmp_path):
    """Fault N: a setting or a class that is not built here is refused, with what to set instead."""
    with pytest.raises(ModelError, match=re.escape(said)):
        load_tokenizer(written(tmp_path, made[kind], model_type, settings, {}))


def test_every_class_of_the_reference_is_known():
    """Fault N: each tokenizer class of the installed `transformers` is built here or refused by name."""
    home = Path(next(iter(importlib.util.find_spec("transformers").submodule_search_locations)))

    def classes() -> Iterator[str]:
        for file in (home / "models").glob("*/tokenization_*.py"):
            nodes = [
                node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
            ]
            yield from (
                node.name for node in nodes if re.search("Backend|Tokenizer", str(list(map(ast.unparse, node.bases))))
            )

    known = {*OWN, *ALIASES, *(f"{name}Tokenizer" for name in OTHERS)}
    left = {name for name in classes() if name.endswith("Tokenizer")} - known
    assert left == set()


def test_passages_are_cut_where_texts_are(made, tmp_path):
    """Fault N: documents of a language model lose the end that the tokenizer names, as texts do."""
    home = written(tmp_path, made["merges"], "llama", {"truncation_side": "left", "eos_token": "</s>"}, {})
    tokenizer = load_tokenizer(home)
    whole = encode_passages(tokenizer, [Passage(TEXTS[0], ((0, len(TEXTS[0])),))], 100, framed=True)
    cut = encode_passages(tokenizer, [Passage(TEXTS[0], ((0, len(TEXTS[0])),))], 8, framed=True)
    assert cut.tokens["input_ids"].tolist() == whole.tokens["input_ids"].tolist()[-8:] and cut.truncated == 1
    assert cut.tokens["label"].tolist()[:-1] == whole.tokens["label"].tolist()[-8:-1]
    assert cut.tokens["token_weight"].tolist() == [1] * 7 + [0]
