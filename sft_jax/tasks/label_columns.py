"""From columns of rows to labels: one a row, or several; all is checked on the host before anything is compiled."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from datasets import ClassLabel

from sft_jax.data.columns import Growing
from sft_jax.data.rows import Bad, Rows
from sft_jax.data.structured import is_structured, read_structured
from sft_jax.errors import DataError, did_you_mean
from sft_jax.tasks.labels import MOST_SHOWN
from sft_jax.tasks.task import Targets

MANY = 20  # rows from which on it is a mistake that no two of them have the same label
BITS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}

Target = tuple[int, ...]  # 0 or 1 for each label


class LabelNumbers:
    """The numbers of the values that stand in a column: of names, of numbers, of what a `ClassLabel` stores."""

    def __init__(self, labels: Sequence[str], feature: Any, values: Iterable[Any] = ()):
        self.labels = labels
        self._by_name: dict[str, int] = {**{label.strip(): i for i, label in enumerate(labels)}}
        self._by_name |= {label: i for i, label in enumerate(labels)}
        # A number is the number of a label, unless labels are themselves called by numbers, or the column has names.
        called = any(label.lstrip("-").isdigit() for label in labels)
        named = any(isinstance(value, str) and value.strip() in self._by_name for value in values)
        self._by_number: Sequence[int] = range(0 if called or named else len(labels))
        if isinstance(feature, ClassLabel):  # which stores numbers of names of its own, never names
            same = set(feature.names) <= set(labels)
            self._by_number = [self._by_name[n] for n in feature.names] if same else range(len(labels))
            self._by_name = {}

    def of(self, value: Any) -> int | None:
        """The number of the label that a value stands for; None where there is no such label."""
        value = label_of(value)
        if type(value) is int and 0 <= value < len(self._by_number):
            return self._by_number[value]
        return None if value is None else self._by_name.get(str(value))  # no label is called "None" by a gap

    def expected(self, value: Any) -> str:
        """What should have stood in place of a value, for messages."""
        known = ", ".join(self.labels[:MOST_SHOWN]) + (", …" if len(self.labels) > MOST_SHOWN else "")
        numbers = f" or a number from 0 to {len(self._by_number) - 1}" if self._by_number else ""
        hint = did_you_mean(str(value), self.labels)
        return f"{hint}; expected one of the {len(self.labels)} labels ({known}){numbers}"


def label_of(value: Any) -> Any:
    """A value as a label is called by it: without blanks around it, a whole number as such; None for a gap."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, float):  # pandas writes 1.0 for 1 where other rows have a gap, and NaN for the gap
        return int(value) if value.is_integer() else None if math.isnan(value) else value
    return value


def read_one(rows: Rows, column: str, labels: Sequence[str]) -> Targets:
    """The number of the label of each row."""
    numbers = LabelNumbers(labels, rows.feature(column), chain.from_iterable(rows.blocks(column)))

    def bad(place: str, value: Any) -> Bad:
        if label_of(value) is None:
            return Bad(place, "no label", f"{column} is {_empty(value)}, expected a label")
        return Bad(place, "unknown label", f"{column} is {value!r:.60}{numbers.expected(value)}")

    return read_values(rows, column, numbers.of, bad)


def read_values(rows: Rows, column: str, of: Callable[[Any], Any], bad: Callable[[str, Any], Bad]) -> Targets:
    """What `of` makes of each value of a column; where that is None, `bad` says why of (place, value)."""
    found, refused, begin = Growing(), dict[int, Bad](), 0
    for block in rows.blocks(column):
        targets = [of(value) for value in block]
        found.add(targets)
        for number, target in enumerate(targets):
            if target is None:
                refused[begin + number] = bad(rows.place(begin + number), block[number])
        begin += len(block)
    return Targets(found.column(), refused)


def read_several(rows: Rows, column: str, separator: str, labels: Sequence[str]) -> Targets:
    """A 0 or 1 for each label of each row, from lists of labels or texts of labels that are joined."""
    values = rows.column(column)
    read = [_parts(value, separator) for value in values]
    lists = (parts for parts in read if isinstance(parts, list))
    numbers = LabelNumbers(labels, rows.feature(column), chain.from_iterable(lists))
    found: list[Target | None] = []
    bad: dict[int, Bad] = {}
    for row, (value, parts) in enumerate(zip(values, read, strict=True)):
        picked = [numbers.of(part) for part in parts] if isinstance(parts, list) else []
        where = rows.place(row)
        if not isinstance(parts, list):
            wanted = parts or f"expected a list of labels, or a text of labels joined by {separator!r}"
            bad[row] = Bad(where, "no labels", f"{column} is {value!r:.60}; {wanted}")
        elif None in picked:
            wrong = parts[picked.index(None)]
            bad[row] = Bad(where, "unknown label", f"{column} has {wrong!r:.60}{numbers.expected(wrong)}")
        elif len(set(picked)) < len(picked):  # 0 and 1 of each label, most likely, which would be read as two labels
            wanted = "expected each label once; zeros and ones of each label need columns of their own"
            bad[row] = Bad(where, "label twice", f"{column} is {value!r:.60}; {wanted}")
        found.append(None if row in bad else tuple(int(i in picked) for i in range(len(labels))))
    return Targets(found, bad)


