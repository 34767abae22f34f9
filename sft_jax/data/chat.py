"""Conversations: read from rows, written by a tokenizer's template, and the parts of them that are answers.

What an answer is is found by rendering: the text up to it, with the template's words that ask for one, must begin the
text with it, and what is added is the answer with its end-of-turn token. A template may write earlier turns in another
way once there are later ones (reasoning is often left out); then a conversation becomes several documents, each with
exactly what a model sees when it is to give the answers in it. Knows no task and holds no jax.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any, Literal, NamedTuple

from sft_jax.data.answers import Passage
from sft_jax.data.templates import Refused, Request, render
from sft_jax.data.text import TextTokenizer
from sft_jax.errors import DataError, ModelError

ASSISTANT = "assistant"
REFUSED = "refused by the template"
OTHERWISE = "the template asks for its answer otherwise than it writes it"
NOTHING = "the template writes nothing of its answer"
MOST_REASONS = 5  # that are told apart
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
SAY, ANSWER = {"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}


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


def read_conversation(messages: Any, tools: Any = None) -> Conversation:
    """A conversation as a row has it, lists or their JSON; raises ValueError that says what was expected.

    A text that is no JSON is what a user says: all that a conversation to be answered needs. What is null in a message
    is left out: tables of many rows put it there for every key that some row has.
    """
    if isinstance(messages, str) and messages.strip() and not messages.lstrip().startswith(("[", "{")):
        messages = [{"role": "user", "content": messages}]
    listed, offered = _opened(messages), _opened(tools)
    if not isinstance(listed, list) or not listed:
        raise ValueError("expected a list of messages")
    for number, message in enumerate(listed, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(f"message {number} has no role; expected {{'role': 'user', 'content': '…'}}")
        if not any(value for key, value in message.items() if key != "role") and message["role"] == ASSISTANT:
            raise ValueError(f"message {number} is the assistant's and empty")
    if offered is not None and not isinstance(offered, list):
        raise ValueError("expected a list of tools")
    found = Conversation([_without_null(message) for message in listed], _without_null(offered) or None)
    write_conversation(found)  # or it holds what is no JSON
    return found


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


def passages(
    tokenizer: TextTokenizer,
    conversations: Sequence[Conversation],
    learned: Literal["answers", "last", "all"],
    today: date | None,
) -> tuple[list[Passage], list[int], dict[str, int]]:
    """(texts and what is to be learned of them, which conversation each is of, why others became none)."""
    found: list[Passage] = []
    rows: list[int] = []
    lost: Counter[str] = Counter()
    for row, made in enumerate(_answered(tokenizer, conversations, today, last=learned != "answers")):
        if isinstance(made, str):
            lost[made] += 1
            continue
        found += [Passage(one.text, ((0, len(one.text)),)) for one in made] if learned == "all" else made
        rows += [row] * len(made)
    return found, rows, _told_apart(lost)


def prompts(tokenizer: TextTokenizer, conversations: Sequence[Conversation], today: date | None) -> list[str]:
    """The texts that ask for the answers to conversations; one that the template refuses is a DataError."""
    cuts = [[(len(conversation.messages), True)] for conversation in conversations]
    requests = [Request(*talk[:2], one) for talk, one in zip(conversations, cuts, strict=True)]
    found = []
    for number, rendered in enumerate(render(_template(tokenizer), tokenizer.special, requests, today), 1):
        if isinstance(rendered, Refused):
            raise DataError(
                f"conversation {number}: the chat template refuses it ({rendered.why}); change its messages"
            )
        found.append(rendered[0])
    return found


def stop_tokens(tokenizer: TextTokenizer, today: date | None) -> list[int]:
    """The ids at which an answer ends: the tokenizer's end of text, and what the template ends answers with."""
    found = [tokenizer.id("eos_token")]
    if tokenizer.template is not None:
        calling = Conversation([SAY, {"role": ASSISTANT, "content": "", "tool_calls": [CALL]}], [CALL])
        for made in _answered(tokenizer, [Conversation([SAY, ANSWER]), calling], today, last=True):
            if not isinstance(made, str):
                ending = [token for token in _special(tokenizer) if made[0].text.endswith(token)]
                found += [tokenizer.fast.token_to_id(max(ending, key=len))] if ending else []
    return sorted({number for number in found if number is not None})


def _answered(
    tokenizer: TextTokenizer, conversations: Sequence[Conversation], today: date | None, *, last: bool
) -> Iterator[list[Passage] | str]:
    """The documents of each conversation with all answers in it or the last one, or why there are none."""
    requests = [Request([SAY, ANSWER, SAY], None, [(2, False), (3, True)])]
    for conversation in conversations:
        turns = [n for n, message in enumerate(conversation.messages) if message["role"] == ASSISTANT]
        cuts = [cut for turn in turns[-1 if last else 0 :] for cut in ((turn, True), (turn + 1, False))]
        requests.append(Request(*conversation[:2], cuts))
    probed, *rendered = render(_template(tokenizer), tokenizer.special, requests, today)
    special = _special(tokenizer)
    tail = "" if isinstance(probed, Refused) else _tail(probed[0], probed[1], special)
    for texts in rendered:
        yield f"{REFUSED}: {texts.why}" if isinstance(texts, Refused) else _documents(texts, special, tail)


def _tail(ended: str, continued: str, special: tuple[str, ...]) -> str:
    """What a template writes at the end of a conversation alone, not of each turn: special tokens and blanks."""
    end = len(ended)
    while not continued.startswith(ended[:end]):
        piece = next((token for token in special if ended[:end].endswith(token)), ended[end - 1])
        if piece not in special and not piece.isspace():
            return ""  # the turn itself is written otherwise once there are later ones
        end -= len(piece)
    return ended[end:]


def _documents(rendered: Sequence[str], special: tuple[str, ...], tail: str) -> list[Passage] | str:
    """The answers of a conversation, those together that one text has as they are asked for; or why there are none.

    `rendered` has for each answer the text that asks for it and the text with it.
    """
    made: list[Passage] = []
    for asked, ended in zip(rendered[::2], rendered[1::2], strict=True):
        whole = ended.removesuffix(tail)
        if not whole.startswith(asked):
            return OTHERWISE
        bare = whole.rstrip()  # blanks behind the end of a turn are those of the next one
        text = bare if bare.endswith(special) and len(bare) > len(asked) else whole
        if not _without(text[len(asked) :], special).strip():
            return NOTHING
        before = made.pop().answers if made and text.startswith(made[-1].text) else ()
        made.append(Passage(text, (*before, (len(asked), len(text)))))
    return made


def _without(text: str, special: tuple[str, ...]) -> str:
    for token in special:
        text = text.replace(token, "")
    return text


def _special(tokenizer: TextTokenizer) -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.fast.get_added_tokens_decoder().values() if token.special)


def _template(tokenizer: TextTokenizer) -> str:
    if tokenizer.template is None:
        raise ModelError("the tokenizer has no chat template; name a file that holds one by task.template")
    return tokenizer.template


def _told_apart(lost: Counter[str]) -> dict[str, int]:
    """The commonest reasons, and the others together."""
    first = dict(lost.most_common(MOST_REASONS))
    rest = lost.total() - sum(first.values())
    return {**first, f"{REFUSED}: other reasons": rest} if rest else first


def _opened(value: Any) -> Any:
    """A value, or what its JSON says where it is a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise ValueError("expected a list, or its JSON") from None


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(found) for key, found in value.items() if found is not None}
    return [_without_null(found) for found in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("expected texts, numbers, lists and objects") from None
