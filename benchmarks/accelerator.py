"""Ours against PyTorch on one machine, in one command: tests that need a GPU, then steps of models at published sizes.

Each side of a job is a process of its own (`speed_ours.py`, `speed_torch.py`) that takes as many steps as it is told,
and the sides take turns, so that a slow spell of the machine hits all. A job has a time limit and the whole a budget;
what fails or comes too late loses nothing but itself. Reports medians with their spread, and the share of what a large
matrix product reaches on the spot; asserts nothing about time.
"""

import argparse
import contextlib
import datetime
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table
from speed_jobs import JOBS, Job, flops, make
from text_classification import HERE, LEAST_WIDTH, gpu, machine, names, revision, save, spread

Tree = dict[str, Any]
TESTS = "tests"
MOST_TESTS_SECONDS = 180
LAST_LINES = 25
MOST_OF_WHAT_IS_LEFT = 0.6  # of a job's time, for one side to become ready in; the rest is for those after it
FRESH = {  # both get large pages, neither takes the whole GPU; what is compiled beforehand is said by each job
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class Late(Exception):
    """A side did not answer in time, or ended."""


class Side:
    """One process of a job; answers come as lines of JSON, all else goes to its log."""

    def __init__(self, name: str, command: list[str], log: Path):
        self.name, self._log = name, log
        self.facts: Tree = {}
        self.rounds: list[Tree] = []
        kept = {
            "JAX_COMPILATION_CACHE_DIR": str(log.parent / "programs"),
            "TORCHINDUCTOR_CACHE_DIR": str(log.with_suffix(".inductor")),
            "BENCHMARK_LOCK": str(log.parents[1] / "lock"),  # kernels are picked by their time: one of ours at a time
        }
        paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                env={**os.environ, **FRESH, **kept, "PYTHONPATH": paths},
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.wait()

    def answer(self, deadline: float) -> Tree:
        """The next line of it."""
        try:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            raise Late("too late") from None
        if line is None:
            tail = self._log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise Late("ended: " + "\n".join(tail))
        return json.loads(line)

    def steps(self, count: int, deadline: float, traced: str = "") -> Tree:
        """Take so many steps; ours can write a profile of them to a directory."""
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{count} {traced}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are in the log
        return self.answer(deadline)

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("@"):
                self._lines.put(line[1:])
        self._lines.put(None)


@dataclass
class Trial:
    """A job under way: what its sides say, and their processes."""

    name: str
    job: Job
    dtype: str
    directory: Path
    found: Tree
    sides: list[Side] = field(default_factory=list)

    def close(self) -> None:
        """End the processes."""
        for side in self.sides:
            side.__exit__()
        self.sides.clear()


def main() -> None:
    """Run the jobs in turn, keep what came out after each, show it."""
    options = parse_options()
    deadline = time.monotonic() + 60 * options.minutes
    report: Tree = {
        "benchmark": Path(__file__).stem,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(),
        "options": vars(options),
        "tests": {},
        "jobs": {},
    }
    console = Console(width=max(Console().width, LEAST_WIDTH))
    jobs = [(name, dtype) for name in options.jobs if name != TESTS for dtype in options.dtypes]
    with ThreadPoolExecutor() as pool:
        tested: Future | None = None
        if TESTS in options.jobs:
            tested = pool.submit(tests, options, min(60 * options.minutes, MOST_TESTS_SECONDS))
            if options.together == 1:
                tested.result()
        for at in range(0, len(jobs), options.together):
            some, left = jobs[at : at + options.together], deadline - time.monotonic()
            limit = len(some) * min(options.limit, 2.5 * left / (len(jobs) - at))  # some need more than their share
            limit = min(left, limit)
            console.print(f"{', '.join(name for name, _ in some)}: at most {max(limit, 0):.0f} s")
            if limit < options.least:
                report["jobs"] |= {key(options, *job): {"error": "no time was left"} for job in some}
            else:
                run_some(options, some, time.monotonic() + limit, tested, report, console)
            save(options.out, report)
        report["tests"] = tested.result() if tested else {}
    save(options.out, report)
    console.print(table(report["jobs"]))
    for line in [*tests_lines(report["tests"]), *errors(report["jobs"]), f"every round: {options.out}"]:
        console.print(line, markup=False, highlight=False)


def key(options: argparse.Namespace, name: str, dtype: str) -> str:
    """What a job is called in the report."""
    return name if len(options.dtypes) == 1 else f"{name}, {dtype}"


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=names, default=",".join([TESTS, *JOBS]), help="in this order")
    parser.add_argument("--minutes", type=float, default=8, help="for all of them")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one job in one type")
    parser.add_argument("--least", type=float, default=10, help="seconds with which no job is begun any more")
    parser.add_argument("--together", type=int, default=1, help="jobs that are made ready at the same time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="about as long is a round of one side")
    parser.add_argument("--dtypes", type=names, default="bfloat16")
    parser.add_argument("--ours", nargs="+", default=[""], metavar="[JOB:]KEY=VALUE,...", help="in several ways")
    parser.add_argument(
        "--peers", type=names, help="variants of speed_torch.py, '' for none; left out: those of each job"
    )
    parser.add_argument("--ours-python", default=sys.executable, help="interpreter with jax")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument("--cpu", action="store_true", help="steps small enough for a CPU")
    parser.add_argument("--dry-run", action="store_true", help="all of it at sizes that a CPU does in seconds")
    parser.add_argument("--warm", action=argparse.BooleanOptionalAction, default=True, help="start ours again at last")
    parser.add_argument("--profiles", type=Path, help="where ours writes a profile of two steps of each job")
    parser.add_argument("--out", type=Path, help="report; left out: a new file in results/")
    options = parser.parse_args()
    unknown = set(options.jobs) - {TESTS, *JOBS}
    if unknown:
        parser.error(f"--jobs: {', '.join(sorted(unknown))}; there are {TESTS}, {', '.join(JOBS)}")
    if options.dry_run:
        options.rounds, options.seconds = 2, 0.1
    device = re.sub(r"[^a-z0-9]+", "-", (gpu() or machine()["cpu"] or "machine").lower()).strip("-")
    kind = "-dry" if options.dry_run else ""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M")
    options.out = options.out or HERE / "results" / f"{device}-{stamp}{kind}.json"
    return options


def tests(options: argparse.Namespace, limit: float) -> Tree:
    """The tests that need an accelerator; without one they are collected and skipped."""
    platforms = {"JAX_PLATFORMS": "cuda,cpu"} if gpu() else {}
    command = [options.ours_python, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider"]
    command += ["tests/nn", "tests/exactness/test_on_gpu.py"]
    begun = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, **FRESH, **platforms},
        )
        said = f"{done.stdout}\n{done.stderr}".strip().splitlines()[-LAST_LINES:]
        return {"code": done.returncode, "seconds": time.monotonic() - begun, "said": said}
    except subprocess.TimeoutExpired:
        return {"code": None, "seconds": limit, "said": ["too late"]}


