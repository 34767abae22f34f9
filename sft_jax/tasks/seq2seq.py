"""A text for each text, by an encoder-decoder: translations, summaries.

What is counted is as for other tasks on the next token, of the targets; besides, the first rows of a split are answered
and scored (`eval.answers`). The headline is chrF, which is more when better, and which what needs no model can be
scored in too; `loss`, which costs no answers, is for `eval.best_metric`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from sft_jax.config.generation import Generation, Rules
from sft_jax.config.tasks import Seq2Seq
from sft_jax.data.batch import Encoded
from sft_jax.data.pairs import START, encode_pairs, encode_sources
from sft_jax.data.prepare import read_texts
from sft_jax.data.rows import Rows
from sft_jax.data.text import GENERATION, TextTokenizer, load_tokenizer
from sft_jax.errors import ConfigError, ModelError
from sft_jax.models.family import Head
from sft_jax.tasks import answer_scores, audits, next_token, word_table
from sft_jax.tasks.task import Audit, Examples, Targets, Task, Texts, Token, written

# What a `generation_config.json` may say that would change answers, and what it must say for them to stay as they are.
PLAIN = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "force_words_ids": None,
    "exponential_decay_length_penalty": None,
}
# Of what `transformers` generates with, that which has the same name here.
SEARCH = ("num_beams", "length_penalty", "early_stopping")
WRITTEN = (START, "pad_token_id", "eos_token_id", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")


def build(section: Seq2Seq, rows: Mapping[str, Rows]) -> Task:
    """The task."""

    def encode(texts: Texts, targets: Sequence[str] | None, tokenizer: TextTokenizer, max_length: int) -> Encoded:
        if targets is None:
            raise ConfigError("--score: seq2seq scores answers where rows have targets, in evaluation; leave it out")
        return encode_pairs(tokenizer, texts[0], targets, max_length, section.max_target_length, section.prefix)

    def given(texts: Texts) -> list[str]:
        return [section.prefix + text for text in texts[0]]

    task = Task(
        kind=section.kind,
        head=Head("seq2seq", 0),
        labels=(),
        texts=(section.source,),
        columns=(section.source, section.target),
        read=lambda rows: read_texts(rows, (section.source,)),
        targets=lambda rows: _read_targets(section, rows),
        classes=lambda targets: [0] * len(targets),
        label_counts=lambda targets: {},
        encode=encode,
        fit=lambda train: task,
        loss=lambda logits, batch: next_token.loss(logits, _of_targets(batch), section.label_smoothing),
        divergence=lambda one, other, batch: next_token.divergence(one, other, _of_targets(batch)),
        count=lambda logits, batch: next_token.count(logits, _of_targets(batch), section.label_smoothing),
        metrics=next_token.finish,
        row_metrics=lambda kept, examples: {},
        metric_names=(*next_token.METRICS, *answer_scores.NAMES),
        least_is_best=next_token.LEAST_IS_BEST,
        headline="chrf",
        tables=lambda counts: {},
        review=next_token.review,
        baselines=baseline_scores,
        decode=next_token.decode,
        to_hf=lambda: {"sft_jax_task": section.model_dump(mode="json", exclude={"label_smoothing"})},
        keep=lambda logits, batch: next_token.keep(logits, _of_targets(batch)),
        cleans=False,
        moves=False,
        audit=lambda train, tokenizer: audit(train, tokenizer, stops(tokenizer)),
        supervision=supervision,
        generation=section.generate,
        prompt=lambda texts, tokenizer, max_length: encode_sources(tokenizer, given(texts), max_length),
        stops=stops,
        rules=rules,
        answer_metrics=answer_scores.score,
        answer_metric_names=answer_scores.NAMES,
        files=files,
    )
    return task


def restore(config: Mapping[str, Any]) -> Seq2Seq:
    """The section that a `config.json` was written from; a model that others trained goes on as it searches."""
    ours = {name: value for name, value in written(config).items() if name in Seq2Seq.model_fields}
    search = {name: config[name] for name in SEARCH if config.get(name) is not None}
    return Seq2Seq(**{"generate": Generation(**search), **ours, "kind": "seq2seq"})


def stops(tokenizer: TextTokenizer) -> list[int]:
    """The tokens that end an answer."""
    found = tokenizer.answers.get("eos_token_id", tokenizer.id("eos_token"))
    return _tokens({"eos_token_id": found}, "eos_token_id")


def rules(tokenizer: TextTokenizer) -> Rules:
    """Which tokens may stand where, by the model's own files; what they ask besides is refused."""
    said = tokenizer.answers
    for name, plain in PLAIN.items():
        if said.get(name) not in (None, plain):
            raise ModelError(f"{GENERATION}: {name}={said[name]!r:.60} is not supported; take it out")
    banned = said.get("bad_words_ids") or []
    if not isinstance(banned, list) or not all(isinstance(b, list) and len(b) == 1 for b in banned):
        raise ModelError(f"{GENERATION}: bad_words_ids is {banned!r:.60}, expected lists of one token each")
    least = max(_count(said, "min_length") - 1, _count(said, "min_new_tokens"), 0)
    return Rules(
        banned=tuple(token for one in banned for token in _tokens({"bad_words_ids": one}, "bad_words_ids")),
        first=_token(said, "forced_bos_token_id"),
        last=_token(said, "forced_eos_token_id"),
        least=least,
    )


