"""From a configuration to a run: the only module that knows everything.

`prepare` builds what a run consists of; `jobs.py` does something with it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sft_jax import assets, checks, machine
from sft_jax import mesh as meshes
from sft_jax.adapt.begin import begin, few_bits, standing_still
from sft_jax.config.data import Files, Mixture
from sft_jax.config.read import read_config
from sft_jax.config.schema import Config, RunSection
from sft_jax.data.augment import augmentation
from sft_jax.data.batch import Batch, Encoded, Shape, declare, one_row, sizes, up_to
from sft_jax.data.loader import EvalBatches, Stacked, TrainBatches, padding_share, prefetch
from sft_jax.data.order import Mixing, Order
from sft_jax.data.packs import plan as plan_packs
from sft_jax.data.pixels import blend, changed
from sft_jax.data.prepare import Prepared
from sft_jax.data.prepare import prepare as prepare_rows
from sft_jax.data.report import DataReport
from sft_jax.data.sources import load_rows
from sft_jax.errors import ConfigError, DataError, RunError
from sft_jax.models.family import Model, build_model, load_model
from sft_jax.nn.kernels import Hardware
from sft_jax.nn.quantised import Kind
from sft_jax.nn.template import Params, Template
from sft_jax.tasks.task import Audit, Examples, Task, build_task
from sft_jax.train import depth, directory, features, optim, step, trackers
from sft_jax.train.checkpoint import Checkpoints, Progress
from sft_jax.train.loop import Plan, edges
from sft_jax.train.state import (
    Begin,
    Placement,
    TrainState,
    abstract_state,
    beginning,
    frozen_paths,
    initial_state,
    place,
)
from sft_jax.weights.files import Checkpoint, find, open_checkpoint
from sft_jax.weights.table import Matched, match

MOST_GROUPS = 100  # each is counted apart, on the device
AT_ONCE = 500  # steps of a head on features that one call takes at most


@dataclass(frozen=True)
class Run:
    """Everything that a configuration stands for, built once; no weights are read and nothing is compiled yet."""

    config: Config
    mesh: Mesh
    task: Task
    rows: dict[str, Prepared]
    data: dict[str, Encoded]
    groups: tuple[str, ...]  # names of the groups that are scored apart; none without `eval.group`
    checkpoint: Checkpoint  # the pretrained one
    tokenizer: Any  # or what else reads what the model is given: `Task.reader`
    model: Model
    matched: Matched
    frozen: frozenset[str]
    optimizer: optax.GradientTransformation
    placement: Placement
    batches: TrainBatches
    evals: dict[str, EvalBatches]
    report: DataReport
    audit: Audit | None = None  # of the training documents, where the task has one
    recomputed: str | None = None  # why features are not computed once; None where they are
    looped: str | None = None  # why layers are not scanned over as `train.scan` asks; None where they are as asked
    template: Template | None = None  # of the head alone, where it is trained on them
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
        return sorted(set(self.model.template.keys) - self.model.template.stats - self.frozen)

    @property
    def few(self) -> dict[str, Kind]:
        """The kernels under adapters that are held in few bits, and how."""
        return few_bits(self.config.adapter, self.model.adapters, self.model.table.axes)

    def examples(self, split: str) -> Examples:
        """The documents of a split with the texts and targets of their rows."""
        return Examples(self.data[split], self.rows[split].texts, self.rows[split].targets)

    @property
    def begin(self) -> Begin:
        """What makes the training state at step 0."""
        return beginning(self.optimizer, self.config.train)

    def put(self, batch: Mapping[str, np.ndarray], *, stacked: bool = False) -> Params:
        """A host batch onto the mesh."""
        return meshes.put(batch, meshes.batch_sharding(self.mesh, stacked=stacked))

    def stream(self, begin: int) -> Iterator[Batch]:
        """The batches of training from a step on; of a head on features, those of many steps stacked."""
        ahead = self.config.data.prefetch
        if self.template is None:
            return prefetch(self.batches, begin, ahead)
        return prefetch(Stacked(self.batches, edges(plan(self), begin, AT_ONCE)), 0, ahead)


def prepare(config: Config) -> Run:
    """Read rows, headers and tokenizer, and lay out what will happen; every user's mistake is found here."""
    meshes.start_processes()
    directory.check(config, Path(config.run.dir).expanduser())
    trackers.check(config.report)
    mesh = meshes.make_mesh(config.mesh)
    checks.determinism(config.run, mesh.devices.flat[0].platform)
    depth.check(config, mesh)
    task, rows, report = _rows(config)
    pretrained = config.model.weights == "pretrained"
    found = find(assets.resolve(config.model.source), config.model.revision, weights=pretrained)
    checkpoint = open_checkpoint(found, weights=pretrained)
    model = _model(config, mesh, checkpoint, task)
    checks.length(config.data.max_length, model, config.model.source)
    tokenizer = task.reader.load(checkpoint.directory)
    data = _encoded(config, task, rows, tokenizer)
    groups, data = _grouped(config.eval.group, rows, data)
    task = task.fit(data["train"])
    checks.ids(model, data)
    checks.target_length(model, data, config.model.source)
    audit = checks.audit(task, Examples(data["train"], rows["train"].texts, rows["train"].targets), tokenizer)
    anew = checks.begins_anew(config.model, model, checkpoint.config)
    matched = match(model.table, model.template.shapes, checkpoint.shapes, str(checkpoint.directory), anew=anew)
    checks.head(task, matched.loaded, checkpoint.config)
    if config.adapter:
        checks.adapter_source(config.adapter, model, task)
    return _laid_out(
        config, mesh, task, rows, data, groups, checkpoint, tokenizer, model, matched, report=report, audit=audit
    )


