"""Lists and objects that stand as texts in the cells of flat files: as JSON, or as Python, numpy and pandas print them.

What is written there is read, or refused with what is wrong: a cell is never taken apart at blanks or commas. Nothing
is evaluated. `['a' 'b']` is two texts, as numpy means it, and not the one that Python would make of it.
"""

import ast
import json
import re
from typing import Any

MOST_NESTED = 50
MOST_CHARS = 1 << 24
PAIRS = {"[": "]", "(": ")", "{": "}"}
# What is written around a list or a value: `array([...], dtype=object)`, `np.str_('a')`.
CALLS = r"(?:np\.|numpy\.)?(?:array|list|tuple|str_|bool_|bool|u?int(?:8|16|32|64)?|float(?:16|32|64)?|datetime64)"
# Brackets of other kinds also stand around texts: "( see below )" is none.
LOOKS = re.compile(
    rf"""(?:\[.*\]|\{{\s*(?:["'].*)?\}}|\(\s*(?:["'\[({{\d-].*,.*)?\)|{CALLS}\(\s*[\[(].*\))""", re.DOTALL
)
TOKEN = re.compile(
    rf"""\s*(?:
    (?P<text>[rbu]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))
    |(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
    |(?P<name>[-+]?(?:None|True|False|null|true|false|nan|NaN|inf|Infinity)(?!\w))
    |(?P<call>{CALLS})(?=\()
    |(?P<kind>dtype\s*=\s*(?:'[^']*'|"[^"]*"|[\w.<>|]+))
    |(?P<dots>\.\.\.|…)
    |(?P<mark>[\[\](){{}},:])
    )""",
    re.VERBOSE | re.DOTALL,
)
NAMES = {
    "None": None, "null": None, "True": True, "true": True, "False": False, "false": False,
    "nan": float("nan"), "NaN": float("nan"), "inf": float("inf"), "Infinity": float("inf"),
}  # fmt: skip


def is_structured(text: str) -> bool:
    """Whether a text looks like a list or an object that was written to a flat file."""
    bare = text.strip()
    return bare[-1:] in ("]", ")", "}") and LOOKS.fullmatch(bare) is not None


def read_structured(text: str) -> Any:
    """What such a text says; raises ValueError with what is wrong."""
    if len(text) > MOST_CHARS:
        raise ValueError(f"more than {MOST_CHARS} characters")
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError:
        pass
    except RecursionError:
        raise ValueError(f"nested deeper than {MOST_NESTED} levels") from None
    reader = _Reader(text)
    found = reader.value(0)
    if reader.kind != "end":
        raise reader.wrong("goes on after its end")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in it")
    return found


class _Reader:
    """The tokens of a text, one at a time, and the values that they make."""

    def __init__(self, text: str):
        self.text, self.place, self.end = text, 0, 0
        self.kind = self.token = ""
        self.next()

    def next(self) -> None:
        self.place = self.end
        if not self.text[self.end :].strip():
            self.kind, self.token = "end", ""
            return
        found = TOKEN.match(self.text, self.end)
        if found is None:
            raise self.wrong("is no list or object that can be read")
        self.kind = found.lastgroup or ""
        self.token = found[self.kind]
        self.end = found.end()

    def wrong(self, what: str) -> ValueError:
        near = self.text[self.place :].strip()[:20]
        return ValueError(f"it {what}, at {near!r}" if near else f"it {what}, at its end")

    def takes(self, mark: str) -> bool:
        """Whether a mark stands here, which is then passed."""
        there = self.kind == "mark" and self.token == mark
        if there:
            self.next()
        return there

    def value(self, depth: int) -> Any:
        kind, token = self.kind, self.token
        if depth > MOST_NESTED:
            raise ValueError(f"nested deeper than {MOST_NESTED} levels")
        if kind == "dots":
            raise self.wrong("was cut with '...' when it was written, so that the rest is lost")
        if kind == "call":
            return self.called(depth)
        if kind == "mark" and token in "[(":
            self.next()
            return self.items(PAIRS[token], depth)
        if kind == "mark" and token == "{":
            self.next()
            return self.pairs(depth)
        if kind not in ("text", "number", "name"):
            raise self.wrong("breaks off" if kind == "end" else "has no value where one is expected")
        self.next()
        return _plain(kind, token)

    def called(self, depth: int) -> Any:
        """What is within the brackets of `array(...)`."""
        self.next()
        self.next()
        found = self.value(depth + 1)
        if self.takes(","):
            if self.kind != "kind":
                raise self.wrong("has more than one value in brackets of a call")
            self.next()
        if not self.takes(")"):
            raise self.wrong("lacks a closing bracket")
        return found

    def items(self, closing: str, depth: int) -> list[Any]:
        """The values of a list, with commas between all of them, or blanks as numpy has it."""
        found: list[Any] = []
        commas: bool | None = None
        while not self.takes(closing):
            if found:
                comma = self.takes(",")
                if comma and self.takes(closing):
                    break  # (1,)
                if commas not in (None, comma):
                    raise self.wrong("has commas between some of its values and blanks between others")
                commas = comma
            found.append(self.value(depth + 1))
        return found

    def pairs(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.takes("}"):
            if found and not self.takes(","):
                raise self.wrong("lacks a comma between two keys")
            if self.takes("}"):
                break
            key = self.value(depth + 1)
            if not self.takes(":"):
                raise self.wrong("is a set or an object without a value for each key; write a list")
            if not isinstance(key, str):
                raise self.wrong(f"has the key {key!r:.20}, which is no text")
            if key in found:
                raise ValueError(f"the key '{key:.40}' stands twice in it")
            found[key] = self.value(depth + 1)
        return found


def _plain(kind: str, token: str) -> Any:
    if kind == "name":
        value = NAMES[token.lstrip("+-")]
        return -value if token[0] == "-" and isinstance(value, float) else value
    if kind == "number":
        return int(token) if re.fullmatch(r"[-+]?\d+", token) else float(token)
    try:
        value = ast.literal_eval(token)
    except (ValueError, SyntaxError):  # a broken escape, a line end inside
        value = None
    if not isinstance(value, str):
        raise ValueError(f"{token[:20]!r} in it is no text that can be read")
    return value
