"""Cleaning of texts, the same in training, evaluation and prediction.

HTML comes first, so that what entities stand for is put into normal form like any other character, and full-width
brackets are no tags. A comment is `<!--` to the next `-->`. A tag is `<`, perhaps `/` or `!`, a letter, anything but
`<` and `>`, and `>`; so "a < b" is none, and neither is a bracket without its other half. Each of them leaves a blank,
since "one<br>two" is two words. Entities are decoded once: "&lt;b&gt;" becomes "<b>" and stays.
"""

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from sft_jax.config.data import Clean

RULES = ("html", "unicode", "whitespace")  # what changes texts, of the section; the rest is about rows
TAG = re.compile(r"<[/!]?[A-Za-z][^<>]*>")


def clean(texts: Sequence[Any], rules: Clean) -> list[Any]:
    """Each text as the rules make it; of a row of words, each word."""
    if texts and isinstance(texts[0], tuple):
        return [tuple(clean(words, rules)) for words in texts]
    found = list(texts)
    if rules.html:
        found = [html.unescape(TAG.sub(" ", _without_comments(text))) for text in found]
    if rules.unicode:
        found = [unicodedata.normalize(rules.unicode, text) for text in found]
    if rules.whitespace:
        found = [" ".join(text.split()) for text in found]
    return found


def _without_comments(text: str) -> str:
    """A text without comments; found one after the other, so that the time is that of the text's length."""
    parts, begin = [], 0
    while (start := text.find("<!--", begin)) >= 0 and (end := text.find("-->", start + 4)) >= 0:
        parts.append(text[begin:start])
        begin = end + 3
    return " ".join([*parts, text[begin:]])
