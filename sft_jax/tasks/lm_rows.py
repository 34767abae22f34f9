"""Rows of a language model as texts and targets: what is given of each, and what is to be said, each as one text.

What is given is a text or a prompt as it is, a conversation up to its answer as JSON, or the segments or tokens of a
text as JSON. What is to be said is nothing of a text, which is given whole; a completion; or a message as JSON. Where
messages, rows or tokens have weights, these stand beside it in a JSON list: what is given never knows them, so that
equal prompts are equal.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

from sft_jax.config.tasks import CausalLM
from sft_jax.data.chat import ASSISTANT, Conversation, open_conversation, write_conversation, write_message
from sft_jax.data.columns import Growing
from sft_jax.data.conversations import (
    content_of,
    read_answered,
    read_conversation,
    read_json,
    read_segments,
    read_settings,
    read_weight,
)
from sft_jax.data.prepare import read_texts
from sft_jax.data.rows import Bad, Rows
from sft_jax.tasks import forms
from sft_jax.tasks.task import Targets

IGNORED = -100  # the label of a token that is not learned
Record = Mapping[str, Any]  # what a row has of `forms.Columns`
NO_ANSWER = "no answer"


def read_given(section: CausalLM, rows: Rows) -> tuple[tuple[Sequence[Any], ...], dict[int, Bad]]:
    """What is given, and what is wrong with the rows that lack it."""
    columns = forms.columns_of(section, rows)
    if _is_plain(section, columns):
        return read_texts(rows, (columns.given,))
    texts, bad = Growing(), dict[int, Bad]()
    for row, found in enumerate(_read(section, columns, rows)):
        texts.append("" if isinstance(found, Bad) else found[0])
        if isinstance(found, Bad):
            bad[row] = found
    return (texts.column(),), bad


def read_targets(section: CausalLM, rows: Rows) -> Targets:
    """What is to be said, with the weights that are not 1."""
    columns = forms.columns_of(section, rows)
    if columns.answer:
        next(rows.blocks(columns.answer), None)  # must be there, where it is learned
    values, bad = Growing(), dict[int, Bad]()
    if _is_plain(section, columns):
        (said,), bad = read_texts(rows, (columns.answer,)) if columns.answer else ((repeat("", len(rows)),), {})
        for row, (text, weight) in enumerate(zip(said, forms.values(rows, columns.weight), strict=True)):
            try:
                target = _with_weight(section, text, read_row_weight(columns, weight))
            except ValueError as error:
                bad[row] = Bad(rows.place(row), "unreadable weight", str(error))
            values.append(None if row in bad else target)
        return Targets(values.column(), bad)
    for row, found in enumerate(_read(section, columns, rows)):
        target = None if isinstance(found, Bad) else found[1]
        values.append(target)
        if isinstance(found, Bad):
            bad[row] = found
        elif target is None:
            said = f"{', '.join(name for name in (columns.given, columns.answer) if name)} has no answer to be learned"
            bad[row] = Bad(rows.place(row), NO_ANSWER, f"{said}, expected the assistant's last")
    return Targets(values.column(), bad)


def read_row_weight(columns: forms.Columns, value: Any) -> float:
    """The weight of a row; raises ValueError that names its column."""
    try:
        return read_weight(value)
    except ValueError as error:
        raise ValueError(f"{columns.weight} is {error}") from None


def whole(text: str, target: str) -> Conversation:
    """The conversation that is given as one text, with what is to be said after it, and the weights of all."""
    given = open_conversation(text)
    said = json.loads(target) if target else None
    answer, weights = said if isinstance(said, list) else (said, None)
    return given._replace(messages=[*given.messages, *([answer] if answer else [])], weights=weights)


def said_of(section: CausalLM, target: str) -> tuple[str, float]:
    """(what is to be said after a text, the weight of the row)."""
    if section.weight is None:
        return target, 1.0
    text, weight = json.loads(target)
    return text, weight


def in_words(section: CausalLM, text: str, target: str) -> str:
    """What is to be said of a row, for people."""
    if section.format == "chat":
        messages = whole(text, target).messages
        return content_of(messages[-1]) if target else text
    said = "" if section.format in ("tokens", "segments") else said_of(section, target)[0]
    return said or asked(section, text)


def asked(section: CausalLM, text: str) -> str:
    """What is given of a row, for people: of a conversation what its user said last."""
    if section.format == "chat":
        messages = open_conversation(text).messages
        last = [message for message in messages if message["role"] == "user"] or messages
        return content_of(last[-1])
    if section.format == "segments":
        return "".join(piece for piece, _ in json.loads(text))
    return f"{len(json.loads(text)):,} tokens" if section.format == "tokens" else text


def _is_plain(section: CausalLM, columns: forms.Columns) -> bool:
    return section.format == "text" or (section.format == "completion" and columns.input is None)


def _read(section: CausalLM, columns: forms.Columns, rows: Rows) -> Iterator[tuple[str, str | None] | Bad]:
    """(what is given, what is to be said) of each row, or what is wrong with it."""
    next(rows.blocks(columns.given), None)  # must be there
    names = [name for name, column in vars(columns).items() if column]
    for row, cells in enumerate(zip(*(forms.values(rows, getattr(columns, name)) for name in names), strict=True)):
        record = dict(zip(names, cells, strict=True))
        try:
            weight = read_row_weight(columns, record.get("weight"))
            yield READ[section.format](section, columns, record, weight)
        except ValueError as error:
            yield Bad(rows.place(row), KINDS[section.format], f"{columns.given} is {record['given']!r:.60}: {error}")


def _of_chat(section: CausalLM, columns: forms.Columns, record: Record, weight: float) -> tuple[str, str | None]:
    """A conversation up to its answer, and that; all of it where another speaks last and earlier ones are learned."""
    more = {
        "tools": record.get("tools"),
        "functions": str(columns.tools).rpartition(".")[2] == forms.FUNCTIONS,
        "system": record.get("system"),
        "settings": {**section.chat_template_kwargs, **read_settings(record.get("settings"))},
        "weight": weight,
    }
    if section.messages:
        found = read_conversation(record["given"], **more)
    else:
        beside = {"more": record.get("input"), "history": record.get("history")}
        found = read_answered(record["given"], record.get("answer"), **beside, **more)
    given, answer = write_conversation(found.prompt._replace(weights=None)), found.answer
    if answer is None and (section.loss_on != "answers" or all(m["role"] != ASSISTANT for m in found.messages)):
        return given, None
    if found.weights is not None:
        return given, json.dumps([answer, found.weights], ensure_ascii=False)
    return given, "" if answer is None else write_message(answer)


def _of_instruction(section: CausalLM, columns: forms.Columns, record: Record, weight: float) -> tuple[str, str | None]:
    """An instruction with what belongs to it as a prompt, line by line, and its completion."""
    parts = [record["given"], record.get("input")]
    if not all(isinstance(part, str | None) for part in (*parts, record.get("answer"))) or not any(parts):
        raise ValueError("expected texts")
    prompt = "".join(f"{part}\n" for part in parts if part)
    return prompt, _with_weight(section, record["answer"], weight) if record.get("answer") else None


def _of_segments(section: CausalLM, columns: forms.Columns, record: Record, weight: float) -> tuple[str, str | None]:
    """Segments of a text with their weights."""
    return json.dumps(read_segments(record["given"]), ensure_ascii=False), _with_weight(section, "", weight)


def _of_tokens(section: CausalLM, columns: forms.Columns, record: Record, weight: float) -> tuple[str, str | None]:
    """Tokens, and the weight of each where it is not 1; filler (`attention_mask` 0) is left out."""
    ids, learned, real = (_numbers(record.get(name), name) for name in ("given", "learned", "padded"))
    if not ids or min(ids) < 0:
        raise ValueError("expected a list of the numbers of tokens")
    for name, values in ((columns.learned, learned), (columns.padded, real)):
        if values is not None and len(values) != len(ids):
            raise ValueError(f"{name} has {len(values)} numbers, expected {len(ids)} as there are tokens")
    weights = [1.0] * len(ids) if learned is None else _of_labels(ids, learned, str(columns.learned))
    kept = [place for place, one in enumerate(real) if one] if real else range(len(ids))
    scaled = [weights[place] * weight for place in kept]
    said = "" if all(one == 1 for one in scaled) else json.dumps(scaled)
    return json.dumps([ids[place] for place in kept]), said


def _of_labels(ids: list[int], learned: list[int], name: str) -> list[float]:
    """The weight of each token, by labels as `transformers` has them, or by a mask of 0 and 1."""
    if name.rpartition(".")[2] != "labels" and set(learned) <= {0, 1}:
        return [float(one) for one in learned]
    for place, (token, label) in enumerate(zip(ids, learned, strict=True)):
        if label not in (token, IGNORED):
            raise ValueError(f"{name} has {label} where token {place + 1} is {token}, expected that or {IGNORED}")
    return [0.0 if label == IGNORED else 1.0 for label in learned]


def _numbers(value: Any, name: str) -> list[int] | None:
    found = read_json(value)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(one, int) for one in found):
        raise ValueError("expected a list of whole numbers" + ("" if name == "given" else f" of what is {name}"))
    return [int(one) for one in found]


def _with_weight(section: CausalLM, text: str, weight: float) -> str:
    return text if section.weight is None else json.dumps([text, weight], ensure_ascii=False)


Reader = Callable[[CausalLM, forms.Columns, Record, float], tuple[str, str | None]]
READ: dict[str, Reader] = {
    "chat": _of_chat,
    "completion": _of_instruction,
    "segments": _of_segments,
    "tokens": _of_tokens,
}
KINDS = {"chat": "no conversation", "completion": "no text", "segments": "no segments", "tokens": "no tokens"}
