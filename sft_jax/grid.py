"""A grid of heads on features that are computed once: all of them trained and validated side by side, in one program.

Rates and decays are chosen by the mean over seeds; the run then trains one head with the best pair and its own seeds.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import mean, stdev
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax import mesh
from sft_jax.config.schema import Config
from sft_jax.data.batch import collect, room_for
from sft_jax.data.loader import Stacked
from sft_jax.nn.template import Params
from sft_jax.run import AT_ONCE, Run, build_optimizer, plan
from sft_jax.train.directory import write_json
from sft_jax.train.features import many_steps
from sft_jax.train.loop import edges
from sft_jax.train.resume import Tell
from sft_jax.train.state import TrainState, beginning
from sft_jax.train.step import make_eval_step, make_train_step

FILE = "grid.json"


class Point(NamedTuple):
    """A rate with a decay, and what it came to: the best validation of each seed."""

    lr: float
    weight_decay: float
    scores: tuple[float, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON has it; one seed has no deviation."""
        spread = {"sd": stdev(self.scores)} if len(self.scores) > 1 else {}
        return {**self._asdict(), "n": len(self.scores), "mean": mean(self.scores), **spread}


def chosen(run: Run, beside: Params, params: Params, tell: Tell) -> Run:
    """The run with the best rate and decay of `train.head_grid`, or as it is without one.

    `params` are those of step 0. What was found is kept in the run directory: a run that goes on does not search again.
    """
    if run.config.train.head_grid is None:
        return run
    file = run.directory / FILE
    if mesh.in_all(file.exists()):  # or some processes would search, and wait for the others
        found = json.loads(file.read_text(encoding="utf-8"))["points"]
    else:
        points = search(run, beside, params)
        found = [point.plain() for point in points]
        if mesh.is_first_process():
            write_json(file, {"metric": plan(run).best_metric, "points": found})
        _told(run, points, tell)
    config = _with_rates(run.config, *_best(run, found))
    return replace(run, config=config, optimizer=build_optimizer(config, run.model, run.batches.steps))


def tried(config: Config) -> tuple[list[tuple[float, float]], list[tuple[int, int, int]]]:
    """(rates with decays, seeds of initial values, order and dropout) that a grid is of."""
    grid, optim, own = config.train.head_grid, config.optim, config.seed
    assert grid is not None
    pairs = list(product(grid.lr or [optim.lr], grid.weight_decay or [optim.weight_decay]))
    return pairs, [(s, s, s) for s in grid.seeds] or [(own.init, own.data, own.dropout)]


def search(run: Run, beside: Params, params: Params) -> list[Point]:
    """Every rate with every decay, over the seeds; each as `train` would have it, and validated as often."""
    sign = 1 if plan(run).best_mode == "max" else -1
    pairs, seeds = tried(run.config)
    lr, decay = (jnp.asarray(values, jnp.float32) for values in zip(*pairs, strict=True))
    init, dropout = (jnp.asarray([seed[n] for seed in seeds], jnp.uint32) for n in (0, 2))
    begin, advance = _program(run, params)
    state = begin(lr, decay, init)
    marks = edges(plan(run), 0, AT_ONCE)
    streams = [Stacked(replace(run.batches, order=replace(run.batches.order, seed=s[1])), marks) for s in seeds]
    best = np.full((len(seeds), len(pairs)), -np.inf)
    for number, step in enumerate(marks[1:]):
        parts = [stream[number] for stream in streams]
        batch = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        state = advance(state, beside, lr, decay, dropout, mesh.put(batch, mesh.replicated(run.mesh)))
        if step == plan(run).steps or step % (plan(run).eval_every or step) == 0:
            best = np.maximum(best, sign * _validated(run, beside, state))
    return [Point(*pair, tuple((sign * best[:, p]).tolist())) for p, pair in enumerate(pairs)]


