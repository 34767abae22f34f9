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
from collections.abc import Callable, Iterator
from functools import partial
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.archives import MOST_RATIO, SMALL_BYTES
from sft_jax.data.cells import HALF, Broken
from sft_jax.errors import DataError, reason

MOST_CHARS = 1 << 24  # in a line, and in a cell that goes over several
MOST_LIST = 1 << 31  # characters of a JSON file that is one list, which is read at once
MOST_WORDS = 1 << 16  # in a sentence
UTF8 = "utf-8"
PEEKED = 128  # bytes that tell UTF-16
# Names under which a file of one object has its rows.
ROWS = ("data", "rows", "examples", "records", "instances", "items")
TOO_LONG = "\0"  # stands for a line that was skipped


class Problem(NamedTuple):
    """Why a line is no record: what such lines are counted as, and what is wrong."""

    reason: str
    text: str


def csv_records(
    file: str, where: str, delimiter: str = ",", encoding: str = UTF8
) -> Iterator[tuple[int, list[str] | Problem]]:
    """The cells of each record. A quote that is never closed costs its own line, and reading goes on at the next."""
    lines, again, taken = _lines(file, where, encoding), deque[str](), list[str]()

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
                    yield number, _problem(taken, number, encoding) or cells
                number += len(taken)
                taken.clear()
            return
        except csv.Error as error:
            yield number, _problem(taken[:1], number, encoding) or _broken_csv(str(error), delimiter)
            again.extendleft(reversed(taken[1:]))
            number += 1
            taken.clear()


def text_records(file: str | BufferedReader, where: str, encoding: str = UTF8) -> Iterator[tuple[int, str | Problem]]:
    """Each line of a file or of an open stream, without its end; a line may be empty."""
    for number, line in enumerate(_lines(file, where, encoding), 1):
        yield number, _problem([line], number, encoding) or line.rstrip("\r\n")


def conll_records(
    file: str, where: str, encoding: str = UTF8
) -> Iterator[tuple[int, tuple[list[str], list[str]] | Problem]]:
    """(words, tags) of each sentence: the first and the last column of its lines, as many columns in all of the file.

    Blank lines end a sentence. A line that is wrong costs its sentence, and is what is said of it; lines that begin a
    document, and comments before a sentence, are no words.
    """
    words, tags = list[str](), list[str]()
    begin, columns, wrong = 0, 0, None
    for number, line in chain(enumerate(_lines(file, where, encoding), 1), [(0, "")]):
        if line.strip() and not line.startswith(DOCUMENT) and not (COMMENT.match(line) and not words):
            cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
            begin, columns = begin if words else number, columns or len(cells)
            if wrong is None:
                words.append(cells[0])
                tags.append(cells[-1])
                problem = _problem([line], number, encoding) or _broken_word(cells, columns, len(words))
                wrong = (number, problem) if problem else None
        elif words:
            yield wrong or (begin, (words, tags))
            words, tags, wrong = [], [], None


def read_text(content: bytes, encoding: str = UTF8) -> str | Problem:
    """The text that these bytes are, without a byte order mark."""
    try:
        text = content.decode("utf-8-sig" if encoding == UTF8 else encoding)
    except UnicodeDecodeError as error:
        return _broken_bytes(content[error.start], f"byte {error.start + 1}", encoding)
    except UnicodeError as error:  # no mark of UTF-16
        return Problem(f"broken {encoding}", f"not {encoding} ({reason(error)}); set data.source.encoding")
    return Problem("NUL character", "holds a NUL character; take it out") if "\0" in text else text


def _lines(file: str | BufferedReader, where: str, encoding: str = UTF8, longest: int | None = None) -> Iterator[str]:
    """Lines with their ends, of which bytes that are no text are surrogates; those too long are skipped."""
    most = longest or MOST_CHARS
    path = Path(file).expanduser() if isinstance(file, str) else Path("stream")
    packed = path.suffix.lower() == ".gz"
    try:
        left = max(MOST_RATIO * path.stat().st_size, SMALL_BYTES) if packed else None
        with _opened(file, path, packed=packed) as raw:
            if encoding == UTF8 and (other := _utf16(raw.peek(PEEKED)[:PEEKED])):
                raise DataError(
                    f"{where}: {file} is UTF-16; save it as UTF-8, or say what it is with data.source.encoding={other}"
                )
            text = "utf-8-sig" if encoding == UTF8 else encoding
            stream = io.TextIOWrapper(raw, text, errors="surrogateescape", newline="")
            for line in iter(partial(stream.readline, most), ""):
                long = len(line) == most
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
    except UnicodeError as error:  # of encodings in which no byte stands for itself
        raise DataError(f"{where}: {file} is not {encoding} ({reason(error)}); set data.source.encoding") from None


