"""The next token: of plain texts, of completions of prompts, of what an assistant says in conversations.

A row's texts are what is given, its target what is to be said: of a prompt its completion, of a conversation the
answer that it ends with (as JSON), of a plain text nothing. So equal prompts with other completions are conflicts, and
a prompt that stands in the test split leaks. Only plain texts may be cleaned: prompts would be changed and completions
not.

The headline is the share of tokens that the model thinks likeliest, since it is more when better, as what it is
compared with is; `loss`, which picks better steps, is for `eval.best_metric`.

Letters: r rows of the batch, t tokens in a row, n document slots in a row, d documents.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.config.tasks import CausalLM
from sft_jax.data import chat, templates
from sft_jax.data.answers import (
    CUT,
    WEIGHTLESS,
    Passage,
    cached,
    encode_numbers,
    encode_passages,
    encode_prompts,
    with_lost,
)
from sft_jax.data.batch import Encoded
from sft_jax.data.blocks import Maker
from sft_jax.data.chat import Conversation
from sft_jax.data.conversations import joined
from sft_jax.data.rows import MOST_SHOWN, Rows
from sft_jax.data.templates import REASONING
from sft_jax.data.text import GENERATION, TEMPLATE, TextTokenizer, load_tokenizer
from sft_jax.errors import ConfigError, DataError, ModelError, reason
from sft_jax.models.family import Head
from sft_jax.tasks import audits, baselines, forms, lm_rows, next_token
from sft_jax.tasks.task import Audit, Examples, Task, Texts, written


def build(section: CausalLM, rows: Mapping[str, Rows]) -> Task:
    """The task; what the configuration leaves open is told by the columns of the training rows, and of a template that
    it names, the file is read here."""
    template = None if section.template is None else _template(section.template)
    found, told = forms.settled(section, rows.get("train"))
    return _task(found, template, forms.columns_of(found, rows.get("train")), told)


def restore(config: Mapping[str, Any]) -> CausalLM:
    """The section that a `config.json` was written from; a model that others trained goes on with plain texts."""
    given = {name: value for name, value in written(config).items() if name in CausalLM.model_fields}
    return CausalLM(**{**given, "kind": "causal_lm"})


def _task(
    section: CausalLM, template: str | None, columns: forms.Columns, told: str, train: Encoded | None = None
) -> Task:
    """The task of a section: with a template in place of the tokenizer's own, and fitted to training documents."""
    is_chat = section.format == "chat"

    def of(tokenizer: TextTokenizer) -> TextTokenizer:
        return tokenizer if template is None else replace(tokenizer, template=template, named={})

    def encode(texts: Texts, targets: Sequence[str] | None, tokenizer: TextTokenizer, max_length: int) -> Encoded:
        if targets is None:
            return prompt(texts, tokenizer, max_length)
        worker = of(tokenizer)
        settings = (section.format, section.loss_on, section.today, sorted(section.mask), section.weight is None)
        origin, columns = (f"{settings} {max_length}",), (texts[0], targets)
        if is_chat:
            return _told_apart(cached(worker, origin, columns, lambda: _of_chats(section, worker, max_length)))
        make = MAKE[section.format]

        def of_block(given: Sequence[str], answers: Sequence[str]) -> Encoded:
            return make(section, given, answers, worker, max_length)

        return cached(worker, origin, columns, lambda: Maker(of_block))

    def prompt(texts: Texts, tokenizer: TextTokenizer, max_length: int) -> Encoded:
        worker, found = of(tokenizer), list(texts[0])
        if section.format == "tokens":
            return encode_numbers([json.loads(text) for text in found], max_length)
        if section.format == "segments":
            found = [lm_rows.asked(section, text) for text in found]
        if is_chat:
            talks = [chat.open_conversation(text) for text in found]
            found = chat.prompts(worker, _suited(worker, talks), section.today)
        return encode_prompts(worker, found, max_length, framed=section.format in ("text", "completion"))

    def stops(tokenizer: TextTokenizer) -> list[int]:
        return chat.stop_tokens(tokenizer, train)

    task = Task(
        kind=section.kind,
        head=Head("causal_lm", 0),
        labels=(),
        texts=(columns.given,),
        columns=columns.names,
        read=lambda rows: lm_rows.read_given(section, rows),
        targets=lambda rows: lm_rows.read_targets(section, rows),
        classes=lambda targets: [0] * len(targets),
        label_counts=lambda targets: {},
        encode=encode,
        fit=lambda train: _task(section, template, columns, told, train),
        loss=lambda logits, batch: next_token.loss(logits, batch, section.label_smoothing),
        divergence=next_token.divergence,
        count=lambda logits, batch: next_token.count(logits, batch, section.label_smoothing),
        metrics=next_token.finish,
        row_metrics=lambda kept, examples: {},
        metric_names=next_token.METRICS,
        least_is_best=next_token.LEAST_IS_BEST,
        headline="token_accuracy",
        tables=lambda counts: {},
        review=lambda kept, examples: next_token.review(kept, _in_words(section, examples)),
        baselines=baseline_scores,
        decode=next_token.decode,
        to_hf=lambda: {"sft_jax_task": section.model_dump(mode="json", exclude={"template", "label_smoothing"})},
        keep=next_token.keep,
        cleans=section.format == "text",
        moves=False,
        audit=lambda train, tokenizer: audit(section, train, of(tokenizer), chat.stop_tokens(tokenizer, train.encoded)),
        generation=section.generate,
        prompt=prompt,
        stops=stops,
        files=lambda directory: files(directory, stops(load_tokenizer(directory)), template),
        supervision=audits.next_tokens,
        told=told,
        asked=lambda texts, row: lm_rows.asked(section, texts[0][row]),
    )
    return task


