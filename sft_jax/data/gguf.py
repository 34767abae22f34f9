"""The tokenizer of a GGUF file, from its metadata: byte-level BPE, special tokens and the chat template.

Texts are split as the model's own tokenizer splits them, which is not always how readers of GGUF files do: SmolLM2
takes each digit alone, also after blanks. A kind of splitting that is not known is refused, since it would give other
tokens without a word.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sft_jax.errors import ModelError, did_you_mean, reason
from sft_jax.gguf import read_header

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEMPLATE = "tokenizer.chat_template"  # key of the chat template, and with a name behind it of another
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens: those that no text may hold, and those that are found whole in it
# Special token -> key of its id, after `tokenizer.ggml.`.
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _by(pattern: str) -> Callable[[], Any]:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return lambda: pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@dataclass(frozen=True)
class Splitting:
    """What happens to a text before its bytes are merged."""

    pieces: Callable[[], Any]
    composed: bool = False  # to NFC first
    whole_words: bool = False  # a piece that is a token is taken as it is, whatever the merges say
    begins: bool = False  # texts begin with a token of their own, unless the file says otherwise


# `tokenizer.ggml.pre` -> how it splits. One line a kind.
SPLITTINGS = {
    "gpt-2": Splitting(_gpt2),
    "smollm": Splitting(_digits),
    "llama-bpe": Splitting(_by(LLAMA3), whole_words=True, begins=True),
    "qwen2": Splitting(_by(QWEN2), composed=True),
}


def read_tokenizer(file: Path) -> tuple[Tokenizer, dict[str, str], str | None, dict[str, str]]:
    """(tokenizer, special tokens by name, chat template, more templates by name) of a GGUF file; a ModelError where it
    is not understood."""
    metadata = read_header(file).metadata
    said = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    kind, pre = said.get("model"), said.get("pre")
    if kind != "gpt2":
        raise ModelError(f"{file}: a tokenizer of kind {kind!r:.40}; only 'gpt2', which is byte-level BPE, is read")
    if not isinstance(pre, str) or pre not in SPLITTINGS:
        known = ", ".join(SPLITTINGS)
        hint = did_you_mean(str(pre), SPLITTINGS)
        raise ModelError(f"{file}: a tokenizer that splits texts as {pre!r:.40} is not read{hint} (known: {known})")
    tokens, merges = said.get("tokens"), said.get("merges")
    kinds = said.get("token_type", np.zeros(len(tokens) if isinstance(tokens, list) else 0, np.int32))
    pairs = [tuple(merge.split(" ")) for merge in merges] if isinstance(merges, list) else []
    if not isinstance(tokens, list) or not tokens or not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise ModelError(f"{file}: its tokenizer has no list of tokens with the kind of each; fetch it again")
    if len(set(tokens)) < len(tokens) or not pairs or any(len(pair) != 2 for pair in pairs):
        raise ModelError(f"{file}: its tokenizer has a token twice, or merges that are no pairs; fetch it again")
    special = {}
    for name, key in SPECIAL.items():
        if key in said:
            if type(said[key]) is not int or not 0 <= said[key] < len(tokens):
                raise ModelError(
                    f"{file}: tokenizer.ggml.{key} is {said[key]!r:.40}, of {len(tokens)} tokens; fetch it again"
                )
            special[name] = tokens[said[key]]
    begins = said.get("add_bos_token", SPLITTINGS[pre].begins), said.get("add_eos_token", False)
    try:
        tokenizer = _built(tokens, kinds, pairs, SPLITTINGS[pre])
    except Exception as error:  # the tokenizer library raises bare Exception for merges of what is no token
        raise ModelError(f"{file}: its tokenizer cannot be built ({reason(error)}); fetch it again") from None
    _frame(tokenizer, special, *begins)
    template = metadata.get(TEMPLATE)
    of_names = {key.removeprefix(f"{TEMPLATE}."): v for key, v in metadata.items() if key.startswith(f"{TEMPLATE}.")}
    named = {name: text for name, text in of_names.items() if isinstance(text, str)}
    return tokenizer, special, template if isinstance(template, str) else None, named


def _built(tokens: list[str], kinds: np.ndarray, merges: list[Any], splitting: Splitting) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words))
    if splitting.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting.pieces()
    tokenizer.decoder = decoders.ByteLevel()
    for kind in (CONTROL, USER_DEFINED):
        special = kind == CONTROL
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, of_kind in zip(tokens, kinds.tolist(), strict=True)
            if of_kind == kind and token
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    return tokenizer


def _frame(tokenizer: Tokenizer, special: dict[str, str], begin: object, end: object) -> None:
    """Let texts begin and end with the tokens for it, where the file asks for that."""
    first = [special["bos_token"]] if begin is True and "bos_token" in special else []
    last = [special["eos_token"]] if end is True and "eos_token" in special else []
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*first, *last)],
        )
