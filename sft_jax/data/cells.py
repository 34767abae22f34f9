"""How the values of a column are stored, so that each is read again as its file says it: no type is made for all.

A block of values of one plain type (texts, whole numbers, numbers, true or false, flat lists of one of these) is an
Arrow array of it. Any other block is `written`: an Arrow array of texts, each of them the JSON of its value, which is
decoded when the column is read and not before. Blocks of one form stay as they are side by side; where forms differ,
the column is written. So nothing depends on what stands in other rows: not numbers, not nulls, not the order of keys.

Cells of flat files are texts, of which is said whether they all are numbers.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # whose functions no type checker knows
MOST_NESTED = 100  # lists and objects in each other
AT_ONCE = 256  # texts of JSON that are decoded in one go
INTEGER = r"^-?(0|[1-9][0-9]*)$"
NUMBER = r"^-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"
PLAIN = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
NOTHING, EMPTY = pa.null(), pa.list_(pa.null())  # blocks without any value, and with empty lists alone
UNFIT = (pa.ArrowException, OverflowError, ValueError, TypeError)  # what Arrow raises for values of no one type
MARK = "\0"  # the one key of the object that is written in place of a `Broken`
HALVES = re.compile(r"\\u[dD][89a-fA-F]")  # of surrogate pairs
HALF = "holds half of a pair such as \\ud83d\\ude00; write both halves"


class Broken:
    """A value that is there and cannot be used; being no text, number or list, it is refused by whoever reads it."""

    def __init__(self, why: str):
        self.why = why

    def __repr__(self) -> str:
        return self.why


class Form(NamedTuple):
    """How the values of a block are stored."""

    kind: pa.DataType
    written: bool = False  # each value as its own JSON


WRITTEN = Form(pa.string(), written=True)


def packed(values: Sequence[Any]) -> tuple[pa.Array | pa.ChunkedArray, Form]:
    """Values as they are stored; an array of chunks where they are more than 2 GiB."""
    kind = _kind(values)
    try:
        if kind is not None:
            return pa.array(values, kind), Form(kind)
    except UNFIT:  # a number beyond 64 bits, half of a surrogate pair
        pass
    return pa.array(list(map(_written, values)), WRITTEN.kind), WRITTEN


def joined(forms: Iterable[Form]) -> Form:
    """The form that holds the values of blocks of these forms."""
    found = set(forms) - {Form(NOTHING)}
    if len(found) > 1 and all(pa.types.is_list(form.kind) and not form.written for form in found):
        found -= {Form(EMPTY)}
    return found.pop() if len(found) == 1 else WRITTEN if found else Form(NOTHING)


def turned(array: pa.Array, form: Form, wanted: Form) -> pa.Array | pa.ChunkedArray:
    """An array of one form in a form that holds its values."""
    if form == wanted:
        return array
    if form.kind == NOTHING:
        return pa.nulls(len(array), wanted.kind)
    if wanted.written:
        return pa.array(list(map(_written, array.to_pylist())), wanted.kind)
    return pa.array(array.to_pylist(), wanted.kind)  # Arrow's own cast makes broken arrays of lists of None


def opened(texts: Sequence[str | None]) -> Iterator[Any]:
    """The values that were written, in order; `Broken` where one cannot be used."""
    for begin in range(0, len(texts), AT_ONCE):
        part = texts[begin : begin + AT_ONCE]
        values = json.loads(f"[{','.join('null' if text is None else text for text in part)}]")
        for text, value in zip(part, values, strict=True):
            yield value if text is None else _checked(value, text)


class Cells:
    """Whether the cells of a column of a flat file are numbers, block after block."""

    def __init__(self) -> None:
        self._whole = self._numbers = True
        self._large = self._filled = False

    def add(self, cells: Sequence[str]) -> None:
        """Look at a block of them."""
        if not self._numbers:
            return
        filled = pa.array([cell for cell in cells if cell], pa.string())
        self._filled |= len(filled) > 0
        self._whole = self._whole and _all(pc.match_substring_regex(filled, INTEGER))
        self._numbers = self._whole or _all(pc.match_substring_regex(filled, NUMBER))
        self._numbers = self._numbers and _all(pc.is_finite(filled.cast(pa.float64())))
        try:
            if self._whole and not self._large:
                filled.cast(pa.int64())
        except pa.ArrowInvalid:
            self._large = True

    @property
    def kind(self) -> pa.DataType:
        """Numbers where every cell is one or empty, and some are not; numbers beyond 64 bits stay texts."""
        if not self._filled or not self._numbers or (self._whole and self._large):
            return pa.string()
        return pa.int64() if self._whole else pa.float64()


def typed(cells: Sequence[str], kind: pa.DataType) -> list[Any]:
    """Cells as values of the kind that was found; an empty one is None among numbers."""
    if kind == pa.string():
        return list(cells)
    number = int if kind == pa.int64() else float
    return [number(cell) if cell else None for cell in cells]


def _all(found: pa.Array) -> bool:
    return pc.all(found, min_count=0).as_py()


def _kind(values: Sequence[Any]) -> pa.DataType | None:
    """The one plain type of these values, None where there is none."""
    kinds = {*map(type, values)} - {type(None)}
    if not kinds:
        return NOTHING
    if kinds == {list}:
        inner = {*map(type, chain.from_iterable(value for value in values if value is not None))} - {type(None)}
        if not inner:
            return EMPTY
        return pa.list_(PLAIN[inner.pop()]) if len(inner) == 1 and inner <= PLAIN.keys() else None
    return PLAIN.get(kinds.pop()) if len(kinds) == 1 else None


def _written(value: Any) -> str | None:
    """The JSON of a value as a text that Arrow takes."""
    if value is None:
        return None
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_marked)
        text.encode()
        return text
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), default=_marked)
    except RecursionError:
        return json.dumps(_marked(Broken(_deep())), separators=(",", ":"))


def _marked(value: Any) -> dict[str, str]:
    if not isinstance(value, Broken):
        raise TypeError(f"{type(value).__name__} is no JSON")
    return {MARK: value.why}


def _checked(value: Any, text: str) -> Any:
    """A value, or why it cannot be used."""
    if r'{"\u0000":' in text and (found := re.search(r'\{"\\u0000":("(?:[^"\\]|\\.)*")\}', text)):
        return Broken(json.loads(found[1]))
    if text.count("[") + text.count("{") > MOST_NESTED and _depth(value) > MOST_NESTED:
        return Broken(_deep())
    if r"\u" in text and HALVES.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Broken(f"what {HALF}")
    return value


def _deep() -> str:
    return f"nested deeper than {MOST_NESTED} levels"


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, list | dict)]:
        depth += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return depth
