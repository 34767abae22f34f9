"""Marian's tokenizer: SentencePiece models with the ids of a `vocab.json`, in the place of a `tokenizers.Tokenizer`.

Marian has one model for what is read and another for what is written, and one list of ids for both: the pieces of a
model are called by their names, and one that the list lacks is unknown. A text may begin with a code such as `>>fr<<`,
which is one token. Equal to `transformers.MarianTokenizer`, whose files are data alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor

SOURCE, TARGET, IDS = "source.spm", "target.spm", "vocab.json"
END, UNKNOWN, PADDING = "</s>", "<unk>", "<pad>"
BLANK = "▁"


class Found(NamedTuple):
    """The tokens of a text."""

    ids: list[int]


@dataclass(frozen=True)
class Pieces:
    """One side of a pair of SentencePiece models."""

    model: SentencePieceProcessor
    numbers: Mapping[str, int]  # piece -> id
    digest: str  # of all that it is made of

    @cached_property
    def names(self) -> dict[int, str]:
        """Id -> piece."""
        return {number: name for name, number in self.numbers.items()}

    def encode(self, text: str, add_special_tokens: bool = True) -> Found:
        """The tokens of a text, and the one that ends it."""
        code, end = "", text.find("<<")
        if text.startswith(">>") and end != -1:
            code, text = text[: end + 2], text[end + 2 :]
        pieces = [*([code] if code else []), *self.model.encode(text, out_type=str)]
        unknown = self.numbers[UNKNOWN]
        ids = [self.numbers.get(piece, unknown) for piece in pieces]
        return Found([*ids, self.numbers[END]] if add_special_tokens else ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[Found]:
        """The tokens of each text."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these tokens."""
        special = (END, UNKNOWN, PADDING)
        parts: list[str] = []
        pieces: list[str] = []
        for name in (self.names.get(number, UNKNOWN) for number in ids):
            if name not in special:
                pieces.append(name)
            elif not skip_special_tokens:
                parts.append(f"{self.model.decode_pieces(pieces)}{name} ")
                pieces = []
        return "".join([*parts, self.model.decode_pieces(pieces)]).replace(BLANK, " ").strip()

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece, None where there is none."""
        return self.numbers.get(token)

    def id_to_token(self, number: int) -> str | None:
        """The piece of an id, None where there is none."""
        return self.names.get(number)

    def to_str(self) -> str:
        """What tells it from others."""
        return self.digest

    def no_padding(self) -> None:
        """Texts are never filled up."""

    def no_truncation(self) -> None:
        """Nor are they cut."""


def load_pieces(directory: Path) -> tuple[Pieces, Pieces]:
    """(the pieces of what is read, the pieces of what is written) of a Marian checkpoint."""
    numbers = json.loads((directory / IDS).read_text(encoding="utf-8"))
    if not isinstance(numbers, dict) or not all(type(number) is int for number in numbers.values()):
        raise ValueError(f"{IDS} holds no ids by piece")
    lacking = [name for name in (END, UNKNOWN) if name not in numbers]
    if lacking:
        raise ValueError(f"{IDS} lacks {', '.join(lacking)}")
    ids = hashlib.sha256((directory / IDS).read_bytes()).hexdigest()
    source, target = ((directory / name).read_bytes() for name in (SOURCE, TARGET))
    return _side(source, numbers, ids), _side(target, numbers, ids)


def _side(proto: bytes, numbers: Mapping[str, int], ids: str) -> Pieces:
    digest = hashlib.sha256(ids.encode() + proto).hexdigest()
    return Pieces(SentencePieceProcessor(model_proto=proto), numbers, digest)
