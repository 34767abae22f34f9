"""From texts with spans of characters, as spaCy, Prodigy and doccano write them, to words with a tag each.

Words are cut in one way, here: runs of letters, digits and underscores are words, so is each other sign, and each
character of scripts that are written without blanks. A span that begins or ends within a word makes its row a bad one:
there is no tag for half a word.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.data.rows import Bad, Rows
from sft_jax.data.structured import is_structured, read_structured
from sft_jax.tasks.label_columns import LabelNumbers
from sft_jax.tasks.tag_schemes import OUTSIDE
from sft_jax.tasks.task import Targets

# Kana and ideographs alone; letters with the accents that follow them; all else that is no blank alone.
SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{SINGLE}]|(?:(?![{SINGLE}])[\w\u0300-\u036f])+|[^\w\s]")
BEGINS, ENDS = ("start", "start_offset", "begin"), ("end", "end_offset")
CALLED = ("label", "labels", "entity_group", "entity", "type", "tag")
FORM = "[begin, end, label] or {'start': …, 'end': …, 'label': …}"

Span = tuple[int, int, str]


def cut(text: str) -> list[tuple[int, int]]:
    """Where each word of a text begins and ends."""
    return [found.span() for found in WORD.finditer(text)]


def read_words(rows: Rows, column: str) -> tuple[tuple[list[Any], ...], dict[int, Bad]]:
    """The words of each text, and what is wrong with the rows that have none."""
    found: list[tuple[str, ...]] = []
    bad: dict[int, Bad] = {}
    for row, text in enumerate(rows.texts(column)):
        words = tuple(text[begin:end] for begin, end in cut(text)) if isinstance(text, str) else ()
        if not words:
            bad[row] = Bad(rows.place(row), "no text", f"{column} is {text!r:.60}, expected a text")
        found.append(words)
    return (found,), bad


def names(train: Rows, column: str) -> tuple[str, ...]:
    """The tags that the spans of a column need: `O`, and of each label one for its first word and one for others."""
    kinds = {span[2] for value in train.column(column) for span in _spans(value) or () if isinstance(span, tuple)}
    return (OUTSIDE, *(f"{prefix}-{kind}" for kind in sorted(kinds) for prefix in "BI"))


def read(rows: Rows, text_column: str, column: str, labels: Sequence[str]) -> Targets:
    """The number of the tag of each word."""
    numbers = LabelNumbers(labels, None)
    found: list[tuple[int, ...] | None] = []
    bad: dict[int, Bad] = {}
    for row, (value, text) in enumerate(zip(rows.column(column), rows.texts(text_column), strict=True)):
        tags = _tags(value, text, column) if isinstance(text, str) else []  # else that is what is said of the row
        wrong = ("span", tags) if isinstance(tags, str) else None
        picked = [numbers.of(tag) for tag in tags] if isinstance(tags, list) else []
        if None in picked:
            tag = tags[picked.index(None)]
            wrong = "unknown label", f"{column} has {tag[2:]!r:.60}{numbers.expected(tag)}"
        if wrong:
            bad[row] = Bad(rows.place(row), *wrong)
        found.append(None if wrong else tuple(number for number in picked if number is not None))
    return Targets(found, bad)


def _tags(value: Any, text: str, column: str) -> list[str] | str:
    """The tag of each word of a text, or what is wrong with its spans."""
    spans = _spans(value)
    if spans is None:
        return f"{column} is {value!r:.60}, expected a list of {FORM}"
    words = cut(text)
    first = {begin: word for word, (begin, _) in enumerate(words)}
    last = {end: word for word, (_, end) in enumerate(words)}
    tags = [OUTSIDE] * len(words)
    for span in spans:
        if not isinstance(span, tuple):
            return f"{column} holds {span!r:.60}, expected {FORM}"
        begin, end, kind = span
        where = f"{column} has {kind!r:.40} at [{begin}:{end}]"
        if not 0 <= begin < end <= len(text):
            return f"{where}, and the text has {len(text)} characters"
        if begin not in first or end not in last:
            return f"{where}, which is {text[begin:end]!r:.40}; it begins or ends within a word, or at a blank"
        those = range(first[begin], last[end] + 1)
        if any(tags[word] != OUTSIDE for word in those):
            return f"{where}, where another span is; words have one tag each"
        for word in those:
            tags[word] = f"{'B' if word == those[0] else 'I'}-{kind}"
    return tags


def _spans(value: Any) -> list[Any] | None:
    """Each span as (begin, end, label), or as it stands where it is none; None for what is no list of spans."""
    if isinstance(value, str) and is_structured(value):
        try:
            value = read_structured(value)
        except ValueError:
            return None
    if isinstance(value, Mapping) and isinstance(value.get("entities"), list):
        value = value["entities"]
    return [_span(one) for one in value] if isinstance(value, list) else None


def _span(one: Any) -> Any:
    if isinstance(one, Mapping):
        found = [next((one[key] for key in keys if key in one), None) for keys in (BEGINS, ENDS, CALLED)]
    elif isinstance(one, list) and len(one) == 3:
        found = list(one)
    else:
        return one
    begin, end, kind = found
    kind = kind[0] if isinstance(kind, list) and len(kind) == 1 else kind
    if type(begin) is int and type(end) is int and isinstance(kind, str) and kind.strip():
        return begin, end, kind.strip()
    return one
