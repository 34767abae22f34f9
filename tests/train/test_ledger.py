"""Where the time of a run goes: every second is booked once, over crashes and restarts."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import ONE_SHAPE, SMALL, write_model

from sft_jax import jobs, machine
from sft_jax.config.schema import Config
from sft_jax.data.batch import Batch
from sft_jax.data.loader import TrainBatches
from sft_jax.errors import RunError
from sft_jax.run import Run, prepare
from sft_jax.train.checkpoint import Checkpoints
from sft_jax.train.ledger import LOOP, PARTS, Ledger, account, read_account, read_events, table

Make = Callable[..., Config]


class Crash(Exception):
    """What ends an attempt of a test."""


@dataclass
class Clock:
    """A clock that tests set forward."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class BadBatches(TrainBatches):
    """Training batches of which one comes late, once, and one ends the attempt, once."""

    slow: set[int] = field(default_factory=set)
    fatal: set[int] = field(default_factory=set)

    def __getitem__(self, step: int) -> Batch:
        if step in self.slow:
            self.slow.remove(step)
            time.sleep(2)
        if step in self.fatal:
            self.fatal.remove(step)
            raise Crash
        return super().__getitem__(step)


def spoiled(run: Run, slow: set[int], fatal: set[int]) -> Run:
    """The same run with such batches."""
    return replace(run, batches=BadBatches(**vars(run.batches), slow=slow, fatal=fatal))


def test_a_stall_and_a_crash_are_booked_where_they_belong(configure: Make, tmp_path: Path, monkeypatch):
    """R59: with a stall of 2 s and a crash, the parts sum to the wall within 2 %, and the lost steps are exact."""
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, *given: (save(self, *given), self.wait()))
    model = write_model(tmp_path / "model", SMALL)
    config = configure(
        f"model.source={model}", ONE_SHAPE, "train.log_every=3", "train.steps=12", "checkpoint.every=4",
        "eval.every=4", "data.prefetch=1",
    )  # fmt: skip
    slow, fatal = {5}, {7}
    begun = time.time()
    monkeypatch.setattr(machine, "started", lambda: begun)
    with pytest.raises(Crash):
        jobs.train(spoiled(prepare(config), slow, fatal))
    crashed = time.time()
    time.sleep(0.2)
    again = time.time()
    monkeypatch.setattr(machine, "started", lambda: again)
    jobs.train(spoiled(prepare(config), slow, fatal))
    wall = time.time() - begun
    assert not slow and not fatal
    found = read_account(tmp_path / "run")
    assert found.wall == pytest.approx(wall, rel=0.02)
    assert sum(found.seconds.values()) == pytest.approx(wall, rel=0.02)
    assert (found.attempts, found.steps, found.lost_steps) == (2, 12, 3)
    # The batch that was late is of a step that was lost with the crash.
    first = read_events((tmp_path / "run" / "ledger.jsonl").read_text())
    waited = sum(event["seconds"].get("wait", 0.0) for event in first)
    assert 1.8 < waited < 1.8 + wall - 2
    assert found.seconds["lost"] > 1.8 > found.seconds["wait"]
    assert found.seconds["down"] == pytest.approx(again - crashed, abs=0.05)
    assert all(found.seconds[part] > 0 for part in PARTS)


def test_a_stall_that_is_not_lost_is_data_wait(configure: Make, tmp_path: Path, monkeypatch):
    """R59: a stall of 2 s in steps that were kept stands under `wait`, and takes nothing from goodput's steps."""
    model = write_model(tmp_path / "model", SMALL)
    config = configure(
        f"model.source={model}", ONE_SHAPE, "train.log_every=3", "train.steps=7", "eval.every=never", "data.prefetch=1"
    )
    begun = time.time()
    monkeypatch.setattr(machine, "started", lambda: begun)
    jobs.train(spoiled(prepare(config), {4}, set()))
    wall, found = time.time() - begun, read_account(tmp_path / "run")
    assert sum(found.seconds.values()) == pytest.approx(wall, rel=0.02)
    assert (found.lost_steps, found.seconds["lost"], found.seconds["down"]) == (0, 0, 0)
    assert 1.8 < found.seconds["wait"] < wall - found.seconds["step"]
    assert found.goodput == found.seconds["step"] / found.wall


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


def attempt(file: Path, clock: Clock, begin: int, steps: int, every: int = 2) -> Iterator[Ledger]:
    """An attempt that takes `steps` steps of 10 s after 1 s of starting, each after 1 s of waiting."""
    ledger = Ledger(file, clock.now, clock)
    clock.now += 1
    ledger.begin_loop(begin)

    def batches() -> Iterator[int]:
        for number in range(begin, begin + steps):
            clock.now += 1
            yield number

    for number in ledger.waited(batches()):
        clock.now += 10
        ledger.step = number + 1
        if ledger.step % every == 0:
            ledger.write()
    yield ledger


