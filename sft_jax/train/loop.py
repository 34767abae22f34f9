"""The training loop: one function, and the order in which things happen.

For each step, and the order matters:
  1. the batch goes onto the mesh and the step is dispatched while earlier ones still run; nothing waits for it;
  2. at the end of an interval the metrics of the interval *before* are fetched and reported;
  3. when it is time, the validation split is evaluated, and the best step is noted;
  4. then a checkpoint is begun, so that it knows of that evaluation;
  5. a request to stop is answered last, after a checkpoint.
Knows tasks and templates; no family, no source, no configuration file.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from sft_jax.data.batch import Batch
from sft_jax.errors import Interrupted
from sft_jax.nn.template import Params
from sft_jax.train.checkpoint import Checkpoints, Progress
from sft_jax.train.evaluate import Put
from sft_jax.train.ledger import Ledger
from sft_jax.train.meter import Meter
from sft_jax.train.profile import Trace
from sft_jax.train.report import Sink
from sft_jax.train.state import TrainState
from sft_jax.train.step import Program

Validate = Callable[[Params, Params], dict[str, Any]]  # (trainable, frozen) -> metrics, and those of groups


@dataclass(frozen=True)
class Plan:
    """When things happen, in steps."""

    steps: int
    log_every: int
    eval_every: int | None  # None: never
    save_every: int | None  # None: whenever there was an evaluation
    best_metric: str
    best_mode: str  # "max" or "min"
    patience: int | None = None  # evaluations in a row that may be no better
    min_delta: float = 0.0  # by how much one must be better to be better
    max_skipped: int = 10  # steps in a row that may be skipped
    extended: int = 0  # the step from which on a run that was done went on: patience begins anew
    begins: tuple[tuple[int, str], ...] = ()  # (steps before it, what begins to be trained then)


@dataclass(frozen=True)
class Timing:
    """What the loop measured of itself."""

    first_step: float  # when the first step was done, as time.time()
    seconds: float  # evaluations and checkpoints included, compiling not
    tokens_per_second: float  # real tokens, steady state
    waiting: float = 0.0  # seconds, for batches


def train(
    state: TrainState,
    frozen: Params,
    progress: Progress,
    *,
    plan: Plan,
    program: Program,
    batches: Iterator[Batch],
    put: Put,
    rate: Callable[[int], Any],
    validate: Validate,
    checkpoints: Checkpoints,
    sinks: Sequence[Sink],
    ledger: Ledger,
    trace: Trace | None = None,
) -> tuple[TrainState, Timing]:
    """Train from `progress.step` to `plan.steps`, bringing `progress` along; raises Interrupted after saving.

    `batches` begin there; where they are stacked, the program takes a step for each of them in one call.
    """
    meter = Meter(plan.steps, plan.log_every, plan.max_skipped, rate, sinks, progress.left, lambda: ledger.waiting)
    begun, first, compiling = time.perf_counter(), 0.0, program.seconds
    ledger.begin_loop(progress.step)
    with stop_requests() as stop, trace or Trace() as traced:
        for batch in ledger.waited(batches):
            with meter.paused(), ledger("compile"):  # a shape that was not met before
                executable = program.compile(batch)
            called, stacked = time.perf_counter(), batch["weight"].ndim == 3
            after = progress.step + (len(batch["weight"]) if stacked else 1)
            _tell_beginnings(plan, progress.step, after, sinks)
            with traced.over(progress.step + 1, after):
                state, metrics = executable(state, frozen, put(batch))
            traced.end(after, metrics)
            progress.step = ledger.step = after
            if not first:
                jax.block_until_ready(metrics)
                first = time.time()
            if stacked:
                meter.add_all(progress.step, metrics, called)
            else:
                meter.add(progress.step, metrics)
            if _due(plan.log_every, progress.step):
                ledger.write()
            checkpoints.check()  # a save that failed in the background is known a step later
            last = progress.step == plan.steps
            evaluating = plan.eval_every is not None and (last or progress.step % plan.eval_every == 0)
            planned = evaluating or last or _due(plan.save_every, progress.step)
            if not (planned or stop):
                continue
            with meter.paused():
                progress.left = meter.flush(whole=planned)  # a state that is not finite is never saved
                if evaluating:
                    note(progress, plan, validate(state.weights, frozen), sinks)
                progress.finished = last or (evaluating and out_of_patience(progress, plan, sinks))
                with ledger("checkpoint"):
                    checkpoints.save(state, progress)
            ledger.write()
            if progress.finished:
                break
            if stop:
                with ledger("checkpoint"):
                    checkpoints.wait()
                saved = "and saved " if progress.step in checkpoints.steps() else "but could not save "
                raise Interrupted(f"stopped {saved}at step {progress.step} of {plan.steps}", stop[0])
    with ledger("checkpoint"):
        checkpoints.wait()
    seconds = time.perf_counter() - begun - (program.seconds - compiling)
    return state, Timing(first, seconds, meter.tokens_per_second, ledger.waiting)


def edges(plan: Plan, begin: int, most: int) -> tuple[int, ...]:
    """Steps from `begin` on between which nothing happens but training, at most so many apart."""
    found = [begin]
    for step in range(begin + 1, plan.steps + 1):
        happens = any(_due(every, step) for every in (plan.eval_every, plan.save_every))
        if happens or step == plan.steps or step - found[-1] == most:
            found.append(step)
    return tuple(found)


def note(progress: Progress, plan: Plan, metrics: dict[str, Any], sinks: Sequence[Sink]) -> None:
    """Write an evaluation down and see whether it is the best so far; of equals, the earlier one is."""
    value = metrics[plan.best_metric]
    sign = 1 if plan.best_mode == "max" else -1
    if progress.best_value is None or sign * (value - progress.best_value) > plan.min_delta:
        progress.best_step, progress.best_value = progress.step, value
    entry = {"step": progress.step, "split": "validation", **metrics}
    progress.evaluations.append(entry)
    for sink in sinks:
        sink.emit("validation", entry)


def out_of_patience(progress: Progress, plan: Plan, sinks: Sequence[Sink]) -> bool:
    """Whether the last evaluations were none better than the best for as long as the plan allows (C13)."""
    begun = max(progress.best_step or 0, plan.extended)
    since = sum(entry["step"] > begun for entry in progress.evaluations)
    if plan.patience is None or since < plan.patience:
        return False
    for sink in sinks:
        text = f"stopped early: no better {plan.best_metric} in {since} validations since step {begun}"
        sink.emit("note", {"text": text})
    return True


def _tell_beginnings(plan: Plan, before: int, after: int, sinks: Sequence[Sink]) -> None:
    """Say what begins to be trained in these steps."""
    for step, what in plan.begins:
        if before <= step < after:
            for sink in sinks:
                sink.emit("note", {"text": f"from step {step + 1} on trained as well: {what}"})


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM put the exit code into; a second SIGINT stops at once.

    With several processes, signals keep their own effect: stopping must then be agreed on, by the launcher.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield asked
        return
    codes = {signal.SIGINT: 130, signal.SIGTERM: 42}
    before = {number: signal.getsignal(number) for number in codes}

    def ask(number: int, frame: Any) -> None:
        asked.append(codes[signal.Signals(number)])
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in codes:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
