"""Whatever ends a run - a kill, a signal, a full disk - the same command goes on, and ends where it would have.

The runs are those of real processes; `crash_worker.py` starts them, so that each is under way at once.
"""

import os
import platform
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from crash_worker import Event, Zygote
from exact_runs import differing, metrics_lines, settings, small_model

from sft_jax.config.read import write_config
from sft_jax.config.schema import Config
from sft_jax.errors import RunError
from sft_jax.jobs import evaluate, train, trained
from sft_jax.run import open_run, prepare

EVERY = 3  # steps between two checkpoints
STEPS = 60  # of the run that is ended again and again
FEW = 12  # of the others
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
# What is waited for, how often it must have come, and for how many seconds at most the end is put off after it.
MOMENTS = [
    *[("pid", 1, 1.0)] * 2,
    *[("save", 1, 0.05)] * 2,
    *[("writing", 1, 0.0)] * 4,
    *[("writing", 1, 0.05)] * 3,
    *[("writing", 2, 0.02)] * 1,
    *[("train", 2, 0.02)] * 3,
]
ENDS = [(TERM, TERM), (INT, INT), *[(KILL,)] * len(MOMENTS)]


@dataclass(frozen=True)
class Attempt:
    """One process of a run, how it ended and what it left."""

    signals: Sequence[signal.Signals]
    code: int
    events: list[Event]
    steps: list[int]  # checkpoints on disk afterwards
    leftovers: list[str]  # of saves that were not finished

    def of(self, kind: str) -> list[int]:
        """The steps of the events of a kind."""
        return [event["step"] for event in self.events if event["kind"] == kind]