def _program(run: Run, params: Params) -> tuple[Callable[..., TrainState], Callable[..., TrainState]]:
    """(what begins all heads of the grid, what takes all of them through stacked batches)."""
    config, template = run.config, run.template
    assert template is not None
    fresh = [path for path in run.trainable if path in run.matched.initialised]
    held = {path: params[path] for path in run.trainable if path not in fresh}

    def optimizer(lr: Any, decay: Any) -> Any:
        return build_optimizer(_with_rates(config, lr, decay), run.model, run.batches.steps)

    def begin(lr: Any, decay: Any, seed: Any) -> TrainState:
        drawn = template.initial(jax.random.key(seed), fresh)
        return beginning(optimizer(lr, decay), config.train)(dict(sorted({**held, **drawn}.items())), {})

    def advance(state: TrainState, beside: Params, lr: Any, decay: Any, seed: Any, batches: Any) -> TrainState:
        step = make_train_step(
            template,
            run.task,
            optimizer(lr, decay),
            section=config.train,
            compute_dtype=run.dtype,
            seed=seed,
        )
        return many_steps(step)(state, beside, batches)[0]

    begun = jax.vmap(jax.vmap(begin, (0, 0, None)), (None, None, 0))
    pairs = jax.vmap(advance, (0, None, 0, 0, None, None))
    return jax.jit(begun), jax.jit(jax.vmap(pairs, (0, None, None, None, 0, 0)), donate_argnums=0)


def _validated(run: Run, beside: Params, state: TrainState) -> np.ndarray:
    """The metric that picks the best, [seeds, pairs]."""
    task, batches, template = run.task, run.evals["validation"], run.template
    assert template is not None
    one: Any = make_eval_step(template, task, groups=0, compute_dtype=run.dtype)
    step = jax.jit(jax.vmap(jax.vmap(one, (0, None, None, 0)), (0, None, None, 0)))
    tally: Any = None
    kept: list[list[np.ndarray]] | None = None
    for number in range(len(batches)):
        batch = batches[number]
        put = mesh.put(batch, mesh.replicated(run.mesh))
        if tally is None:
            shapes, _ = jax.eval_shape(step, state.weights, beside, put, None)
            tally = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        tally, outputs = step(state.weights, beside, put, tally)
        outputs = np.asarray(outputs)
        kept = [[_room(outputs, run) for _ in row] for row in outputs] if kept is None else kept
        for row, of_seed in zip(outputs, kept, strict=True):
            for output, place in zip(row, of_seed, strict=True):
                collect(place, batch, output, batches.encoded, task.grain)
    counts, examples, name = mesh.to_host(tally), run.examples("validation"), plan(run).best_metric
    assert kept is not None

    def score(seed: int, pair: int) -> float:
        own = jax.tree.map(lambda a: a[seed, pair], counts.all)
        return {**task.metrics(own), **task.row_metrics(kept[seed][pair], examples)}[name]

    return np.asarray([[score(s, p) for p in range(len(kept[s]))] for s in range(len(kept))])


def _room(outputs: np.ndarray, run: Run) -> np.ndarray:
    return room_for(outputs, run.evals["validation"].encoded, run.task.grain)


def _best(run: Run, points: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The pair with the best mean of what a search came to; of equals the first."""
    sign = 1 if plan(run).best_mode == "max" else -1
    best = max(points, key=lambda point: sign * point["mean"])
    return best["lr"], best["weight_decay"]


def _with_rates(config: Config, lr: Any, weight_decay: Any) -> Config:
    section = config.optim.model_copy(update={"lr": lr, "weight_decay": weight_decay})
    return config.model_copy(update={"optim": section})


def _told(run: Run, points: Sequence[Point], tell: Tell) -> None:
    """The grid as a table."""
    name = plan(run).best_metric
    tell(f"grid of {len(points)} heads, {name} of the validation split:")
    for point in points:
        said: Mapping[str, Any] = point.plain()
        spread = f" ± {said['sd']:.4f} (n = {said['n']})" if "sd" in said else ""
        tell(f"  lr {point.lr:g}, weight decay {point.weight_decay:g}: {said['mean']:.4f}{spread}")