def read_each(rows: Rows, column: str, labels: Sequence[str], counts: Sequence[int | None]) -> Targets:
    """The number of the label of each word of each row; `counts` are the words of each, None for none."""
    values = rows.texts(column)
    read = [split_at_blanks(value) for value in values]
    lists = (parts for parts in read if isinstance(parts, list))
    numbers = LabelNumbers(labels, rows.feature(column), chain.from_iterable(lists))
    found: list[Target | None] = []
    bad: dict[int, Bad] = {}
    for row, (value, parts, count) in enumerate(zip(values, read, counts, strict=True)):
        picked = [numbers.of(part) for part in parts] if isinstance(parts, list) else []
        where = rows.place(row)
        if isinstance(parts, str):
            bad[row] = Bad(where, "no tag for each word", f"{column} is {value!r:.60}; {parts}")
        elif not isinstance(parts, list) or (count is not None and len(parts) != count):
            said = f"{len(parts)} tags" if isinstance(parts, list) else repr(value)[:60]
            bad[row] = Bad(where, "no tag for each word", f"{column} has {said}, expected {count}, one for each word")
        elif None in picked:
            wrong = parts[picked.index(None)]
            bad[row] = Bad(where, "unknown label", f"{column} has {wrong!r:.60}{numbers.expected(wrong)}")
        found.append(None if row in bad or count is None else tuple(number for number in picked if number is not None))
    return Targets(found, bad)


def read_bits(rows: Rows, names: Sequence[str]) -> Targets:
    """A 0 or 1 for each label of each row, from a column for each label."""
    columns = [rows.column(name) for name in names]
    found = [tuple(BITS.get(str(value).strip().lower()) for value in values) for values in zip(*columns, strict=True)]
    bad: dict[int, Bad] = {}
    for row, bits in enumerate(found):
        if None in bits:
            number = bits.index(None)
            text = f"{names[number]} is {columns[number][row]!r:.60}, expected 0 or 1"
            bad[row] = Bad(rows.place(row), "unknown label", text)
    return Targets([None if row in bad else bits for row, bits in enumerate(found)], bad)


def names_of_one(train: Rows, column: str) -> tuple[str, ...]:
    """Names of the labels of a column; numbers keep their order, and 0..k need no gap.

    They are of the type that most rows have; what rows of another type are called is looked up among them.
    """
    feature = train.feature(column)
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    kinds, values = Counter[type](), dict[type, set[Any]]()
    for label in map(label_of, chain.from_iterable(train.blocks(column))):
        if label is None:
            continue
        kind = type(label)
        if not issubclass(kind, str | int) or (
            kind is str and label not in values.get(str, ()) and is_structured(label)
        ):
            raise DataError(
                f"{train.where}: column '{column}' holds values such as {label!r:.60}, "
                f"not labels; name another column in task.label"
            )
        kinds[kind] += 1
        values.setdefault(kind, set()).add(label)
    most = max(kinds, key=lambda kind: (kinds[kind], kind.__name__), default=str)
    labels = _in_order(values.get(most, set()))
    if len(labels) < 2:
        raise DataError(f"{train.where}: column '{column}' holds {len(labels)} label; classification needs two or more")
    if len(labels) == kinds.total() >= MANY:
        raise DataError(
            f"{train.where}: column '{column}' makes every row a class of its own, {len(labels)} in all; "
            f"name another column in task.label, or the classes in task.labels"
        )
    return labels


def names_of_several(train: Rows, column: str, separator: str) -> tuple[str, ...]:
    """Names of the labels of a column of lists, or of texts of labels that are joined."""
    feature = train.feature(column)
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    parts = _named(_parts(value, separator) for value in train.column(column))
    if not parts:
        raise DataError(
            f"{train.where}: column '{column}' holds no label; expected lists of labels, or texts of labels "
            f"joined by {separator!r}; name another column in task.label"
        )
    return _in_order(parts)


def names_of_each(train: Rows, column: str) -> tuple[str, ...]:
    """Names of the tags in a column of lists; `O`, which is no span, comes first."""
    feature = train.feature(column)
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    parts = _named(split_at_blanks(value) for value in train.texts(column))
    if len(parts) < 2:
        raise DataError(
            f"{train.where}: column '{column}' holds {len(parts)} tags; expected lists with a tag for each word, "
            f"of two kinds or more; name another column in task.tags"
        )
    names = _in_order(parts)
    return tuple(sorted(names, key=lambda name: name != "O"))


def split_at_blanks(value: Any) -> Any:
    """The list that a cell holds: itself, one that is written out, or the words of a text.

    A text in place of a list says what is wrong with one that is written out.
    """
    if not isinstance(value, str) or not is_structured(value):
        return value.split() if isinstance(value, str) else value
    return _written_out(value)


def _written_out(text: str) -> Any:
    try:
        found = read_structured(text)
    except ValueError as error:
        return f'a list that is written out: {error}; write it as JSON, such as ["a", "b"]'
    return found if isinstance(found, list) else None


def _named(lists: Iterable[Any]) -> set[Any]:
    """The labels that stand in lists; what is no label is left to be refused by row."""
    found = (label_of(part) for parts in lists if isinstance(parts, list) for part in parts)
    return {label for label in found if isinstance(label, str | int)}


def _in_order(values: set[Any]) -> tuple[str, ...]:
    ordered = sorted(values) if all(isinstance(v, int) for v in values) else sorted(map(str, values))
    return tuple(str(v) for v in ordered)


def _empty(value: Any) -> str:
    return "empty" if isinstance(value, str) else {None: "not there"}.get(value, "NaN")


def _parts(value: Any, separator: str) -> list[Any] | str | None:
    """The labels of a row, blanks around them taken off; None where there can be none, or a text that says why."""
    if isinstance(value, str):
        value = _written_out(value) if is_structured(value) else value.split(separator)
    value = label_of(value)
    if type(value) is int:
        value = [value]
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    trimmed = [part.strip() if isinstance(part, str) else part for part in value]
    return [part for part in trimmed if part != ""]