def baseline_scores(train: Examples, test: Examples) -> dict[str, float]:
    """Token accuracy of always saying the commonest token, and the one that is commonest after the token before."""
    (before, label), (test_before, test_label) = _pairs(train), _pairs(test)
    return {
        "commonest token": baselines.commonest_class(label, test_label),
        "commonest after the token before": baselines.commonest_next(before, label, test_before, test_label),
    }


def audit(section: CausalLM, train: Examples, tokenizer: TextTokenizer, stops: Sequence[int]) -> Audit:
    """What is supervised of the training documents, whether they begin once, and whether models learn to stop; of
    chats, what of their messages the template does not read."""
    found = audits.of_tokens(train.encoded, tokenizer, stops, ends=section.format not in ("tokens", "segments"))
    if section.format != "chat":
        return found
    unread = _unread(train, _words(tokenizer))
    said = ", ".join(f"{name} ({count:,} rows)" for name, count in unread.items()) or "nothing"
    return replace(found, facts={**found.facts, "not read": said})


def files(directory: Path, stops: Sequence[int], template: str | None) -> dict[str, str]:
    """What an export has besides: where generation stops (C5), and a template that is not the tokenizer's own."""
    file = directory / GENERATION
    try:
        given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        before = given.get("eos_token_id", [])
        all_of_them = sorted({*(before if isinstance(before, list) else [before]), *stops} - {None})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read ({reason(error)}); fetch it again, or remove it") from None
    found = {GENERATION: json.dumps({**given, "eos_token_id": all_of_them}, indent=2) + "\n"} if all_of_them else {}
    return found if template is None else {**found, TEMPLATE: template}


def _of_texts(
    section: CausalLM, texts: Sequence[str], targets: Sequence[str], tokenizer: TextTokenizer, max_length: int
) -> Encoded:
    """Texts as they are, or prompts with their completions."""
    everything = section.format == "text" or section.loss_on == "all"
    passages = []
    for text, target in zip(texts, targets, strict=True):
        said, weight = lm_rows.said_of(section, target)
        learned = (0 if everything else len(text), len(text + said))
        passages.append(Passage(text + said, (learned,), () if weight == 1 else (weight,)))
    return _of_passages(tokenizer, passages, max_length, framed=True)


def _of_segments(
    section: CausalLM, texts: Sequence[str], targets: Sequence[str], tokenizer: TextTokenizer, max_length: int
) -> Encoded:
    """Texts in segments that are learned or not, with all that they need: nothing is put around them."""
    passages = []
    for text, target in zip(texts, targets, strict=True):
        pieces, weight = json.loads(text), lm_rows.said_of(section, target)[1]
        ends = np.cumsum([len(piece) for piece, _ in pieces]).tolist()
        spans = [
            (begin, end, worth * weight) for begin, end, (_, worth) in zip([0, *ends[:-1]], ends, pieces, strict=True)
        ]
        learned = [span for span in spans if span[2] > 0 and span[0] < span[1]]
        answers = tuple((begin, end) for begin, end, _ in learned)
        whole, weights = "".join(piece for piece, _ in pieces), tuple(worth for *_, worth in learned)
        passages.append(Passage(whole, answers, weights, seams=()))
    return _of_passages(tokenizer, passages, max_length, framed=False)


