"""Augmentation of training documents: pure functions of (seed, visit, document). Holds numpy only.

A document is drawn anew each time that it is read, and what is drawn depends on nothing but the seed, which document
it is and how often it was read before: on no batch, order, host or worker. Works on tokens, so that it costs little
and needs no text. What stands between special tokens is one text; special tokens stay as and where they are.
"""

from dataclasses import dataclass

import numpy as np

from sft_jax.config.data import Augment
from sft_jax.data.batch import Encoded
from sft_jax.data.order import AUGMENT, random_bits
from sft_jax.data.text import TextTokenizer
from sft_jax.errors import ConfigError

DROPPED = ("[MASK]", "<mask>", "[UNK]", "<unk>")  # what a dropped token becomes: the first that a tokenizer has
DRAWS = 4  # numbers drawn for each token


@dataclass(frozen=True)
class Augmentation:
    """What is done to documents, and what is special among their tokens."""

    section: Augment
    seed: int
    special: tuple[int, ...]  # ids of the tokens that a tokenizer puts around texts
    dropped: int  # id that a dropped token gets

    def __call__(self, encoded: Encoded, documents: np.ndarray, visits: np.ndarray) -> Encoded:
        """These documents in this order, as they are on these visits."""
        changed, lengths = [], []
        for document, visit in zip(documents.tolist(), visits.tolist(), strict=True):
            source = slice(encoded.offsets[document], encoded.offsets[document + 1])
            ids = encoded.tokens["input_ids"][source]
            bits = random_bits(self.seed, AUGMENT, DRAWS * len(ids), at=(document, visit))
            places, dropped = self._draw(ids, (bits >> np.uint64(11)).reshape(DRAWS, -1) * 2.0**-53)
            tokens = {name: values[source][places] for name, values in encoded.tokens.items()}
            tokens["input_ids"][dropped] = self.dropped
            changed.append(tokens)
            lengths.append(len(places))
        tokens = {name: np.concatenate([found[name] for found in changed]) for name in encoded.tokens}
        fields = {name: values[documents] for name, values in encoded.documents.items()}
        return Encoded(tokens, np.concatenate([[0], np.cumsum(lengths)]), fields)

    def _draw(self, ids: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places of the tokens that stay, in their new order; which of these are dropped), from numbers in [0, 1)."""
        special = np.isin(ids, self.special)
        places, dropped = np.arange(len(ids)), np.zeros(len(ids), bool)
        stays = np.ones(len(ids), bool)
        edges = np.flatnonzero(np.diff(np.concatenate([[True], special, [True]])))  # where texts begin and end
        for begin, end in edges.reshape(-1, 2):
            text = draws[:, begin:end]
            stays[begin:end] = ~_picked(text[0], self.section.delete)
            left = begin + np.flatnonzero(stays[begin:end])
            one, other = _pairs(draws[1, left], draws[2, begin], self.section.swap)
            places[left[one]], places[left[other]] = left[other], left[one]
            dropped[left] = _picked(draws[3, left], self.section.token_dropout)
        return places[stays], dropped[stays]


def augmentation(section: Augment, seed: int, tokenizer: TextTokenizer) -> Augmentation | None:
    """What the section asks for, with a tokenizer's special tokens; None where it asks for nothing."""
    if section == Augment():
        return None
    fast = tokenizer.fast
    fast.no_truncation()
    special: set[int] = set()
    for empty in (fast.encode(""), fast.encode("", "")):
        special |= {i for i, added in zip(empty.ids, empty.special_tokens_mask, strict=True) if added}
    known = [number for word in DROPPED if (number := fast.token_to_id(word)) is not None]
    if section.token_dropout and not known:
        raise ConfigError(
            f"data.augment.token_dropout: the tokenizer has none of {', '.join(DROPPED)}; leave token_dropout at 0"
        )
    return Augmentation(section, seed, tuple(sorted(special)), known[0] if known else 0)


def _picked(draws: np.ndarray, share: float) -> np.ndarray:
    """Which tokens of a text are picked, each with the same probability; one at least is not."""
    picked = draws < share
    picked[np.argmax(draws)] = False
    return picked


def _pairs(draws: np.ndarray, rounding: float, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that change places, as two lists of positions: a share of the text, exact in the mean."""
    count = min(int(share * len(draws) / 2 + rounding), len(draws) // 2)
    order = np.argsort(draws, kind="stable")
    return order[:count], order[count : 2 * count]