def test_parts_inside_parts_are_counted_once(tmp_path: Path, clock: Clock):
    """R59: the time of an inner part is not also the outer one's; what no part claims is that of the stage."""
    with Ledger(tmp_path / "ledger.jsonl", 990, clock) as ledger:
        clock.now += 2
        with ledger("compile"):
            clock.now += 3
        ledger.begin_loop(0)
        with ledger("evaluation"):
            clock.now += 5
            with ledger("compile"):
                clock.now += 7
            clock.now += 11
        clock.now += 13
        ledger.end_loop()
        clock.now += 17
    found = read_account(tmp_path)
    expected = {"start": 12, "compile": 10, "step": 13, "evaluation": 16, "finish": 17}
    assert found.seconds == {**dict.fromkeys(PARTS, 0), **expected}
    assert found.wall == clock.now - 990


def test_a_kill_loses_one_interval_of_the_books(tmp_path: Path, clock: Clock):
    """R59: killed at step 7 with a line each second step, six steps are known; resumed at 4, two of them are lost."""
    file = tmp_path / "ledger.jsonl"
    next(attempt(file, clock, 0, 7))  # never closed, as after kill -9
    with open(file, "a") as sink:
        sink.write('{"event": "steps", "at": 1')  # killed as it wrote
    clock.now += 100
    with next(attempt(file, clock, 4, 6)) as ledger:
        ledger.end_loop()
        clock.now += 5
    found = read_account(tmp_path)
    assert (found.attempts, found.steps, found.lost_steps) == (2, 10, 2)
    # 11 s of step 7 were not written down, and count as time between the attempts.
    assert found.seconds == {
        "start": 2, "compile": 0, "wait": 4 + 6, "step": 40 + 60, "evaluation": 0, "checkpoint": 0, "finish": 5,
        "lost": 22, "down": 111,
    }  # fmt: skip
    assert found.wall == clock.now - 1000 == sum(found.seconds.values())
    assert found.goodput == 100 / found.wall


def test_going_back_to_the_beginning_loses_everything(tmp_path: Path, clock: Clock):
    """R59: what three attempts did that began at step 0 again is lost but for the last, also where one broke down."""
    file = tmp_path / "ledger.jsonl"
    for steps in (4, 3, 5):
        with pytest.raises(Crash), next(attempt(file, clock, 0, steps)):
            raise Crash
    with pytest.raises(Crash), Ledger(file, clock.now, clock):  # before its first step: nothing more is lost
        clock.now += 1
        raise Crash
    found = read_account(tmp_path)
    assert (found.attempts, found.steps, found.lost_steps) == (4, 5, 7)
    assert (found.seconds["lost"], found.seconds["step"]) == (77, 50)
    whys = [event.get("why") for event in read_events(file.read_text()) if event["event"] == "end"]
    assert whys == ["Crash"] * 4


@pytest.mark.parametrize(("crash", "down"), [(True, 1e5), (False, 0)])
def test_a_finished_run_waits_for_nobody(tmp_path: Path, clock: Clock, crash: bool, down: float):
    """R59: the days between a finished run and the same command again are not down time; a stopped run's are."""
    file = tmp_path / "ledger.jsonl"
    with contextlib.suppress(Crash), next(attempt(file, clock, 0, 2)):
        if crash:
            raise Crash
    clock.now += 1e5
    with Ledger(file, clock.now, clock):
        pass
    assert read_account(tmp_path).seconds["down"] == down


def test_lines_that_are_none_are_left_out(tmp_path: Path, clock: Clock):
    """R59: whatever was written into the file, the account is made of the lines that are lines of a ledger."""
    file = tmp_path / "ledger.jsonl"
    with next(attempt(file, clock, 0, 4)):
        pass
    sound = read_account(tmp_path)
    with open(file, "ab") as sink:
        sink.write(b'\n7\n[]\nnull\n{"event": "end"}\n\xff\xfe\n{"event": [], "at": 1, "step": 1, "seconds": {}}\n')
        sink.write(b'{"event": "end", "at": 1, "step": 1, "seconds": {"sleep": 1}}\n' + b"[" * 100_000)
    assert read_account(tmp_path) == sound
    assert account([]).goodput == 0 and len(table(account([]))) == len(PARTS) + 3
    with pytest.raises(RunError, match=r"holds no ledger\.jsonl; give the run\.dir of"):
        read_account(tmp_path / "elsewhere")


def test_the_table_has_all_of_it(tmp_path: Path, clock: Clock):
    """R59: the shares of the parts are of the wall, and steps, attempts and goodput stand below."""
    with next(attempt(tmp_path / "ledger.jsonl", clock, 0, 4)):
        pass
    lines = {row[0].partition(":")[0]: row for row in table(read_account(tmp_path))}
    assert lines["step"][1:] == ["40.0", "88.9%"] and lines["wait"][1:] == ["4.0", "8.9%"]
    assert lines["in all"] == ["in all: 1 attempt, 4 steps kept, 0 lost", "45.0", "100.0%"]
    assert lines["goodput"][1:] == ["40.0", "88.9%"]
    assert set(PARTS) <= lines.keys() and set(LOOP) <= PARTS.keys()
    assert json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[0])["event"] == "begin"
