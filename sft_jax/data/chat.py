"""Conversations: written by a tokenizer's template, and the parts of them that are answers.

What an answer is is found by rendering (`data/turns.py`): the text up to it, with the template's words that ask for
one, and the text with it. A template may write earlier turns in another way once there are later ones (reasoning is
often left out); then a conversation becomes several documents, each with exactly what a model sees when it is to give
the answers in it. What a row says is read in `conversations.py`. Knows no task and holds no jax.
"""

import json
from collections.abc import Collection, Sequence
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from sft_jax.data.answers import Passage
from sft_jax.data.batch import Encoded
from sft_jax.data.templates import Refused, Request, View, render
from sft_jax.data.text import DEFAULT, TextTokenizer
from sft_jax.data.turns import ASSISTANT, REFUSED, Known, Learned, Masked, Steps, documents
from sft_jax.errors import DataError, ModelError

TOOL_USE = "tool_use"  # name of the template of conversations with tools, where a tokenizer has one
OTHERS = f"{REFUSED}: other reasons"
MOST_REASONS = 5  # that are told apart
TAKEN = ("messages", "tools", "add_generation_prompt")  # what a template is given by the conversation itself


class Conversation(NamedTuple):
    """Messages, each with a `role` and a `content` or what stands for it, and the tools that the assistant may call.

    `weights` has for each message a number, or a list of [text, number] for a message of several parts; those of the
    assistant matter, and None is 1 everywhere. A prompt keeps that of its answer. `template_kwargs` are given to the
    template beside the messages, such as `enable_thinking`.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    weights: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None

    @property
    def prompt(self) -> "Conversation":
        """All up to the answer that it ends with, if it does."""
        return self if self.answer is None else self._replace(messages=self.messages[:-1])

    @property
    def answer(self) -> dict[str, Any] | None:
        """The message that it ends with, where that is the assistant's."""
        return self.messages[-1] if self.messages and self.messages[-1]["role"] == ASSISTANT else None


def write_conversation(conversation: Conversation) -> str:
    """The one JSON text of a conversation: equal for equal ones, and what is shown of it."""
    more = {name: value for name, value in conversation._asdict().items() if value is not None}
    return _json(conversation.messages if list(more) == ["messages"] else more)


def open_conversation(text: str) -> Conversation:
    """The conversation of such a text."""
    found = json.loads(text)
    return Conversation(found) if isinstance(found, list) else Conversation(**found)


def write_message(message: dict[str, Any]) -> str:
    """The one JSON text of a message."""
    return _json(message)


class Written(NamedTuple):
    """What conversations become by a template."""

    passages: list[Passage]
    rows: list[int]  # which conversation each is of
    lost: dict[str, list[int]]  # why others became none -> which
    noted: dict[str, int]  # what is to be said of those that did -> of how many


def passages(
    tokenizer: TextTokenizer,
    conversations: Sequence[Conversation],
    learned: Learned,
    today: date | None,
    masked: Collection[Masked] = (),
) -> Written:
    """The texts of conversations and what is to be learned of them: all answers, the last ones or everything.

    Of answers nothing is learned that is `masked`: their reasoning, or what the template writes before plain ones.
    """
    known = begin(tokenizer, learned, masked)
    made = passages_of_block(tokenizer, conversations, known, today)
    return made._replace(lost=_told_apart(made.lost), noted=known.noted())


def begin(tokenizer: TextTokenizer, learned: Learned, masked: Collection[Masked]) -> Known:
    """What is known of a template before the first block of conversations."""
    return Known(learned, frozenset(masked), special_tokens(tokenizer), tokenizer.special.get("eos_token"))


def passages_of_block(
    tokenizer: TextTokenizer, conversations: Sequence[Conversation], known: Known, today: date | None
) -> Written:
    """The same of some of the conversations; what is to be said of them all is known after the last ones."""
    for conversation in conversations:
        known.settings.update(list(conversation.template_kwargs or {}))
    steps = [
        documents(known, talk.messages, talk.weights, template, talk.tools, talk.template_kwargs or {})
        for talk, template in ((talk, _template(tokenizer, talk.tools)) for talk in conversations)
    ]
    found: list[Passage] = []
    rows: list[int] = []
    lost: dict[str, list[int]] = {}
    for row, made in enumerate(_settled(tokenizer, conversations, steps, today)):
        if isinstance(made, str):
            lost.setdefault(made, []).append(row)
        else:
            found += made
            rows += [row] * len(made)
    return Written(found, rows, lost, {})