def baseline_scores(train: Examples, test: Examples) -> dict[str, float]:
    """chrF of the sources as they are, and of their words each translated alone, by a table of the training rows."""
    rows = np.unique(test.encoded.rows).tolist()
    sources, targets = ([column[row] for row in rows] for column in (test.texts[0], test.targets or []))
    table = word_table.learn(train.texts[0], train.targets or [])
    return {
        "the source as it is": answer_scores.chrf(sources, targets),
        "word by word": answer_scores.chrf(word_table.translate(table, sources), targets),
    }


def audit(train: Examples, tokenizer: TextTokenizer, stop: Sequence[int]) -> Audit:
    """What is to be written of the training documents, behind the sources that it answers."""
    encoded, target = train.encoded, train.encoded.target
    assert target
    found = audits.of_tokens(_in_one(target), replace(tokenizer, fast=tokenizer.writer), stop)
    cut = f"{encoded.truncated:,} sources and {target.truncated:,} targets of {len(encoded):,} documents"
    ids = encoded.select(audits.shown(len(encoded))).ids()
    sources = [audits.shortened(tokenizer.fast.decode(one, skip_special_tokens=False)) for one in ids]
    shown = [[(source, False), *pieces] for source, pieces in zip(sources, found.rows, strict=True)]
    return Audit(shown, {**found.facts, "truncated": cut}, found.problems)


def supervision(encoded: Encoded, tokenizer: TextTokenizer) -> Iterator[list[Token]]:
    """The tokens of each source, of which none is supervised, and those of its target."""
    assert encoded.target
    written = audits.next_tokens(_in_one(encoded.target), replace(tokenizer, fast=tokenizer.writer))
    for ids, target in zip(encoded.ids(), written, strict=True):
        source = audits.tokens(tokenizer, np.asarray(ids), [0.0] * len(ids))
        yield [*source, *target]


def files(directory: Path) -> dict[str, str]:
    """How an export is made to answer: what the model's own files say, in the one that `transformers` reads."""
    said = load_tokenizer(directory).answers
    kept = {name: said[name] for name in (*WRITTEN, "min_length") if said.get(name) is not None}
    return {GENERATION: json.dumps(kept, indent=2) + "\n"}


def _of_targets(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch as the decoder sees it."""
    return {**batch, "segment_ids": batch["decoder_segment_ids"], "position_ids": batch["decoder_position_ids"]}


def _read_targets(section: Seq2Seq, rows: Rows) -> Targets:
    (values,), bad = read_texts(rows, (section.target,))
    return Targets(values, bad)


def _in_one(target: Encoded) -> Encoded:
    """Targets with the token that ends them as documents of a decoder, whose last token predicts nothing."""
    tokens, ends = target.tokens, target.offsets[1:]
    ids = np.insert(tokens["decoder_input_ids"], ends, tokens["label"][ends - 1])
    filled = {name: np.insert(tokens[name], ends, 0) for name in ("label", "token_weight")}
    return Encoded({"input_ids": ids, **filled}, target.offsets + np.arange(len(target.offsets)), {})


def _tokens(said: Mapping[str, Any], name: str) -> list[int]:
    found = said.get(name)
    tokens = found if isinstance(found, list) else [found] if found is not None else []
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise ModelError(f"{GENERATION}: {name} is {found!r:.60}, expected tokens by their numbers")
    return tokens


def _token(said: Mapping[str, Any], name: str) -> int | None:
    tokens = _tokens(said, name)
    if len(tokens) > 1:
        raise ModelError(f"{GENERATION}: {name} is {tokens!r:.60}; only one token is supported")
    return tokens[0] if tokens else None


def _count(said: Mapping[str, Any], name: str) -> int:
    found = said.get(name) or 0
    if type(found) is not int or found < 0:
        raise ModelError(f"{GENERATION}: {name} is {found!r:.60}, expected a number of tokens")
    return found
