"""A tag for each word: named entities, parts of speech.

A row is a tuple of words; a document is a window of it (`data/words.py`). Every word has one token from which its
answer is read, its first. Where the tokens of a word are averaged, the mean of their outputs stands at that token.

Letters: r rows of the batch, t tokens in a row, c tags, w words of all rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sft_jax.config.tasks import TokenClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.rows import Bad, Rows
from sft_jax.data.words import tokenize_words
from sft_jax.errors import ConfigError, DataError, ModelError
from sft_jax.models.family import Head
from sft_jax.tasks import audits, metrics, span_columns, tag_schemes
from sft_jax.tasks import label_columns as columns
from sft_jax.tasks import labels as named
from sft_jax.tasks.classes import balanced_weights, count, finish, often, tables
from sft_jax.tasks.losses import Weights, class_divergence, cross_entropy, token_weights
from sft_jax.tasks.task import Examples, Ratio, Record, Review, Targets, Task, Texts, Token, written

Tags = tuple[int, ...]
KEPT = ("words", "text", "spans", "align", "stride", "scheme")  # of the section, in a `config.json`
SPANS = ("span_precision", "span_recall", "span_f1", "span_f1_macro", "span_f1_strict")


def build(section: TokenClassification, rows: Mapping[str, Rows]) -> Task:
    """The task on these rows; the tags are those of the configuration, the source, or the sorted values."""
    if section.spans is None and (train := rows.get("train")) and train.names == ["text"]:
        raise DataError(
            f"{train.where}: is lines of text, a row each; files of words with their tags are told by their names, "
            f"which end in .conll, .iob, .iob2 or .bio"
        )
    found = section.labels
    if found is None and section.spans:
        found = span_columns.names(rows["train"], section.spans)
    elif found is None:
        found = columns.names_of_each(rows["train"], section.tags)
    labels = named.given(found, 2)
    scheme = tag_schemes.scheme_of(labels)
    if section.scheme not in ("auto", "none", scheme) and not (section.scheme == "BIOES" and scheme == "BIO"):
        raise ConfigError(
            f"task.scheme: the tags are {'of ' + scheme if scheme != 'none' else 'no spans'}, such as {labels[-1]!r}; "
            f"set it to auto or none"
        )
    chosen = scheme if section.scheme == "auto" else section.scheme
    return _task(section, labels, chosen, named.weights(section.class_weights, labels), _outside(labels))


def restore(config: Mapping[str, Any]) -> TokenClassification:
    """The section that a `config.json` was written from; of a model that others trained, its label names."""
    names = named.names_in(config)
    if len(names) < 2:
        raise ModelError(f"config.json: names {len(names)} label, expected two or more tags")
    kept = {key: written(config)[key] for key in KEPT if key in written(config)}
    return TokenClassification(kind="token_classification", labels=names, **kept)


def _task(section: TokenClassification, labels: tuple[str, ...], scheme: str, weights: Weights, fallback: int) -> Task:
    gamma = section.focal_gamma if section.loss == "focal" else 0.0
    inside = _inside(labels)
    plain = scheme == "none"

    def outputs_of(logits: Float[Array, "r t c"], batch: Mapping[str, Array]) -> Float[Array, "r t c"]:
        return averaged(logits, batch["back"]) if section.align == "average" else logits

    def loss(logits: Float[Array, "r t c"], batch: Mapping[str, Array]) -> Ratio:
        settings = {"class_weights": weights, "smoothing": section.label_smoothing, "gamma": gamma}
        return cross_entropy(outputs_of(logits, batch), batch["label"], token_weights(batch), **settings)

    def divergence(one: Float[Array, "r t c"], other: Float[Array, "r t c"], batch: Mapping[str, Array]) -> Ratio:
        return class_divergence(outputs_of(one, batch), outputs_of(other, batch), token_weights(batch))

    def counted(logits: Float[Array, "r t c"], batch: Mapping[str, Array]) -> Any:
        answered = {"label": batch["label"], "weight": token_weights({**batch, "token_weight": batch["answers"]})}
        return count(outputs_of(logits, batch), answered, loss(logits, batch))

    def encode(texts: Texts, targets: Sequence[Tags] | None, tokenizer: Any, max_length: int) -> Encoded:
        stride = max_length // 4 if section.stride is None else section.stride
        found = tokenize_words(tokenizer, texts[0], max_length, stride)
        starts, tags = _flat(texts[0], targets)
        places = starts[np.repeat(found.rows, np.diff(found.offsets))] + found.word  # of no meaning where it is -1
        label = np.where(found.word >= 0, tags[np.maximum(places, 0)], 0).astype(np.int32)
        answers = found.first.astype(np.float32)
        trained = answers
        if section.align == "all":
            trained = (found.word >= 0).astype(np.float32)
            label = np.where(found.first, label, inside[label])
        tokens = {**found.fields, "label": label, "token_weight": trained, "answers": answers}
        if section.align == "average":
            tokens["back"] = _back(found.word, found.first)
        return Encoded(tokens, found.offsets, {}, rows=found.rows, beside={"word": found.word})

    def fit(train: Encoded) -> Task:
        learned = train.tokens["label"][train.tokens["token_weight"] > 0]
        by_tag = balanced_weights(learned, len(labels)) if section.class_weights == "balanced" else weights
        commonest = int(often(learned, len(labels)).argmax()) if plain and len(learned) else fallback
        return _task(section, labels, scheme, by_tag, commonest)

    def both(kept: np.ndarray, examples: Examples) -> tuple[list[list[str]], list[list[str]]]:
        found, targets = _tags_said(kept, examples, labels, fallback), examples.targets or []
        return [[labels[tag] for tag in targets[row]] for row in found], list(found.values())

    def row_metrics(kept: np.ndarray, examples: Examples) -> dict[str, float]:
        if plain:
            return {}
        truth, found = both(kept, examples)
        strict = tag_schemes.span_scores(truth, found, lambda tags: tag_schemes.strict_spans(tags, scheme))
        summary = tag_schemes.summary(tag_schemes.span_scores(truth, found))
        return {**summary, "span_f1_strict": tag_schemes.summary(strict)["span_f1"]}

    def row_tables(kept: np.ndarray, examples: Examples) -> dict[str, list[list[Any]]]:
        if plain:
            return {}
        table: list[list[Any]] = [["type", "precision", "recall", "F1", "spans", "said"]]
        for kind, (hits, found, there) in tag_schemes.span_scores(*both(kept, examples)).items():
            figures = (round(float(value), 4) for value in metrics.precision_recall_f1(hits, found, there))
            table.append([kind, *figures, there, found])
        return {"spans": table}

    def baselines(train: Examples, test: Examples) -> dict[str, float]:
        rows = np.unique(test.encoded.rows)
        known = _commonest_tags(train)
        commonest = int(often(_flat(train.texts[0], train.targets)[1], len(labels)).argmax())
        guessed = [[known.get(word, commonest) for word in test.texts[0][row]] for row in rows]
        truth = [list((test.targets or [])[row]) for row in rows]
        if plain:
            pairs = [a == b for one, other in zip(truth, guessed, strict=True) for a, b in zip(one, other, strict=True)]
            return {"commonest tag of each word": float(np.mean(pairs))}
        there, said = ([[labels[tag] for tag in tags] for tags in side] for side in (truth, guessed))
        return {"commonest tag of each word": tag_schemes.summary(tag_schemes.span_scores(there, said))["span_f1"]}

    task = Task(
        kind=section.kind,
        head=Head("token_classification", len(labels)),
        labels=labels,
        texts=(section.text if section.spans else section.words,),
        columns=(section.text, section.spans) if section.spans else (section.words, section.tags),
        read=lambda rows: _read_words(rows, section),
        targets=lambda rows: _read_tags(rows, section, labels),
        classes=lambda targets: [0] * len(targets),
        label_counts=lambda targets: _label_counts(targets, labels),
        doubts=named.doubts,
        encode=encode,
        fit=fit,
        loss=loss,
        divergence=divergence,
        count=counted,
        metrics=finish,
        row_metrics=row_metrics,
        metric_names=("loss", "log_loss", *metrics.classification(np.eye(2)), "ece", *(() if plain else SPANS)),
        least_is_best=frozenset({"loss", "log_loss", "ece"}),
        headline="accuracy" if plain else "span_f1",
        tables=lambda counts: tables(counts, labels),
        row_tables=row_tables,
        review=lambda kept, examples: review(kept, examples, *both(kept, examples), plain),
        baselines=baselines,
        decode=lambda kept, examples: decode(kept, examples, _tags_said(kept, examples, labels, fallback), plain),
        to_hf=lambda: _to_hf(section, labels, scheme),
        grain="token",
        keep=lambda logits, batch: keep(outputs_of(logits, batch), batch),
        moves=False,
        supervision=lambda encoded, tokenizer: supervision(encoded, tokenizer, labels),
    )
    return task


def supervision(encoded: Encoded, tokenizer: Any, labels: Sequence[str]) -> Iterator[list[Token]]:
    """The tokens of each window, with the tags of those that are trained on."""
    for begin, end in pairwise(encoded.offsets.tolist()):
        ids, label, weight = (encoded.tokens[name][begin:end] for name in ("input_ids", "label", "token_weight"))
        told = [labels[int(tag)] if worth else None for tag, worth in zip(label, weight, strict=True)]
        yield audits.tokens(tokenizer, ids, weight.tolist(), told)


def averaged(logits: Float[Array, "r t c"], back: Int[Array, "r t"]) -> Float[Array, "r t c"]:
    """At the first token of each word the mean of the outputs of all of its tokens; `back` is how far away that is."""
    tokens = logits.shape[1]
    first = jnp.arange(tokens) - back

    def of_row(values: Float[Array, "t k"], word: Int[Array, " t"]) -> Float[Array, "t k"]:
        return jax.ops.segment_sum(values, word, num_segments=tokens)

    sums = jax.vmap(of_row)(logits.astype(jnp.float32), first)
    counts = jax.vmap(of_row)(jnp.ones((*back.shape, 1)), first)
    return sums / jnp.maximum(counts, 1)


def keep(logits: Float[Array, "r t c"], batch: Mapping[str, Array]) -> Float[Array, "r t 3"]:
    """Of each token the tag that is said, its probability, and the loss of the true one."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(logs, batch["label"][..., None], axis=-1)[..., 0]
    return jnp.stack([logs.argmax(axis=-1).astype(jnp.float32), jnp.exp(logs.max(axis=-1)), loss], axis=-1)


