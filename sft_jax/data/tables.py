"""CSV, TSV, JSON lines, CoNLL and text as rows: records gathered in blocks, and stored as they are.

Every record is a row or a `Bad`. The cells of CSV are kept as texts, and may be numbers where the whole column is;
values of JSON are what they are, whatever stands in other rows. Knows no task.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from sft_jax.data.cells import Cells
from sft_jax.data.gather import Gathered, blocks, shown
from sft_jax.data.records import UTF8, Problem, conll_records, csv_records, json_records, text_records
from sft_jax.data.rows import Rows
from sft_jax.data.store import Store
from sft_jax.errors import DataError

OTHERS = (";", "\t", "|", ",")  # what separates the cells of files that are not separated as their ending says
MOST_COLUMNS = 1000  # keys of all objects of a JSON file together


def read_csv(
    files: Sequence[str], where: str, encoding: str = UTF8, delimiter: str | None = None, usual: str = ","
) -> Rows:
    """The rows of files that have the same columns; the first line of each names them."""
    header: list[str] = []
    found, twice = _gathered(files, where), dict[str, str]()

    def records(number: int, file: str) -> Iterator[tuple[int, Any]]:
        lines = csv_records(file, where, delimiter or usual, encoding)
        names = _header(next(lines, None), file, where)
        if delimiter is None:
            _check_separated(names, file, where)
        kept = _named_once(names, file, found, twice)
        columns = [names[i] for i in kept]
        header.extend(() if header else columns)
        if sorted(columns) != sorted(header):
            raise DataError(
                f"{where}: {files[0]} has the columns {', '.join(header)}, {file} has {', '.join(columns)}; "
                f"give files of the same columns"
            )
        order = [names.index(name) for name in header]
        plain = order == list(range(len(names)))
        for line, cells in lines:
            if isinstance(cells, Problem):
                yield line, cells
            elif len(cells) != len(names):
                yield line, Problem("wrong number of cells", f"cells: {len(cells)}, expected {len(names)} as in line 1")
            else:
                yield line, cells if plain else [cells[i] for i in order]

    store, kinds = Store(where), dict[str, Cells]()
    for block in blocks(files, records, found):
        columns = dict(zip(header, zip(*block, strict=True), strict=True))
        store.add(columns)
        for name, cells in columns.items():
            kinds.setdefault(name, Cells()).add(cells)
    table = store.table() if kinds else pa.table({name: pa.array([], pa.string()) for name in header})
    cells = {name: kind.kind for name, kind in kinds.items() if name not in twice}
    return found.rows(table, cells=cells, unfit=twice)


def read_json(files: Sequence[str], where: str, encoding: str = UTF8) -> Rows:
    """The rows of files of objects (`json_records`); a column that an object lacks is None there."""
    found, store, beyond = _gathered(files, where), Store(where), dict[str, str]()

    def records(number: int, file: str) -> Iterator[tuple[int, Any]]:
        def numbered() -> None:
            found.files[number] = f"{found.files[number].removesuffix('line')}row"

        return json_records(file, where, encoding, numbered)

    for block in blocks(files, records, found):
        names = dict.fromkeys(name for record in block for name in record)
        new = [name for name in names if name not in store.forms]
        for name in new[max(0, MOST_COLUMNS - len(store.forms)) :]:
            if len(beyond) < MOST_COLUMNS:
                beyond[name] = f"column '{name}' is beyond the first {MOST_COLUMNS} columns; give objects of fewer"
            del names[name]
        store.add({name: [record.get(name) for record in block] for name in names})
    if beyond:
        found.note(f"{shown(files)[0]}: more than {MOST_COLUMNS} columns, such as '{next(iter(beyond))}', are left out")
    written = frozenset(name for name, form in store.forms.items() if form.written)
    return found.rows(store.table(), written=written, unfit=beyond)


def read_lines(files: Sequence[str], where: str, encoding: str = UTF8) -> Rows:
    """A row for each line, with the one column `text`."""
    found, store = _gathered(files, where), Store(where)
    for block in blocks(files, lambda number, file: text_records(file, where, encoding), found):
        store.add({"text": block})
    return found.rows(store.table())


def read_conll(files: Sequence[str], where: str, encoding: str = UTF8) -> Rows:
    """A row for each sentence: its words in the column `tokens`, their tags in the column `tags`."""
    found, store = _gathered(files, where), Store(where)
    for block in blocks(files, lambda number, file: conll_records(file, where, encoding), found):
        if not store.forms:
            _check_words([words for words, _ in block], files[0], where)
        store.add(dict(zip(("tokens", "tags"), zip(*block, strict=True), strict=True)))
    return found.rows(store.table())


def _gathered(files: Sequence[str], where: str) -> Gathered:
    return Gathered(where, [f"{name}, line" for name in shown(files)])


def _header(first: tuple[int, Any] | None, file: str, where: str) -> list[str]:
    if first is None:
        raise DataError(f"{where}: {file} is empty; its first line names the columns")
    line, names = first
    if isinstance(names, Problem):
        raise DataError(f"{where}: {file}, line {line}: {names.text}; this line names the columns")
    if not any(map(str.strip, names)):
        raise DataError(f"{where}: {file}, line {line}: names no column; give each column a name")
    return [name.strip() for name in names]


def _check_separated(names: list[str], file: str, where: str) -> None:
    """A header of one name that holds another mark between names is of a file that is separated by that mark."""
    marks = [mark for mark in OTHERS if mark in names[0]] if len(names) == 1 else []
    for mark in marks:
        if all(part.strip() for part in names[0].split(mark)):
            shown = {"\t": "tab"}.get(mark, mark)
            raise DataError(
                f"{where}: {file}, line 1: names one column, {names[0]!r:.60}; the file is separated by {mark!r}: "
                f"set data.source.delimiter='{shown}'"
            )


def _check_words(sentences: list[list[str]], file: str, where: str) -> None:
    """The first column of CoNLL-U are numbers, that of CoNLL-2012 the name of a document: neither holds words."""
    long = [words for words in sentences if len(words) > 2]
    numbered = all(words[:3] == ["1", "2", "3"] for words in long)
    named = all(len(set(words)) == 1 for words in long) and any("/" in words[0] for words in long)
    if long and (numbered or named):
        raise DataError(
            f"{where}: {file} has {'numbers' if numbered else 'names of documents'} in its first column, such as "
            f"{long[0][0]!r:.40}; write files with the word first and its tag last"
        )


def _named_once(names: list[str], file: str, found: Gathered, twice: dict[str, str]) -> list[int]:
    """Places of the columns that have a name of their own; others are left out, which is said."""
    kept = []
    for i, name in enumerate(names):
        if not name:
            index = ", as of an index that pandas writes" if i == 0 else ""
            found.note(f"{file}: column {i + 1} has no name{index}, and is left out")
        elif name in names[:i]:
            twice[name] = f"column '{name}' stands twice in {file}, line 1; give each column a name of its own"
            found.note(f"{file}: column {i + 1} is called '{name}' too, and is left out")
        else:
            kept.append(i)
    return kept