def _opened(file: str | BufferedReader, path: Path, *, packed: bool) -> Any:
    if not isinstance(file, str):
        return file
    return gzip.open(path) if packed else open(path, "rb")


def _utf16(begin: bytes) -> str:
    """Which UTF-16 a file begins with, by its mark or by every other byte being NUL; nothing where it is none."""
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(set(begin)) > 3 and not any(begin[first::2]) and all(begin[1 - first :: 2]):
            return name
    return ""


def _less(left: int | None, count: int, file: str | BufferedReader, where: str) -> int | None:
    if left is None:
        return None
    if count > left:
        raise DataError(f"{where}: {file} unpacks to more than {MOST_RATIO} times its size; do not trust it")
    return left - count


def _problem(lines: list[str], number: int, encoding: str = UTF8) -> Problem | None:
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
            return _broken_bytes(ord(line[error.start]) - 0xDC00, f"character {error.start + 1}{on}", encoding)
    return None


def _broken_bytes(byte: int, at: str, encoding: str) -> Problem:
    if encoding != UTF8:
        return Problem(f"broken {encoding}", f"not {encoding} (byte 0x{byte:02x} at {at}); set data.source.encoding")
    remedy = "save the file as UTF-8, or set data.source.encoding (cp1252 where Windows wrote it)"
    return Problem("broken UTF-8", f"not UTF-8 (byte 0x{byte:02x} at {at}); {remedy}")


def _broken_csv(error: str, delimiter: str) -> Problem:
    if "end of data" in error:
        return Problem("broken quotes", "a quote is opened and never closed; close it, or double it")
    if "expected after" in error:
        mark = {",": "a comma", "\t": "a tab"}.get(delimiter, repr(delimiter))
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


