"""Tokenizers and tokenisation: one path for training, evaluation and prediction.

Texts are tokenised in parallel by threads of the tokenizer library, in this process: nothing is forked, which a process
that runs JAX would not survive. What they came to can be kept in a cache, under a hash of all that it depends on.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from sft_jax.data import cache
from sft_jax.data.columns import digest, ranges
from sft_jax.data.gguf import read_tokenizer
from sft_jax.data.pieces import SOURCE, TARGET, Pieces, load_pieces
from sft_jax.data.settings import BESIDE, Settled, by_pieces, settle, tidied
from sft_jax.errors import ConfigError, ModelError, reason
from sft_jax.gguf import is_gguf

FAST, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
NAMED = "additional_chat_templates"  # folder of more templates, each under its name
DEFAULT = "default"  # name of the template that `TEMPLATE` holds, where a list has names
CONFIG, GENERATION = "config.json", "generation_config.json"  # of the model, which knows where texts begin and end
VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
# Files that a tokenizer consists of; copied as they are into an export.
FILES = (
    FAST, SETTINGS, TEMPLATE, SPECIAL, ADDED, "vocab.txt", "vocab.json", "merges.txt", "vocab.bpe", "encoder.json",
    "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "tekken.json", SOURCE, TARGET,
)  # fmt: skip
LENGTHS, TRUNCATED = "lengths", "truncated"  # of what is kept: of each document, its tokens and whether it was cut
VERSION = "2"  # of `tokenize`: another one, and what is in caches is not found any more


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with what its directory says besides."""

    fast: Tokenizer | Any  # or `Pieces`, which has of it what answers to sources need
    special: Mapping[str, str] = field(default_factory=dict)  # "eos_token" -> the token, of those that are named
    template: str | None = None  # of chats; untrusted, and rendered nowhere but in `data/chat.py`
    named: Mapping[str, str] = field(default_factory=dict)  # more of them by name, such as `tool_use`
    home: Path | None = None  # where its work is kept, so that it is not done twice
    targets: Pieces | None = None  # of what is written, where that has a tokenizer of its own
    answers: Mapping[str, Any] = field(default_factory=dict)  # what the model's files say of generation
    left: bool = False  # texts that are too long lose their beginning, not their end
    tidy: bool = False  # blanks before punctuation are taken out of what is decoded

    def id(self, name: str) -> int | None:
        """The id of a special token by its name, such as "eos_token"; None where there is none."""
        return self.fast.token_to_id(self.special[name]) if name in self.special else None

    def text(self, ids: Sequence[int]) -> str:
        """What ids that were written say, without special tokens."""
        found = self.writer.decode(ids, skip_special_tokens=True)
        return tidied(found) if self.tidy else found

    @property
    def writer(self) -> Any:
        """The tokenizer of what is written."""
        return self.targets or self.fast


@dataclass(frozen=True)
class Tokens:
    """Tokenised documents, one after the other, and where each begins."""

    fields: dict[str, np.ndarray]  # int32 [tokens of all documents]: input_ids, token_type_ids
    offsets: np.ndarray  # int64 [documents + 1]
    truncated: int  # documents that were cut


def load_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer of a checkpoint, a directory or a GGUF file, from data alone: code in it is never run."""
    if is_gguf(directory):
        return TextTokenizer(*read_tokenizer(directory))
    try:
        settled, targets = _read(directory)
        fast, config = settled.fast, _object(directory / CONFIG)
        described = _described(directory, fast)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from None
    except Exception as error:  # the tokenizer libraries raise bare Exception for broken files
        raise ModelError(
            f"{directory}: its tokenizer cannot be loaded ({reason(error)}); fetch {FAST} again, or save one there"
        ) from None
    how = {"answers": _said_of_answers(directory, config), "left": settled.left, "tidy": settled.tidy}
    return TextTokenizer(fast, *described, targets=targets, **how)


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The files that a checkpoint's tokenizer consists of; of a GGUF file, those that a directory would have."""
    if not is_gguf(directory):
        others = sorted(file.name for file in directory.glob("*.tiktoken"))
        files = [name for name in (*FILES, *others) if (directory / name).is_file()]
        return {name: (directory / name).read_bytes() for name in (*files, *named_templates(directory))}
    tokenizer = load_tokenizer(directory)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special,
    }
    if tokenizer.named:
        all_of_them = {**({} if tokenizer.template is None else {DEFAULT: tokenizer.template}), **tokenizer.named}
        settings["chat_template"] = [{"name": name, "template": text} for name, text in all_of_them.items()]
    elif tokenizer.template is not None:
        settings["chat_template"] = tokenizer.template
    said = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {FAST: tokenizer.fast.to_str(pretty=True).encode(), SETTINGS: said.encode()}


def named_templates(directory: Path) -> list[str]:
    """The files of a directory that hold chat templates by name, relative to it and in order."""
    return sorted(f"{NAMED}/{file.name}" for file in (directory / NAMED).glob("*.jinja") if file.is_file())


def fingerprint(files: Mapping[str, bytes]) -> str:
    """The sha256 of those of these files that are read: of a fast tokenizer not what a slow one is made of."""
    digest = hashlib.sha256()
    read = (FAST, SETTINGS, TEMPLATE, SPECIAL, ADDED, *sorted(name for name in files if name.startswith(f"{NAMED}/")))
    for name in [f for f in (read if FAST in files and SOURCE not in files else files) if f in files]:
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