def otherwise(run: Run, config: Config) -> Run:
    """The same rows and model under other settings of mesh, microbatches and depth; nothing is read again."""
    mesh = meshes.make_mesh(config.mesh)
    depth.check(config, mesh)
    report, model, parts = run.report, _model(config, mesh, run.checkpoint, run.task), (run.groups, run.checkpoint)
    rest = (run.tokenizer, model, run.matched)
    return _laid_out(config, mesh, run.task, run.rows, run.data, *parts, *rest, report=report, audit=run.audit)


def _model(config: Config, mesh: Mesh, checkpoint: Checkpoint, task: Task) -> Model:
    section, train = config.model, config.train
    given = (section.source, section.dropout, section.embedding_noise, config.adapter, train.remat, train.attention)
    hardware = Hardware(mesh.devices.flat[0].platform, mesh.size, train.compute_dtype)
    return build_model(checkpoint.config, task.head, *given, hardware)


def _laid_out(
    config: Config,
    mesh: Mesh,
    task: Task,
    rows: dict[str, Prepared],
    data: dict[str, Encoded],
    groups: tuple[str, ...],
    checkpoint: Checkpoint,
    tokenizer: Any,
    model: Model,
    matched: Matched,
    *,
    report: DataReport,
    audit: Audit | None,
) -> Run:
    """What is read, as batches and state over a mesh."""
    batches, evals = _batches(config, mesh, rows, data, tokenizer)
    new = matched.initialised if matched.loaded else ()  # all is new where no weights are read
    still = standing_still(config.adapter, model.template.leaves, model.adapters, new, model.head.kind)
    frozen = frozen_paths(config.train.freeze, model.template, still)
    template, looped = depth.held(config, model.template, frozen, matched.loaded, batches.steps)
    model, frozen = replace(model, template=template), depth.by_key(template, frozen)
    recomputed = features.obstacle(model.template, task, frozen, batches, config.train.cache_features)
    checks.features(config.train, recomputed)
    checks.profile(config.train, batches.steps)
    optimizer = build_optimizer(config, model, batches.steps)
    placement = place(mesh, model.template, model.axes, frozen, beginning(optimizer, config.train))
    return Run(
        config,
        mesh,
        task,
        rows,
        data,
        groups,
        checkpoint,
        tokenizer,
        model,
        matched,
        frozen,
        optimizer,
        placement,
        batches,
        evals,
        _with_tokens(report, data, batches, evals),
        audit,
        recomputed,
        looped,
    )


def report_data(config: Config) -> DataReport:
    """What becomes of the rows, and what they are in tokens: the tokenizer is read, and no weights."""
    mesh = meshes.make_mesh(config.mesh)
    task, rows, report = _rows(config)
    found = find(assets.resolve(config.model.source), config.model.revision, weights=False)
    tokenizer = task.reader.load(found)
    data = _encoded(config, task, rows, tokenizer)
    return _with_tokens(report, data, *_batches(config, mesh, rows, data, tokenizer))


