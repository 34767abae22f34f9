"""Conversations as rows have them: the forms in which people write messages, read as one `Conversation`.

What is read is OpenAI's form (`role`, `content`, `tool_calls`, and the older `function_call`), ShareGPT's (`from`,
`value`), a prompt with its completion as messages or as texts, and alpaca's instruction with an input and a history.
A key that says what a message is worth is taken out and becomes its weight; every other key goes to the template as it
is. Whatever cannot be read is a ValueError that says what was expected. Knows no task and holds no jax.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.data.chat import ASSISTANT, Conversation, write_conversation
from sft_jax.data.templates import REASONING

# Keys of a message, or of a part of one, that say how much it counts, or whether it is learned at all (1 or 0).
WEIGHTS = ("weight", "loss_weight", "loss_scale", "loss", "train", "training", "trainable", "train_on_turn")
MASKED = "masked"  # the other way round
DETAILS = ("train_detail", "training_detail")  # pieces of a content, by the places of their first and last characters
EITHER = ("mask", "loss_mask")  # which mean "is learned" to some and "is left out" to others
# What others call the roles that templates know: under `role`, and under `from` besides.
ROLES = {"human": "user", "prompter": "user", "gpt": ASSISTANT, "function": "tool"}
FROM = {
    **ROLES,
    **dict.fromkeys(("chatgpt", "bing", "bard", "model", "bot"), ASSISTANT),
    **dict.fromkeys(("observation", "tool_response", "function_response"), "tool"),
}
KNOWN = ("system", "developer", "user", ASSISTANT, "tool")
CALLS = ("function_call", "tool_call")  # the role of a ShareGPT message that is a call, as JSON
CONTENTS = ("value", "text")  # under which messages and parts carry what is not called `content` or `text`
TEXTS = ("text", "input_text", "output_text", "refusal")  # types of parts that are texts
THOUGHTS = ("reasoning", "thinking")  # and of those that are reasoning
UNSEEN = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio", "file")


def read_conversation(messages: Any, tools: Any = None, **more: Any) -> Conversation:
    """A conversation as a row has it, lists or their JSON; `more` is what `conversation` takes besides.

    A text that is no JSON is what a user says: all that a conversation to be answered needs.
    """
    if isinstance(messages, str) and messages.strip() and not messages.lstrip().startswith(("[", "{")):
        messages = [{"role": "user", "content": messages}]
    return conversation(*_turns(read_json(messages)), tools=tools, **more)


def read_answered(prompt: Any, answer: Any, *, more: Any = None, history: Any = None, **rest: Any) -> Conversation:
    """A prompt with its answer, each a text or messages; what the assistant says in the prompt is not learned.

    `more` is a text that belongs to the prompt (alpaca's `input`), `history` earlier pairs of a question and an
    answer, which are learned as other earlier answers are. Without an answer (None) it is one to be answered.
    """
    messages, _ = _turns(_spoken(prompt, "user"))
    weights = [0 if message["role"] == ASSISTANT else 1 for message in messages]
    if isinstance(more, str) and more.strip():
        if len(messages) != 1 or not isinstance(messages[0].get("content"), str):
            raise ValueError("expected a text, where there is an input beside it")
        messages = [{**messages[0], "content": f"{messages[0]['content']}\n{more}".strip()}]
    earlier = [{"role": role, "content": text} for pair in _pairs(history) for role, text in pair]
    said, of_answer = ([], []) if answer is None else _turns(_spoken(answer, ASSISTANT))
    everything = [*earlier, *messages, *said]
    return conversation(everything, [*([1] * len(earlier)), *weights, *of_answer], **rest)


def conversation(
    messages: list[dict[str, Any]],
    weights: Sequence[Any],
    *,
    tools: Any = None,
    functions: bool = False,
    system: Any = None,
    settings: Mapping[str, Any] | None = None,
    weight: float = 1.0,
) -> Conversation:
    """A conversation of messages and weights as they were read.

    `functions` says that tools are functions as OpenAI had them before; `system` is what is said before all, `settings`
    what the template is given besides, and `weight` that of the row.
    """
    offered = read_json(tools)
    if offered is not None and not isinstance(offered, list):
        raise ValueError("expected a list of tools")
    if functions:
        offered = [{"type": "function", "function": one} for one in offered or []]
    if isinstance(system, str) and system.strip():
        if messages[0]["role"] in ("system", "developer"):
            raise ValueError("there is a system's message beside the column with what the system says; keep one")
        messages, weights = [{"role": "system", "content": system}, *messages], [1, *weights]
    scaled = [_scaled(one, weight) for one in weights]
    plain = all(one == 1 for one in scaled)
    found = Conversation(messages, offered or None, None if plain else scaled, dict(settings) if settings else None)
    write_conversation(found)  # or it holds what is no JSON
    return found


def read_settings(value: Any) -> dict[str, Any]:
    """What a row's template is to be given (`chat_template_kwargs`): an object, its JSON, or nothing."""
    found = read_json(value)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError("expected an object with what the template is given")
    return dict(found)


def read_weight(value: Any) -> float:
    """A number that is not negative, or true or false; nothing (None) is 1."""
    if value is None:
        return 1.0
    if not isinstance(value, bool | int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r:.40}, expected a number from 0")
    return float(value)


def read_segments(value: Any) -> list[list[Any]]:
    """[text, weight] of each segment of a text, objects with a `text` and a `label` that says whether it is learned."""
    found = read_json(value)
    if not isinstance(found, list) or not found:
        raise ValueError("expected a list of segments")
    read = []
    for number, segment in enumerate(found, 1):
        if not isinstance(segment, Mapping) or not isinstance(segment.get("text"), str):
            raise ValueError(f"segment {number} has no text; expected {{'text': '…', 'label': true}}")
        marks = {("weight" if key == "label" else key): mark for key, mark in segment.items() if mark is not None}
        read.append([segment["text"], _taken(marks, f"segment {number}")[1]])
    if not any(text for text, _ in read):
        raise ValueError("every segment is empty")
    return read


def content_of(message: Mapping[str, Any]) -> str:
    """What a message says, for people: its text, or that of its parts, and its calls as JSON."""
    content = message.get("content")
    texts = [part.get("text", "") if isinstance(part, Mapping) else str(part) for part in content or []]
    said = content if isinstance(content, str) else "".join(texts) if isinstance(content, list) else content
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or []]
    return " ".join([*([str(said)] if said else []), *calls])