def tokenize(tokenizer: TextTokenizer, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> Tokens:
    """Tokens of each text (or pair of texts), special tokens included, cut to `max_length`."""
    worker = tokenizer.fast
    special = worker.num_special_tokens_to_add(pairs is not None)
    if max_length <= special:
        raise ConfigError(f"data.max_length: {max_length} leaves no room beside {special} special tokens; raise it")
    worker.no_padding()
    worker.enable_truncation(max_length, direction="left" if tokenizer.left else "right")  # the longer of a pair first
    columns = (texts,) if pairs is None else (texts, pairs)
    found = cache.made(
        tokenizer.home, lambda: _origin(worker, columns, max_length), lambda sink: _tokenized(worker, columns, sink)
    )
    offsets, truncated = offsets_of(found.pop(LENGTHS)), int(found.pop(TRUNCATED).sum())
    return Tokens(found, offsets, truncated)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each document begins, and the last one ends, by their lengths: int64 [documents + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def joined(parts: Iterable[Sequence[int]]) -> np.ndarray:
    """These numbers, one part after the other: int32."""
    found = array("i")
    for part in parts:
        found.fromlist(part if isinstance(part, list) else list(part))
    return np.frombuffer(found, np.int32) if found else np.zeros(0, np.int32)


@contextmanager
def in_use() -> Iterator[None]:
    """What a broken tokenizer raises while it is used, as one error of the user's."""
    try:
        yield
    except BaseException as error:  # a panic in the library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{FAST}: it cannot be used ({reason(error)}); fetch it again") from None


def _tokenized(tokenizer: Tokenizer, columns: Sequence[Sequence[str]], sink: cache.Sink) -> None:
    """Put into a sink what texts, or pairs of them, come to."""
    for begin, end in ranges(*columns):
        inputs = [column[begin:end] for column in columns]
        with in_use():
            encoded = tokenizer.encode_batch_fast(
                list(inputs[0]) if len(inputs) == 1 else list(zip(*inputs, strict=True))
            )
        sink.add("input_ids", joined(e.ids for e in encoded))
        sink.add("token_type_ids", joined(e.type_ids for e in encoded))
        sink.add(LENGTHS, np.fromiter((len(e) for e in encoded), np.int32, len(encoded)))
        sink.add(TRUNCATED, np.fromiter((bool(e.overflowing) for e in encoded), bool, len(encoded)))


def _origin(tokenizer: Tokenizer, columns: Sequence[Sequence[str]], max_length: int) -> Iterator[str]:
    """Everything that tokens depend on, in parts."""
    yield from (VERSION, tokenizers.__version__, tokenizer.to_str(), str(max_length))
    yield from digest(*columns)


def _said_of_answers(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's files say of answers: `generation_config.json`, or `config.json` where there is none.

    Beside the first, `transformers` reads of the second nothing but the ids of tokens that begin, end and pad.
    """
    if not (directory / GENERATION).is_file():
        return dict(config)
    ids = {key: value for key, value in config.items() if key.endswith("_token_id") and not key.startswith("forced_")}
    try:
        return {**ids, **_object(directory / GENERATION)}
    except (OSError, ValueError) as error:
        file = directory / GENERATION
        raise ModelError(f"{file}: cannot be read ({reason(error)}); fetch it again, or remove it") from None


def _read(directory: Path) -> tuple[Settled, Pieces | None]:
    """(the tokenizer of what is read, as its settings have it, that of what is written where it is another one)."""
    settings, config = _object(directory / SETTINGS), _object(directory / CONFIG)
    pieces = (directory / SOURCE).is_file() and by_pieces(settings, config)
    if (directory / FAST).is_file() and not pieces:
        beside = {name: _object(directory / f"{name}.json") for name in BESIDE}
        return settle(Tokenizer.from_file(str(directory / FAST)), settings, config, beside), None
    left, tidy = settings.get("truncation_side") == "left", bool(settings.get("clean_up_tokenization_spaces"))
    if (directory / SOURCE).is_file():
        source, target = load_pieces(directory)
        return Settled(source, left, tidy), target
    return Settled(_converted(directory), left, tidy), None


def _described(directory: Path, fast: Any) -> tuple[dict[str, str], str | None, dict[str, str]]:
    """(special tokens by name, chat template, more of them by name) as the files beside a tokenizer have them, the
    model's own at last."""
    settings, config = _object(directory / SETTINGS), _object(directory / CONFIG)
    ids = {name: config.get(f"{name}_id") for name in ("bos_token", "eos_token")}
    of_model = {name: fast.id_to_token(n) for name, n in ids.items() if type(n) is int and n >= 0}
    named = {**of_model, **{name: v for name, v in settings.items() if name.endswith("_token") and v is not None}}
    special = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items()}
    templates = _templates(directory, settings.get("chat_template"))
    template = templates.pop(DEFAULT, None)
    return {n: v for n, v in special.items() if isinstance(v, str)}, template, templates


def _templates(directory: Path, given: Any) -> dict[str, str]:
    """The chat templates of a directory by name, as `transformers` finds them: files stand before the setting."""
    files = {Path(name).stem: directory / name for name in named_templates(directory)}
    if (directory / TEMPLATE).is_file():
        files = {DEFAULT: directory / TEMPLATE, **files}
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    if isinstance(given, list):
        pairs = [(one.get("name"), one.get("template")) for one in given if isinstance(one, dict)]
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {DEFAULT: given} if isinstance(given, str) else {}


def _object(file: Path) -> dict[str, Any]:
    """The object of a JSON file; none of a file that is not there."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds a {type(found).__name__}, expected an object")
    return found


def _converted(directory: Path) -> Tokenizer:
    """A tokenizer that has only the files of old releases (`vocab.txt`, `merges.txt`), by way of `transformers`."""
    if not any((directory / file).is_file() for file in VOCABULARIES):  # or an empty tokenizer would be made up
        raise FileNotFoundError(f"there is no {FAST} and none of {', '.join(VOCABULARIES)}")
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    return slow.backend_tokenizer
