"""The span of a context that answers a question: logits of its first and last token, as in BERT (arXiv 1810.04805).

A row is a question with its context; a document is a window of it (`data/contexts.py`). As `run_qa.py` of
`transformers` trains, a window that does not hold the whole answer says so by its first token, and the softmax is over
all tokens of the window. The best span of all windows is the answer. "No answer" is said where its score, least over
the windows, is above that of the span by `null_threshold`.

Letters: r rows of the batch, t tokens in a row, n document slots in a row.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sft_jax.config.tasks import QuestionAnswering
from sft_jax.data.batch import Encoded
from sft_jax.data.contexts import tokenize_contexts
from sft_jax.data.prepare import read_texts
from sft_jax.data.rows import Bad, Rows
from sft_jax.data.text import TextTokenizer
from sft_jax.models.family import Head
from sft_jax.tasks import answer_columns, audits, baselines, metrics, spans, squad
from sft_jax.tasks.answer_columns import Answers
from sft_jax.tasks.losses import token_weights
from sft_jax.tasks.task import Audit, Examples, Ratio, Record, Review, Table, Task, Texts, Token, written

KEPT = ("question", "context", "no_answer", "null_threshold", "stride", "n_best", "max_answer_tokens")
WORDS = ("what", "who", "whom", "whose", "when", "where", "which", "why", "how")
LENGTHS = {"none": 0, "1 word": 1, "2 or 3 words": 3, "4 to 7 words": 7}  # of an answer, at most
LONGER, OTHER, NONE = "8 words or more", "other", "(no answer)"
LEAST = float(np.finfo(np.float32).min)


def build(section: QuestionAnswering, rows: Mapping[str, Rows]) -> Task:
    """The task; it needs to know nothing of its rows."""
    read = answer_columns.read_texts if section.answer_text else answer_columns.read_answers
    answers = section.answer_text or section.answers

    def encode(texts: Texts, targets: Sequence[Answers] | None, tokenizer: TextTokenizer, max_length: int) -> Encoded:
        stride = max_length // 4 if section.stride is None else section.stride
        found = tokenize_contexts(tokenizer, texts[0], texts[1], max_length, stride, cut=targets is None)
        begin, end = _learned(targets or [()] * len(texts[0]))
        return replace(found, documents={"answer": spans.locate(found, begin, end)})

    def scored(kept: np.ndarray, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """([rows, 2] exact match and F1, bool [rows] which rows have an answer)."""
        said, apart = best_answers(kept, examples, section)
        given = [text if near else "" for text, near in zip(said, apart <= _threshold(section), strict=True)]
        truth = _truth(examples)
        return squad.scores(given, truth), np.asarray([bool(right) for right in truth])

    return Task(
        kind=section.kind,
        head=Head("question_answering", 2),
        labels=(),
        texts=(section.question, section.context),
        columns=(section.question, section.context, answers),
        read=lambda rows: _read(rows, section),
        targets=lambda rows: read(rows, answers, section.context, none=section.no_answer),
        classes=lambda targets: [int(not answers) for answers in targets],
        label_counts=_label_counts,
        encode=encode,
        fit=lambda train: build(section, rows),
        loss=loss,
        divergence=divergence,
        count=loss,
        metrics=lambda counts: {"loss": metrics.mean(counts)},
        row_metrics=lambda kept, examples: squad.figures(*scored(kept, examples), section.no_answer),
        metric_names=("loss", *squad.NAMES, *(squad.APART if section.no_answer else ())),
        least_is_best=frozenset({"loss"}),
        headline="f1",
        tables=lambda counts: {},
        row_tables=lambda kept, examples: tables(kept, examples, section, *scored(kept, examples)),
        review=lambda kept, examples: review(kept, examples, section, scored(kept, examples)[0]),
        baselines=baseline_scores,
        decode=lambda kept, examples: list(records(kept, examples, section)),
        to_hf=lambda: {"sft_jax_task": section.model_dump(mode="json", include={"kind", *KEPT})},
        grain="token",
        keep=lambda logits, batch: logits.astype(jnp.float32),
        cleans=False,
        moves=False,
        audit=audit,
        supervision=supervision,
    )


def restore(config: Mapping[str, Any]) -> QuestionAnswering:
    """The section that a `config.json` was written from; of a model that others trained, that of plain SQuAD."""
    kept = {key: written(config)[key] for key in KEPT if key in written(config)}
    return QuestionAnswering(kind="question_answering", **kept)


def loss(logits: Float[Array, "r t 2"], batch: Mapping[str, Array]) -> Ratio:
    """Cross-entropy of the first and of the last token over the tokens of each document, the mean of both."""
    logits = logits.astype(jnp.float32)
    places = batch["starts"][..., None] + batch["answer"]
    each = (_log_sums(logits, batch) - jnp.take_along_axis(logits, places, axis=1)).mean(axis=-1)
    weight = batch["weight"]
    return Ratio(jnp.where(weight > 0, each * weight, 0).sum(), weight.sum())


def divergence(one: Float[Array, "r t 2"], other: Float[Array, "r t 2"], batch: Mapping[str, Array]) -> Ratio:
    """Kullback-Leibler divergence of two passes, the mean of both directions and of both ends (arXiv 2106.14448)."""
    document = jnp.maximum(batch["segment_ids"] - 1, 0)[..., None]
    weights = token_weights({**batch, "token_weight": jnp.ones_like(batch["segment_ids"], jnp.float32)})[..., None]
    p, q = (
        jnp.where(weights > 0, logits - jnp.take_along_axis(_log_sums(logits, batch), document, axis=1), 0)
        for logits in (one.astype(jnp.float32), other.astype(jnp.float32))
    )  # of filler 0, so that its gradient is finite
    each = 0.5 * (jnp.exp(p) - jnp.exp(q)) * (p - q) * weights
    return Ratio(each.mean(axis=-1).sum(), batch["weight"].sum())


def best_answers(
    kept: Float[np.ndarray, "tokens 2"], examples: Examples, section: QuestionAnswering
) -> tuple[list[str], Float[np.ndarray, " rows"]]:
    """(the best span of each row, by how much no answer scores above it)."""
    found = spans.best(kept, examples.encoded, 1, section.max_answer_tokens)
    there = np.diff(found.offsets) > 0
    first = np.minimum(found.offsets[:-1], max(len(found.score) - 1, 0))
    said = [
        examples.texts[1][row][found.begin[span] : found.end[span]].strip() if some else ""
        for row, span, some in zip(found.rows, first, there, strict=True)
    ]
    apart = np.full(len(said), float(np.finfo(np.float32).max))
    apart[there] = found.null[there].astype(np.float64) - found.score[first[there]]
    return said, apart


def records(kept: Float[np.ndarray, "tokens 2"], examples: Examples, section: QuestionAnswering) -> Iterator[Record]:
    """`{"answer", "start", "end", "score", "n_best": [...]}` of each row, places in characters; no answer is ""."""
    found = spans.best(kept, examples.encoded, section.n_best, section.max_answer_tokens)
    for number, row in enumerate(found.rows):
        which = slice(found.offsets[number], found.offsets[number + 1])
        context, scores, null = examples.texts[1][row], found.score[which].astype(np.float64), float(found.null[number])
        ends = zip(found.begin[which].tolist(), found.end[which].tolist(), strict=True)
        said = [_cut(context, begin, end) for begin, end in ends]
        chosen = 0
        if section.no_answer or not said:
            held_back = not said or null - scores[0] > _threshold(section)
            place = int(np.searchsorted(-scores, -null, side="right"))
            chosen = place if held_back else int(place == 0)
            said.insert(place, ("", 0, 0))
            scores = np.insert(scores, place, null)
        likely = np.exp(scores - scores.max())
        n_best = [
            {"answer": text, "start": begin, "end": end, "score": round(float(probability), 6)}
            for (text, begin, end), probability in zip(said, likely / likely.sum(), strict=True)
        ]
        yield {**n_best[chosen], "n_best": n_best}


def review(
    kept: Float[np.ndarray, "tokens 2"],
    examples: Examples,
    section: QuestionAnswering,
    values: Float[np.ndarray, "rows 2"],
) -> Review:
    """How each row was answered; `values` are its exact match and F1. The loss of a row is the mean of its windows."""
    said = list(records(kept, examples, section))
    rows, firsts = np.unique(examples.encoded.rows, return_index=True)
    each = spans.losses(kept, examples.encoded, examples.documents["answer"])
    return Review(
        truth=[" | ".join(dict.fromkeys(right)) or NONE for right in _truth(examples)],
        predicted=[record["answer"] or NONE for record in said],
        right=values[:, 0] > 0,
        confidence=np.asarray([record["score"] for record in said]),
        loss=np.add.reduceat(each, firsts) / np.diff(np.append(firsts, len(each))),
        rows=rows,
    )


def tables(
    kept: Float[np.ndarray, "tokens 2"],
    examples: Examples,
    section: QuestionAnswering,
    values: Float[np.ndarray, "rows 2"],
    answered: Bool[np.ndarray, " rows"],
) -> dict[str, Table]:
    """Exact match and F1 by the word that asks and by the length of the answer; where no answer is best said."""
    rows, truth = np.unique(examples.encoded.rows), _truth(examples)
    found = {
        "by question": _by([_asked(examples.texts[0][row]) for row in rows], [*WORDS, OTHER], values),
        "by length of the answer": _by([_length(right) for right in truth], [*LENGTHS, LONGER], values),
    }
    if section.no_answer:
        said, apart = best_answers(kept, examples, section)
        given = squad.scores(said, truth)
        table: Table = [["", "null_threshold", "value"]]
        now = dict(zip(squad.NAMES, values.mean(axis=0), strict=True))
        table += [[name, section.null_threshold, round(float(value), 4)] for name, value in now.items()]
        for number, name in enumerate(squad.NAMES):
            threshold, value = squad.best_threshold(given[:, number], answered, apart)
            table.append([f"best {name}", round(threshold, 4), round(value, 4)])
        found["no answer"] = table
    return found


def baseline_scores(train: Examples, test: Examples) -> dict[str, float]:
    """F1 of what the same question is most often answered with, and of the sentence that is most like the question."""
    rows, truth = np.unique(test.encoded.rows), _truth(test)
    questions, contexts = ([column[row] for row in rows] for column in test.texts)
    commonest = baselines.commonest_answers(train.texts[0], _first_texts(train.targets or []), questions)
    sentences = baselines.nearest_sentences(train.texts[1], questions, contexts)
    said = {"commonest answer to each question": commonest, "sentence most like the question": sentences}
    return {name: float(squad.scores(answers, truth)[:, 1].mean()) for name, answers in said.items()}


def audit(train: Examples, tokenizer: TextTokenizer) -> Audit:
    """How many windows hold their answer, and some of them; where none does there is nothing to be learned."""
    encoded, held = train.encoded, train.documents["answer"][:, 1] > 0
    answered = np.asarray([bool(answers) for answers in train.targets or []])
    rows = np.unique(encoded.rows)
    without = np.setdiff1d(rows[answered[rows]], encoded.rows[held])
    facts = {
        "windows": f"{len(encoded):,} of {len(rows):,} rows, {int(held.sum()):,} with the answer",
        "answers that no window holds": f"{len(without):,}",
        "lost": ", ".join(f"{count:,} {why}" for why, count in encoded.lost.items()) or "none",
    }
    problems = (
        [] if held.any() else ["no window holds an answer, so there is none to be learned; raise data.max_length"]
    )
    shown = np.flatnonzero(held)[[0, held.sum() // 2, -1]] if held.any() else []
    return Audit([_pieces(train, int(window), tokenizer) for window in np.unique(shown)], facts, problems)


def supervision(encoded: Encoded, tokenizer: TextTokenizer) -> Iterator[list[Token]]:
    """The tokens of each window; those of its answer are supervised, the first one where it holds none."""
    for (begin, end), (first, last) in zip(
        pairwise(encoded.offsets.tolist()), encoded.documents["answer"], strict=True
    ):
        weights = [float(first <= place <= last) for place in range(end - begin)]
        yield audits.tokens(tokenizer, encoded.tokens["input_ids"][begin:end], weights)


def _pieces(train: Examples, window: int, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
    """The text of a window in three pieces, of which the second is its answer."""
    ids = train.encoded.tokens["input_ids"][train.encoded.offsets[window] : train.encoded.offsets[window + 1]]
    first, last = train.documents["answer"][window]
    parts = (ids[:first], ids[first : last + 1], ids[last + 1 :])
    texts = (tokenizer.fast.decode(part.tolist(), skip_special_tokens=False) for part in parts)
    return [(audits.shortened(text), number == 1) for number, text in enumerate(texts)]


def _read(rows: Rows, section: QuestionAnswering) -> tuple[tuple[Sequence[Any], ...], dict[int, Bad]]:
    (questions, contexts), bad = read_texts(rows, (section.question, section.context))
    return ([text.strip() if isinstance(text, str) else text for text in questions], contexts), bad


def _learned(targets: Sequence[Answers]) -> tuple[np.ndarray, np.ndarray]:
    """(where the first answer of each row begins, where it ends); nowhere where there is none."""
    first = [answers[0] if answers else (0, "") for answers in targets]
    begin = np.asarray([place for place, _ in first], np.int64)
    return begin, begin + np.asarray([len(text) for _, text in first], np.int64)


def _log_sums(logits: Float[Array, "r t 2"], batch: Mapping[str, Array]) -> Float[Array, "r n 2"]:
    """The logarithm of the sum of the exponentials over the tokens of each document; finite also where it has none."""
    slots = 1 + jnp.arange(batch["starts"].shape[1])
    own = batch["segment_ids"][:, None] == slots[:, None]
    return jax.nn.logsumexp(jnp.where(own[..., None], logits[:, None], LEAST), axis=2)


def _threshold(section: QuestionAnswering) -> float:
    """How far no answer may score above the best span before it is said."""
    return section.null_threshold if section.no_answer else float("inf")


def _truth(examples: Examples) -> list[list[str]]:
    """The right answers of each row that has documents."""
    targets = examples.targets or []
    return [[text for _, text in targets[row]] for row in np.unique(examples.encoded.rows)]


def _first_texts(targets: Sequence[Answers]) -> list[str]:
    return [answers[0][1] if answers else "" for answers in targets]


def _cut(context: str, begin: int, end: int) -> tuple[str, int, int]:
    """(text, begin, end) of a span without the blanks around it, which some tokenizers count in."""
    text = context[begin:end]
    begin += len(text) - len(text.lstrip())
    return text.strip(), begin, begin + len(text.strip())


def _label_counts(targets: Sequence[Answers]) -> dict[str, int | float]:
    return dict(Counter("answer" if answers else "no answer" for answers in targets))


def _asked(question: str) -> str:
    return next((word for word in re.findall(r"\w+", question.lower()) if word in WORDS), OTHER)


def _length(right: Sequence[str]) -> str:
    words = len(right[0].split()) if right else 0
    return next((name for name, most in LENGTHS.items() if words <= most), LONGER)


def _by(kinds: Sequence[str], order: Sequence[str], values: Float[np.ndarray, "rows 2"]) -> Table:
    table: Table = [["", "rows", "exact match", "F1"]]
    for kind in order:
        own = values[[k == kind for k in kinds]]
        if len(own):
            table.append([kind, len(own), *(round(float(value), 4) for value in own.mean(axis=0))])
    return table
