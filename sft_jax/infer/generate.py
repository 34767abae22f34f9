"""Answers to prompts: batches of like lengths, each declared shape compiled once.

Knows of a model that it can `begin(ids, lengths, room)` with prompts and go on with the `next` token, no more; see the
top of `models/decoder.py` and `models/encoder_decoder.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sft_jax.config.generation import ANYTHING, Generation, Rules
from sft_jax.data.batch import Encoded, thresholds, up_to
from sft_jax.data.text import TextTokenizer
from sft_jax.errors import ConfigError
from sft_jax.infer.lengths import more_rows
from sft_jax.infer.lengths import sizes as declared_sizes
from sft_jax.infer.search import Found, search
from sft_jax.mesh import to_host
from sft_jax.models.family import NO_LIMIT, Model
from sft_jax.nn.template import Params

BUCKETS = 2  # lengths of prompts that are compiled for
MULTIPLE = 16  # of the lengths
WINDOW = 64  # batches that are sorted by length together


class Answer(NamedTuple):
    """What a model says to a prompt."""

    ids: list[int]  # without the token that ended it
    stopped: bool  # by such a token, and not by the length
    score: float  # mean log-probability of a token, that one included

    def record(self, tokenizer: TextTokenizer) -> dict[str, Any]:
        """`{"answer": ..., "tokens": ..., "stopped": ..., "score": ...}`."""
        text = tokenizer.text(self.ids)
        return {"answer": text, "tokens": len(self.ids), "stopped": self.stopped, "score": round(self.score, 6)}


@dataclass(frozen=True, eq=False)  # told apart by identity, as what jit keeps executables by
class Generator:
    """A model that answers prompts."""

    model: Model
    section: Generation
    stop: tuple[int, ...]  # tokens that end an answer
    rules: Rules = ANYTHING  # which tokens may stand where besides
    dtype: Any = jnp.float32  # of the arithmetic

    def __call__(
        self,
        params: Params,
        prompts: Encoded,
        batch_size: int,
        *,
        numbers: np.ndarray | None = None,
        most: int | None = None,
    ) -> Iterator[Answer]:
        """An answer to each prompt, in order; `numbers` are those of the prompts among all that are ever asked.

        Shapes are read off the prompts; where prompts of at most so many tokens are asked again and again (`most`),
        they are those that are declared for all of them.
        """
        self.check(int(prompts.lengths.max()))
        rows = min(batch_size, len(prompts))
        if most is None:
            sizes = thresholds([up_to(int(size), MULTIPLE) for size in prompts.lengths], BUCKETS)
        else:
            sizes, rows = declared_sizes(most), more_rows(rows, batch_size)
        numbers = np.arange(len(prompts)) if numbers is None else numbers
        # A window of prompts at a time, so that answers do not wait for all others; shapes are those of all.
        for first in range(0, len(prompts), WINDOW * rows):
            order = first + np.argsort(prompts.lengths[first : first + WINDOW * rows], kind="stable")
            found: dict[int, Answer] = {}
            for begin in range(0, len(order), rows):
                batch = order[begin : begin + rows]
                size = next(size for size in sizes if size >= prompts.lengths[batch].max())
                answers = to_host(self._answers(params, *_laid_out(prompts, batch, rows, size, numbers)))
                found |= {prompt: self._read(answers, row) for row, prompt in enumerate(batch.tolist())}
            yield from (found[prompt] for prompt in sorted(found))

    @property
    def room(self) -> int:
        """Tokens that a prompt may have, so that there is room for its answer."""
        own = "decoder_input_ids" in self.model.limits
        return self.model.max_length - (0 if own else self.section.max_new_tokens)

    def check(self, prompt: int) -> None:
        """Raise ConfigError where a prompt of so many tokens or its answer is too long for the model's positions."""
        answer, limits = self.section.max_new_tokens, self.model.limits
        if "decoder_input_ids" in limits:  # an answer has positions of its own, and a token before it
            most, needed, what = limits.get("decoder_position_ids", NO_LIMIT), answer + 1, "its first token and"
        else:
            most, needed, what = self.model.max_length, answer + prompt, f"a prompt of {prompt} tokens and"
        if needed > most:
            raise ConfigError(
                f"max_new_tokens: {what} an answer of {answer} are more than the model's {most} positions; lower it"
            )

    @partial(jax.jit, static_argnums=0)
    def _answers(
        self, params: Params, ids: Int[Array, "b s"], lengths: Int[Array, " b"], numbers: Int[Array, " b"]
    ) -> Found:
        module = self.model.template.bind({path: array.astype(self.dtype) for path, array in params.items()})
        logits, cache, positions = module.begin(ids, lengths, self.section.max_new_tokens)
        return search(module.next, logits, cache, positions, numbers, self.section, self.stop, self.rules)

    def _read(self, found: Any, row: int) -> Answer:
        length = int(found.lengths[row])
        ids = found.tokens[row, :length].tolist()
        stopped = bool(ids) and ids[-1] in self.stop
        score = float(found.scores[row])
        if self.section.num_beams > 1:
            score *= length**self.section.length_penalty  # the sum, as without beams
        return Answer(ids[:-1] if stopped else ids, stopped, score / max(length, 1))


def _laid_out(
    prompts: Encoded, batch: Sequence[int] | np.ndarray, rows: int, size: int, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [rows, size], lengths, numbers) of these prompts; rows without one repeat the first."""
    chosen = np.resize(np.asarray(batch), rows)
    chosen[len(batch) :] = batch[0]
    ids = np.zeros((rows, size), np.int32)
    for row, prompt in enumerate(chosen):
        ids[row, : prompts.lengths[prompt]] = prompts.tokens["input_ids"][prompts.places([prompt])]
    return ids, prompts.lengths[chosen].astype(np.int32), numbers[chosen].astype(np.int32)
