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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.config.tasks import CausalLM
from sft_jax.data import chat
from sft_jax.data.answers import Passage, cached, encode_passages, encode_prompts
from sft_jax.data.batch import Encoded
from sft_jax.data.prepare import read_texts
from sft_jax.data.rows import Bad, Rows
from sft_jax.data.text import GENERATION, TEMPLATE, TextTokenizer, load_tokenizer
from sft_jax.errors import ConfigError, ModelError, reason
from sft_jax.models.family import Head
from sft_jax.tasks import audits, baselines, next_token
from sft_jax.tasks.task import Audit, Examples, Targets, Task, Texts, written


def build(section: CausalLM, rows: Mapping[str, Rows]) -> Task:
    """The task; of a template that the configuration names, the file is read here."""
    return _task(section, None if section.template is None else _template(section.template))


def restore(config: Mapping[str, Any]) -> CausalLM:
    """The section that a `config.json` was written from; a model that others trained goes on with plain texts."""
    given = {name: value for name, value in written(config).items() if name in CausalLM.model_fields}
    return CausalLM(**{**given, "kind": "causal_lm"})


def _task(section: CausalLM, template: str | None, train: Encoded | None = None) -> Task:
    """The task of a section: with a template in place of the tokenizer's own, and fitted to training documents."""
    is_chat = section.format == "chat"

    def of(tokenizer: TextTokenizer) -> TextTokenizer:
        return tokenizer if template is None else replace(tokenizer, template=template, named={})

    def encode(texts: Texts, targets: Sequence[str] | None, tokenizer: TextTokenizer, max_length: int) -> Encoded:
        if targets is None:
            return prompt(texts, tokenizer, max_length)
        worker = of(tokenizer)
        learned = f"{section.format} {section.loss_on} {section.today} {sorted(section.mask)} {max_length}"
        make = _of_chats if is_chat else _of_texts
        origin = (learned, *texts[0], *targets)
        return cached(worker, origin, lambda: make(section, texts[0], targets, worker, max_length))

    def prompt(texts: Texts, tokenizer: TextTokenizer, max_length: int) -> Encoded:
        worker, found = of(tokenizer), list(texts[0])
        if is_chat:
            found = chat.prompts(worker, [chat.open_conversation(text) for text in found], section.today)
        return encode_prompts(worker, found, max_length, framed=not is_chat)

    def stops(tokenizer: TextTokenizer) -> list[int]:
        return chat.stop_tokens(tokenizer, train)

    task = Task(
        kind=section.kind,
        head=Head("causal_lm", 0),
        labels=(),
        texts=(_given(section),),
        columns=_columns(section),
        read=lambda rows: _read_given(section, rows),
        targets=lambda rows: _read_targets(section, rows),
        classes=lambda targets: [0] * len(targets),
        label_counts=lambda targets: {},
        encode=encode,
        fit=lambda train: _task(section, template, train),
        loss=lambda logits, batch: next_token.loss(logits, batch, section.label_smoothing),
        divergence=next_token.divergence,
        count=lambda logits, batch: next_token.count(logits, batch, section.label_smoothing),
        metrics=next_token.finish,
        row_metrics=lambda kept, examples: {},
        metric_names=next_token.METRICS,
        least_is_best=next_token.LEAST_IS_BEST,
        headline="token_accuracy",
        tables=lambda counts: {},
        review=next_token.review,
        baselines=baseline_scores,
        decode=next_token.decode,
        to_hf=lambda: {"sft_jax_task": section.model_dump(mode="json", exclude={"template", "label_smoothing"})},
        keep=next_token.keep,
        cleans=section.format == "text",
        moves=False,
        audit=lambda train, tokenizer: audit(train, tokenizer, chat.stop_tokens(tokenizer, train.encoded)),
        generation=section.generate,
        prompt=prompt,
        stops=stops,
        files=lambda directory: files(directory, stops(load_tokenizer(directory)), template),
    )
    return task


