"""What tasks share that predict the next token of something: loss, counts, metrics and reviews of the tokens learned.

A batch has `label` and `token_weight` [r, t] for each token, and `segment_ids` say which document a token is of. Where
that stands in other fields, as of targets beside their sources, the task hands in a view.

Letters: r rows of the batch, t tokens in a row, n document slots in a row, d documents.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sft_jax.nn.heads import LazyLogits
from sft_jax.tasks import metrics
from sft_jax.tasks.losses import token_weights
from sft_jax.tasks.task import Examples, Ratio, Record, Review
from sft_jax.tasks.vocabulary import token_divergence, token_loss, token_scores

METRICS = ("loss", "perplexity", "token_accuracy", "answer_accuracy")
LEAST_IS_BEST = frozenset({"loss", "perplexity"})
MOST_LOSS = 700.0  # of which the exponential is a finite number
MOST_SHOWN = 200  # characters of an answer in a review


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenCounts:
    """What evaluation adds up."""

    loss: Ratio  # what is trained on
    log_loss: Ratio  # cross-entropy, no more
    tokens: Int[Array, ""]
    right: Int[Array, ""]
    answers: Int[Array, ""]  # documents
    whole: Int[Array, ""]  # those of which every token is right


def loss(logits: LazyLogits, batch: Mapping[str, Array], smoothing: float = 0.0) -> Ratio:
    """Cross-entropy of the tokens that are to be learned."""
    weight = token_weights(batch)
    return Ratio(token_loss(logits, batch["label"], weight, smoothing), weight.sum())


def divergence(one: LazyLogits, other: LazyLogits, batch: Mapping[str, Array]) -> Ratio:
    """How far two passes are apart on these tokens, for R-Drop."""
    each, weight = token_divergence(one, other, batch["token_weight"] > 0), token_weights(batch)
    return Ratio((each * weight).sum(), weight.sum())


def count(logits: LazyLogits, batch: Mapping[str, Array], smoothing: float = 0.0) -> TokenCounts:
    """The counts of a batch; filler has weight 0 and is not counted (C16)."""
    each, right = token_scores(logits, batch["label"], batch["token_weight"] > 0)
    weight = token_weights(batch)
    log_loss = Ratio((each * weight).sum(), weight.sum())
    wanted = weight > 0
    of_document = _by_document(batch, wanted.astype(jnp.float32), wanted * right)
    learned = (of_document[..., 0] > 0) & (batch["weight"] > 0)
    return TokenCounts(
        loss=loss(logits, batch, smoothing) if smoothing else log_loss,
        log_loss=log_loss,
        tokens=wanted.sum(dtype=jnp.int32),
        right=(wanted & (right > 0)).sum(dtype=jnp.int32),
        answers=learned.sum(dtype=jnp.int32),
        whole=(learned & (of_document[..., 0] == of_document[..., 1])).sum(dtype=jnp.int32),
    )


def finish(counts: TokenCounts) -> dict[str, float]:
    """Every metric that counts are enough for, on the host."""
    log_loss = metrics.mean(counts.log_loss)
    return {
        "loss": metrics.mean(counts.loss),
        "perplexity": math.exp(min(log_loss, MOST_LOSS)),
        "token_accuracy": int(counts.right) / max(int(counts.tokens), 1),
        "answer_accuracy": int(counts.whole) / max(int(counts.answers), 1),
    }


def keep(logits: LazyLogits, batch: Mapping[str, Array]) -> Float[Array, "r n 3"]:
    """Of each document the sum of its loss, how many tokens it is of, and how many of them were right."""
    each, right = token_scores(logits, batch["label"], batch["token_weight"] > 0)
    wanted = (token_weights(batch) > 0).astype(jnp.float32)
    return _by_document(batch, each * wanted, wanted, right * wanted)


def review(kept: Float[np.ndarray, "d 3"], examples: Examples) -> Review:
    """What was to be said, how much of it the model thought likeliest, and its mean loss."""
    loss, tokens, right = kept.astype(np.float64).T
    mean, rows = loss / np.maximum(tokens, 1), examples.encoded.rows
    targets, texts = examples.targets or [""] * len(examples.texts[0]), examples.texts[0]
    return Review(
        truth=[_shown(targets[row] or texts[row]) for row in rows],
        predicted=[
            f"{int(hits)} of {int(count)} tokens, perplexity {_exp(value):.4g}"
            for hits, count, value in zip(right, tokens, mean, strict=True)
        ],
        right=right == tokens,
        confidence=None,
        loss=mean,
        rows=rows,
    )


def decode(kept: Float[np.ndarray, "d 3"], examples: Examples) -> list[Record]:
    """`{"loss": ..., "perplexity": ..., "tokens": ...}` of the text of each row, which is what stands in for a text."""
    numbers, places = np.unique(examples.encoded.rows, return_inverse=True)
    sums = np.zeros((len(numbers), kept.shape[-1]))
    np.add.at(sums, places, kept)
    means = sums[:, 0] / np.maximum(sums[:, 1], 1)
    return [
        {"loss": round(mean, 6), "perplexity": round(_exp(mean), 6), "tokens": int(tokens)}
        for mean, tokens in zip(means.tolist(), sums[:, 1], strict=True)
    ]


def _by_document(batch: Mapping[str, Array], *values: Float[Array, "r t"]) -> Float[Array, "r n k"]:
    """The sums of values of tokens over each document."""
    slots = batch["weight"].shape[1]

    def of_row(values: Float[Array, "t k"], segments: Int[Array, " t"]) -> Float[Array, "n k"]:
        return jax.ops.segment_sum(values, segments, num_segments=slots + 1)[1:]

    return jax.vmap(of_row)(jnp.stack(values, axis=-1).astype(jnp.float32), batch["segment_ids"])


def _exp(value: float) -> float:
    return math.exp(min(value, MOST_LOSS))


def _shown(target: str) -> str:
    """What was to be said, for people: of a message its content."""
    try:
        message = json.loads(target)
        found = message.get("content") or target if isinstance(message, dict) and "role" in message else target
    except ValueError:
        found = target
    text = found if isinstance(found, str) else str(found)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"