def _of_passages(tokenizer: TextTokenizer, passages: Sequence[Passage], max_length: int, *, framed: bool) -> Encoded:
    """The documents of texts, without those of which nothing is to be learned."""
    heavy = [row for row, passage in enumerate(passages) if passage.answers and any(passage.weights or (1,))]
    picked = [passages[row] for row in heavy]
    found = encode_passages(tokenizer, picked, max_length, framed=framed, rows=heavy)
    return with_lost(found, {WEIGHTLESS: _others(heavy, len(passages))})


def _of_tokens(
    section: CausalLM, texts: Sequence[str], targets: Sequence[str], tokenizer: TextTokenizer, max_length: int
) -> Encoded:
    """Tokens as rows have them, each with its weight."""
    numbers = [json.loads(text) for text in texts]
    found = encode_numbers(numbers, max_length, [json.loads(target) if target else None for target in targets])
    largest, limit = int(found.tokens["input_ids"].max(initial=0)), tokenizer.fast.get_vocab_size()
    if largest >= limit:
        raise DataError(
            f"column '{section.text}': has a token {largest}, the tokenizer of the model has {limit} of them; make the "
            f"tokens with that one"
        )
    return found


def _of_chats(section: CausalLM, tokenizer: TextTokenizer, max_length: int) -> Maker:
    """Conversations, by the template of the tokenizer."""
    known = chat.begin(tokenizer, section.loss_on, section.mask)

    def encode(texts: Sequence[str], targets: Sequence[str]) -> Encoded:
        talks = [lm_rows.whole(text, target) for text, target in zip(texts, targets, strict=True)]
        made = chat.passages_of_block(tokenizer, _suited(tokenizer, talks), known, section.today)
        encoded = encode_passages(tokenizer, made.passages, max_length, framed=False, rows=made.rows)
        return with_lost(encoded, made.lost)

    return Maker(encode, known.noted)


def _told_apart(found: Encoded) -> Encoded:
    """The documents of conversations, of which the commonest reasons are told why others became none."""
    reasons = sorted((why for why in found.lost if why != CUT), key=lambda why: -found.lost[why])
    rare = reasons[chat.MOST_REASONS :]
    told = [*reasons[: chat.MOST_REASONS], *([CUT] if CUT in found.lost else [])]
    lost, rows = ({why: of[why] for why in told} for of in (found.lost, found.lost_rows))
    if rare:
        lost[chat.OTHERS] = sum(found.lost[why] for why in rare)
        rows[chat.OTHERS] = sorted(row for why in rare for row in found.lost_rows[why])[:MOST_SHOWN]
    return replace(found, lost=lost, lost_rows=rows)


MAKE: dict[str, Callable[..., Encoded]] = {
    "text": _of_texts,
    "completion": _of_texts,
    "segments": _of_segments,
    "tokens": _of_tokens,
}


def _others(rows: Sequence[int], count: int) -> list[int]:
    return np.setdiff1d(np.arange(count), rows).tolist()


def _suited(tokenizer: TextTokenizer, talks: Sequence[Conversation]) -> list[Conversation]:
    """Conversations as a template takes them: parts of texts as one text, where it knows of no parts."""
    return [*talks] if "text" in _words(tokenizer) else [joined(talk) for talk in talks]


def _words(tokenizer: TextTokenizer) -> frozenset[str]:
    """What the templates of a tokenizer read."""
    return frozenset().union(*map(templates.words, (tokenizer.template or "", *tokenizer.named.values())))


def _unread(train: Examples, words: Collection[str]) -> Counter[str]:
    """What of conversations a template does not read, with the number of rows that have it."""
    known = {*words, "role", "content", *(REASONING if words & {*REASONING} else ())}
    found: Counter[str] = Counter()
    for text, target in zip(train.texts[0], train.targets or [], strict=True):
        talk = lm_rows.whole(text, target)
        names = {name for message in talk.messages for name, value in message.items() if value}
        names |= {"tools"} if talk.tools else set()
        found.update((names | {*(talk.template_kwargs or {})}) - known)
    return found


def _in_words(section: CausalLM, examples: Examples) -> Examples:
    """The same with targets as people read them."""
    targets = examples.targets or [""] * len(examples.texts[0])
    pairs = zip(examples.texts[0], targets, strict=True)
    return replace(examples, targets=[lm_rows.in_words(section, text, target) for text, target in pairs])


def _template(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"task.template: {file} cannot be read ({reason(error)}); name a file with a template"
        ) from None


def _pairs(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """(token, the one that follows) wherever that one is to be learned."""
    tokens = examples.encoded.tokens
    learned = tokens["token_weight"] > 0
    return tokens["input_ids"][learned], tokens["label"][learned]
