"""What is reported of a run: the file of metrics, the screen, and the meter that feeds them."""

import io
import json
import math
import re
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_SHAPE, SMALL, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_jax import console, jobs, run
from sft_jax.errors import Interrupted, NonFiniteError
from sft_jax.tasks.task import Ratio
from sft_jax.train.meter import Meter
from sft_jax.train.report import MetricsFile, Screen

TIMES = ("tokens_per_second", "waiting", "seconds_left")
TRAIN = {"loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "tokens_per_second": 1234.5}


class Recorder:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.events = []

    def emit(self, kind, values):
        """Keep it."""
        self.events.append((kind, dict(values)))


def step_metrics(total: float, weight: float, tokens: int, norm: float = 1.0) -> dict:
    """What a training step returns."""
    loss = Ratio(jnp.float32(total), jnp.float32(weight))
    counts = {"tokens": jnp.int32(tokens), "documents": jnp.int32(weight)}
    return {"loss": loss, "grad_norm": jnp.float32(norm), **counts}


def lines(file) -> list[dict]:
    """The lines of a file of metrics."""
    return [json.loads(line) for line in file.read_text().splitlines()]


class StopAfter(Screen):
    """A screen behind which someone presses Ctrl-C as soon as a step was reported."""

    def __init__(self, step):
        super().__init__(Console(file=io.StringIO()))
        self.step = step

    def emit(self, kind, values):
        """Press it."""
        if kind == "train" and values["step"] == self.step:
            signal.raise_signal(signal.SIGINT)


# The file.


def test_lines_are_whole_numbers_in_full(tmp_path):
    """A line for each train, validation and test event, every digit kept; notes are not metrics."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.emit("train", {"step": 1, "loss": 1 / 3})
    file.emit("note", {"text": "compiled"})
    file.emit("validation", {"step": 1, "f1": 0.1})
    file.emit("test", {"step": 1, "f1": 0.2})
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["kind"] for line in found] == ["train", "validation", "test"] and found[0]["loss"] == 1 / 3


def test_repeated_steps_are_dropped(tmp_path):
    """R56: going on after step 4 drops what an earlier process wrote of later steps, and the test at its end."""
    first = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (2, 4, 6):
        first.emit("train", {"step": step})
    first.emit("validation", {"step": 4})
    first.emit("validation", {"step": 6})
    first.emit("test", {"step": 4})
    second = MetricsFile(tmp_path / "metrics.jsonl", 4)
    second.emit("train", {"step": 6, "again": True})
    found = [(line["kind"], line["step"], "again" in line) for line in lines(tmp_path / "metrics.jsonl")]
    assert found == [("train", 2, False), ("train", 4, False), ("validation", 4, False), ("train", 6, True)]


def test_line_that_was_cut_off(tmp_path):
    """R3: a line that a killed process wrote half of does not keep the run from going on."""
    file = tmp_path / "metrics.jsonl"
    MetricsFile(file, 0).emit("train", {"step": 2})
    whole = file.read_text()
    file.write_text(whole + '{"kind": "train", "st')
    MetricsFile(file, 9)
    assert file.read_text() == whole
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_step_is_reported_once(configure, tmp_path_factory):
    """R56: over an interrupted run and its end, the intervals of the lines cover each step and each token once."""
    home = tmp_path_factory.getbasetemp()
    source = f"model.source={write_model(home / 'reported', SMALL)}"
    config = configure(source, ONE_SHAPE, "train.steps=8", "train.log_every=3", "eval.every=4")
    prepared = run.prepare(config)
    whole = [int((prepared.batches[step]["segment_ids"] > 0).sum()) for step in range(8)]
    with pytest.raises(Interrupted, match=r"stopped and saved at step \d of 8") as caught:
        jobs.train(prepared, StopAfter(3))
    assert caught.value.exit_code == 130
    stopped = int(re.search(r"step (\d)", str(caught.value))[1])
    jobs.train(run.prepare(config))
    found = lines(prepared.directory / "metrics.jsonl")
    jobs.train(run.prepare(config))  # done already: tested again, and nothing else
    trained = [line for line in found if line["kind"] == "train"]
    steps = [line["step"] for line in trained]
    assert 3 < stopped < 8 and stopped in steps and steps == sorted(set(steps)) and steps[-1] == 8
    assert [line["tokens"] for line in trained] == [
        sum(whole[begin:end]) for begin, end in zip([0, *steps], steps, strict=False)
    ]
    assert [line["step"] for line in found if line["kind"] == "validation"] == [4, 8]
    assert [line["kind"] for line in found].count("test") == 1
    assert lines(prepared.directory / "metrics.jsonl") == found
    events = EventAccumulator(str(prepared.directory / "events"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == steps
    assert [event.step for event in events.Scalars("validation/loss")] == [4, 8]
    assert len(events.Scalars("test/loss")) == 1


# The screen.


def screen(*, terminal: bool) -> tuple[Screen, io.StringIO]:
    """A screen for ten steps and what appears on it."""
    shown = io.StringIO()
    found = Screen(Console(file=shown, force_terminal=terminal, width=100, highlight=False))
    found.steps = 10
    return found, shown


def test_plain_lines():
    """Without a terminal there is a plain line for each event, and nothing else."""
    plain, shown = screen(terminal=False)
    plain.emit("note", {"text": "compiled [bold]in[/bold] 1 s"})
    plain.emit("train", {"step": 3, "seconds_left": 61.4, **TRAIN})
    plain.emit("validation", {"step": 3, "split": "validation", "loss": 0.25, "f1_macro": 0.5, "f1_micro": 0.75})
    plain.emit("test", {"step": 3, "split": "test", "accuracy": 0.25, "f1_micro": 0.25, "f1_weighted": 0.5})
    plain.stop()
    assert shown.getvalue().splitlines() == [
        "compiled [bold]in[/bold] 1 s",
        "step 3/10  loss 0.5000  lr 1.00e-03  grad norm 2.000  1,234 tokens/s  0:01:01 left",
        "validation at step 3  loss 0.2500  f1_macro 0.5000  f1_micro 0.7500",
        "test at step 3  accuracy 0.2500",
    ]


@pytest.mark.parametrize(
    ("seconds", "left"), [(59.6, "0:01:00"), (3600 + 62, "1:01:02"), (30 * 3600, "1 day, 6:00:00")]
)
def test_hours_left(seconds, left):
    """More than an hour, or a day, is not wrapped around."""
    plain, shown = screen(terminal=False)
    plain.emit("train", {"step": 3, "seconds_left": seconds, **TRAIN})
    assert shown.getvalue().endswith(f"  {left} left\n")


def test_images_are_no_tokens():
    """D7: of a run on images a line says how many of them a second."""
    plain, shown = screen(terminal=False)
    plain.unit = "images"
    plain.emit("train", {"step": 3, "seconds_left": 1.0, **TRAIN})
    assert "1,234 images/s" in shown.getvalue()


def test_live_bar():
    """On a terminal one bar moves, other events stand above it, and the cursor is given back."""
    live, shown = screen(terminal=True)
    for step in (3, 6):
        live.emit("train", {"step": step, "seconds_left": 9.0, **TRAIN, "loss": step / 10})
    live.emit("validation", {"step": 6, "split": "validation", "loss": 0.25})
    live.emit("train", {"step": 9, "seconds_left": 1.0, **TRAIN, "loss": 0.9})
    live.stop()
    text = shown.getvalue()
    assert " 3/10" in text and " 9/10" in text and "loss 0.9000" in text and "━" in text
    assert "validation at step 6  loss 0.2500" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "hides the cursor and does not show it again"
    live.stop()
    assert shown.getvalue() == text, "stopping twice is stopping once"


def test_tables_show_names_as_they_are():
    """A label, or a run, that looks like markup of the console is shown as it is called."""
    shown = io.StringIO()
    console.show_table(Console(file=shown, width=60), "[/b] of [red]", [["label", "[bold]"], ["[/red]", "[1]"]])
    assert all(name in shown.getvalue() for name in ("[/b] of [red]", "[bold]", "[/red]", "[1]"))


@pytest.mark.parametrize(
    "names", [["Billing", "Delivery", "Refunds", "Other things"], [f"label {n}" for n in range(40)]]
)
def test_wide_tables_cut_no_name(names):
    """Newcomer 1: a confusion matrix that is wider than the terminal has numbers for names, and goes on below; each
    name and each count is there, and no line is too long."""
    shown = io.StringIO()
    counts = [[1000 * row + column for column in range(len(names))] for row in range(len(names))]
    table = [["truth \\ predicted", *names], *([name, *row] for name, row in zip(names, counts, strict=True))]
    console.show_wide(Console(file=shown, width=60), "confusion matrix", table)
    text = shown.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 60
    for number, (name, row) in enumerate(zip(names, counts, strict=True), 1):
        assert f"{number} {name}" in text
        assert set(map(str, row)) <= {*re.findall(r"\d+", text)}
    narrow = io.StringIO()
    console.show_wide(Console(file=narrow, width=60), "per class", [["label", "F1"], ["a", 0.5]])
    assert "columns" not in narrow.getvalue() and ("columns 1 to" in text) == (len(names) > 4)


# The meter.


def meter(every: int) -> tuple[Meter, list]:
    """A meter of ten steps, and what it reports."""
    sink = Recorder()
    return Meter(10, every, 3, lambda step: step / 100, [sink]), sink.events


def test_one_interval_late():
    """An interval is reported when the next one is full, so that the device never waits; `flush` reports the rest."""
    found, events = meter(2)
    for step in (1, 2, 3):
        found.add(step, step_metrics(1, 1, 1))
    assert events == []
    found.add(4, step_metrics(1, 1, 1))
    assert [values["step"] for _, values in events] == [2]
    found.add(5, step_metrics(1, 1, 1))
    found.flush()
    assert [values["step"] for _, values in events] == [2, 4, 5]
    found.flush()
    assert len(events) == 3, "the same steps are reported twice"


def test_totals_add_up():
    """C1: the loss of an interval is total by weight, not a mean of means; tokens and documents are exact sums."""
    found, events = meter(3)
    steps = [(6.0, 3.0, 100), (0.5, 1.0, 7), (20.0, 8.0, 301), (3.0, 4.0, 11)]
    for number, (total, weight, tokens) in enumerate(steps, start=1):
        found.add(number, step_metrics(total, weight, tokens, norm=number))
    found.flush()
    (_, first), (_, second) = events
    assert first["loss"] == (6.0 + 0.5 + 20.0) / 12 != (2.0 + 0.5 + 2.5) / 3
    assert (first["tokens"], first["documents"], first["grad_norm"]) == (408, 12.0, 3.0)
    assert (second["loss"], second["tokens"], second["documents"]) == (0.75, 11, 4.0)
    assert (first["lr"], second["lr"]) == (0.02, 0.03), "the rate that the last step was made with"


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [(math.nan, 1.0, "step 5: loss nan, gradient norm 1.0"), (1.0, math.inf, "step 5: loss 1.0, gradient norm inf")],
)
def test_not_finite(loss, norm, said):
    """C10, R23: the first step that is not finite is named, after the interval was reported as it is."""
    found, events = meter(2)
    for step in range(1, 5):
        found.add(step, step_metrics(1, 1, 1))
    found.add(5, step_metrics(loss, 1, 1, norm))
    found.add(6, step_metrics(math.nan, 1, 1, math.nan))
    with pytest.raises(NonFiniteError, match=said) as caught:
        found.flush()
    assert caught.value.exit_code == 76 and "lower optim.lr" in str(caught.value)
    assert [values["step"] for _, values in events] == [2, 4, 6]
    assert not math.isfinite(events[-1][1]["loss"])


@given(st.integers(2, 6), st.sets(st.integers(1, 19), max_size=4), st.sampled_from([3, 4, 7, 100]))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_a_stop_leaves_no_trace(tmp_path_factory, every, stops, saves):
    """R54, R56: stopped at any steps and resumed, `metrics.jsonl` is byte for byte that of the run that was not."""
    home = tmp_path_factory.mktemp("stops")
    whole, parts = (
        metered(home / "whole.jsonl", every, set(), saves),
        metered(home / "parts.jsonl", every, stops, saves),
    )
    assert whole == parts
    steps = [json.loads(line)["step"] for line in whole.splitlines()]
    assert steps == sorted({s for s in range(1, 21) if s % every == 0 or s % saves == 0 or s == 20})


def test_a_stop_reports_what_there_is(tmp_path):
    """R56: until the run is resumed, the line of the interval that was stopped in is there, and is called partial."""
    file = tmp_path / "metrics.jsonl"
    metered(file, 4, {6}, 100, until=6)
    assert [(line["step"], line.get("partial")) for line in lines(file)] == [(4, None), (6, True)]


def test_an_interval_of_other_metrics_is_not_taken_up():
    """R58: what an older version left of an interval is dropped rather than taken for something else."""
    sink = Recorder()
    found = Meter(9, 3, 9, lambda step: 0.0, [sink], {"seconds": 1.0, "steps": [[4, {"['speed']": 1.0}]]})
    found.add(5, step_metrics(1, 1, 1))
    found.flush()
    assert sink.events[0][1]["documents"] == 1


def metered(file: Path, every: int, stops: set[int], saves: int, until: int = 20) -> str:
    """What stands in `file`, times left out, after 20 steps that were stopped after some and resumed."""
    left, begin = {}, 0
    for end in sorted(stops | {until}):
        meter = Meter(20, every, 9, lambda step: step / 100, [MetricsFile(file, begin)], json.loads(json.dumps(left)))
        for step in range(begin + 1, end + 1):
            draw = np.random.default_rng(step)
            loss, weight, norm = draw.normal(size=3) * 10 + 50
            skipped = {"skipped": jnp.asarray(draw.random() < 0.3)}
            meter.add(step, {**step_metrics(loss, weight, int(draw.integers(1, 1000)), norm), **skipped})
            if step % saves == 0 or step == 20:
                meter.flush()
        planned = end % saves == 0 or end == 20
        left, begin = ({} if planned else meter.flush(whole=False)), end
    return "\n".join(json.dumps({k: v for k, v in line.items() if k not in TIMES}) for line in lines(file))


def test_steady_speed():
    """Tokens per second leave out the first interval, in which everything warms up, and what `paused` encloses."""
    found, _ = meter(1)
    found.add(1, step_metrics(1, 1, 10**9))
    assert found.tokens_per_second == 0.0
    found.add(2, step_metrics(1, 1, 3))
    with found.paused():
        begun = found._begun
    assert found._begun > begun
    found.flush()
    assert 0 < found.tokens_per_second < 10**9