@dataclass
class Workshop:
    """A process to start runs from, and the files that they need."""

    home: Path
    make: Callable[..., Config]
    zygote: Zygote = field(default_factory=Zygote)

    def run(
        self,
        name: str,
        *overrides: str,
        steps: int = FEW,
        signals: Sequence[signal.Signals] = (),
        when: Callable[[Event], bool] = lambda event: False,
        delay: float = 0.0,
        file_size: int | None = None,
    ) -> Attempt:
        """Train in a process, which is sent the signals, one after the other, once an event is the awaited one."""
        file, events, waiting = self.home / f"{name}.yaml", [], True
        file.write_text(write_config(self.make(name, steps)), encoding="utf-8")
        self.zygote.train(file, self.home / f"{name}.log", overrides, file_size)
        for event in self.zygote.events():
            events.append(event)
            if waiting and when(event):
                waiting = False
                time.sleep(delay)
                for number in signals:
                    os.kill(events[0]["pid"], number)
        found = [entry.name for entry in (self.home / name / "checkpoints").glob("*")]
        steps = sorted(int(entry) for entry in found if entry.isdecimal())
        return Attempt(signals, events[-1]["code"], events, steps, [e for e in found if e.endswith("-tmp")])

    def log(self, name: str) -> str:
        """What the processes of a run said on stderr."""
        return (self.home / f"{name}.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[Workshop]:
    """One process for all of these tests."""
    home, model = tmp_path_factory.mktemp("lost"), small_model(tmp_path_factory)
    when = (f"checkpoint.every={EVERY}", f"eval.every={2 * EVERY}")
    what = ("model.dropout=0.1", "data.layout.kind=padded", "train.freeze=['embed/**','blocks/**']")  # quick to begin

    def make(name: str, steps: int = FEW) -> Config:
        return settings(home / name, model, rows, *when, *what, f"train.steps={steps}")

    found = Workshop(home, make)
    yield found
    found.zygote.close()


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> Path:
    """The run that nothing happened to."""
    assert workshop.run("whole", steps=STEPS).code == 0, workshop.log("whole")
    return workshop.home / "whole"


@pytest.fixture(scope="module")
def chain(workshop: Workshop) -> list[Attempt]:
    """A run that was ended again and again at seeded moments, until it was let through."""
    draw, attempts = random.Random(3), []
    moments = [("writing", 1, 0.0), ("writing", 1, 0.0), *draw.sample(MOMENTS, len(MOMENTS))]
    for signals, (kind, count, most) in zip(ENDS, moments, strict=True):
        counter = {"left": count}

        def when(event: Event, kind: str = kind, counter: dict[str, int] = counter) -> bool:
            counter["left"] -= event["kind"] == kind
            return counter["left"] == 0

        attempts.append(workshop.run("chain", steps=STEPS, signals=signals, when=when, delay=draw.uniform(0, most)))
    return [*attempts, workshop.run("chain", steps=STEPS)]


def ended_by(attempts: Sequence[Attempt], *signals: signal.Signals) -> list[Attempt]:
    """The attempts that were sent these signals."""
    return [attempt for attempt in attempts if tuple(attempt.signals) == signals]


def test_a_killed_run_goes_on_by_itself(chain: list[Attempt], workshop: Workshop):
    """R3, C14: killed 15 times, also in the middle of a save, each restart goes on from the newest step on disk."""
    killed = ended_by(chain, KILL)
    assert [attempt.code for attempt in killed] == [-KILL] * len(MOMENTS) and len(killed) >= 15
    assert sum(bool(attempt.leftovers) for attempt in killed) >= 2  # in the middle of a save
    for before, after in pairwise(chain):
        first = after.of("train")[:1]
        assert first in ([], [max(before.steps, default=0) + 1])
    assert chain[-1].code == 0 and not chain[-1].leftovers, workshop.log("chain")


def test_no_more_is_lost_than_one_interval(chain: list[Attempt]):
    """R3: after each end the checkpoint before the last one that was begun is there, at the least."""
    newest = 0
    for attempt in chain:
        begun = max(attempt.of("writing"), default=newest)
        assert max(attempt.steps, default=0) >= max(newest, begun - EVERY)
        newest = max(attempt.steps, default=0)


def test_two_signals_during_a_save_corrupt_nothing(chain: list[Attempt]):
    """R7: SIGTERM twice or SIGINT twice while a checkpoint is written; the run ends, and goes on from a whole one."""
    (terminated,), (interrupted,) = ended_by(chain, TERM, TERM), ended_by(chain, INT, INT)
    assert (terminated.code, interrupted.code) == (42, 130)
    assert terminated.steps[-1] >= terminated.of("writing")[0]  # SIGTERM waits, however often it comes


def test_the_end_is_that_of_a_run_that_nothing_happened_to(chain: list[Attempt], workshop: Workshop, whole: Path):
    """R3, R1: after all of it, every leaf of the state and every exported byte is that of the uninterrupted run."""
    other = workshop.home / "chain"
    left, right = (trained(open_run(directory), "latest") for directory in (whole, other))
    assert left[2] == right[2] == STEPS and differing(left[0], right[0]) == []
    weights = [directory / "model" / "model.safetensors" for directory in (whole, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_metrics_have_each_step_once(chain: list[Attempt], workshop: Workshop, whole: Path):
    """R56: after all of it, the file of metrics has each step once, in order, with the numbers of the other run."""
    lines = metrics_lines(workshop.home / "chain")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert lines == metrics_lines(whole)


def test_a_directory_in_use_is_refused(workshop: Workshop):
    """R27: while a run trains, a second one is refused with the holder's process and host; looking is allowed, and
    does not disturb it. One that was killed leaves nothing that the next would have to clear away."""
    seen: dict[str, Any] = {}

    def when(event: Event) -> bool:
        seen.setdefault("pid", event.get("pid"))
        if event["kind"] != "writing" or event["step"] != 2 * EVERY:
            return False
        os.kill(seen["pid"], signal.SIGSTOP)
        (workshop.home / "used" / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir()  # or the real one may be done
        with pytest.raises(RunError) as caught:
            train(prepare(workshop.make("used")))
        seen["refusal"] = str(caught.value)
        seen["step"] = evaluate(open_run(workshop.home / "used"), "test", "latest")[1]
        seen["left"] = (workshop.home / "used" / "checkpoints" / "99.orbax-checkpoint-tmp").exists()
        os.kill(seen["pid"], signal.SIGCONT)
        return True

    attempt = workshop.run("used", when=when, signals=[KILL])
    holder = f"process {seen['pid']} on {platform.node()}, since 20"
    assert attempt.code == -KILL and f"used: {holder}" in seen["refusal"]
    assert seen["refusal"].endswith("is training in it; wait, stop it, or give another run.dir")
    assert seen["step"] in (EVERY, 2 * EVERY) and seen["left"]
    assert train(prepare(workshop.make("used"))).steps == FEW


def test_a_save_that_fails_ends_the_run(workshop: Workshop):
    """R10: no room for a checkpoint; the run ends at the next step, with a message and no traceback, and the step
    that failed is no checkpoint. With room again the same command goes on."""
    attempt = workshop.run("full", file_size=3000)
    assert attempt.code == 65 and attempt.steps == []
    said = workshop.log("full").strip()
    assert said.startswith(f"{workshop.home / 'full' / 'checkpoints'}: step {EVERY} could not be saved (")
    assert said.endswith("; make room for it, and the same command begins again") and "\n" not in said
    assert workshop.run("full").code == 0


def test_a_save_that_fails_may_be_passed_over(workshop: Workshop):
    """R10: with `checkpoint.on_error=warn` the run tells of it, goes on, and saves again when it is time."""
    attempt = workshop.run("warned", "checkpoint.on_error=warn", file_size=3000)
    (note,) = [event["text"] for event in attempt.events if "could not be saved" in event.get("text", "")]
    assert attempt.code == 0 and f"step {EVERY} could not be saved (" in note
    assert attempt.steps[-2:] == [FEW - EVERY, FEW] and EVERY not in attempt.steps


def test_nothing_is_begun_again_unasked(workshop: Workshop):
    """R9: where no checkpoint can be restored the run is refused; `run.resume=restart` keeps them, and begins anew."""
    home = workshop.home / "restarted"
    assert (
        workshop.run("restarted", signals=[KILL], when=lambda event: event.get("step") == 2 * EVERY + 1).code == -KILL
    )
    steps = sorted(int(entry.name) for entry in (home / "checkpoints").iterdir() if entry.name.isdecimal())
    for step in steps:
        (home / "checkpoints" / str(step) / "manifest" / "metadata").unlink()
    assert workshop.run("restarted").code == 65
    assert "run.resume=restart moves them all aside and begins again" in workshop.log("restarted")
    again = workshop.run("restarted", "run.resume=restart")
    assert again.code == 0 and again.of("train") == list(range(1, FEW + 1))
    assert sorted(int(entry.name) for entry in (home / "checkpoints" / "archive-1").iterdir()) == steps
    assert [line["step"] for line in metrics_lines(home) if line["kind"] == "train"] == list(range(1, FEW + 1))
