"""Which columns of the rows say what a language model is to learn: told by their names and first values, and said.

A configuration that names its columns is followed; what it leaves open is looked for under the names that others use.
Which format that makes is settled once, for a run and for its export; columns that rows may have besides, such as
`tools`, are looked for again wherever rows are read, so that a model can be asked without them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

from sft_jax.config.tasks import CausalLM
from sft_jax.data.conversations import as_said, is_conversational
from sft_jax.data.rows import Rows
from sft_jax.errors import ConfigError, did_you_mean

FIRST = 64  # rows that are looked at
MESSAGES = ("messages", "conversations", "conversation", "dialogue")
SEGMENTS, TOKENS = "segments", "input_ids"
# Columns of a prompt and of its answer, as others call them.
PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("INSTRUCTION", "RESPONSE"),
    ("question", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
    ("prompt", "generation"),
    ("prompt", "chosen"),
)
CHOSEN = "chosen"  # of a preference, which may be a whole conversation
OPTIONAL = {
    "tools": ("tools", "functions"),
    "system": ("system", "system_prompt"),
    "input": ("input",),
    "history": ("history",),
    "learned": ("labels", "completion_mask", "assistant_masks", "loss_mask"),
}
BESIDE_INSTRUCTION = ("input", "history")  # that mean something else beside other columns
SETTLED = ("format", "text", "prompt", "completion", "messages", "input")  # settings that columns may tell
FUNCTIONS = "functions"  # tools as OpenAI had them before
SETTINGS = "chat_template_kwargs"
PADDED = "attention_mask"


@dataclass(frozen=True)
class Columns:
    """The columns of some rows that are read."""

    given: str  # the text, the prompt, or the messages
    answer: str | None = None
    tools: str | None = None
    system: str | None = None
    input: str | None = None
    history: str | None = None
    learned: str | None = None
    weight: str | None = None
    settings: str | None = None
    padded: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, what is given first."""
        return tuple(dict.fromkeys(name for name in vars(self).values() if name))


def settled(section: CausalLM, rows: Rows | None) -> tuple[CausalLM, str]:
    """(the section with its format and the columns of that, what is to be said of how they were told)."""
    if rows is None:  # a model that is asked: an export says all of it, and that of others goes on with texts
        return (section.model_copy(update={"format": "text"}) if section.format == "auto" else section), ""
    asked = section.format
    found = _format(section, rows) if asked == "auto" else asked
    changed: dict[str, Any] = {"format": found}
    if found == "chat" and "messages" not in section.model_fields_set:
        changed |= _of_chat(section, rows)
    elif found == "completion":
        changed |= _of_completion(section, rows)
    elif found in ("segments", "tokens") and not _has(rows, section.text):
        changed["text"] = SEGMENTS if found == "segments" else TOKENS
    made = section.model_copy(update=changed)
    _check(section, rows)
    columns = columns_of(made, rows)
    told = [name for name in columns.names if name not in _named(section) or asked == "auto"]
    return made, f"{made.format}, told by the columns {', '.join(told)}" if told else ""


def columns_of(section: CausalLM, rows: Rows | None) -> Columns:
    """The columns that are read of these rows; of a section whose format is settled."""
    kind = section.format
    if kind in ("text", "segments", "auto"):
        return Columns(section.text, weight=_optional(section, "weight", rows))
    if kind == "tokens":
        padded = PADDED if rows is not None and _has(rows, PADDED) else None
        picked = {name: _optional(section, name, rows) for name in ("learned", "weight")}
        return Columns(section.text, padded=padded, **picked)
    if kind == "completion":
        own = _optional(section, "input", rows) if section.input else None
        return Columns(section.prompt, section.completion, input=own, weight=_optional(section, "weight", rows))
    settings = SETTINGS if rows is not None and _has(rows, SETTINGS) else None
    picked = {name: _optional(section, name, rows) for name in ("tools", "system", "weight")}
    if section.messages:
        return Columns(section.messages, settings=settings, **picked)
    picked |= {name: _optional(section, name, rows) for name in BESIDE_INSTRUCTION}
    return Columns(section.prompt, section.completion, settings=settings, **picked)


def values(rows: Rows, name: str | None) -> Iterator[Any]:
    """A column that rows may have or not, as they say it: None where rows, or a part of a mixture, have it not."""
    if name is None or not _has(rows, name):
        return repeat(None, len(rows))
    found, kind = chain.from_iterable(replace(rows, lacking={}).blocks(name)), _kind(rows, name)
    return found if kind is None or hasattr(kind, "dtype") else (as_said(value, kind) for value in found)


