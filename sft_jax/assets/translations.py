"""Messages of a program with their translations, out of its catalogues, and a small translator that knows nothing.

Messages of programs are short and much alike, so a small model can learn to translate those that it has not seen.
"""

import io
import json
import random
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft_jax.archives import members
from sft_jax.assets.plain import write_json

CATALOGUE = re.compile(r"/fr/LC_MESSAGES/[^/]+\.mo$")
LITTLE = b"\xde\x12\x04\x95"  # the first bytes of a catalogue whose numbers have the least byte first
CONTEXT = "\x04"  # stands between a message and what tells it from another of the same words
MOST_WORDS = 40
PARTS = 20  # one of which is for validation, and one for the test
SPLITS = ("train", "validation", "test")
PIECES = 4000
END, UNKNOWN, PADDING = "</s>", "<unk>", "<pad>"
MARIAN = {
    "model_type": "marian",
    "architectures": ["MarianMTModel"],
    "activation_function": "swish",
    "d_model": 256,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "dropout": 0.1,
    "init_std": 0.0625,  # 1 over the root of d_model
    "is_encoder_decoder": True,
    "max_position_embeddings": 256,
    "scale_embedding": True,
    "static_position_embeddings": True,
}


def en_fr(archive: Path, out: Path) -> None:
    """English messages with their French translations as JSON lines of `en` and `fr`, in three files.

    Each English message is there once, in whatever case, and which file it is in depends on its letters alone. Within
    each file they are in a random order that is always the same.
    """
    for split, rows in _splits(archive).items():
        write_json(out / f"{split}.jsonl", rows)


def tiny_marian(archive: Path, out: Path) -> None:
    """A small Marian model without weights: `config.json` and a tokenizer made of the training messages of `en_fr`."""
    import sentencepiece

    texts = [text for row in _splits(archive)["train"] for text in row.values()]
    sink = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=sink,
        model_type="bpe",
        vocab_size=PIECES,
        hard_vocab_limit=False,
        character_coverage=0.9995,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=sink.getvalue())
    pieces = [model.id_to_piece(number) for number in range(len(model))]
    names = [END, UNKNOWN, *(piece for piece in pieces if piece not in (END, UNKNOWN)), PADDING]
    pad, size = len(names) - 1, len(names)
    said: dict[str, Any] = {
        "decoder_start_token_id": pad,
        "pad_token_id": pad,
        "eos_token_id": 0,
        "forced_eos_token_id": 0,
    }
    said |= {"bad_words_ids": [[pad]]}
    for name in ("source.spm", "target.spm"):  # one for both languages, as its embeddings are
        (out / name).write_bytes(sink.getvalue())
    _write(out / "vocab.json", {name: number for number, name in enumerate(names)})
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "fr"}
    _write(out / "tokenizer_config.json", {**settings, "model_max_length": MARIAN["max_position_embeddings"]})
    _write(out / "config.json", {**MARIAN, "vocab_size": size, "decoder_vocab_size": size, **said})
    _write(out / "generation_config.json", said)


def read_catalogue(content: bytes) -> Iterator[tuple[str, str]]:
    """The messages of a compiled catalogue of gettext with their translations; of those with a plural the singular.

    Source: the format is in the manual of GNU gettext, "The Format of GNU MO Files".
    """
    order = "<" if content[:4] == LITTLE else ">"
    count, messages, translations = struct.unpack(f"{order}3I", content[8:20])
    for number in range(count):
        texts = []
        for table in (messages, translations):
            length, begin = struct.unpack(f"{order}2I", content[table + 8 * number : table + 8 * number + 8])
            texts.append(content[begin : begin + length].decode("utf-8").split("\x00")[0])
        yield texts[0].rpartition(CONTEXT)[2].strip(), texts[1].strip()


def _splits(archive: Path) -> dict[str, list[dict[str, str]]]:
    pairs: dict[str, dict[str, str]] = {}
    for name, content in sorted(members(archive)):
        for message, translation in read_catalogue(content) if CATALOGUE.search(name) else ():
            if translation and _is_text(message) and message != translation:
                pairs.setdefault(message.lower(), {"en": message, "fr": translation})
    found: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for key, row in pairs.items():
        part = zlib.crc32(key.encode()) % PARTS
        found[SPLITS[part] if part in (1, 2) else "train"].append(row)
    for rows in found.values():
        random.Random(0).shuffle(rows)
    return found


def _is_text(message: str) -> bool:
    """Whether a message has a word of two letters, and not too many of them."""
    words: Sequence[str] = message.split()
    return len(words) <= MOST_WORDS and re.search(r"[A-Za-z]{2}", message) is not None


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
