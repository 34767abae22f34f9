"""What is done with a run: train it, evaluate it, export it. What the command line does is these calls."""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sft_jax import assets, grid, machine
from sft_jax import mesh as meshes
from sft_jax.data.batch import Batch
from sft_jax.data.loader import padding_share
from sft_jax.data.text import fingerprint
from sft_jax.errors import ConfigError, RunError, did_you_mean
from sft_jax.heads import on_features
from sft_jax.infer.answered import Answered, answering
from sft_jax.inputs import audited
from sft_jax.nn.template import Params
from sft_jax.publish import publish
from sft_jax.report import audit
from sft_jax.report.page import write_report
from sft_jax.report.predictions import FILE as PREDICTIONS
from sft_jax.report.predictions import write_predictions
from sft_jax.report.review import summarise
from sft_jax.run import Run, eval_program, initial, plan, restore, train_program
from sft_jax.scores import Scores, scores_of
from sft_jax.train import directory, optim, step
from sft_jax.train.checkpoint import Checkpoints, Progress
from sft_jax.train.evaluate import evaluate as evaluate_split
from sft_jax.train.ledger import FILE, LOOP, Ledger, read_account
from sft_jax.train.loop import Timing
from sft_jax.train.loop import train as train_loop
from sft_jax.train.manifest import MODEL_CONFIG, local_files, manifest, sha256, split, versions
from sft_jax.train.profile import Trace, programs
from sft_jax.train.report import MetricsFile, SamplesFile, Screen, Sink, read_metrics, size, speed
from sft_jax.train.resume import Tell, newest, resume
from sft_jax.train.state import TrainState
from sft_jax.train.trackers import Events, Wandb

SPENT = ("tokens_per_second", "seconds", "programs", "peak_memory_bytes")  # of a summary: what training took
AUDITED = 8  # rows of which a run directory keeps what is supervised
Answering = Callable[[Params], Answered]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    directory: Path
    steps: int
    best_step: int | None
    validation: dict[str, float]  # of the best step; empty without a validation split
    test: Scores | None
    baselines: dict[str, float]  # of the task's headline metric on the test split
    summary: dict[str, Any]


def train(run: Run, screen: Screen | None = None) -> Result:
    """Train, or go on where the run directory stopped; test the best step, export it and sum up."""
    first = meshes.is_first_process()
    with directory.held(run.directory) if first else nullcontext():
        now = begin_directory(run)
        with (
            directory.attempt(run.directory, now) if first else nullcontext(),
            Ledger(run.directory / FILE if first else None, machine.started()) as ledger,
        ):
            return _train(run, screen, ledger)


def _train(run: Run, screen: Screen | None, ledger: Ledger) -> Result:
    sinks: list[Sink] = []
    told: list[str] = []
    checkpoints = _checkpoints(run, partial(_tell, sinks))
    state, frozen = initial(run)
    found = resume(checkpoints, run.config.run, partial(restore, run, checkpoints), told.append)
    state, progress = found or (state, Progress())
    extended = _extended(run, progress, told.append)
    answers = answers_to(run, "validation")
    if meshes.is_first_process():
        sinks += [*_files(run, progress.step), *([screen] if screen else [])]
    for text in [*told, *([f"layers are looped over: {run.looped}"] if run.looped else [])]:
        _tell(sinks, text)
    run, beside = on_features(run, frozen, partial(_tell, sinks))
    run = grid.chosen(run, beside, state.params, partial(_tell, sinks))
    program, validate = train_program(run, state, beside), eval_program(run, state.weights, beside)
    timing = None
    if not (progress.finished or progress.step >= run.batches.steps):
        with ledger("compile"):
            alone = replace(run, batches=replace(run.batches, workers=0))  # one batch is worth no process
            _compile(alone.stream(progress.step), program, sinks)
        state, timing = train_loop(
            state,
            beside,
            progress,
            plan=replace(plan(run), extended=extended),
            program=program,
            batches=run.stream(progress.step),
            put=partial(run.put, stacked=run.template is not None),
            rate=optim.learning_rate(run.config.optim, run.batches.steps),
            validate=lambda params, frozen: _validated(run, validate, params, frozen, ledger, answers, progress, sinks),
            checkpoints=checkpoints,
            sinks=sinks,
            ledger=ledger,
            trace=Trace(run.config.train.profile, run.directory / "profile"),
        )
    ledger.end_loop()
    if screen:
        screen.stop()
    if progress.best_step not in (None, progress.step):
        state, _ = _best(run, checkpoints, progress.best_step)
    checkpoints.close()
    return _finish(run, state, frozen, beside, progress, timing, program, validate, sinks)


