"""Where a run goes on: from which checkpoint, and what becomes of those that it does not go on from.

Nothing is deleted here. What is damaged, or later than the step that was asked for, is moved into a directory beside
the checkpoints, so that saving goes on as if it had not been there.
"""

from collections.abc import Callable
from itertools import count
from typing import TypeVar

from sft_jax.config.schema import RunSection
from sft_jax.errors import RunError, listing
from sft_jax.train.checkpoint import DAMAGED, Checkpoints, Progress
from sft_jax.train.state import TrainState

Found = TypeVar("Found")
Read = Callable[[int], Found]  # a step, or a RunError that says what is wrong with it
Tell = Callable[[str], None]


def resume(
    checkpoints: Checkpoints, section: RunSection, read: Read[tuple[TrainState, Progress]], tell: Tell
) -> tuple[TrainState, Progress] | None:
    """The state and progress to go on from, or None to begin; tells what was moved aside, and why."""
    steps = checkpoints.steps()
    if section.resume == "restart":
        _archive(checkpoints, steps, tell)
        return None
    if section.resume_step is not None:
        state, progress = _one(checkpoints, section.resume_step, steps, read)
        _archive(checkpoints, [step for step in steps if step > section.resume_step], tell)
    elif not steps:
        return None
    else:
        (state, progress), damaged = newest(checkpoints, read, strict=section.resume == "strict")
        for step, problem in damaged.items():
            tell(f"{problem}\n  moved to {DAMAGED}/{step}; going on after step {progress.step}")
        checkpoints.set_aside(list(damaged), DAMAGED)
    if progress.best_step is not None and progress.best_step not in checkpoints.steps():
        tell(f"{checkpoints.directory}: the best step, {progress.best_step}, is gone; the next evaluation begins anew")
        progress.forget_best()
    return state, progress


def newest(checkpoints: Checkpoints, read: Read[Found], *, strict: bool = False) -> tuple[Found, dict[int, str]]:
    """(what is read of the newest checkpoint that is whole, what is wrong with each later one).

    `strict` accepts no other than the newest. Where none is whole, that is a RunError: to begin again would lose all.
    """
    damaged: dict[int, str] = {}
    # Listed again each time: a run that trains meanwhile takes old steps away, and has newer ones.
    while left := [step for step in checkpoints.steps() if step not in damaged]:
        try:
            return read(left[-1]), damaged
        except RunError as error:
            damaged[left[-1]] = str(error)
        if strict:
            what = "the newest one cannot be restored, and run.resume is strict"
            raise _refusal(checkpoints, f"{what}; run.resume=auto goes on from an earlier one", damaged)
    if damaged:
        what = "none can be restored; run.resume=restart moves them all aside and begins again"
        raise _refusal(checkpoints, what, damaged)
    raise RunError(f"{checkpoints.directory}: no checkpoint yet; train first")


def _one(checkpoints: Checkpoints, step: int, steps: list[int], read: Read[Found]) -> Found:
    if step not in steps:
        there = f"there are {', '.join(map(str, steps))}; name one of them" if steps else "there is none; leave it out"
        raise RunError(f"run.resume_step: no checkpoint of step {step} in {checkpoints.directory}; {there}")
    return read(step)


def _refusal(checkpoints: Checkpoints, what: str, damaged: dict[int, str]) -> RunError:
    where = f"{checkpoints.directory}: "
    return RunError(listing(where + what, (_on_one_line(p.removeprefix(where)) for p in damaged.values())))


def _on_one_line(listed: str) -> str:
    """`step 4: a; b` of a listing of problems."""
    first, *problems = listed.splitlines()
    return f"{first.rpartition(':')[0]}: {'; '.join(p.strip(' -') for p in problems)}" if problems else first


def _archive(checkpoints: Checkpoints, steps: list[int], tell: Tell) -> None:
    """Move steps into the first `archive-N` that there is not."""
    if not steps:
        return
    home = checkpoints.directory
    name = next(name for number in count(1) if not (home / (name := f"archive-{number}")).exists())
    checkpoints.set_aside(steps, name)
    tell(f"{home}: {len(steps)} checkpoint(s) moved to {name}: step {', '.join(map(str, steps))}")