def joined(conversation: Conversation) -> Conversation:
    """The conversation with contents of parts that are all texts as one text, for a template that knows no parts."""
    messages = []
    for message in conversation.messages:
        parts = message.get("content")
        texts = isinstance(parts, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in parts)
        messages.append({**message, "content": "".join(part["text"] for part in parts)} if parts and texts else message)
    return conversation._replace(messages=messages)


def read_json(value: Any) -> Any:
    """A value, or what its JSON says where it is a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise ValueError("expected a list, or its JSON") from None


def is_conversational(value: Any) -> bool:
    """Whether a value is messages, or their JSON, rather than a text."""
    try:
        found = read_json(value) if isinstance(value, str) and value.lstrip().startswith(("[", "{")) else value
    except ValueError:
        return False
    first = found[0] if isinstance(found, list) and found else found
    return isinstance(first, Mapping) and any(name in first for name in ("role", "from"))


def as_said(value: Any, kind: Any) -> Any:
    """A value of a table without the nulls that the table put there, for every key that some row has; `kind` is its
    feature in `datasets`. Of a message's `content`, which may be null (OpenAI), the null stays."""
    if isinstance(kind, Mapping) and isinstance(value, Mapping):
        there = {key: found for key, found in value.items() if found is not None or key == "content"}
        return {key: as_said(found, kind.get(key)) for key, found in there.items()}
    inner = getattr(kind, "feature", None)
    return [as_said(found, inner) for found in value] if inner is not None and isinstance(value, list) else value