def prompts(tokenizer: TextTokenizer, conversations: Sequence[Conversation], today: date | None) -> list[str]:
    """The texts that ask for the answers to conversations; one that the template refuses is a DataError."""
    requests = [_request(tokenizer, talk, [View(len(talk.messages), asks=True)]) for talk in conversations]
    found: list[str] = []
    for number, (rendered,) in enumerate(render(_templates(tokenizer), tokenizer.special, requests, today), 1):
        if isinstance(rendered, Refused):
            raise DataError(
                f"conversation {number}: the chat template refuses it ({rendered.why}); change its messages"
            )
        found.append(rendered)
    return found


def stop_tokens(tokenizer: TextTokenizer, train: Encoded | None) -> list[int]:
    """The ids at which an answer ends: the tokenizer's end of text, the special tokens that training answers end with,
    and without training documents those that the model's files say."""
    found = {tokenizer.id("eos_token")}
    if train is None:
        said = tokenizer.answers.get("eos_token_id")
        found |= {number for number in (said if isinstance(said, list) else [said]) if type(number) is int}
        return sorted(number for number in found if number is not None)
    learned = train.tokens["token_weight"] > 0
    last = learned & ~np.append(learned[1:], False)
    if train.truncated and not tokenizer.left:  # what ends where it was cut ends with any token
        cut = train.lengths == train.lengths.max()
        last[(train.offsets[1:] - 2)[cut]] = False
    special = [
        number for token in special_tokens(tokenizer) if (number := tokenizer.fast.token_to_id(token)) is not None
    ]
    ends = np.unique(train.tokens["label"][last])
    return sorted({*ends[np.isin(ends, special)].tolist(), *found} - {None})


def special_tokens(tokenizer: TextTokenizer) -> tuple[str, ...]:
    """The special tokens of a tokenizer, the end of text among them however it is held."""
    added = [token.content for token in tokenizer.fast.get_added_tokens_decoder().values() if token.special]
    return tuple(dict.fromkeys([*added, *tokenizer.special.values()]))


def _settled(
    tokenizer: TextTokenizer, conversations: Sequence[Conversation], steps: Sequence[Steps], today: date | None
) -> list[Any]:
    """What each of these comes to; whatever they ask for at the same time is rendered together."""
    found: list[Any] = [None] * len(steps)
    waiting: dict[int, Sequence[View]] = {}

    def go_on(number: int, given: Any) -> None:
        try:
            waiting[number] = steps[number].send(given)
        except StopIteration as done:
            found[number] = done.value

    for number in range(len(steps)):
        go_on(number, None)
    while waiting:
        asked, waiting = waiting, {}
        requests = [_request(tokenizer, conversations[number], views) for number, views in asked.items()]
        rendered = render(_templates(tokenizer), tokenizer.special, requests, today)
        for number, texts in zip(asked, rendered, strict=True):
            go_on(number, texts)
    return found


def _request(tokenizer: TextTokenizer, talk: Conversation, views: Sequence[View]) -> Request:
    settings = talk.template_kwargs or {}
    if taken := next((name for name in TAKEN if name in settings), None):
        raise DataError(f"chat_template_kwargs: {taken} is what the conversation itself says; leave it out")
    name = TOOL_USE if talk.tools is not None and TOOL_USE in tokenizer.named else DEFAULT
    return Request(talk.messages, talk.tools, views, settings, name)


def _template(tokenizer: TextTokenizer, tools: Any) -> str:
    """The template that a conversation is written by: as `transformers` takes it, by whether there are tools."""
    templates = _templates(tokenizer)
    name = TOOL_USE if tools is not None and TOOL_USE in templates else DEFAULT
    if name not in templates:
        raise ModelError(
            f"the tokenizer has chat templates by name ({', '.join(sorted(templates))}) and none that is the default; "
            f"name a file that holds one by task.template"
        )
    return templates[name]


def _templates(tokenizer: TextTokenizer) -> dict[str, str]:
    found = dict(tokenizer.named) if tokenizer.template is None else {**tokenizer.named, DEFAULT: tokenizer.template}
    if not found:
        raise ModelError("the tokenizer has no chat template; name a file that holds one by task.template")
    return found


def _told_apart(lost: dict[str, list[int]]) -> dict[str, list[int]]:
    """The commonest reasons, and the others together."""
    often = sorted(lost, key=lambda why: -len(lost[why]))
    first = {why: lost[why] for why in often[:MOST_REASONS]}
    rest = sorted(row for why in often[MOST_REASONS:] for row in lost[why])
    return {**first, OTHERS: rest} if rest else first


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("expected texts, numbers, lists and objects") from None
