"""One training step and one evaluation step: pure functions, compiled once for each declared shape.

Gradients are of totals, summed over microbatches and devices, and divided once by the weight of the whole batch.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, UInt32

from sft_jax.config.training import TrainSection
from sft_jax.mesh import batch_sharding, put, replicated
from sft_jax.nn import random
from sft_jax.nn.template import Moving, Params, Template, crc
from sft_jax.tasks.task import Counts, Ratio, Task
from sft_jax.train.state import Placement, TrainState, lying

Arrays = Mapping[str, Any]  # a batch: arrays of host or device, or their shapes
Metrics = dict[str, Any]  # loss: Ratio, grad_norm, tokens, documents; of a guard: skipped, in_row, skipped_before


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tally:
    """What evaluation adds up: the counts of all rows, and those of each group with a leading axis."""

    all: Counts
    groups: Counts | None


def make_train_step(
    template: Template,
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    section: TrainSection,
    compute_dtype: jnp.dtype,
    seed: int,
) -> Callable[[TrainState, Params, Arrays], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics). Dropout masks depend on seed, step and microbatch alone.

    The step takes a `stream` in place of the seed, so that one program serves all seeds.
    """
    accumulate = section.accumulate

    def total(params: Params, stats: Params, frozen: Params, batch: Arrays, key: PRNGKeyArray) -> Any:
        moving = {path: Moving(array) for path, array in stats.items()}
        model = bind(template, {**params, **frozen, **moving}, compute_dtype)
        outputs = model(batch, key=random.from_jax(key))
        loss = task.loss(outputs, batch)
        if section.r_drop:
            again = model(batch, key=random.from_jax(jax.random.fold_in(key, crc("r-drop"))))
            apart = task.divergence(outputs, again, batch).total  # divided by the weight of the loss, as all is
            loss = Ratio((loss.total + task.loss(again, batch).total) / 2 + section.r_drop * apart, loss.weight)
        return loss.total, (loss, {path: held.moved for path, held in moving.items()})

    gradient = jax.grad(total, has_aux=True)

    def summed(
        params: Params, stats: Params, frozen: Params, batch: Arrays, key: PRNGKeyArray
    ) -> tuple[Params, Ratio, Params]:
        if accumulate == 1:
            totals, (loss, stats) = gradient(params, stats, frozen, batch, key)
            return totals, loss, stats

        def add(carry, item):
            (*before, stats), (number, part) = carry, item
            totals, (loss, stats) = gradient(params, stats, frozen, part, jax.random.fold_in(key, number))
            return (*jax.tree.map(jnp.add, tuple(before), (totals, loss)), stats), None

        nothing = (jax.tree.map(jnp.zeros_like, params), Ratio(jnp.zeros(()), jnp.zeros(())), stats)
        parts = {name: microbatches(array, accumulate) for name, array in batch.items()}
        # On a CPU, XLA computes gradients of convolutions inside a loop naively, a hundred times as slowly.
        convolves = any(len(shape) == 4 for shape in template.looped.shapes.values())
        unroll = accumulate if convolves else 1
        return jax.lax.scan(add, nothing, (jnp.arange(accumulate), parts), unroll=unroll)[0]

    def train_step(
        state: TrainState, frozen: Params, batch: Arrays, stream: UInt32[Array, "2"] | None = None
    ) -> tuple[TrainState, Metrics]:
        words = dropout_stream(seed) if stream is None else stream
        key = jax.random.fold_in(jax.random.wrap_key_data(words), state.step)
        totals, loss, stats = summed(state.params, state.stats or {}, frozen, batch, key)
        gradients = jax.tree.map(lambda g: g / jnp.where(loss.weight > 0, loss.weight, 1), totals)
        updates, opt = optimizer.update(gradients, state.opt, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "tokens": (batch["segment_ids"] > 0).sum(),
            "documents": (batch["weight"] > 0).sum(),
        }
        ema = average(state, params, section.ema)
        after = TrainState(state.step + 1, params, opt, ema, state.guard, stats or None)
        if state.guard is not None:
            take, guard = state.guard.judge(loss.value, metrics["grad_norm"], section)
            kept = replace(state, step=after.step)
            after = replace(jax.tree.map(lambda new, old: jnp.where(take, new, old), after, kept), guard=guard)
            metrics |= {"skipped": ~take, "in_row": guard.in_row, "skipped_before": state.guard.skipped}
        return after, metrics

    return train_step


def dropout_stream(seed: Any) -> UInt32[Array, "2"]:
    """What all dropout of a run is drawn from."""
    return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), crc("dropout")))


def average(state: TrainState, params: Params, decay: float | None) -> Params | None:
    """The moving average with new parameters; at first it forgets faster, as TensorFlow's and big_vision's do."""
    if decay is None:
        return None
    step = state.step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.ema, params)


