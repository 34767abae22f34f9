"""A record for each record of the input, in its order, whatever becomes of it: what all that answers rows shares."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, overload

from sft_jax.data.rows import Bad, Rows, refuse
from sft_jax.errors import ConfigError, DataError, did_you_mean
from sft_jax.infer.inputs import Window, given, placed
from sft_jax.tasks.task import Record, Task

BadRows = Literal["error", "keep", "drop"]
ALL = "all"  # of `keep`: every column
TRUNCATED = "truncated"
# What records have of their own; a column of the input that is called so is kept as `input.NAME`.
FIELDS = frozenset(
    {"id", "file", "line", "row", "error", "truncated", "truth", "logits"}  # of any task
    | {"label", "labels", "scores", "score", "words", "tags", "entities"}
    | {"answer", "start", "end", "n_best", "tokens", "stopped", "loss", "perplexity"}
)


@dataclass
class Counted:
    """What became of the records of an input; grows while they are answered."""

    records: int = 0
    truncated: int = 0
    bad: int = 0
    first: list[Bad] = field(default_factory=list)  # of these
    notes: dict[str, None] = field(default_factory=dict)  # what should be known of the input besides

    def refuse(self, bad: Bad) -> None:
        """Count what cannot be answered."""
        self.bad += 1
        if len(self.first) < 5:
            self.first.append(bad)


class Answers(ABC):
    """A loaded model: rows in, records out."""

    task: Task
    columns: Mapping[str, str]  # what columns of the input stand for others

    @property
    @abstractmethod
    def longest(self) -> int:
        """The most tokens that are read of a row."""

    @abstractmethod
    def answered(self, rows: Rows, batch_size: int, *, raw: bool, score: bool, first: int) -> list[Record | Bad]:
        """The record of each row, or why it has none; the input has `first` records before them."""

    @abstractmethod
    def read(self, rows: Rows) -> dict[int, Bad]:
        """What is wrong with rows, of those with which something is; nothing is computed."""

    @overload
    def __call__(self, rows: str | Mapping[str, Any], batch_size: int = 32, **how: Any) -> Record: ...

    @overload
    def __call__(self, rows: Any, batch_size: int = 32, **how: Any) -> Iterator[Record]: ...

    def __call__(self, rows: Any, batch_size: int = 32, **how: Any) -> Record | Iterator[Record]:
        """The record of a row, or a record for each of several, in order, with its `id` where it has one.

        One row is a text, a dict of its columns, the messages of one conversation, or an image. Several are a list or
        an iterator of such, of tuples for models of two texts, a DataFrame, a Series, a `datasets.Dataset`, an array of
        texts, or `Rows`. How: `raw` adds the logits of each document at full precision; `score` says of a model that
        answers in words how likely it finds the texts. `bad_rows` is `error`, which raises a DataError before anything
        is answered (of an iterator, before its window is), `keep`, which gives a record with `error` in place, or
        `drop`. `keep` names columns that records carry on, or is "all".
        """
        found, alone = given(self.task, rows)
        records = self.stream(found if hasattr(rows, "__next__") else [*found], batch_size, **how)
        return next(records) if alone else records

    def stream(
        self,
        windows: Iterable[Window],
        batch_size: int = 32,
        *,
        raw: bool = False,
        score: bool = False,
        bad_rows: BadRows = "error",
        keep: Sequence[str] | Literal["all"] = (),
        counted: Counted | None = None,
    ) -> Iterator[Record]:
        """The same of windows of rows; `counted` is told what became of them."""
        if bad_rows not in get_args(BadRows):
            raise ConfigError(f"bad_rows: expected error, keep or drop, got {bad_rows!r:.40}")
        counted, first = counted or Counted(), 0
        if bad_rows == "error" and isinstance(windows, Sequence):
            refuse(windows[0].rows.where if windows else "", [bad for window in windows for bad in self._bad(window)])
        for number, window in enumerate(windows):
            rows = window.rows
            counted.notes |= dict.fromkeys(rows.notes)
            if not number and len(rows):
                self._has_columns(rows)
            answers = self.answered(rows, batch_size, raw=raw, score=score, first=first) if len(rows) else []
            names, kept = self._named(rows), self._kept(rows, keep)
            if bad_rows == "error":
                found = [answers[entry] if isinstance(entry, int) else entry for entry in window.order]
                refuse(rows.where, [bad for bad in found if isinstance(bad, Bad)])
            for entry in window.order:
                answer, carried = (
                    (answers[entry], {**names[entry], **kept[entry]}) if isinstance(entry, int) else (entry, {})
                )
                counted.records += 1
                if isinstance(answer, Bad):
                    counted.refuse(answer)
                    if bad_rows == "drop":
                        continue
                    place = placed(answer, several=len(rows.files) > 1)
                    answer = {**place, "error": f"{answer.reason}: {answer.text}"}
                counted.truncated += TRUNCATED in answer
                yield {**carried, **answer}
            first += len(window.order)

    def _bad(self, window: Window) -> list[Bad]:
        """What cannot be answered of a window, in order."""
        if len(window.rows):
            self._has_columns(window.rows)
        bad = self.read(window.rows) if len(window.rows) else {}
        found = [bad.get(entry) if isinstance(entry, int) else entry for entry in window.order]
        return [one for one in found if one]

    def _has_columns(self, rows: Rows) -> None:
        """Raise DataError where the rows lack a column that the model reads, with the way to name another one."""
        for name in self.task.texts:
            if name not in rows.names and name.partition(".")[0] not in rows.names:
                there = ", ".join(rows.names)
                raise DataError(
                    f"{rows.where}: no column '{name}'; the rows have: {there}; if another one stands for it, say so: "
                    f"--columns {name}=OTHER"
                )

    def _named(self, rows: Rows) -> list[Record]:
        """What a record says of its row, so that it can be told apart: its `id`, where there is such a column."""
        column = self.columns.get("id", "id")
        if column not in rows.names:
            if "id" in self.columns and len(rows):
                rows.column(column)  # says what there is
            return [{}] * len(rows)
        return [{"id": name} if isinstance(name, str | int) else {} for name in rows.column(column)]

    def _kept(self, rows: Rows, keep: Sequence[str] | Literal["all"]) -> list[Record]:
        """The columns of rows that records carry on."""
        if not keep or not len(rows):
            return [{}] * len(rows)
        names = rows.names if keep == ALL else keep
        columns: dict[str, list[Any]] = {}
        for name in names:
            if name not in rows.names:
                known = ", ".join(rows.names)
                raise ConfigError(f"keep: no column '{name}'{did_you_mean(name, rows.names)} (there are: {known})")
            if name != self.columns.get("id", "id"):
                columns[f"input.{name}" if name in FIELDS else name] = [carried(value) for value in rows.column(name)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] or [
            {}
        ] * len(rows)


def carried(value: Any) -> Any:
    """A value of a row as a record can have it: of an encoded image its path, of a date its text."""
    if isinstance(value, Mapping):
        if value.keys() == {"bytes", "path"}:
            return value["path"]
        return {str(name): carried(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [carried(one) for one in value]
    if isinstance(value, float) and value != value:
        return None  # JSON has no such number
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return None if isinstance(value, bytes) else str(value)