def _extended(run: Run, progress: Progress, tell: Tell) -> int:
    """The last step after which the run was extended, 0 where it was not; a run that was done there is done no more."""
    first = meshes.is_first_process()
    found = directory.extensions(run.directory) if first else []
    last = meshes.of_first([found[-1]["step"], found[-1]["before"]] if found else [])
    ended = meshes.of_first([entry["step"] for entry in found])
    if progress.finished and progress.step in ended:
        progress.finished = False
    if last and progress.step == last[0] and run.batches.steps > last[1]:
        was, now = (optim.learning_rate(run.config.optim, steps) for steps in (last[1], run.batches.steps))
        tell(
            f"extended from {last[1]} to {run.batches.steps} steps, goes on at step {last[0] + 1}; the learning rate "
            f"is {np.asarray(now(last[0])):.3e} there, as in a schedule of {run.batches.steps} steps, and was "
            f"{np.asarray(was(max(0, last[0] - 1))):.3e} at the step before"
        )
    return last[0] if last else 0


def evaluate(run: Run, split: str, at: str = "best", tell: Tell = _to_stderr) -> tuple[Scores, int]:
    """(scores, step) of the best or latest step of a run on one of its splits; `tell` hears what was left out."""
    if split not in run.evals:
        raise ConfigError(f"split '{split}': this run has {', '.join(run.evals) or 'none'}; name one of them")
    _check_read(run, {"train", split})
    state, frozen, number = trained(run, at, tell)
    return _scored(run, split, eval_program(run, state.weights, frozen), state.weights, frozen), number


def export(run: Run, out: Path, at: str = "best", tell: Tell = _to_stderr) -> int:
    """Write the best or latest step of a run as a Hugging Face directory; gives that step."""
    _check_read(run, {"train"})
    state, frozen, number = trained(run, at, tell)
    publish(run, state, frozen, out, {}, replace=False)
    return number


def score(
    run: Run, split: str, program: step.Program, params: Params, frozen: Params, answered: Answered | None = None
) -> Scores:
    """What the run's task says of these parameters on one of its splits, and of what they answered there."""
    task, examples = run.task, run.examples(split)
    found = evaluate_split(program, params, frozen, run.evals[split], run.put, run.config.data.prefetch, task.grain)
    return scores_of(task, found, examples, run.groups, answered)


def _scored(run: Run, split: str, program: step.Program, params: Params, frozen: Params) -> Scores:
    """The same, answers and all."""
    answering = answers_to(run, split)
    return score(run, split, program, params, frozen, answering({**params, **frozen}) if answering else None)


def trained(run: Run, at: str, tell: Tell = _to_stderr) -> tuple[TrainState, Params, int]:
    """(state, frozen parameters, step) of the `best` or `latest` checkpoint of a run directory, which may be in use."""
    if at not in ("best", "latest"):
        raise ConfigError(f"--at: expected best or latest, got '{at}'{did_you_mean(at, ('best', 'latest'))}")
    checkpoints = _checkpoints(run)
    _, frozen = initial(run)
    progress, damaged = newest(checkpoints, checkpoints.progress)
    if at == "best" and progress.best_step is not None:
        state, progress = _best(run, checkpoints, progress.best_step)
    else:
        (state, progress), damaged = newest(checkpoints, partial(restore, run, checkpoints))
    if meshes.is_first_process():
        for problem in damaged.values():
            tell(problem)
    return state, frozen, progress.step


def begin_directory(run: Run) -> dict[str, Any]:
    """Create the run directory, or see that it reads what it began with; gives the manifest of now."""
    config = run.config
    now = manifest(
        directory.settings(config),
        config.seed,
        run.mesh,
        data=_splits(run, run.data),
        files=[(name, Path(assets.resolve(name)).expanduser()) for name in local_files(config.data.source)],
        model=_model(run),
    )
    meshes.wait_for_all("run directory checked")  # or a slow process would find it in use by this very run
    if meshes.is_first_process():
        directory.begin(config, run.directory, now, run.batches.steps, run.batches.order.steps_per_epoch)
        directory.write_json(run.directory / "data.json", run.report.plain(), sort=False)
        first = audited(run.task, run.rows["train"], run.data["train"], run.tokenizer, range(AUDITED))
        if run.task.supervision is not None:
            audit.write_lines(first, run.directory / audit.FILE)
    return now