def review(
    kept: Float[np.ndarray, "tokens 3"], examples: Examples, truth: list[list[str]], said: list[list[str]], plain: bool
) -> Review:
    """How each row was answered: its spans, or the words whose tags are wrong."""
    rows, at = np.unique(examples.encoded.rows), _answered(examples.encoded)
    of = np.searchsorted(rows, _rows_of_tokens(examples.encoded)[at])
    texts = examples.texts[0]
    shown = [_shown(texts[row], a, b, plain) for row, a, b in zip(rows, truth, said, strict=True)]
    words = np.maximum(np.bincount(of, minlength=len(rows)), 1)
    return Review(
        truth=[one for one, _ in shown],
        predicted=[other for _, other in shown],
        right=np.asarray([a == b for a, b in zip(truth, said, strict=True)]),
        confidence=np.exp(np.bincount(of, np.log(np.maximum(kept[at, 1], 1e-30)), len(rows))),
        loss=np.bincount(of, kept[at, 2], len(rows)) / words,
        rows=rows,
    )


def decode(
    kept: Float[np.ndarray, "tokens 3"], examples: Examples, said: Mapping[int, list[str]], plain: bool
) -> list[Record]:
    """`{"words": [...], "tags": [...], "entities": [...]}` of each row; without spans there are no entities."""
    at = _answered(examples.encoded)
    rows, words = _rows_of_tokens(examples.encoded)[at].tolist(), examples.encoded.beside["word"][at].tolist()
    sure = dict(zip(zip(rows, words, strict=True), kept[at, 1].tolist(), strict=True))
    records: list[Record] = []
    for row, tags in said.items():
        text = examples.texts[0][row]
        record: Record = {"words": list(text), "tags": tags}
        if not plain:
            record["entities"] = [
                {
                    "type": kind,
                    "text": " ".join(text[begin:end]),
                    "words": [begin, end],
                    "score": round(float(np.mean([sure.get((row, word), 0.0) for word in range(begin, end)])), 6),
                }
                for kind, begin, end in tag_schemes.spans(tags)
            ]
        records.append(record)
    return records