def _spoken(value: Any, role: str) -> Any:
    """Messages, opened where they are JSON; a text as the one message of this role."""
    if is_conversational(value):
        return read_json(value)
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40}, expected a text or a list of messages")
    return [{"role": role, "content": value}]


def _turns(value: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """(messages, the weight of each) of a list of messages, or of one."""
    found = [value] if is_conversational(value) and isinstance(value, Mapping) else value
    if not isinstance(found, list) or not found:
        raise ValueError("expected a list of messages")
    read = [_message(number, message) for number, message in enumerate(found, 1)]
    return [message for message, _ in read], [weight for _, weight in read]


def _message(number: int, given: Any) -> tuple[dict[str, Any], Any]:
    """(a message as templates read them, its weight or those of its parts)."""
    where = f"message {number}"
    names = [given[name] for name in ("role", "from") if given.get(name)] if isinstance(given, Mapping) else []
    if not names or not isinstance(names[0], str):
        raise ValueError(f"{where} has no role; expected {{'role': 'user', 'content': '…'}}")
    message = {key: value for key, value in given.items() if value is not None or key == "content"}
    message = message if message.get("role") else {key: value for key, value in message.items() if key != "role"}
    role = _role(message, where)
    content = message.get("content")
    if content is None:
        named = next((name for name in CONTENTS if name in message), None)
        content = message.pop(named) if named else None
    message = _called(message, role, content, where)
    if message["role"] == ASSISTANT and not any(v for k, v in message.items() if k not in ("role", *_marks(message))):
        raise ValueError(f"{where} is the assistant's and empty")
    return _weighed(message, where)


def _role(message: dict[str, Any], where: str) -> str:
    """The role of a message, as it is or as others call it; takes it out."""
    if "role" in message:
        said = str(message.pop("role"))
        return ROLES.get(said, said)
    said = str(message.pop("from"))
    role = FROM.get(said.lower(), said.lower())
    if role not in (*KNOWN, *CALLS):
        raise ValueError(f"{where} is from {said!r:.40}, expected {', '.join(['human', 'gpt', *KNOWN, *CALLS])}")
    return role


def _called(message: dict[str, Any], role: str, content: Any, where: str) -> dict[str, Any]:
    """The message with calls of tools and refusals as templates know them, role and content first."""
    has_content = "content" in message or content is not None
    calls = [message.pop("function_call")] if message.get("function_call") is not None else []
    if role in CALLS:
        given = _call(content, where)
        calls, role, content, has_content = given if isinstance(given, list) else [given], ASSISTANT, None, False
    if refusal := message.pop("refusal", None):
        if content:
            raise ValueError(f"{where} has a content and a refusal; keep the one that is the answer")
        content, has_content = refusal, True
    if isinstance(content, list):
        content, more = _parts(content, role, where)
        calls, message = [*calls, *more.pop("calls", [])], {**message, **more}
        has_content = bool(content) or not calls
    if any(not isinstance(call, Mapping) or not isinstance(call.get("name"), str) for call in calls):
        raise ValueError(f"{where} has a call without a name; expected {{'name': '…', 'arguments': {{…}}}}")
    if calls:
        message["tool_calls"] = [
            *(message.get("tool_calls") or []),
            *({"type": "function", "function": call} for call in calls),
        ]
    message.pop("content", None)
    return {"role": role, **({"content": content} if has_content else {}), **message}


def _parts(parts: list[Any], role: str, where: str) -> tuple[list[Any], dict[str, Any]]:
    """(the parts of a content that are its own, what else they say of the message: calls and reasoning)."""
    kept: list[Any] = []
    calls: list[Any] = []
    thoughts: list[str] = []
    for given in parts:
        part = {"type": "text", "text": given} if isinstance(given, str) else given
        if not isinstance(part, Mapping):
            raise ValueError(f"{where} has a part {part!r:.40}, expected {{'type': 'text', 'text': '…'}}")
        part = {"type": "text", **{key: value for key, value in part.items() if value is not None}}
        kind = part["type"]
        if kind in UNSEEN:
            raise ValueError(f"{where} has a part of type {kind!r}, which a model of texts cannot see")
        text = next((part[name] for name in ("text", kind, *CONTENTS) if isinstance(part.get(name), str)), None)
        if kind == "tool_call" and role == ASSISTANT:
            calls.append(_call(text, where))
        elif kind in THOUGHTS and role == ASSISTANT and text is not None:
            thoughts.append(text)
        elif kind in TEXTS:
            if text is None:
                raise ValueError(f"{where} has a part of type {kind!r} without a text")
            marks = {name: part[name] for name in _marks(part)}
            kept.append({"type": "text", "text": text, **marks})
        else:
            kept.append(part)
    more: dict[str, Any] = {"calls": calls} if calls else {}
    return kept, {**more, REASONING[0]: "".join(thoughts)} if thoughts else more


def _call(text: Any, where: str) -> Any:
    """A call of a tool, or several, that stands as JSON in a text."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        raise ValueError(f"{where} is a call that is no JSON: {text!r:.40}") from None


def _weighed(message: dict[str, Any], where: str) -> tuple[dict[str, Any], Any]:
    """(the message without the keys that say what it is worth, that weight; those of its parts as [text, weight]).

    A mark of another than the assistant stays where it asks for more than there is: only answers are learned, so it is
    counted among the keys that nobody reads.
    """
    content, parts = message.get("content"), None
    if details := next((message.pop(name) for name in DETAILS if name in message), None):
        parts = _pieces(content, details, where)
    if isinstance(content, list):
        read = [_taken(part, f"a part of {where}") if isinstance(part, Mapping) else (part, 1.0) for part in content]
        message = {**message, "content": [part for part, _ in read]}
        parts = [[part["text"], weight] for part, weight in read if isinstance(part.get("text"), str)]
    bare, weight = _taken(message, where)
    if message["role"] != ASSISTANT:
        return (message if _marks(message) and weight > 0 else bare), 1
    if parts is None or all(worth == 1 for _, worth in parts):
        return bare, weight
    return bare, [[text, worth * weight] for text, worth in parts]


def _marks(message: Mapping[str, Any]) -> list[str]:
    return [name for name in (*WEIGHTS, MASKED, *EITHER, *DETAILS) if name in message]


def _taken(given: Mapping[str, Any], where: str) -> tuple[dict[str, Any], float]:
    """(a message or part without the keys that say what it is worth, the product of what they say)."""
    weight = 1.0
    for name in _marks(given):
        if name in EITHER:
            raise ValueError(f"{where} has a {name!r}, which means either; write weight, 0 for what is not learned")
        try:
            found = read_weight(given[name])
        except ValueError as error:
            raise ValueError(f"{name} of {where} is {error}") from None
        weight *= (0.0 if found else 1.0) if name == MASKED else found
    return {key: value for key, value in given.items() if key not in _marks(given)}, weight


def _pieces(content: Any, details: Any, where: str) -> list[list[Any]]:
    """The pieces of a text with their weights, by the places of the first and the last character of each."""
    pieces: list[list[Any]] = []
    end = 0
    try:
        for detail in details:
            begin, last = detail["begin_offset"], detail["end_offset"]
            if begin != end or last < begin or last >= len(content):
                raise ValueError
            end = last + 1
            pieces.append([content[begin:end], _taken(detail, f"a detail of {where}")[1]])
    except (TypeError, KeyError, ValueError):
        end = -1
    if not isinstance(content, str) or end != len(content):
        raise ValueError(
            f"{where} has details that do not cover its text; expected begin_offset and end_offset of one piece "
            f"after the other, with the last character in it"
        )
    return pieces


def _pairs(history: Any) -> list[list[tuple[str, str]]]:
    """Earlier questions with their answers."""
    found = read_json(history)
    if found is None:
        return []
    if not isinstance(found, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in found
    ):
        raise ValueError(f"the history is {history!r:.40}, expected pairs of a question and an answer")
    return [[("user", question), (ASSISTANT, answer)] for question, answer in found]


def _scaled(weight: Any, by: float) -> Any:
    return [[text, worth * by] for text, worth in weight] if isinstance(weight, list) else weight * by