def _check_read(run: Run, splits: Collection[str]) -> None:
    """See that a run reads now what it was trained with, of these splits."""
    directory.check_read(run.directory, {"data": _splits(run, splits), **_model(run)})


def _splits(run: Run, splits: Collection[str]) -> dict[str, Any]:
    """What a manifest says of these splits."""
    scored = {name: (*part.texts, part.targets) for name, part in run.rows.items() if name != "train"}
    return {name: split(part, scored.get(name)) for name, part in run.data.items() if name in splits}


def _model(run: Run) -> dict[str, Any]:
    """What a manifest says of the task and the pretrained model."""
    return {
        "task": sha256(run.task.to_hf()),
        "tokenizer": fingerprint(run.task.reader.files(run.checkpoint.directory)),
        "weights": {**run.checkpoint.digest(), MODEL_CONFIG: sha256(run.checkpoint.config)},
    }


def peak_memory() -> int:
    """The most memory held: of the first device where it says, else of this process; bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use") or machine.peak_memory())


def _files(run: Run, step: int) -> list[Sink]:
    """Where the figures of a run that goes on after `step` are written to."""
    home, section = run.directory, run.config.report
    metrics = MetricsFile(home / "metrics.jsonl", step)
    samples = SamplesFile(home / "samples.jsonl", step)
    sinks: list[Sink] = [metrics, samples, Events(home / "events", home / "metrics.jsonl")]
    return sinks if section.wandb is None else [*sinks, Wandb(section.wandb, home, run.config.model_dump(mode="json"))]


def _checkpoints(run: Run, tell: Tell | None = None) -> Checkpoints:
    section = run.config.checkpoint
    return Checkpoints(run.directory / "checkpoints", section.keep, tell if section.on_error == "warn" else None)


def _best(run: Run, checkpoints: Checkpoints, number: int) -> tuple[TrainState, Progress]:
    try:
        return restore(run, checkpoints, number)
    except RunError as error:
        raise RunError(f"{error}\n{number} is the best step; evaluate and export also take --at latest") from None


def _tell(sinks: Sequence[Sink], text: str) -> None:
    for sink in sinks:
        sink.emit("note", {"text": text})


def _compile(batches: Iterator[Batch], program: step.Program, sinks: list[Sink]) -> None:
    """Compile for the shape of the first batch; others follow when they are met."""
    executable = program.compile(next(batches))
    held, temporary = step.needs(executable)
    text = f"compiled in {program.seconds:.1f} s; a step needs {size(held + temporary)}"
    _tell(sinks, f"{text} ({size(temporary)} of it temporary)")


def answers_to(run: Run, split: str) -> Answering | None:
    """What answers the first rows of a split, of a task that answers in words; only validation shows some."""
    section, data = run.config.eval, run.config.data
    return answering(
        run.model,
        run.task,
        run.tokenizer,
        run.rows.get(split),
        _answerable(run, split),
        data.max_length,
        run.dtype,
        scored=section.answers,
        shown=section.samples if split == "validation" else 0,
        batch_size=section.batch_size,
    )


def _answerable(run: Run, split: str) -> list[int]:
    """The rows of a split that became documents, in order."""
    return np.unique(run.data[split].rows).tolist() if split in run.data else []


def _validated(
    run: Run,
    program: step.Program,
    params: Params,
    frozen: Params,
    ledger: Ledger,
    answering: Answering | None,
    progress: Progress,
    sinks: Sequence[Sink],
) -> dict[str, Any]:
    with ledger("compile"):  # the first time
        program.compile(run.evals["validation"][0])
    with ledger("evaluation"):
        answered = answering({**params, **frozen}) if answering else None
        if answered and answered.samples:
            for sink in sinks:
                sink.emit("samples", {"step": progress.step, "samples": answered.samples})
        return score(run, "validation", program, params, frozen, answered).values()


def _finish(
    run: Run,
    state: TrainState,
    frozen: Params,
    beside: Params,
    progress: Progress,
    timing: Timing | None,
    program: step.Program,
    evaluator: step.Program,
    sinks: list[Sink],
) -> Result:
    """Test, export and sum up."""
    test = _scored(run, "test", evaluator, state.weights, beside) if "test" in run.evals else None
    if test:
        for sink in sinks:
            sink.emit("test", {"step": progress.best_step or progress.step, "split": "test", **test.values()})
    publish(run, state, frozen, run.directory / "model", test.metrics if test else {}, replace=True)
    best = next((e for e in progress.evaluations if e["step"] == progress.best_step), {})
    validation = {k: v for k, v in best.items() if k in run.task.metric_names}
    spent = _spent_before(run) if timing is None else _spent(run, timing, program, evaluator)
    summary = {
        "steps": progress.step,
        "best_step": progress.best_step,
        **spent,
        "unit": run.task.unit,  # of these
        "padding_share": padding_share(run.batches),
        "validation": validation,
        "headline": run.task.headline,
        "test": test.values() if test else {},
        "versions": versions(),
    }
    scored = _baselines(run) if run.config.eval.baselines and test else {}
    summary["baselines"] = scored
    if meshes.is_first_process():
        directory.write_json(run.directory / "summary.json", summary)
        _report(run, test, sinks)
    for sink in sinks:
        sink.emit("done", {})
    return Result(run.directory, progress.step, progress.best_step, validation, test, scored, summary)


def _spent(run: Run, timing: Timing, program: step.Program, evaluator: step.Program) -> dict[str, Any]:
    """How fast a process trained, and what that took."""
    now, begun = time.time(), machine.started()
    return {
        "tokens_per_second": timing.tokens_per_second,
        "seconds": {
            "to_first_step": timing.first_step - begun,
            "compile": program.seconds + evaluator.seconds,
            "train": timing.seconds,
            "waiting": timing.waiting,
            "total": now - begun,
        },
        "programs": programs(),
        "peak_memory_bytes": peak_memory(),
    }


def _spent_before(run: Run) -> dict[str, Any]:
    """The same of a run that was done before this process: as it summed up, or as its ledger and its metrics say."""
    before = directory.read_summary(run.directory)
    if spent := {key: before[key] for key in SPENT if key in before}:
        return spent
    seconds = read_account(run.directory).seconds
    return {
        "tokens_per_second": speed(read_metrics(run.directory / "metrics.jsonl")),
        "seconds": {
            "to_first_step": seconds["start"],
            "compile": seconds["compile"],
            "train": sum(seconds[part] for part in LOOP),
            "waiting": seconds["wait"],
            "total": sum(seconds.values()),
        },
        "programs": programs(),
        "peak_memory_bytes": peak_memory(),
    }


def _report(run: Run, test: Scores | None, sinks: list[Sink]) -> None:
    """Write what is kept of the test split, and the page; the last thing of all, so that it cannot lose a run."""
    try:
        if test:
            rows = run.examples("test"), run.rows["test"]
            write_predictions(run.directory / PREDICTIONS, run.task, test.kept, *rows, test.answers)
            directory.write_json(run.directory / "review.json", _review(run, test))
        write_report(run.directory)
    except Exception as error:
        text = f"{run.directory}: no report was written ({type(error).__name__}: {error}); try: sft-jax report"
        for sink in sinks:
            sink.emit("note", {"text": f"{text} {run.directory}"})


def _review(run: Run, test: Scores) -> dict[str, Any]:
    """How the rows of the test split were answered, as plain data."""
    task, encoded = run.task, run.data["test"]
    groups: list[str] | None = None
    if run.groups:
        names = dict(zip(encoded.rows.tolist(), encoded.documents["group"].tolist(), strict=True))
        groups = [run.groups[names[row]] if row in names else "" for row in range(len(run.rows["test"]))]
    lengths = np.bincount(encoded.rows, encoded.lengths, len(run.rows["test"])).astype(np.int64)
    review = task.review(test.kept, run.examples("test"))
    found = summarise(review, run.rows["test"], task.texts, lengths, groups, run.config.report.mistakes)
    return {**found, "headline": task.headline, "tables": list(test.tables.items())}


def _baselines(run: Run) -> dict[str, float]:
    """The headline metric of what needs no pretrained model, on the rows of this run that have it of the model."""
    test = run.examples("test")
    if run.task.headline in run.task.answer_metric_names:
        answered = _answerable(run, "test")[: run.config.eval.answers]
        test = test.select(np.flatnonzero(np.isin(test.encoded.rows, answered)))
    return run.task.baselines(run.examples("train"), test)
