"""Text files record by record: CSV, TSV, JSON, CoNLL and plain lines, each with the line that it begins on, from 1.

Nothing is lost in silence: each line that is no record comes as a `Problem`. Memory is bounded by the longest line that
is read, and a line has a bound. Knows no table and no type of column.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.archives import MOST_RATIO, SMALL_BYTES
from sft_jax.data.cells import HALF, Broken
from sft_jax.errors import DataError, reason

MOST_CHARS = 1 << 24  # in a line, and in a cell that goes over several
MOST_LIST = 1 << 31  # characters of a JSON file that is one list, which is read at once
MOST_WORDS = 1 << 16  # in a sentence
TOO_LONG = "\0"  # stands for a line that was skipped


class Problem(NamedTuple):
    """Why a line is no record: what such lines are counted as, and what is wrong."""

    reason: str
    text: str


def csv_records(file: str, where: str, delimiter: str = ",") -> Iterator[tuple[int, list[str] | Problem]]:
    """The cells of each record. A quote that is never closed costs its own line, and reading goes on at the next."""
    lines, again, taken = _lines(file, where), deque[str](), list[str]()

    def feed() -> Iterator[str]:
        while line := again.popleft() if again else next(lines, ""):
            taken.append(line)
            yield line

    csv.field_size_limit(max(csv.field_size_limit(), MOST_CHARS))  # of the process, and never lowered
    number = 1
    while True:
        try:
            for cells in csv.reader(feed(), delimiter=delimiter, strict=True):
                if cells:  # else a blank line
                    yield number, _problem(taken, number) or cells
                number += len(taken)
                taken.clear()
            return
        except csv.Error as error:
            yield number, _problem(taken[:1], number) or _broken_csv(str(error), delimiter)
            again.extendleft(reversed(taken[1:]))
            number += 1
            taken.clear()


def json_records(file: str, where: str) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """The object on each line, or each object of the one list that a `.json` file may be."""
    may_be_list = ".json" in [ending.lower() for ending in Path(file).suffixes[-2:]]
    for number, line in enumerate(_lines(file, where), 1):
        if line.isspace():
            continue
        if may_be_list and line.lstrip().startswith("["):
            yield from _list_records(file, where)
            return
        may_be_list = False
        yield number, _problem([line], number) or _parsed(line)


def text_records(file: str | BufferedReader, where: str) -> Iterator[tuple[int, str | Problem]]:
    """Each line of a file or of an open stream, without its end; a line may be empty."""
    for number, line in enumerate(_lines(file, where), 1):
        yield number, _problem([line], number) or line.rstrip("\r\n")


def conll_records(file: str, where: str) -> Iterator[tuple[int, tuple[list[str], list[str]] | Problem]]:
    """(words, tags) of each sentence: the first and the last column of its lines, as many columns in all of the file.

    Blank lines end a sentence. A line that is wrong costs its sentence, and is what is said of it; lines that begin a
    document, and comments before a sentence, are no words.
    """
    words, tags = list[str](), list[str]()
    begin, columns, wrong = 0, 0, None
    for number, line in chain(enumerate(_lines(file, where), 1), [(0, "")]):
        if line.strip() and not line.startswith(DOCUMENT) and not (COMMENT.match(line) and not words):
            cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
            begin, columns = begin if words else number, columns or len(cells)
            if wrong is None:
                words.append(cells[0])
                tags.append(cells[-1])
                problem = _problem([line], number) or _broken_word(cells, columns, len(words))
                wrong = (number, problem) if problem else None
        elif words:
            yield wrong or (begin, (words, tags))
            words, tags, wrong = [], [], None


def read_text(content: bytes) -> str | Problem:
    """The text that these bytes are, without a byte order mark."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _broken_bytes(content[error.start], f"byte {error.start + 1}")
    return Problem("NUL character", "holds a NUL character; take it out") if "\0" in text else text


def _lines(file: str | BufferedReader, where: str) -> Iterator[str]:
    """Lines with their ends, of which bytes that are not UTF-8 are surrogates; those too long are skipped."""
    path = Path(file).expanduser() if isinstance(file, str) else Path("stream")
    packed = path.suffix.lower() == ".gz"
    try:
        left = max(MOST_RATIO * path.stat().st_size, SMALL_BYTES) if packed else None
        with _opened(file, path, packed=packed) as raw:
            if raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{where}: {file} is UTF-16; save it as UTF-8")
            stream = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
            for line in iter(partial(stream.readline, MOST_CHARS), ""):
                long = len(line) == MOST_CHARS
                if long:
                    piece = line
                    while piece and not piece.endswith(("\n", "\r")):
                        piece = stream.readline(MOST_CHARS)
                        left = _less(left, len(piece), file, where)
                left = _less(left, len(line), file, where)
                yield TOO_LONG if long else line
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise DataError(f"{where}: {file} cannot be read ({why}); check the path and the file") from None


def _opened(file: str | BufferedReader, path: Path, *, packed: bool) -> Any:
    if not isinstance(file, str):
        return file
    return gzip.open(path) if packed else open(path, "rb")


