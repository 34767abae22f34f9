"""What a person and a program see of a run: sinks of events, each with one method.

The loop calls `emit(kind, values)`; what becomes of it is no business of the loop. `metrics.jsonl` is always written,
and every curve is drawn from it; the console shows a live bar on a terminal and plain lines elsewhere. What other
programs are told is in `trackers.py`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sft_jax.errors import RunError

METRICS = ("train", "validation", "test")  # the kinds of events that carry a step and figures
MUCH_WAITING = 0.05  # share of the time that a line tells of
SHOWN_CHARS = 100  # of a prompt, and of an answer
Values = Mapping[str, Any]


class Sink(Protocol):
    """Something that events go to: `train`, `validation`, `samples`, `test`, `note` and `done`."""

    def emit(self, kind: str, values: Values) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: a line for each event, numbers in full.

    A resume drops the lines of steps that it repeats, and the partial line of an interval that it finishes.
    """

    def __init__(self, file: Path, step: int):
        stays = [e for e in read_metrics(file) if e["kind"] != "test" and e["step"] <= step and not e.get("partial")]
        fresh = file.with_name(f".{file.name}.new")
        fresh.write_text("".join(map(_line, stays)), encoding="utf-8")
        fresh.rename(file)
        self._file = file

    def emit(self, kind: str, values: Values) -> None:
        """Append training and evaluation metrics."""
        if kind in METRICS:
            with open(self._file, "a", encoding="utf-8") as sink:
                sink.write(_line({"kind": kind, **values}))


class SamplesFile:
    """`samples.jsonl`: what a model answered at each validation, a line an answer; a resume drops what it repeats."""

    def __init__(self, file: Path, step: int):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        stays = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if lines:
            file.write_text("".join(stays), encoding="utf-8")
        self._file = file

    def emit(self, kind: str, values: Values) -> None:
        """Append samples."""
        if kind == "samples":
            with open(self._file, "a", encoding="utf-8") as sink:
                sink.writelines(_line({"step": values["step"], **sample}) for sample in values["samples"])


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The events of a `metrics.jsonl` in order, none without a file; a last line that was cut off is left out."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if file.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]  # the process was killed as it wrote the others
    return [_event(f"{file}, line {number}", line) for number, line in enumerate(whole, start=1)]


def speed(events: Sequence[Values]) -> float:
    """Tokens a second over all intervals of training but the first, unless there is no other; 0 without any."""
    found = [e for e in events if e["kind"] == "train" and not e.get("partial") and e.get("tokens_per_second")]
    found = found[1:] or found
    seconds = sum(event["tokens"] / event["tokens_per_second"] for event in found)
    return sum(event["tokens"] for event in found) / seconds if seconds else 0.0


def _event(where: str, line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
        if event["kind"] in METRICS and isinstance(event["step"], int):
            return event
    except (ValueError, TypeError, KeyError):
        pass
    raise RunError(f"{where}: {line.strip()!r:.60} is no line of metrics; take it out")


def _line(event: Values) -> str:
    return json.dumps(event) + "\n"


def shown(metrics: Iterable[str]) -> list[str]:
    """Those that a line has room for; where there is an accuracy, the micro averages say the same."""
    names = list(metrics)
    hidden = ("_weighted", "_samples", *(["_micro"] if "accuracy" in names else []))
    return [name for name in names if not name.endswith(hidden)]


class Screen:
    """The console: a live bar with the latest figures on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self.steps, self.unit = 0, "tokens"
        self._bar: Progress | None = None

    def emit(self, kind: str, values: Values) -> None:
        """Show an event."""
        {
            "train": self._train,
            "validation": self._scores,
            "test": self._scores,
            "samples": self._samples,
            "note": self._note,
        }.get(kind, lambda values: self.stop())(values)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _note(self, values: Values) -> None:
        self.console.print(values["text"], markup=False)

    def _samples(self, values: Values) -> None:
        for sample in values["samples"]:
            asked, said = (" ".join(sample[name].split()) for name in ("prompt", "answer"))
            self.console.print(f"  {_shortened(asked)!r} -> {said[:SHOWN_CHARS]!r}", markup=False)

    def _train(self, values: Values) -> None:
        line = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad norm {values['grad_norm']:.3f}  "
            f"{values['tokens_per_second']:,.0f} {self.unit}/s"
        )
        if values.get("waiting", 0.0) >= MUCH_WAITING:
            line += f"  {values['waiting']:.0%} waiting for data"
        if values.get("skipped"):
            line += f"  {values['skipped']} skipped"
        if not self.console.is_terminal:
            left = timedelta(seconds=round(values["seconds_left"]))
            self.console.print(f"step {values['step']}/{self.steps}  {line}  {left} left", markup=False)
            return
        if self._bar is None:
            columns = (
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.add_task("", total=self.steps, completed=values["step"])
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=values["step"], description=line)

    def _scores(self, values: Values) -> None:
        names = shown(name for name in values if name not in ("step", "split", "groups"))
        figures = "  ".join(f"{name} {values[name]:.4f}" for name in names)
        self.console.print(f"{values['split']} at step {values['step']}  {figures}", markup=False)


def _shortened(text: str) -> str:
    """A text without its middle, if it is long: what is asked stands at its beginning or at its end."""
    half = SHOWN_CHARS // 2
    return text if len(text) <= SHOWN_CHARS else f"{text[:half]} … {text[-half:]}"


def size(count: float) -> str:
    """Bytes as people read them."""
    unit, scale = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if count >= pair[1]), ("kB", 1e3))
    return f"{count / scale:.{1 if unit == 'GB' else 0}f} {unit}"