def make_eval_step(
    template: Template, task: Task, *, groups: int, compute_dtype: jnp.dtype
) -> Callable[[Params, Params, Arrays, Tally], tuple[Tally, Array]]:
    """(params, frozen, batch, tally so far) -> (tally, what is kept of the outputs); without a tally, it begins one."""

    def eval_step(params: Params, frozen: Params, batch: Arrays, tally: Tally | None) -> tuple[Tally, Array]:
        outputs = bind(template, {**params, **frozen}, compute_dtype)(batch)

        def of_group(number: Array) -> Counts:
            return task.count(outputs, {**batch, "weight": batch["weight"] * (batch["group"] == number)})

        found = Tally(task.count(outputs, batch), jax.vmap(of_group)(jnp.arange(groups)) if groups else None)
        return found if tally is None else jax.tree.map(jnp.add, tally, found), task.keep(outputs, batch)

    return eval_step


def bind(template: Template, params: Mapping[str, Any], compute_dtype: jnp.dtype) -> Any:
    """The module, with all parameters in the type of the arithmetic; statistics stay as they are."""
    return template.bind({p: a if p in template.stats else a.astype(compute_dtype) for p, a in params.items()})


def microbatches(array: Array, count: int) -> Array:
    """[rows, ...] -> [count, rows / count, ...]. Rows are dealt out in turn, so each device keeps its own."""
    dealt = array.reshape(array.shape[0] // count, count, *array.shape[1:])
    return jnp.moveaxis(dealt, 1, 0)


class Program:
    """A jitted function with an executable for each shape of batch; nothing else ever compiles.

    `specimen(batch)` gives the arguments for a batch as shapes and types; `last` makes one that every call is given
    after its own, so that programs which differ in it alone are the same.
    """

    def __init__(
        self, jitted: Any, specimen: Callable[[Arrays], tuple[Any, ...]], last: Callable[[], Any] | None = None
    ):
        self._jitted, self.specimen, self._last = jitted, specimen, last
        self._executables: dict[tuple[int, ...], Any] = {}
        self.seconds = 0.0  # spent compiling

    def compile(self, batch: Arrays) -> Any:
        """The executable for batches of this shape."""
        shape = tuple(batch["segment_ids"].shape) + tuple(batch["weight"].shape)
        if shape not in self._executables:
            begin = time.perf_counter()
            executable = self._jitted.lower(*self.specimen(batch)).compile()
            self._executables[shape] = executable if self._last is None else Executable(executable, self._last)
            self.seconds += time.perf_counter() - begin
        return self._executables[shape]

    @property
    def compiled(self) -> int:
        """How many shapes were compiled."""
        return len(self._executables)


class Executable:
    """A compiled program whose last argument is always the same."""

    def __init__(self, compiled: Any, last: Callable[[], Any]):
        self._compiled, self._last = compiled, last

    def __call__(self, *given: Any) -> Any:
        return self._compiled(*given, self._last())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


def needs(executable: Any) -> tuple[int, int]:
    """(bytes that a program takes and gives, bytes that it needs meanwhile), on each device."""
    memory = executable.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held, memory.temp_size_in_bytes


def train_program(
    step: Callable[..., Any],
    placement: Placement,
    state: TrainState,
    frozen: Params,
    *,
    stacked: bool = False,
    options: Mapping[str, bool] | None = None,
    seed: int | None = None,
) -> Program:
    """The training step, or several on stacked batches, donated and with explicit shardings in and out.

    `options` are those of XLA for this program alone. With a seed of dropout the program is the same for all seeds,
    else that of the step is compiled in.
    """
    rows, whole = batch_sharding(placement.mesh, stacked=stacked), replicated(placement.mesh)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placement.state, lying(placement, frozen), rows, *([] if seed is None else [whole])),
        out_shardings=(placement.state, whole),
        compiler_options=dict(options) if options else None,
    )
    stream = () if seed is None else (jax.eval_shape(dropout_stream, 0),)

    def specimen(batch: Arrays) -> tuple[Any, ...]:
        return abstract(state), abstract(frozen), abstract(batch), *stream

    @cache
    def last() -> jax.Array:
        return put({"stream": np.asarray(dropout_stream(seed))}, whole)["stream"]

    return Program(jitted, specimen, None if seed is None else last)


def eval_program(step: Callable[..., Any], placement: Placement, params: Params, frozen: Params) -> Program:
    """The evaluation step; the tally so far is donated."""
    rows, whole = batch_sharding(placement.mesh), replicated(placement.mesh)
    shardings = lying(placement, params), lying(placement, frozen)
    jitted = jax.jit(step, donate_argnums=3, in_shardings=(*shardings, rows, whole), out_shardings=whole)
    weights = abstract(params), abstract(frozen)

    def specimen(batch: Arrays) -> tuple[Any, ...]:
        tally, _ = jax.eval_shape(step, *weights, abstract(batch), None)
        return (*weights, abstract(batch), tally)

    return Program(jitted, specimen)


def abstract(tree: Any) -> Any:
    """Shapes and types of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
