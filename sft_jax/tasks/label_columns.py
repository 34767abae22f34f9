"""From columns of rows to labels: one a row, or several; all is checked on the host before anything is compiled."""

from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel

from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import DataError, did_you_mean
from sft_jax.tasks.labels import MOST_SHOWN
from sft_jax.tasks.task import Targets

BITS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}

Target = tuple[int, ...]  # 0 or 1 for each label


class LabelNumbers:
    """The numbers of the values that stand in a column: of names, of numbers, of what a `ClassLabel` stores."""

    def __init__(self, labels: Sequence[str], feature: Any):
        self.labels = labels
        self._by_name: dict[str, int] = {label: i for i, label in enumerate(labels)}
        # A number is the number of a label, unless the labels are themselves called by numbers.
        called = any(label.lstrip("-").isdigit() for label in labels)
        self._by_number: Sequence[int] = range(0 if called else len(labels))
        if isinstance(feature, ClassLabel):  # which stores numbers of names of its own, never names
            same = set(feature.names) <= set(labels)
            self._by_number = [self._by_name[n] for n in feature.names] if same else range(len(labels))
            self._by_name = {}

    def of(self, value: Any) -> int | None:
        """The number of the label that a value stands for; None where there is no such label."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and 0 <= value < len(self._by_number):
            return self._by_number[value]
        return None if value is None else self._by_name.get(str(value))  # no label is called "None" by a gap

    def expected(self, value: Any) -> str:
        """What should have stood in place of a value, for messages."""
        known = ", ".join(self.labels[:MOST_SHOWN]) + (", …" if len(self.labels) > MOST_SHOWN else "")
        numbers = f" or a number from 0 to {len(self._by_number) - 1}" if self._by_number else ""
        hint = did_you_mean(str(value), self.labels)
        return f"{hint}; expected one of the {len(self.labels)} labels ({known}){numbers}"


def read_one(rows: Rows, column: str, labels: Sequence[str]) -> Targets:
    """The number of the label of each row."""
    values = rows.column(column)
    numbers = LabelNumbers(labels, rows.table.features[column])
    found = [numbers.of(value) for value in values]

    def bad(row: int) -> Bad:
        text = f"{column} is {values[row]!r:.60}{numbers.expected(values[row])}"
        return Bad(rows.place(row), "unknown label", text)

    return Targets(found, {row: bad(row) for row, number in enumerate(found) if number is None})


def read_several(rows: Rows, column: str, separator: str, labels: Sequence[str]) -> Targets:
    """A 0 or 1 for each label of each row, from lists of labels or texts of labels that are joined."""
    values = rows.column(column)
    numbers = LabelNumbers(labels, _feature(rows, column))
    found: list[Target | None] = []
    bad: dict[int, Bad] = {}
    for row, value in enumerate(values):
        parts = _parts(value, separator)
        picked = [numbers.of(part) for part in parts or ()]
        where = rows.place(row)
        if parts is None:
            wanted = f"expected a list of labels, or a text of labels joined by {separator!r}"
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
    values, numbers = rows.column(column), LabelNumbers(labels, _feature(rows, column))
    found: list[Target | None] = []
    bad: dict[int, Bad] = {}
    for row, (value, count) in enumerate(zip(values, counts, strict=True)):
        parts = value.split() if isinstance(value, str) else value
        picked = [numbers.of(part) for part in parts] if isinstance(parts, list) else []
        where = rows.place(row)
        if not isinstance(parts, list) or (count is not None and len(parts) != count):
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
    """Names of the labels of a column; numbers keep their order, and 0..k need no gap."""
    values = train.column(column)
    feature = train.table.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    odd = [v for v in values if isinstance(v, float | list | dict) and v == v]  # NaN, a gap, is not itself
    if odd:
        raise DataError(
            f"data.source.train: column '{column}' holds values such as {odd[0]!r:.60}, "
            f"not labels; name another column in task.label"
        )
    labels = _in_order({v for v in values if v is not None and v == v})
    if len(labels) < 2:
        raise DataError(
            f"data.source.train: column '{column}' holds {len(labels)} label; classification needs two or more"
        )
    return labels


def names_of_several(train: Rows, column: str, separator: str) -> tuple[str, ...]:
    """Names of the labels of a column of lists, or of texts of labels that are joined."""
    values, feature = train.column(column), _feature(train, column)
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    lists = [_parts(value, separator) or [] for value in values]
    parts = {part for found in lists for part in found if isinstance(part, str | int)}
    if not parts:
        raise DataError(
            f"data.source.train: column '{column}' holds no label; expected lists of labels, or texts of labels "
            f"joined by {separator!r}; name another column in task.label"
        )
    return _in_order(parts)


def names_of_each(train: Rows, column: str) -> tuple[str, ...]:
    """Names of the tags in a column of lists; `O`, which is no span, comes first."""
    feature = _feature(train, column)
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    lists = (value.split() if isinstance(value, str) else value for value in train.column(column))
    parts = {part for found in lists if isinstance(found, list) for part in found if isinstance(part, str | int)}
    if len(parts) < 2:
        raise DataError(
            f"data.source.train: column '{column}' holds {len(parts)} tags; expected lists with a tag for each word, "
            f"of two kinds or more; name another column in task.tags"
        )
    names = _in_order(parts)
    return tuple(sorted(names, key=lambda name: name != "O"))


def _in_order(values: set[Any]) -> tuple[str, ...]:
    ordered = sorted(values) if all(isinstance(v, int) for v in values) else sorted(map(str, values))
    return tuple(str(v) for v in ordered)


def _feature(rows: Rows, column: str) -> Any:
    """The type of the labels in a column, of which there may be a list in each row."""
    feature = rows.table.features[column]
    return getattr(feature, "feature", feature)


def _parts(value: Any, separator: str) -> list[Any] | None:
    """The labels of a row, blanks around them taken off; None where there can be none."""
    if isinstance(value, str):
        value = value.split(separator)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list):
        return None
    trimmed = [part.strip() if isinstance(part, str) else part for part in value]
    return [part for part in trimmed if part != ""]