def _read_words(rows: Rows, section: TokenClassification) -> tuple[tuple[list[Any], ...], dict[int, Bad]]:
    """The words of each row, and what is wrong with those that have none."""
    if section.spans:
        return span_columns.read_words(rows, section.text)
    column = section.words
    found: list[tuple[str, ...]] = []
    bad: dict[int, Bad] = {}
    for row, value in enumerate(rows.texts(column)):
        words = columns.split_at_blanks(value)
        fits = isinstance(words, list) and bool(words) and all(isinstance(word, str) for word in words)
        if not fits or not any(word.strip() for word in words):
            wanted = f"; {words}" if isinstance(words, str) else ", expected a list of words"
            bad[row] = Bad(rows.place(row), "no words", f"{column} is {value!r:.60}{wanted}")
        found.append(tuple(words) if fits else ())
    return (found,), bad


def _read_tags(rows: Rows, section: TokenClassification, labels: Sequence[str]) -> Targets:
    if section.spans:
        return span_columns.read(rows, section.text, section.spans, labels)
    (words,), bad = _read_words(rows, section)
    counts = [None if row in bad else len(found) for row, found in enumerate(words)]
    return columns.read_each(rows, section.tags, labels, counts)


def _flat(words: Sequence[Sequence[str]], targets: Sequence[Tags] | None) -> tuple[np.ndarray, np.ndarray]:
    """(where each row begins among the words of all, tags of the words of all); 0 where there are no targets."""
    counts = np.asarray([len(row) for row in words], np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    if targets is None:
        return starts[:-1], np.zeros(int(starts[-1]), np.int32)
    return starts[:-1], np.fromiter((tag for tags in targets for tag in tags), np.int32, int(starts[-1]))


def _back(word: Int[np.ndarray, " tokens"], first: np.ndarray) -> Int[np.ndarray, " tokens"]:
    """How many tokens before each one its word begins; 0 for a token that is of no word."""
    places = np.arange(len(word))
    begun = np.maximum.accumulate(np.where(first, places, 0)) if len(word) else places
    return np.where(word >= 0, places - begun, 0).astype(np.int32)


def _answered(encoded: Encoded) -> np.ndarray:
    """The tokens from which answers are read."""
    return np.flatnonzero(encoded.tokens["answers"] > 0)


def _rows_of_tokens(encoded: Encoded) -> np.ndarray:
    return np.repeat(encoded.rows, encoded.lengths)


def _tags_said(
    kept: Float[np.ndarray, "tokens 3"], examples: Examples, labels: Sequence[str], fallback: int
) -> dict[int, list[str]]:
    """Row -> its tags; a word that became no token gets the fallback."""
    encoded, texts = examples.encoded, examples.texts[0]
    found = {int(row): [labels[fallback]] * len(texts[row]) for row in np.unique(encoded.rows)}
    at = _answered(encoded)
    rows, words = _rows_of_tokens(encoded)[at].tolist(), encoded.beside["word"][at].tolist()
    for row, word, tag in zip(rows, words, kept[at, 0].astype(int).tolist(), strict=True):
        found[row][word] = labels[tag]
    return found


def _commonest_tags(train: Examples) -> dict[str, int]:
    """Word -> its commonest tag in training; of equally common ones the lowest."""
    counts: dict[str, dict[int, int]] = {}
    for words, tags in zip(train.texts[0], train.targets or [], strict=True):
        for word, tag in zip(words, tags, strict=True):
            of_word = counts.setdefault(word, {})
            of_word[tag] = of_word.get(tag, 0) + 1
    return {word: min(found, key=lambda tag: (-found[tag], tag)) for word, found in counts.items()}


def _label_counts(targets: Sequence[Tags], labels: Sequence[str]) -> dict[str, int | float]:
    """How many words have each tag."""
    flat = np.fromiter((tag for tags in targets for tag in tags), np.int64)
    return dict(zip(labels, often(flat, len(labels)).tolist(), strict=True))


def _shown(words: Sequence[str], truth: Sequence[str], said: Sequence[str], plain: bool) -> tuple[str, str]:
    """(what is true, what was said) of a row, for people."""
    if plain:
        wrong = [place for place, (a, b) in enumerate(zip(truth, said, strict=True)) if a != b]
        one, other = (", ".join(f"{words[place]}/{tags[place]}" for place in wrong) for tags in (truth, said))
        return one or "all right", other or "all right"
    sides = []
    for tags in (truth, said):
        found = [f"{kind}: {' '.join(words[begin:end])}" for kind, begin, end in tag_schemes.spans(tags)]
        sides.append("; ".join(found) or "none")
    return sides[0], sides[1]


def _outside(labels: Sequence[str]) -> int:
    return labels.index(tag_schemes.OUTSIDE) if tag_schemes.OUTSIDE in labels else 0


def _inside(labels: Sequence[str]) -> Int[np.ndarray, " c"]:
    """For each tag that of the tokens after the first one: I- of its type where there is one, else itself."""
    numbers = {label: number for number, label in enumerate(labels)}
    return np.asarray([numbers.get(f"I-{label[2:]}", n) if label[1:2] == "-" else n for label, n in numbers.items()])


def _to_hf(section: TokenClassification, labels: Sequence[str], scheme: str) -> dict[str, Any]:
    kept = section.model_dump(mode="json", include={"kind", *KEPT})
    found = named.to_hf(labels, "", {**kept, "scheme": scheme})
    return {key: value for key, value in found.items() if key != "problem_type"}