def _less(left: int | None, count: int, file: str, where: str) -> int | None:
    if left is None:
        return None
    if count > left:
        raise DataError(f"{where}: {file} unpacks to more than {MOST_RATIO} times its size; do not trust it")
    return left - count


def _problem(lines: list[str], number: int) -> Problem | None:
    """What is wrong with the characters of a record that begins on line `number`."""
    for line in lines:
        if line.isascii() and "\0" not in line:
            continue
        on = f" on line {number + lines.index(line)}" if len(lines) > 1 else ""
        if line is TOO_LONG:
            return Problem("line too long", f"a line of more than {MOST_CHARS} characters{on}; break it up")
        if "\0" in line:
            return Problem("NUL character", f"holds a NUL character{on}; take it out")
        try:
            line.encode("utf-8")
        except UnicodeEncodeError as error:
            return _broken_bytes(ord(line[error.start]) - 0xDC00, f"character {error.start + 1}{on}")
    return None


def _broken_bytes(byte: int, at: str) -> Problem:
    return Problem("broken UTF-8", f"not UTF-8 (byte 0x{byte:02x} at {at}); save the file as UTF-8")


def _broken_csv(error: str, delimiter: str) -> Problem:
    if "end of data" in error:
        return Problem("broken quotes", "a quote is opened and never closed; close it, or double it")
    if "expected after" in error:
        mark = {",": "a comma", "\t": "a tab"}[delimiter]
        return Problem("broken quotes", f"a quote ends where neither {mark} nor the line follows; double those inside")
    if "limit" in error:
        return Problem("line too long", f"a cell of more than {MOST_CHARS} characters, or an open quote; close it")
    return Problem("broken CSV", f"not CSV ({error}); mend the line")


# Lines of CoNLL files that hold no word: `-DOCSTART- -X- O`, and `# id 7` or `# sent_id = 7` before a sentence.
DOCUMENT, COMMENT = "-DOCSTART-", re.compile(r"# (id |\w+ ?= ?)")


def _broken_word(cells: list[str], columns: int, words: int) -> Problem | None:
    """What is wrong with a line of a sentence that has so many words by now."""
    if len(cells) < 2 or not cells[-1]:
        return Problem("word without tag", f"{cells[0]!r:.40} has no tag; write it in the last column")
    if not cells[0]:
        return Problem("tag without word", f"{cells[-1]!r:.40} has no word; write it in the first column")
    if len(cells) != columns:
        return Problem("wrong number of columns", f"columns: {len(cells)}, expected {columns} as in the first line")
    if words > MOST_WORDS:
        return Problem("sentence too long", f"more than {MOST_WORDS} words; put a blank line after each sentence")
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Broken:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        return Broken(f"an object in which the key '{next(n for n in names if names.count(n) > 1):.40}' stands twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
SPACE = re.compile(r"[ \t\n\r]*")


def _parsed(line: str) -> dict[str, Any] | Problem:
    try:
        return _checked(DECODER.decode(line))
    except (ValueError, RecursionError) as error:
        return Problem("broken JSON", f"not JSON ({_fault(error)}); mend the line")


def _checked(value: Any) -> dict[str, Any] | Problem:
    """An object that can be a row. What is wrong inside of its values is for those who read them."""
    if isinstance(value, Broken):
        return Problem("broken JSON", f"not JSON ({value.why.partition('the ')[2]}); mend the line")
    if not isinstance(value, dict):
        return Problem("no JSON object", f"holds a {type(value).__name__}, expected an object with a value by column")
    if not value:
        return Problem("no JSON object", "holds an object without any value, expected one by column")
    try:
        "".join(value).encode()
    except UnicodeEncodeError:
        return Problem("broken UTF-8", f"the name of a column {HALF}")
    return value


def _fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deep"
    return "a number of thousands of digits" if "digits" in str(error) else str(error)


def _list_records(file: str, where: str) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """Objects of one list. Where its syntax breaks nothing after can be told apart, so that is an error at once."""
    text = _whole(file, where)
    place, line, counted = _after(text, text.index("[") + 1), 1, 0
    more, why = text[place : place + 1] != "]", "expected a comma, or the end"
    while more:
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            why = _fault(error)
            break
        yield line, _checked(value)
        place = _after(text, end)
        more = text[place : place + 1] == ","
        place = _after(text, place + 1) if more else place
    if more or text[place:].strip() != "]":
        raise DataError(
            f"{where}: {file}, line {line}: the list breaks off ({why}), and what follows cannot be told apart; "
            f"mend it, or write an object on each line"
        )


def _after(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return found.end() if found else place


def _whole(file: str, where: str) -> str:
    lines, total = [], 0
    for number, line in enumerate(_lines(file, where), 1):
        total += len(line)
        problem = _problem([line], number)
        if total > MOST_LIST:
            problem = Problem("", f"a list of more than {MOST_LIST} characters; write an object on each line")
        if problem:
            raise DataError(f"{where}: {file}, line {number}: {problem.text}")
        lines.append(line)
    return "".join(lines)
