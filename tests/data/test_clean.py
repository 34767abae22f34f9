"""Cleaning of texts: what is a tag and what is none, normal forms, white space, and the time that it takes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.config.data import Clean
from sft_jax.data.clean import RULES, clean


def cleaned(text: str, **rules) -> str:
    """One text, cleaned."""
    (found,) = clean([text], Clean(**rules))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one<br />two<br/>three", "one two three"),
        ("<p class='a b'>one</p>", " one "),
        ("<!DOCTYPE html><h1>A</h1>", "  A "),
        ("a < b and c > d", "a < b and c > d"),
        ("1<2, 3>2, <3, x <- y", "1<2, 3>2, <3, x <- y"),
        ("a <b without an end", "a <b without an end"),
        ("no <!-- <b>hidden</b> --> yes <!-- open", "no   yes <!-- open"),
        ("<!---->a<!-- x --><!-- y -->", " a  "),
        ("R&amp;D &lt;b&gt; caf&eacute; &#39;q&#x27; &nope; AT&T", "R&D <b> café 'q' &nope; AT&T"),
        ("&amp;lt;", "&lt;"),
        ("&#xD800;|&#0;", "\ufffd|\ufffd"),
        ("＜b＞", "＜b＞"),
    ],
)
def test_html(text, expected):
    """Tags and comments leave a blank, entities are decoded once, and all other brackets and ampersands stay."""
    assert cleaned(text, html=True) == expected
    assert cleaned(text) == text, "only when asked for"


def test_unicode_forms():
    """Normal forms make equal what looks equal; NFKC also what means the same, and what entities stand for."""
    assert cleaned("e\u0301 ﬁ ①", unicode="NFC") == "é ﬁ ①"
    assert cleaned("e\u0301 ﬁ ① ｂ", unicode="NFKC") == "é fi 1 b"
    assert cleaned("e&#x301;", unicode="NFC", html=True) == "é"
    assert cleaned("＜b＞", unicode="NFKC", html=True) == "<b>", "what becomes a bracket later is no tag"


def test_white_space():
    """Runs of white space of any kind become one blank, and both ends are trimmed."""
    assert cleaned(" a\t\n b\u00a0\u2003c\u2028d\x85 ", whitespace=True) == "a b c d"
    assert cleaned("<br> a <br>", whitespace=True, html=True) == "a"


@given(text=st.text(max_size=30), html=st.booleans(), form=st.sampled_from([None, "NFC", "NFKC"]), space=st.booleans())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_text_is_cleaned(text, html, form, space):
    """Any text gives a text that UTF-8 can hold; what has neither brackets nor ampersands nor odd forms stays."""
    found = cleaned(text, html=html, unicode=form, whitespace=space)
    found.encode()
    if html and not set(text) & set("<&") and form is None and not space:
        assert found == text
    if space:
        assert found == " ".join(found.split())


@pytest.mark.parametrize("piece", ["<", "<!--", "<a", "<a <", "&", "&#", "--><!--", "<!-- -->", "</"])
def test_hostile_texts_take_no_longer_than_others(piece):
    """A text made of the beginnings of tags, comments or entities, a million characters of it, is done at once."""
    text = piece * (1_000_000 // len(piece))
    assert len(cleaned(text, html=True, whitespace=True, unicode="NFKC")) <= len(text)


def test_rules_are_those_of_the_section():
    """C26: each rule that changes texts is exported, and the others of the section are about rows."""
    assert set(Clean.model_fields) - set(RULES) == {"min_chars", "max_chars"}