def open_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run that a directory holds; `overrides` may say on which mesh to open it."""
    file = path / "config.yaml"
    if not file.is_file():
        raise RunError(f"{path}: holds no run (no config.yaml); give the run.dir of a `sft-jax train`")
    return prepare(read_config([file], overrides).model_copy(update={"run": RunSection(dir=str(path), resume="must")}))


def build_optimizer(config: Config, model: Model, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps, by the paths of all that can be trained."""
    template = model.template
    paths = template.paths(key for key in template.keys if key not in template.stats)
    return optim.build_optimizer(config.optim, steps, paths, config.train.unfreeze, template.held)


def initial(run: Run) -> tuple[TrainState, Params]:
    """(state, frozen parameters) before the first step: the weights are read here."""
    anew = checks.begins_anew(run.config.model, run.model, run.checkpoint.config)
    _, arrays = load_model(run.model, run.checkpoint, anew=anew)
    section = run.config.adapter
    source = checks.adapter_source(section, run.model, run.task) if section else {}
    return initial_state(
        run.model.template,
        begin(section, run.model.adapters, arrays | source) if section else arrays,
        run.frozen,
        run.begin,
        run.placement,
        run.config.seed.init,
        run.dtype,
    )


def restore(run: Run, checkpoints: Checkpoints, number: int) -> tuple[TrainState, Progress]:
    """A checkpoint onto the mesh of now, however its layers were held (`train.scan`)."""
    before = depth.saved(run.model.template, checkpoints.leaves(number))
    there = run if before is None else _holding(run, before)
    abstract = abstract_state(there.model.template, there.frozen, there.begin)
    state, progress = checkpoints.restore(abstract, there.placement.state, number)
    if before is not None:
        wanted = abstract_state(run.model.template, run.frozen, run.begin)
        state = depth.held_as(state, before, run.model.template, wanted, run.placement.state)
    return state, progress


def _holding(run: Run, template: Template) -> Run:
    """The same run with its layers held in another way."""
    model = replace(run.model, template=template)
    frozen = depth.by_key(template, run.model.template.paths(run.frozen))
    optimizer = build_optimizer(run.config, model, run.batches.steps)
    begin = beginning(optimizer, run.config.train)
    placement = place(run.mesh, template, model.axes, frozen, begin)
    return replace(run, model=model, frozen=frozen, optimizer=optimizer, placement=placement)


def train_program(run: Run, state: TrainState, frozen: Params) -> step.Program:
    """The training step of a run."""
    function = step.make_train_step(
        run.template or run.model.template,
        run.task,
        run.optimizer,
        section=run.config.train,
        compute_dtype=run.dtype,
        seed=run.config.seed.dropout,
    )
    if run.template is None:
        return step.train_program(function, run.placement, state, frozen)
    return step.train_program(features.many_steps(function), run.placement, state, frozen, stacked=True)


def eval_program(run: Run, params: Params, frozen: Params) -> step.Program:
    """The evaluation step of a run."""
    template = run.template or run.model.template
    function = step.make_eval_step(template, run.task, groups=len(run.groups), compute_dtype=run.dtype)
    return step.eval_program(function, run.placement, params, frozen)


def plan(run: Run) -> Plan:
    """When things happen, in steps."""
    config = run.config
    every = {"epoch": run.batches.order.steps_per_epoch, "never": None}.get(str(config.eval.every), config.eval.every)
    return Plan(
        steps=run.batches.steps,
        log_every=config.train.log_every,
        eval_every=every if isinstance(every, int) else None,
        save_every=config.checkpoint.every,
        best_metric=_best_metric(config, run.task),
        best_mode=_best_mode(config, run.task),
        patience=config.eval.patience,
        min_delta=config.eval.min_delta,
        max_skipped=config.train.max_skipped,
    )


def _best_metric(config: Config, task: Task) -> str:
    return config.eval.best_metric or task.headline


def _best_mode(config: Config, task: Task) -> str:
    least = "min" if _best_metric(config, task) in task.least_is_best else "max"
    return least if config.eval.best_mode == "auto" else config.eval.best_mode


def _rows(config: Config) -> tuple[Task, dict[str, Prepared], DataReport]:
    """(task, the rows that are used, what became of all of them)."""
    found = load_rows(_local(config.data.source))
    task = build_task(config.task, found)
    checks.metric(_best_metric(config, task), task, config.eval.answers)
    checks.changes(config.data, task)
    functions = (task.read, task.targets, task.classes, task.label_counts)
    return task, *prepare_rows(found, config.data, *functions, config.seed.data)