def json_records(
    file: str, where: str, encoding: str = UTF8, numbered: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """The object on each line, each of the one list that a `.json` file may be, or each of several that go over lines.

    A `.json` file of one object may hold rows in it (`_rows_within`). Where records have no lines of their own they are
    counted from 1, and `numbered` is called first.
    """
    is_json = ".json" in [ending.lower() for ending in Path(file).suffixes[-2:]]
    longest = MOST_LIST if is_json else MOST_CHARS  # a list may be on one line, as that of SQuAD is
    lines = ((n, line) for n, line in enumerate(_lines(file, where, encoding, longest), 1) if not line.isspace())
    head = list(islice(lines, 2))
    begin = head[0][1].lstrip() if head else ""
    if is_json and begin.startswith("["):
        yield from _list_records(_whole(file, where, encoding), file, where, encoding, numbered)
    elif begin.startswith("{") and (len(head) == 1 if is_json and _ends(begin) else _goes_on(begin, file, encoding)):
        yield from _objects(_whole(file, where, encoding), file, where, encoding, numbered)
    else:
        for number, line in chain(head, lines):
            yield number, _problem([line], number, encoding) or _parsed(line)


def _ends(line: str) -> bool:
    """Whether a line is one whole value of JSON."""
    try:
        DECODER.decode(line)
    except (ValueError, RecursionError):
        return False
    return True


def _goes_on(line: str, file: str, encoding: str) -> bool:
    """Whether the object that begins on the first line of a file ends on a later one."""
    if _ends(line):
        return False
    try:
        text = _whole(file, "", encoding)
        _, end = DECODER.raw_decode(text, _after(text, 0))
    except (DataError, ValueError, RecursionError):
        return False
    return "\n" in text[:end].strip()


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


def _list_records(
    text: str, file: str, where: str, encoding: str, numbered: Callable[[], None]
) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """Objects of one list. Where its syntax breaks nothing after can be told apart, so that is an error at once."""
    place, line, counted = _after(text, text.index("[") + 1), 1, 0
    more, why, count = text[place : place + 1] != "]", "expected a comma, or the end", 0
    on_one = "\n" not in text.strip()
    if on_one:
        numbered()
    while more:
        line, counted, count = line + text.count("\n", counted, place), place, count + 1
        try:
            value, end = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            why = _fault(error)
            break
        broken = _problem(text[place:end].splitlines(keepends=True), line, encoding)
        for record in [broken] if broken else _expanded(value):
            yield count if on_one else line, record
        place = _after(text, end)
        more = text[place : place + 1] == ","
        place = _after(text, place + 1) if more else place
    if more or text[place:].strip() != "]":
        raise _broken_off("the list", file, where, line, why)


def _objects(
    text: str, file: str, where: str, encoding: str, numbered: Callable[[], None]
) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """Objects one after the other, each over any number of lines; of one alone the rows that it may hold."""
    place, line, counted = _after(text, 0), 1, 0
    while place < len(text):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _broken_off("an object", file, where, line, _fault(error)) from None
        first, place = place, _after(text, end)
        broken = _problem(text[first:end].splitlines(keepends=True), line, encoding)
        within = _rows_within(value, file, where) if first == _after(text, 0) and place == len(text) else None
        if within is None or broken:
            yield line, broken or _checked(value)
            continue
        numbered()
        records = (record for row in within for record in _expanded(row))
        yield from enumerate(records, 1)


def _broken_off(what: str, file: str, where: str, line: int, why: str) -> DataError:
    return DataError(
        f"{where}: {file}, line {line}: {what} breaks off ({why}), and what follows cannot be told apart; "
        f"mend it, or write an object on each line"
    )


def _rows_within(value: Any, file: str, where: str) -> list[Any] | None:
    """The rows that the one object of a file holds; None where it is a row itself.

    They are a list under a name such as `data`, with nothing but facts beside it; or columns, as pandas writes them,
    each an object of the values by the same numbers, or a list. Lists may as well be the one row's own: where nothing
    tells the two apart, the file is refused.
    """
    if not isinstance(value, dict) or not value:
        return None
    if value.keys() - {"index"} == {"columns", "data"} and _is_table(value["columns"], value["data"]):
        return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    lists = [name for name, part in value.items() if isinstance(part, list)]
    if len(lists) == 1 and lists[0] in ROWS and value[lists[0]] and all(isinstance(r, dict) for r in value[lists[0]]):
        return value[lists[0]]
    parts = list(value.values())
    if all(isinstance(part, dict) and part and part.keys() == parts[0].keys() for part in parts):
        if all(name.isdigit() for name in parts[0]):
            return [{name: part[number] for name, part in value.items()} for number in parts[0]]
        if all(name.isdigit() for name in value):
            return parts
    if len(lists) < len(value) or len({len(part) for part in parts}) > 1 or len(parts[0]) < 2:
        return None
    inner = [one for part in parts for one in part]
    if any(isinstance(one, dict) for one in inner):
        return None
    if not any(isinstance(one, list) or (isinstance(one, str) and " " in one.strip()) for one in inner):
        raise DataError(
            f"{where}: {file} is one object of lists, which may be one row or a list for each column; write a list of "
            f"objects, or an object on each line of a .jsonl file"
        )
    return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]


def _is_table(columns: Any, rows: Any) -> bool:
    named = isinstance(columns, list) and all(isinstance(name, str) for name in columns)
    return named and isinstance(rows, list) and all(isinstance(r, list) and len(r) == len(columns) for r in rows)


def _expanded(value: Any) -> Iterator[dict[str, Any] | Problem]:
    """A record, or the questions of an article as the files of SQuAD have them: with their contexts, one a record."""
    paragraphs = value.get("paragraphs") if isinstance(value, dict) else None
    if not isinstance(paragraphs, list) or not all(isinstance(p, dict) and "qas" in p for p in paragraphs):
        yield _checked(value)
        return
    for paragraph in paragraphs:
        for asked in paragraph["qas"] if isinstance(paragraph["qas"], list) else [None]:
            if not isinstance(asked, dict):
                yield Problem("broken JSON", "a paragraph whose qas are no list of objects; mend it")
                continue
            yield _checked({"title": value.get("title"), "context": paragraph.get("context"), **asked})


def _after(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return found.end() if found else place


def _whole(file: str, where: str, encoding: str) -> str:
    lines, total = [], 0
    for number, line in enumerate(_lines(file, where, encoding, MOST_LIST), 1):
        total += len(line)
        if total > MOST_LIST or line is TOO_LONG:
            raise DataError(
                f"{where}: {file}, line {number}: more than {MOST_LIST} characters that are no object on a line; write "
                f"an object on each line"
            )
        lines.append(line)
    return "".join(lines)
