"""From rows to the splits of a run: checked, cleaned, seeded, the same on every host, every decision counted.

The order, in which each step needs the ones before it:

1. Rows that cannot be used are named, or dropped (`bad_rows`), as many as may be (`most_bad`): all else needs texts
   and targets.
2. Texts are cleaned (`clean`), so that whatever compares texts compares what will be tokenised.
3. The first `max_rows` of what is left; of a mixture, the first of each part in turn.
4. Duplicates go within a split, then conflicts (equal texts, other target): once a text is there once only for each of
   its targets, all that is left of it is a conflict.
5. The splits that the source has not are cut from training rows (`split`). Distinct texts are divided and rows follow,
   so that no text stands on two sides, even where duplicates are kept.
6. Training rows whose texts stand in validation or test go (`leakage`); of what was cut there is none by then.
7. The rows of each class that are trained on are drawn (`per_class`), last, so that there are as many as asked for.

Knows no task: what rows are answered with, and what a split is stratified by, are functions handed in. Texts are told
apart by hashing, in time proportional to their number. Holds numpy only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sft_jax.config.data import Clean, DataSection, Split
from sft_jax.data.clean import RULES, clean
from sft_jax.data.columns import BLOCK, Growing, numbers, picked
from sft_jax.data.order import SPLIT, SUBSET, random_bits, sorting
from sft_jax.data.report import DataReport, SplitReport
from sft_jax.data.rows import MOST_SHOWN, Bad, Rows, plain
from sft_jax.data.sources import SPLITS
from sft_jax.errors import ConfigError, DataError, listing

Indices = np.ndarray  # int64, rows of the source in the source's order
Which = np.ndarray  # bool, by row
Texts = tuple[Sequence[Any], ...]  # columns of texts, or of tuples of words; hashable
Read = Callable[[Rows], tuple[Texts, dict[int, Bad]]]  # -> (columns, what is wrong with the rows that lack one)
SHOWN_CHARS = 80  # of a text in the report


@dataclass(frozen=True)
class Prepared:
    """The rows of one split that are used, their texts as they will be tokenised, and their targets."""

    rows: Rows
    texts: Texts
    targets: Sequence[Any]
    numbers: Indices  # of these rows in their source

    def __len__(self) -> int:
        return len(self.targets)


@dataclass
class _Split:
    """A split on its way: the rows that are left of it, and what was decided so far."""

    source: Rows
    rows: Indices  # of the source, those that are left
    texts: Texts
    targets: Sequence[Any]
    read: int
    text: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # numbers of texts, the same in all splits
    answer: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # numbers of targets
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def find(self, kind: str, which: Which, *, drop: bool, show: bool = True) -> None:
        """Count rows, show some of them, and drop them if so decided."""
        found = np.flatnonzero(which).tolist()
        self.found[kind] = len(found)
        if not found:
            return
        if show:
            self.examples[kind] = [
                f"{self.source.place(self.rows[row])}: {plain(self.texts[0][row])[:SHOWN_CHARS]!r}"
                for row in found[:MOST_SHOWN]
            ]
        if drop:
            self.dropped[kind] = len(found)
            self.keep(np.flatnonzero(~which))

    def refuse(self, bad: Bad) -> None:
        """Count a row that cannot be used, and show it if it is one of the first of its kind."""
        self.dropped[bad.reason] = self.dropped.get(bad.reason, 0) + 1
        if self.dropped[bad.reason] <= MOST_SHOWN:
            self.examples.setdefault(bad.reason, []).append(f"{bad.place}: {bad.text}")

    def keep(self, left: Indices) -> None:
        """Go on with these of the rows that are left."""
        self.rows, self.targets = self.rows[left], picked(self.targets, left)
        self.texts = tuple(picked(column, left) for column in self.texts)
        if len(self.text):
            self.text, self.answer = self.text[left], self.answer[left]

    def prepared(self) -> Prepared:
        """The rows that are left."""
        return Prepared(self.source.select(self.rows), self.texts, self.targets, self.rows)

    def report(self, labels: dict[str, int | float]) -> SplitReport:
        """What became of the rows."""
        return SplitReport(
            read=self.read,
            used=len(self.rows),
            cut=self.cut,
            dropped=self.dropped,
            duplicates=self.found["duplicate"],
            conflicts=self.found["conflict"],
            leaked=self.found.get("leaked", 0),
            labels=labels,
            examples=self.examples,
        )


def prepare(
    rows: Mapping[str, Rows],
    section: DataSection,
    read: Read,
    targets: Callable[[Rows], Any],  # -> what has `values` and `bad`, by row
    classes: Callable[[Sequence[Any]], Sequence[int]],  # of targets
    label_counts: Callable[[Sequence[Any]], dict[str, int | float]],  # of targets, for the report
    seed: int,
) -> tuple[dict[str, Prepared], DataReport]:
    """(the splits of a run, what became of their rows); raises DataError for rows that cannot be used."""
    wanted = [name for name in ("validation", "test") if getattr(section.split, name)]
    for name in wanted:
        if name in rows:
            raise ConfigError(f"data.split.{name}: the source has a split of its own; drop one of the two")
    found = _usable(rows, read, targets, section)
    for split in found.values():
        _clean(split, section.clean)
        if section.max_rows:
            split.find("beyond max_rows", _beyond(split, section.max_rows), drop=True, show=False)
    _number(found)
    for name, split in found.items():
        split.find("duplicate", _duplicates(split), drop=section.duplicates == "drop")
        split.find("conflict", _conflicts(split), drop=section.conflicts == "drop" and name == "train")
        _some_left(split)
    train = found["train"]
    if wanted:
        found |= _cut(train, classes(train.targets), section.split, seed)
    held_out = [split.text for name, split in found.items() if name != "train"]
    leaked = np.isin(train.text, np.concatenate([*held_out, train.text[:0]]))
    train.find("leaked", leaked, drop=section.leakage == "drop")
    _some_left(train)
    if section.per_class:
        drawn = draw(classes(train.targets), section.per_class, seed)
        train.find("not drawn", ~np.isin(np.arange(len(train.rows)), drawn), drop=True, show=False)
    found = {name: found[name] for name in SPLITS if name in found}
    report = {name: split.report(label_counts(split.targets)) for name, split in found.items()}
    notes = [f"{given.where}: {note}" for given in rows.values() for note in given.notes]
    return {name: split.prepared() for name, split in found.items()}, DataReport(report, notes)


def read_texts(rows: Rows, names: Sequence[str]) -> tuple[Texts, dict[int, Bad]]:
    """(columns of texts, what is wrong with the rows that lack one)."""
    columns = tuple(Growing() for _ in names)
    bad: dict[int, Bad] = {}
    for name, column in zip(names, columns, strict=True):
        begin = 0
        for block in rows.blocks(name, texts=True):
            for row, text in enumerate(block, begin):
                if not isinstance(text, str) or not text.strip():
                    bad[row] = Bad(rows.place(row), "no text", f"{name} is {text!r:.60}, expected a text")
            column.add([text if isinstance(text, str) else None for text in block])
            begin += len(block)
    return tuple(column.column() for column in columns), bad


def cut(classes: Sequence[int], shares: Split, seed: int, firsts: Indices | None = None) -> dict[str, Indices]:
    """Disjoint rows for `train`, `validation` and `test`, each class divided in the same shares.

    A split of share 0 is left out. Rounding is by class to the nearest row, so that a class of n rows gives
    round(n * share), but every class leaves a row to train on. With `firsts`, the first of the rows that are alike,
    only these are divided; the others go where their first one goes.
    """
    order = sorting(random_bits(seed, SPLIT, len(classes)))
    firsts = np.arange(len(classes)) if firsts is None else firsts
    order = order[firsts[order] == order]
    kinds = np.asarray(classes)[order]
    side = np.zeros(len(classes), np.int64)  # of the first ones; all others follow
    for kind in np.unique(kinds):
        rows, begin = order[kinds == kind], 0
        for number in (2, 1):  # the test rows first: what a seed means must stay
            end = min(begin + round(len(rows) * getattr(shares, SPLITS[number])), len(rows) - 1)
            side[rows[begin:end]] = number
            begin = end
    result = {name: np.flatnonzero(side[firsts] == number) for number, name in enumerate(SPLITS)}
    for name in SPLITS[:0:-1]:
        share = getattr(shares, name)
        if share and not len(result[name]):
            raise DataError(f"data.split.{name}: {share} of {len(classes)} rows is no row; {_more(classes, share)}")
    return {name: rows for name, rows in result.items() if len(rows)}


def _more(classes: Sequence[int], share: float) -> str:
    """What to do where a share comes to no row of any class."""
    count = len(set(classes))
    if round(len(classes) * share) < 1:
        return "give a larger share"
    return f"there are {count} classes, and none has enough for one; give a larger share, or check the column of labels"


def draw(classes: Sequence[int], count: int, seed: int) -> Indices:
    """`count` rows of each class, or all where there are fewer; a smaller count draws some of those of a larger."""
    order = sorting(random_bits(seed, SUBSET, len(classes)))
    kinds = np.asarray(classes)[order]
    return np.sort(np.concatenate([order[kinds == kind][:count] for kind in np.unique(kinds)]))


def _usable(
    rows: Mapping[str, Rows], read: Read, targets: Callable[[Rows], Any], section: DataSection
) -> dict[str, _Split]:
    """The rows that have texts and a target; the others are refused, those of all splits together, or counted."""
    found: dict[str, _Split] = {}
    problems: list[str] = []
    worst = 0.0  # share of the rows of a split that cannot be used
    drop = section.bad_rows == "drop"
    for name, given in rows.items():
        columns, without_text = read(given)
        answered = targets(given)
        by_row = answered.bad | without_text
        bad = [*given.bad, *(by_row[row] for row in sorted(by_row))]
        split = _Split(given, np.arange(len(given)), columns, answered.values, len(given) + len(given.bad))
        for one in bad:
            split.refuse(one)
        if by_row:
            split.keep(np.setdiff1d(split.rows, list(by_row)))
        if not drop and bad:
            problems.append(_said(given.where, bad))
        elif len(bad) > section.most_bad * split.read:
            reasons = sorted(split.dropped.items(), key=lambda pair: -pair[1])[:MOST_SHOWN]
            why = ", ".join(f"{reason}: {count}" for reason, count in reasons)
            problems.append(_said(f"{given.where}: {len(bad)} of {split.read} rows cannot be used ({why})", bad))
        worst = max(worst, len(bad) / max(split.read, 1))
        found[name] = split
    if problems:
        raise DataError("\n".join([*problems, _remedy(worst, section, drop)]))
    for split in found.values():
        _some_left(split)
    return found


def _remedy(worst: float, section: DataSection, drop: bool) -> str:
    """What to do about bad rows; many of them are left out only for those who ask for it."""
    share = math.ceil(worst * 100) / 100
    if drop:
        return f"more than data.most_bad={section.most_bad:g}; check columns and files, or set data.most_bad={share:g}"
    more = f" data.most_bad={share:g}" if worst > section.most_bad else ""
    return f"mend the rows, or leave them out with data.bad_rows=drop{more}"


def _said(where: str, bad: Sequence[Bad]) -> str:
    shown = [f"{b.place}: {b.text}" for b in bad[:MOST_SHOWN]]
    return listing(where, shown, more=len(bad) - len(shown))


def _clean(split: _Split, rules: Clean) -> None:
    """Clean the texts of a split, and drop the rows that are then too short or too long."""
    split.texts = tuple(_cleaned(column, rules) for column in split.texts)
    sizes = np.array([_lengths(column) for column in split.texts])
    short = np.any(sizes < rules.min_chars, axis=0)
    split.find("too short", short, drop=True)
    if rules.max_chars:
        split.find("too long", np.any(sizes[:, ~short] > rules.max_chars, axis=0), drop=True)


def _cleaned(column: Sequence[Any], rules: Clean) -> Sequence[Any]:
    if not any(getattr(rules, rule) for rule in RULES):
        return column
    found = Growing()
    for begin in range(0, len(column), BLOCK):
        found.add(clean(column[begin : begin + BLOCK], rules))
    return found.column()


def _lengths(column: Sequence[Any]) -> np.ndarray:
    """The characters of each text, but for blanks around it."""
    return np.fromiter((len(plain(text).strip()) for text in column), np.int64, len(column))


def _beyond(split: _Split, count: int) -> Which:
    """All but the first rows; of a mixture, all but the first of each part in turn."""
    part, place = split.source.part, np.arange(len(split.rows))
    if part is not None:
        for number in np.unique(part):
            own = np.flatnonzero(part[split.rows] == number)
            place[own] = np.arange(len(own))
    beyond = np.ones(len(place), bool)
    beyond[np.argsort(place, kind="stable")[:count]] = False
    return beyond


def _number(found: Mapping[str, _Split]) -> None:
    """Give equal texts one number in all splits, and equal targets."""
    texts = numbers([split.texts for split in found.values()])
    answers = numbers([(split.targets,) for split in found.values()])
    for split, text, answer in zip(found.values(), texts, answers, strict=True):
        split.text, split.answer = text, answer


def _duplicates(split: _Split) -> Which:
    """Rows whose texts and target stand earlier in the split."""
    again = np.ones(len(split.text), bool)
    again[np.unique(_answered(split), return_index=True)[1]] = False
    return again


def _conflicts(split: _Split) -> Which:
    """Rows whose texts stand in the split with another target."""
    texts = np.unique(_answered(split)) // (1 + split.answer.max(initial=0))
    return np.isin(split.text, texts[1:][np.diff(texts) == 0])


def _answered(split: _Split) -> np.ndarray:
    """A number for each text with its target."""
    return split.text * (1 + split.answer.max(initial=0)) + split.answer


def _cut(train: _Split, classes: Sequence[int], shares: Split, seed: int) -> dict[str, _Split]:
    """The splits that are cut from training rows, which go on without them."""
    _, first, which = np.unique(train.text, return_index=True, return_inverse=True)
    parts = cut(classes, shares, seed, first[which])
    found: dict[str, _Split] = {}
    for name, rows in parts.items():
        if name != "train":
            split = replace(train, read=len(rows), dropped={}, found={}, examples={})
            split.keep(rows)
            split.find("duplicate", _duplicates(split), drop=False)
            split.find("conflict", _conflicts(split), drop=False)
            found[name] = split
    train.cut = sum(len(split.rows) for split in found.values())
    train.keep(parts["train"])
    return found


def _some_left(split: _Split) -> None:
    if not len(split.rows):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in split.dropped.items())
        raise DataError(
            f"{split.source.where}: of {split.read} rows none is left ({reasons or 'there was none'}); "
            f"give others, or drop fewer"
        )
