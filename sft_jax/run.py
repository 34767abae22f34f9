"""From a configuration to a run: the only module that knows everything.

`prepare` builds what a run consists of; `jobs.py` does something with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sft_jax import assets, checks, machine
from sft_jax import mesh as meshes
from sft_jax.adapt.begin import begin, few_bits, standing_still
from sft_jax.config.read import read_config
from sft_jax.config.schema import Config, RunSection
from sft_jax.data.batch import Batch
from sft_jax.data.loader import EvalBatches, Stacked, TrainBatches, prefetch
from sft_jax.errors import RunError
from sft_jax.inputs import Inputs, best_metric, encode, grouped, make_batches, noted, read_rows, with_tokens
from sft_jax.models.family import Model, build_model, load_model, settled
from sft_jax.nn.devices import Over
from sft_jax.nn.kernels import Hardware
from sft_jax.nn.quantised import Kind
from sft_jax.nn.template import Params, Template
from sft_jax.tasks.task import Examples, Task
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
    unfrozen,
)
from sft_jax.weights.files import Checkpoint, count, find, open_checkpoint
from sft_jax.weights.table import Matched, match

AT_ONCE = 500  # steps of a head on features that one call takes at most


@dataclass(frozen=True)
class Run(Inputs):
    """Everything that a configuration stands for, built once; no weights are read and nothing is compiled yet."""

    config: Config
    mesh: Mesh
    model: Model
    matched: Matched
    frozen: frozenset[str]
    later: dict[str, list[str]]  # pattern of `train.unfreeze` -> the paths that it holds still at first
    optimizer: optax.GradientTransformation
    placement: Placement
    batches: TrainBatches
    evals: dict[str, EvalBatches]
    recomputed: str | None  # why features are not computed once; None where they are
    looped: str | None  # why layers are not scanned over as `train.scan` asks; None where they are as asked
    template: Template | None = None  # of the head alone, where it is trained on them

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


def prepare(config: Config, *, anywhere: bool = False) -> Run:
    """Read rows, headers and tokenizer, and lay out what will happen; every user's mistake is found here.

    `anywhere` is for what leaves the run directory alone, whatever it holds.
    """
    meshes.start_processes()
    if not anywhere:
        directory.check(config, Path(config.run.dir).expanduser())
    trackers.check(config.report)
    mesh = meshes.make_mesh(config.mesh)
    checks.determinism(config.run, mesh.devices.flat[0].platform)
    depth.check(config, mesh)
    task, rows, report = read_rows(config)
    pretrained = config.model.weights == "pretrained"
    found = find(assets.resolve(config.model.source), config.model.revision, weights=pretrained)
    checkpoint = settled(open_checkpoint(found, weights=pretrained), task.head)
    model = _model(config, mesh, checkpoint, task)
    checks.length(config.data.max_length, model, config.model.source)
    tokenizer = task.reader.load(checkpoint.directory)
    groups, data = grouped(config.eval.group, rows, encode(config, task, rows, tokenizer))
    task = task.fit(data["train"])
    checks.ids(model, data)
    checks.target_length(model, data, config.model.source)
    audit = checks.audit(task, Examples(data["train"], rows["train"].texts, rows["train"].targets), tokenizer)
    anew = checks.begins_anew(config.model, model, checkpoint.config)
    matched = match(model.table, model.template.shapes, checkpoint.shapes, str(checkpoint.directory), anew=anew)
    checks.head(task, matched.loaded, checkpoint.config)
    if config.adapter:
        checks.adapter_source(config.adapter, model, task)
    report = replace(report, notes=noted(task, audit))
    inputs = Inputs(task, rows, data, groups, checkpoint, tokenizer, report, audit)
    return _laid_out(config, mesh, inputs, model, matched)


def otherwise(run: Run, config: Config) -> Run:
    """The same rows and model under other settings of mesh, microbatches and depth; nothing is read again."""
    mesh = meshes.make_mesh(config.mesh)
    depth.check(config, mesh)
    return _laid_out(config, mesh, run, _model(config, mesh, run.checkpoint, run.task), run.matched)


def _model(config: Config, mesh: Mesh, checkpoint: Checkpoint, task: Task) -> Model:
    section, train = config.model, config.train
    given = (section.source, section.dropout, section.embedding_noise, config.adapter, train.remat, train.attention)
    over = Over(mesh, meshes.ROWS, meshes.HEADS) if mesh.size > 1 else None
    hardware = Hardware(mesh.devices.flat[0].platform, train.compute_dtype, over)
    return build_model(checkpoint.config, task.head, *given, hardware)


def _laid_out(config: Config, mesh: Mesh, inputs: Inputs, model: Model, matched: Matched) -> Run:
    """What is read, as batches and state over a mesh."""
    task, data = inputs.task, inputs.data
    batches, evals = make_batches(config, mesh, inputs.rows, data, inputs.tokenizer)
    new = matched.initialised if matched.loaded else ()  # all is new where no weights are read
    still = standing_still(config.adapter, model.template.leaves, model.adapters, new, model.head.kind)
    later = unfrozen(config.train.unfreeze, model.template, still)
    frozen = frozen_paths(config.train.freeze, model.template, still, later)
    template, looped = depth.held(config, model.template, frozen, matched.loaded, batches.steps)
    model, frozen = replace(model, template=template), depth.by_key(template, frozen)
    recomputed = features.obstacle(model.template, task, frozen, batches, config.train.cache_features)
    checks.features(config.train, recomputed)
    checks.profile(config.train, batches.steps)
    optimizer = build_optimizer(config, model, batches.steps)
    placement = place(mesh, model.template, model.axes, frozen, beginning(optimizer, config.train))
    counted = replace(inputs, report=with_tokens(inputs.report, inputs.rows, data, batches, evals))
    return Run(
        **counted.inputs(),
        config=config,
        mesh=mesh,
        model=model,
        matched=matched,
        frozen=frozen,
        later=later,
        optimizer=optimizer,
        placement=placement,
        batches=batches,
        evals=evals,
        recomputed=recomputed,
        looped=looped,
    )


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
    options = machine.step_options(run.mesh.devices.flat[0].platform, run.config.train.compute_dtype)
    how: dict[str, Any] = {"options": options, "seed": run.config.seed.dropout}
    if run.template is None:
        return step.train_program(function, run.placement, state, frozen, **how)
    return step.train_program(features.many_steps(function), run.placement, state, frozen, stacked=True, **how)


def eval_program(run: Run, params: Params, frozen: Params) -> step.Program:
    """The evaluation step of a run."""
    template = run.template or run.model.template
    function = step.make_eval_step(template, run.task, groups=len(run.groups), compute_dtype=run.dtype)
    return step.eval_program(function, run.placement, params, frozen)


def plan(run: Run) -> Plan:
    """When things happen, in steps."""
    config = run.config
    every = {"epoch": run.batches.order.steps_per_epoch, "never": None}.get(str(config.eval.every), config.eval.every)
    begins = [(optim.first_step(u, run.batches.steps), u.match) for u in config.train.unfreeze]
    return Plan(
        steps=run.batches.steps,
        begins=tuple((step, begins_to_be_trained(run, match)) for step, match in begins if step),
        log_every=config.train.log_every,
        eval_every=every if isinstance(every, int) else None,
        save_every=config.checkpoint.every,
        best_metric=best_metric(config, run.task),
        best_mode=_best_mode(config, run.task),
        patience=config.eval.patience,
        min_delta=config.eval.min_delta,
        max_skipped=config.train.max_skipped,
    )


def begins_to_be_trained(run: Run, match: str) -> str:
    """What of a model a pattern of `train.unfreeze` is of, in words."""
    shapes = run.model.template.looped.shapes
    return f"{match}, {count({path: shapes[path] for path in run.later[match]}):,} parameters"


def _best_mode(config: Config, task: Task) -> str:
    least = "min" if best_metric(config, task) in task.least_is_best else "max"
    return least if config.eval.best_mode == "auto" else config.eval.best_mode