def run_some(
    options: argparse.Namespace,
    jobs: list[tuple[str, str]],
    deadline: float,
    tested: Future | None,
    report: Tree,
    console: Console,
) -> None:
    """Jobs that are made ready, all of them before any is measured; each is measured by itself."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch, contextlib.ExitStack() as stack:
        trials = []
        for number, (name, dtype) in enumerate(jobs):
            job = JOBS[name].shrunk() if options.dry_run else JOBS[name].slowed() if options.cpu else JOBS[name]
            (Path(scratch) / str(number)).mkdir()
            directory = make(job, Path(scratch) / str(number) / job.name)
            trials.append(Trial(key(options, name, dtype), job, dtype, directory, {"dtype": dtype, "sides": {}}))
            stack.callback(trials[-1].close)
            report["jobs"][trials[-1].name] = trials[-1].found
        make_ready(options, trials, deadline, console)
        if tested:
            tested.result()
        for number, trial in enumerate(trials):
            left = deadline - time.monotonic()
            measure(options, trial, time.monotonic() + left / (len(trials) - number), console)
            save(options.out, report)


def make_ready(options: argparse.Namespace, trials: list[Trial], deadline: float, console: Console) -> None:
    """Every side at its first step: of a job that is alone, one side after the other."""
    left = deadline - time.monotonic()
    with ThreadPoolExecutor() as pool:
        for trial in trials:
            for name, command in commands(options, trial).items():
                side = Side(name, command, trial.directory.parent / f"{len(trial.sides)}.log")
                trial.sides.append(side)

                def wait(trial: Trial = trial, side: Side = side, room: float = left) -> None:
                    trial.found["sides"][side.name] = facts = ready(side, deadline - (1 - MOST_OF_WHAT_IS_LEFT) * room)
                    console.print(f"  {trial.name}, {side.name}: {said(facts)}", markup=False, highlight=False)

                trial.found["sides"][name] = {}
                waiting = pool.submit(wait)
                if options.together == 1:
                    waiting.result()
                    left = deadline - time.monotonic()


def measure(options: argparse.Namespace, trial: Trial, deadline: float, console: Console) -> None:
    """The sides of a job in turns, and ours once more to its first step, with what it compiled before."""
    found = trial.found["sides"]
    commands_, logs = commands(options, trial), trial.directory.parent
    in_turns(options, [side for side in trial.sides if "error" not in found[side.name]], found, deadline)
    for number, side in enumerate(trial.sides):
        if options.profiles and side.rounds and side.name.startswith("ours"):
            with contextlib.suppress(Late):
                side.steps(2, deadline, str(options.profiles / f"{trial.name}-{number}"))
    trial.close()
    best = max((side["product"] for side in found.values() if "product" in side), default=0.0)
    for side in found.values():
        if side.get("rounds"):  # of a frozen backbone, ours reads features from memory
            side |= figures(trial.job, side["rounds"], 0.0 if trial.job.trained == "head" else best)
    ours = next(iter(commands_))
    if options.warm and "rounds" in found[ours] and time.monotonic() < deadline:
        with Side(ours, commands_[ours], logs / "warm.log") as side:
            found[ours]["warm_first_step"] = ready(side, deadline).get("first_step")


def commands(options: argparse.Namespace, trial: Trial) -> dict[str, list[str]]:
    """Name -> command of each side."""
    directory, dtype, found = trial.directory, trial.dtype, {}
    for number, how in enumerate(options.ours):
        job, _, of_job = how.partition(":")
        how = of_job if job in JOBS else how
        if job in JOBS and job != trial.job.name:
            continue
        (directory / str(number)).mkdir(exist_ok=True)
        for entry in ("model", "job.json", "rows.jsonl", "images.npz"):
            if (directory / entry).exists() and not (directory / str(number) / entry).exists():
                (directory / str(number) / entry).symlink_to(directory / entry)
        settings = [word for word in how.split(",") if word]
        program = [options.ours_python, str(HERE / "speed_ours.py"), str(directory / str(number)), dtype]
        found[" ".join(["ours", *settings])] = [*program, *settings]
    for peer in trial.job.peers if options.peers is None else options.peers:
        found[peer] = [options.peer_python, str(HERE / "speed_torch.py"), str(directory), dtype, peer]
    return found


def ready(side: Side, deadline: float) -> Tree:
    """What a side says when its first step is done."""
    try:
        facts = side.answer(deadline)
        return {"error": f"not available: {facts['unavailable']}"} if "unavailable" in facts else facts
    except Late as late:
        side.__exit__()
        return {"error": str(late)}


def in_turns(options: argparse.Namespace, sides: list[Side], found: Tree, deadline: float) -> None:
    """Rounds of about as many seconds; the steps of each side are counted on two steps that do not count.

    Nor does the first step of a turn: the memory of a side that waited may have gone back to the host of a virtual
    machine, which takes seconds to give it again. A side that is late, as one that compiles again and again, ends.
    """
    counts: dict[str, int] = {}
    for number in range(options.rounds + 2):
        for side in list(sides):
            now = time.monotonic()
            until = deadline if number > 1 else now + (deadline - now) / 2
            try:
                side.steps(1, until)
                one = side.steps(2 if number < 2 else counts[side.name], until)
            except Late as late:
                side.__exit__()
                sides.remove(side)
                if not side.rounds:
                    found[side.name]["error"] = str(late)
                continue
            counts[side.name] = max(1, round(options.seconds * one["steps"] / one["seconds"]))
            if number > 1:
                side.rounds.append(one)
                found[side.name]["rounds"] = side.rounds


def figures(job: Job, rounds: list[Tree], product: float) -> Tree:
    """What the rounds come to."""
    unit = "documents" if job.task == "image" else "tokens"
    need = [flops(job, one["tokens"], one["documents"]) / one["seconds"] for one in rounds]
    return {
        "unit": "images/s" if unit == "documents" else "tokens/s",
        "rate": spread([one[unit] / one["seconds"] for one in rounds]),
        "step_seconds": spread([one["seconds"] / one["steps"] for one in rounds]),
        "flops": spread(need),
        "share_of_product": spread(need)["median"] / product if product else None,
        "peak_bytes": rounds[-1]["peak_bytes"],
    }


def said(facts: Tree) -> str:
    """A side in one line, as soon as it is ready."""
    return facts.get("error", "").splitlines()[-1] if "error" in facts else f"first step {facts['first_step']:.1f} s"


def table(jobs: Tree) -> Table:
    """A row for each side of each job."""
    headings = (
        "job",
        "side",
        "real tokens or images a second",
        "ours / it",
        "of product, %",
        "peak, GiB",
        "first step, s",
        "again, s",
    )
    made = Table(*headings, title="median (least – most) of rounds in turns")
    for name, job in jobs.items():
        sides = job.get("sides", {})
        ours = next((side["rate"]["median"] for side in sides.values() if "rate" in side), None)
        for side, facts in sides.items():
            if "rate" not in facts:
                made.add_row(name, side, "–", "", "", "", "", "")
                continue
            rate, share = facts["rate"], facts["share_of_product"] or 0
            first = next(iter(sides.values()))
            ratio = f"{ours / rate['median']:.2f}" if ours and "rate" in first and facts is not first else ""
            shown = f"{rate['median']:,.0f} ({rate['min']:,.0f} – {rate['max']:,.0f}) {facts['unit']}"
            memory = f"{facts['peak_bytes'] / 2**30:.1f}"
            warm = f"{facts['warm_first_step']:.0f}" if facts.get("warm_first_step") else ""
            made.add_row(name, side, shown, ratio, f"{100 * share:.0f}", memory, f"{facts['first_step']:.0f}", warm)
        made.add_section()
    return made


def errors(jobs: Tree) -> list[str]:
    """What went wrong, for people."""
    found = [f"{name}: {job['error']}" for name, job in jobs.items() if "error" in job]
    for name, job in jobs.items():
        sides = job.get("sides", {}).items()
        found += [f"{name}, {side}: {facts['error']}" for side, facts in sides if "error" in facts]
    return found


def tests_lines(found: Tree) -> list[str]:
    """The tests in a few lines."""
    return [f"tests: code {found['code']}, {found['seconds']:.0f} s", *found["said"][-5:]] if found else []


if __name__ == "__main__":
    main()
