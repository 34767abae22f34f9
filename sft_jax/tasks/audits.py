"""Audits: what is supervised as the tokens say it, before anything is trained. Any problem stops the run."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from sft_jax.data.batch import Encoded
from sft_jax.data.text import TextTokenizer
from sft_jax.tasks.task import Audit, Token

ROWS = 3  # documents that are shown: the first, one in the middle, the last
PIECE = 240  # characters of a piece that are shown


def of_tokens(encoded: Encoded, tokenizer: TextTokenizer, stops: Sequence[int], *, ends: bool = True) -> Audit:
    """The audit of documents of which tokens are supervised by `label` and `token_weight`.

    `ends` says that ends of answers are ours to see to; else whoever made the documents knows where they end.
    """
    learned, label = encoded.tokens["token_weight"] > 0, encoded.tokens["label"]
    last = learned & ~np.append(learned[1:], False)  # of each answer, where its last token is predicted
    ending = np.isin(label[last], list(stops))
    cut = encoded.truncated
    facts = {
        "supervised": f"{int(learned.sum()):,} of {len(learned):,} tokens ({learned.mean():.1%}) "
        f"of {len(encoded):,} documents",
        "truncated": f"{cut:,} documents ({cut / len(encoded):.1%})",
        "lost": ", ".join(f"{count:,} {why}" for why, count in encoded.lost.items()) or "none",
        "stop": f"{int(ending.sum()):,} of {int(last.sum()):,} answers end with {_named(tokenizer, stops)}",
    }
    if encoded.noted:
        facts["note"] = "; ".join(f"{count:,} {what}" for what, count in encoded.noted.items())
    problems = []
    if ends and not ending.any():
        problems.append(
            f"no answer ends with a token that stops generation ({_named(tokenizer, stops)}), so the model would never "
            f"stop; {_remedy(tokenizer, encoded)}"
        )
    begin = tokenizer.id("bos_token")
    if begin is not None:
        once, twice = _begins(encoded, begin)
        facts["begin"] = f"{once:,} of {len(encoded):,} documents begin with {tokenizer.special['bos_token']}"
        if twice:
            problems.append(
                f"{twice:,} documents begin with {tokenizer.special['bos_token']} twice; take it out of the texts "
                f"or the template"
            )
    return Audit([pieces(encoded, number, tokenizer) for number in shown(len(encoded))], facts, problems)


def next_tokens(encoded: Encoded, tokenizer: TextTokenizer) -> Iterator[list[Token]]:
    """The tokens of documents of which each token is supervised by the one before it."""
    for begin, end in pairwise(encoded.offsets.tolist()):
        weights = [0.0, *encoded.tokens["token_weight"][begin : max(begin, end - 1)].tolist()]
        yield tokens(tokenizer, encoded.tokens["input_ids"][begin:end], weights)


def tokens(
    tokenizer: TextTokenizer, ids: np.ndarray, weights: Sequence[float], labels: Sequence[str | None] | None = None
) -> list[Token]:
    """Tokens with their texts, weights, and what they are to be told by."""
    texts = [tokenizer.fast.decode([number], skip_special_tokens=False) for number in ids.tolist()]
    told = labels or [None] * len(texts)
    return [Token(*one) for one in zip(ids.tolist(), texts, weights, told, strict=True)]


def pieces(encoded: Encoded, document: int, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
    """The text of a document in pieces that are supervised or not, long ones without their middle."""
    span = slice(encoded.offsets[document], encoded.offsets[document + 1])
    ids = encoded.tokens["input_ids"][span]
    learned = np.concatenate([[False], encoded.tokens["token_weight"][span][:-1] > 0])  # a label is the token after
    begins = np.flatnonzero(np.concatenate([[True], learned[1:] != learned[:-1]]))
    found = []
    for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        text = tokenizer.fast.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        found.append((shortened(text), bool(learned[begin])))
    return found


def shortened(text: str) -> str:
    """A text without its middle, if it is long."""
    half = PIECE // 2
    return text if len(text) <= PIECE else f"{text[:half]} … {text[-half:]}"


def shown(count: int) -> list[int]:
    """The documents that are shown."""
    return sorted({0, count // 2, count - 1} if count > ROWS - 1 else set(range(count)))


def _begins(encoded: Encoded, begin: int) -> tuple[int, int]:
    """How many documents begin with this token, and how many with two of it."""
    ids, first = encoded.tokens["input_ids"], encoded.offsets[:-1]
    once = ids[first] == begin
    second = np.where(encoded.lengths > 1, ids[np.minimum(first + 1, len(ids) - 1)], -1)
    return int(once.sum()), int((once & (second == begin)).sum())


def _named(tokenizer: TextTokenizer, stops: Sequence[int]) -> str:
    return (
        " or ".join(str(tokenizer.fast.id_to_token(number)) for number in stops)
        or "a stop token, of which there is none"
    )


def _remedy(tokenizer: TextTokenizer, encoded: Encoded) -> str:
    if encoded.truncated == len(encoded):
        return "every document is cut before its end: raise data.max_length"
    if tokenizer.id("eos_token") is None:
        return "name an eos_token in tokenizer_config.json"
    return "use a template that ends answers with a token of the tokenizer's own, by task.template"