def _format(section: CausalLM, rows: Rows) -> str:
    """What the columns say."""
    if _has(rows, section.text):
        first = _first(rows, section.text)
        segments = isinstance(first, list) and bool(first) and isinstance(first[0], Mapping) and "text" in first[0]
        tokens = isinstance(first, list) and bool(first) and isinstance(first[0], int)
        return "segments" if segments else "tokens" if tokens else "text"
    if any(_has(rows, name) for name in _messages(section)):
        return "chat"
    if pair := _pair(section, rows):
        texts = not any(is_conversational(_first(rows, name)) for name in pair)
        return "completion" if texts and pair == (section.prompt, section.completion) else "chat"
    if is_conversational(_first(rows, CHOSEN)):
        return "chat"
    return "segments" if _has(rows, SEGMENTS) else "tokens" if _has(rows, TOKENS) else "text"


def _of_chat(section: CausalLM, rows: Rows) -> dict[str, Any]:
    """The columns of a conversation: its messages, or else a prompt with its answer."""
    named = {"prompt", "completion"} & section.model_fields_set
    found = next((name for name in _messages(section) if _has(rows, name)), None)
    if found and not named:
        return {"messages": found}
    if pair := _pair(section, rows):
        return {"messages": "", "prompt": pair[0], "completion": pair[1]}
    return {"messages": CHOSEN} if is_conversational(_first(rows, CHOSEN)) else {}


def _of_completion(section: CausalLM, rows: Rows) -> dict[str, Any]:
    """The columns of a prompt with its completion; where one of them holds messages, it is a chat."""
    pair = _pair(section, rows)
    if pair is None:
        return {}
    talks = any(is_conversational(_first(rows, name)) for name in pair)
    told = {"prompt": pair[0], "completion": pair[1]}
    if section.input is None and pair[0] not in _named(section) and _has(rows, "input"):
        told["input"] = "input"  # of an instruction that is nobody's choice of columns, what belongs to it
    return {**told, "format": "chat", "messages": ""} if talks else told


def _pair(section: CausalLM, rows: Rows) -> tuple[str, str] | None:
    """The columns of a prompt and its answer: those of the configuration, or such as others have."""
    own = (section.prompt, section.completion)
    if {"prompt", "completion"} & section.model_fields_set or all(_has(rows, name) for name in own):
        return own
    return next((pair for pair in PAIRS if all(_has(rows, name) for name in pair)), None)


def _messages(section: CausalLM) -> tuple[str, ...]:
    return (section.messages,) if "messages" in section.model_fields_set else MESSAGES


def _optional(section: CausalLM, name: str, rows: Rows | None) -> str | None:
    """The column of a setting that rows may have or not."""
    given = getattr(section, name)
    if given is not None:
        return given if given and (rows is None or _has(rows, given)) else None
    if rows is None or name not in OPTIONAL:
        return None
    if name in BESIDE_INSTRUCTION and section.prompt.lower() != "instruction":
        return None
    return next((column for column in OPTIONAL[name] if _has(rows, column)), None)


def _named(section: CausalLM) -> set[str]:
    """The columns that a section names, by itself or by its defaults."""
    return {value for name in CausalLM.model_fields if isinstance(value := getattr(section, name), str)}


def _check(section: CausalLM, rows: Rows) -> None:
    """A column that a configuration names must be there."""
    for name in (*OPTIONAL, "weight"):
        given = getattr(section, name)
        if given and not _has(rows, given):
            raise ConfigError(
                f"task.{name}: {rows.where} has no column '{given}'{did_you_mean(given, rows.names)} "
                f"(the rows have: {', '.join(rows.names)})"
            )


def _has(rows: Rows, name: str) -> bool:
    return name in rows.names or (("." in name) and name.partition(".")[0] in rows.names)


def _first(rows: Rows, name: str) -> Any:
    """The first value of a column that is one; None without the column."""
    some = rows.select(range(min(FIRST, len(rows))))
    return next((value for value in values(some, name) if value not in (None, "", [])), None)


def _kind(rows: Rows, name: str) -> Any:
    """The feature of a column, also of one inside of another."""
    features = rows.table.features
    kind: Any = features.get(name)
    if kind is None:
        kind = features
        for part in name.split("."):
            kind = kind.get(part) if isinstance(kind, Mapping) else None
    return kind