def baseline_scores(train: Examples, test: Examples) -> dict[str, float]:
    """Token accuracy of always saying the commonest token, and the one that is commonest after the token before."""
    (before, label), (test_before, test_label) = _pairs(train), _pairs(test)
    return {
        "commonest token": baselines.commonest_class(label, test_label),
        "commonest after the token before": baselines.commonest_next(before, label, test_before, test_label),
    }


def audit(train: Examples, tokenizer: TextTokenizer, stops: Sequence[int]) -> Audit:
    """What is supervised of the training documents, whether they begin once, and whether models learn to stop."""
    return audits.of_tokens(train.encoded, tokenizer, stops)


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
    passages = [
        Passage(text + target, ((0 if everything else len(text), len(text + target)),))
        for text, target in zip(texts, targets, strict=True)
    ]
    return encode_passages(tokenizer, passages, max_length, framed=True)


def _of_chats(
    section: CausalLM, texts: Sequence[str], targets: Sequence[str], tokenizer: TextTokenizer, max_length: int
) -> Encoded:
    """Conversations, by the template of the tokenizer."""
    given = [chat.open_conversation(text) for text in texts]
    whole = [c._replace(messages=[*c.messages, json.loads(target)]) for c, target in zip(given, targets, strict=True)]
    made = chat.passages(tokenizer, whole, section.loss_on, section.today, section.mask)
    encoded = encode_passages(tokenizer, made.passages, max_length, framed=False, rows=made.rows)
    return replace(encoded, lost={**made.lost, **encoded.lost}, noted={**made.noted, **encoded.noted})


def _given(section: CausalLM) -> str:
    """The column of what is given."""
    return {"text": section.text, "completion": section.prompt, "chat": section.messages}[section.format]


def _columns(section: CausalLM) -> tuple[str, ...]:
    more = {"text": None, "completion": section.completion, "chat": section.tools}[section.format]
    return (_given(section), *([more] if more else []))


def _read_given(section: CausalLM, rows: Rows) -> tuple[tuple[list[Any], ...], dict[int, Bad]]:
    """What is given, and what is wrong with the rows that lack it."""
    if section.format != "chat":
        return read_texts(rows, (_given(section),))
    texts: list[str] = []
    bad: dict[int, Bad] = {}
    for row, found in enumerate(_conversations(section, rows)):
        texts.append("" if isinstance(found, Bad) else chat.write_conversation(found.prompt))
        if isinstance(found, Bad):
            bad[row] = found
    return (texts,), bad


def _read_targets(section: CausalLM, rows: Rows) -> Targets:
    """What is to be said, as text; nothing of plain texts, which are given whole."""
    if section.format == "text":
        return Targets([""] * len(rows), {})
    if section.format == "completion":
        (values,), bad = read_texts(rows, (section.completion,))
        return Targets([None if row in bad else value for row, value in enumerate(values)], bad)
    values: list[str | None] = []
    bad = {}
    for row, found in enumerate(_conversations(section, rows)):
        answer = None if isinstance(found, Bad) else found.answer
        values.append(None if answer is None else chat.write_message(answer))
        if isinstance(found, Bad):
            bad[row] = found
        elif answer is None:
            said = f"{section.messages} ends with a message of {found.messages[-1]['role']!r:.40}"
            bad[row] = Bad(rows.place(row), "no answer", f"{said}, expected the assistant's answer")
    return Targets(values, bad)


def _conversations(section: CausalLM, rows: Rows) -> Iterator[chat.Conversation | Bad]:
    """What each row says, or what is wrong with it."""
    messages = rows.column(section.messages)
    has_tools = section.tools is not None and section.tools in rows.names  # a prompt may do without
    tools = rows.column(section.tools) if has_tools else [None] * len(messages)
    for row, pair in enumerate(zip(messages, tools, strict=True)):
        try:
            yield chat.read_conversation(*pair)
        except ValueError as error:
            yield Bad(rows.place(row), "no conversation", f"{section.messages} is {pair[0]!r:.60}: {error}")


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