def _encoded(config: Config, task: Task, rows: Mapping[str, Prepared], tokenizer: Any) -> dict[str, Encoded]:
    """The splits in tokens; from the user's cache where they are there."""
    worker = replace(tokenizer, home=_cache(config, "tokens"))
    length = config.data.max_length
    found = {split: task.encode(part.texts, part.targets, worker, length) for split, part in rows.items()}
    checks.documents(found, rows)
    return found


def _with_tokens(
    report: DataReport, data: Mapping[str, Encoded], batches: TrainBatches, evals: Mapping[str, EvalBatches]
) -> DataReport:
    padding = {split: padding_share(found) for split, found in {"train": batches, **evals}.items()}
    return report.with_tokens(data, padding)


def _local(source: Any) -> Any:
    """The source with every packaged asset fetched and named by its local path."""
    if isinstance(source, Mixture):
        parts = [part.model_copy(update={"source": _local(part.source)}) for part in source.parts]
        return source.model_copy(update={"parts": parts})
    if not isinstance(source, Files):
        return source
    local = {
        split: assets.resolve(given) if isinstance(given, str) else [assets.resolve(f) for f in given]
        for split in ("train", "validation", "test")
        if (given := getattr(source, split)) is not None
    }
    return source.model_copy(update=local)


def _grouped(
    column: str | None, rows: Mapping[str, Prepared], data: Mapping[str, Encoded]
) -> tuple[tuple[str, ...], dict[str, Encoded]]:
    """(names of the groups, documents that also have the number of their group)."""
    if column is None:
        return (), dict(data)
    values = {split: [str(value) for value in part.rows.column(column)] for split, part in rows.items()}
    names = tuple(sorted({value for found in values.values() for value in found}))
    if len(names) > MOST_GROUPS:
        raise ConfigError(f"eval.group: column '{column}' has {len(names)} values; at most {MOST_GROUPS} make groups")
    numbers = {name: number for number, name in enumerate(names)}
    parts = {split: np.asarray([numbers[value] for value in found], np.int32) for split, found in values.items()}
    return names, {s: replace(e, documents={**e.documents, "group": parts[s][e.rows]}) for s, e in data.items()}


def _batches(
    config: Config, mesh: Mesh, rows: Mapping[str, Prepared], data: Mapping[str, Encoded], tokenizer: Any
) -> tuple[TrainBatches, dict[str, EvalBatches]]:
    train, seed = data["train"], config.seed.data
    parts, packs = meshes.batch_parts(mesh), None
    multiple = parts * config.train.accumulate
    if config.data.layout.kind == "planned":
        row = one_row(config.data.layout, train)
        needed = sizes(train, np.arange(len(train)), row)
        packs = plan_packs(needed, row.length, row.slots, seed, _cache(config, "packs"))
        order = Order(len(packs), packs.in_a_step(config.train.batch_size), seed)
        shapes: tuple[Shape, ...] = (row._replace(rows=up_to(order.batch_size, multiple), slots=packs.slots),)
    else:
        order = Order(len(train), config.train.batch_size, seed, _mixing(config, rows["train"], train))
        shapes = declare(config.data.layout, train, order, multiple)
    steps = config.train.steps or math.ceil(config.train.epochs * order.steps_per_epoch)
    evals = {
        split: EvalBatches.of(found, shapes[-1], config.eval.batch_size, parts)
        for split, found in data.items()
        if split != "train"
    }
    section = config.data
    augmented = None if train.lazy else augmentation(section.augment, seed, tokenizer)
    seen = changed(train, section.images, seed)
    mixed = blend(section.images, seed)
    return TrainBatches(seen, order, shapes, steps, augmented, packs, mixed, section.workers), evals


def _cache(config: Config, name: str) -> Path | None:
    """Where prepared data of a kind is kept in the user's cache, if it is."""
    return machine.cache_home() / name if config.data.cache else None


def _mixing(config: Config, train: Prepared, encoded: Encoded) -> Mixing | None:
    """Which part each training document is of; None without a mixture."""
    source = config.data.source
    if not isinstance(source, Mixture) or train.rows.part is None:
        return None
    part = train.rows.part[encoded.rows]
    empty = [given.name for number, given in enumerate(source.parts) if not (part == number).any()]
    if empty:
        raise DataError(f"data.source.parts: no training row is left of {', '.join(empty)}; drop fewer, or that part")
    return Mixing(part, tuple(given.weight for given in source.parts))
