"""Where the wall time of a run went, over all its attempts: `ledger.jsonl`, and the account that is made of it.

Every moment of a process belongs to one part, so that the parts add up to the wall by construction. A line is written
at the end of each interval and after each save, so a process that is killed takes one interval with it at most; that
time then counts as `down`. Steps run ahead of the host: the time of a step is what is left of the loop's own. Knows no
step, no batch and no device, and waits for none.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from sft_jax.errors import RunError

# In the order in which they are shown. The last two are of no process: steps that a later attempt had to do again, and
# the time between attempts.
PARTS = {
    "start": "from the beginning of the process to the loop: imports, rows, tokens, weights",
    "compile": "compiling",
    "wait": "waiting for batches",
    "step": "training steps that were kept",
    "evaluation": "validation",
    "checkpoint": "saving, as far as the loop had to wait for it",
    "finish": "test, export and reports",
    "lost": "steps of an attempt that a later one had to do again",
    "down": "between two attempts",
}
LOOP = ("wait", "step", "evaluation", "checkpoint")  # what is lost with the steps of an interval
FILE = "ledger.jsonl"
EVENTS = ("begin", "loop", "steps", "end")
Item = TypeVar("Item")
Event = Mapping[str, Any]  # event, at (seconds since 1970), step, seconds by part since the line before


class Ledger:
    """The clock of one attempt; `with ledger("compile"):` says what the time inside is for."""

    def __init__(self, file: Path | None, began: float, clock: Callable[[], float] = time.time):
        """`began` is when the process did, as `time.time()`; without a file nothing is written."""
        self._file, self._clock = file, clock
        self._parts, self._seconds = ["start"], dict[str, float]()
        self.waiting = 0.0  # seconds that this attempt has waited for batches
        text = file.read_text(encoding="utf-8", errors="replace") if file is not None and file.is_file() else ""
        events = read_events(text)
        # An attempt in a process as old as the attempt before goes on where that one ended.
        self._last = max([began, *(event["at"] for event in events[-1:])])
        self.step = max([0, *(event.get("step", 0) for event in events[-1:])])  # taken so far, by all attempts
        self._torn = bool(text) and not text.endswith("\n")  # a process was killed as it wrote
        self._write("begin", at=self._last, step=self.step, seconds={})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self._note("end", why="done" if kind is None else kind.__name__)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """What happens inside belongs to this part; the time of a part inside of another is the inner one's."""
        self._charge()
        self._parts.append(part)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def begin_loop(self, step: int) -> None:
        """From here on time is that of steps; `step` of them stand already."""
        self._charge()
        self._parts, self.step = ["step"], step
        self._note("loop")

    def end_loop(self) -> None:
        """From here on time is that of the test and what follows it."""
        self._charge()
        self._parts = ["finish"]

    def waited(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time until each comes is that of `wait`."""
        waiting = iter(items)
        while True:
            with self("wait"):
                begun = self._clock()
                found = next(waiting, self)
                self.waiting += self._clock() - begun
            if found is self:
                return
            yield found  # type: ignore[misc]

    def write(self) -> None:
        """Put down what the time since the last line was for, and how many steps have been taken."""
        self._charge()
        self._note("steps")

    def _charge(self) -> None:
        now = self._clock()
        part = self._parts[-1]
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def _note(self, event: str, **more: Any) -> None:
        self._charge()
        seconds, self._seconds = self._seconds, {}
        rounded = {part: round(spent, 6) for part, spent in seconds.items()}
        self._write(event, at=self._last, step=self.step, seconds=rounded, **more)

    def _write(self, event: str, **values: Any) -> None:
        if self._file is not None:
            with open(self._file, "a", encoding="utf-8") as sink:
                sink.write("\n" * self._torn + json.dumps({"event": event, **values}) + "\n")
            self._torn = False


@dataclass(frozen=True)
class Account:
    """What the wall time of a run was for."""

    attempts: int
    steps: int  # that were kept
    lost_steps: int
    wall: float  # seconds, from the beginning of the first attempt to the last line
    seconds: dict[str, float]  # by part, in the order of PARTS

    @property
    def goodput(self) -> float:
        """Share of the wall that went into steps that were kept."""
        return self.seconds["step"] / self.wall if self.wall else 0.0


def account(events: Sequence[Event]) -> Account:
    """The books of a run; an attempt that goes on at step k loses what was done after k before."""
    spent = dict.fromkeys(PARTS, 0.0)
    kept: list[Event] = []
    attempts = lost = steps = 0
    for event, before in zip(events, [None, *events], strict=False):
        if event["event"] == "begin":
            attempts += 1
            if before is not None and before.get("why") != "done":  # after a run was done, nobody waited
                spent["down"] += event["at"] - before["at"]
        if event["event"] == "loop":
            lost += max(0, steps - event["step"])
            _add(spent, [e for e in kept if e["step"] > event["step"]], lost=True)
            kept = [e for e in kept if e["step"] <= event["step"]]
        kept.append(event)
        steps = event["step"]
    _add(spent, kept, lost=False)
    return Account(attempts, steps, lost, sum(spent.values()), spent)


def _add(spent: dict[str, float], events: Sequence[Event], *, lost: bool) -> None:
    for event in events:
        for part, seconds in event["seconds"].items():
            spent["lost" if lost and part in LOOP else part] += seconds


def read_events(text: str) -> list[Event]:
    """The lines of a ledger; one that was cut off, or is none of ours, is left out."""
    found = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
            numbers = [event["at"], event["step"], *event["seconds"].values()]
            if event["event"] in EVENTS and event["seconds"].keys() <= PARTS.keys():
                found += [event] if all(isinstance(n, int | float) for n in numbers) else []
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return found


def read_account(directory: Path) -> Account:
    """The account of a run directory."""
    file = directory / FILE
    if not file.is_file():
        raise RunError(f"{directory}: holds no {FILE}; give the run.dir of a `sft-jax train`")
    return account(read_events(file.read_text(encoding="utf-8", errors="replace")))


def table(found: Account) -> list[list[str]]:
    """An account for people, heading first."""

    def row(name: str, seconds: float) -> list[str]:
        return [name, f"{seconds:,.1f}", f"{seconds / (found.wall or 1):.1%}"]

    counted = f"{found.attempts} attempt{'s' * (found.attempts != 1)}, {found.steps:,} steps kept, {found.lost_steps:,}"
    return [
        ["where the time went", "seconds", "share"],
        *(row(f"{part}: {meaning}", found.seconds[part]) for part, meaning in PARTS.items()),
        row(f"in all: {counted} lost", found.wall),
        row("goodput: steps that were kept", found.seconds["step"]),
    ]
