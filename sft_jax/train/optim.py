"""Optimizer, learning-rate schedule, decay and clipping from the configuration, as one optax transformation.

Parameters are a flat dictionary, so what differs by pattern is a number for each path. Decay is decoupled for every
optimizer alike: `lr * weight_decay * parameter` is taken off beside the optimizer's own update, as AdamW does.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from sft_jax import names
from sft_jax.config.training import OptimSection, Penalty, Schedule, Unfreeze
from sft_jax.errors import ConfigError, did_you_mean, listing, reason
from sft_jax.paths import first_match, select
from sft_jax.train.adam import adam, adamw

# A block of a model, or one of a stage of it.
_BLOCK = re.compile(r"(stages/(?P<stage>\d+)/)?blocks/(?P<number>\d+)/")
_OURS = {"adam": adam, "adamw": adamw}  # for what optax has by the same names


def learning_rate(section: OptimSection, steps: int) -> optax.Schedule:
    """The rate of step k, the first being step 0, for a run of `steps` steps.

    Linear, cosine and constant are those of `transformers`. `wsd` decays linearly, and `inverse_sqrt` falls from the
    end of the warmup as 1 / sqrt(k), from step 1 on where there is none.
    """
    schedule, peak = section.schedule, section.lr
    warmup = warmup_steps(schedule, steps)
    after = max(1, steps - warmup)
    shapes: dict[str, Callable[[], optax.Schedule]] = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, schedule.end * peak, after),
        "cosine": lambda: optax.cosine_decay_schedule(peak, after, alpha=schedule.end),
        "inverse_sqrt": lambda: _inverse_sqrt(peak, max(1, warmup)),
        "wsd": lambda: _stable_then_decay(peak, schedule, steps, after),
    }
    shape = shapes[schedule.kind]()
    if warmup == 0:
        return shape
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), shape], [warmup])


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """The warmup in steps, rounded up where it is given as a share."""
    return int(schedule.warmup) if schedule.warmup >= 1 else -int(-schedule.warmup * steps // 1)


def _inverse_sqrt(peak: float, scale: int) -> optax.Schedule:
    # optax asks for k < 0 too while the warmup lasts, and discards what it gets.
    return lambda k: peak * (scale / (jax.numpy.maximum(k, 0) + scale)) ** 0.5


def _stable_then_decay(peak: float, schedule: Schedule, steps: int, after: int) -> optax.Schedule:
    decay = min(after, max(1, round(schedule.decay * steps)))
    falling = optax.linear_schedule(peak, schedule.end * peak, decay)
    return optax.join_schedules([optax.constant_schedule(peak), falling], [after - decay])


def build_optimizer(
    section: OptimSection,
    steps: int,
    paths: Sequence[str],
    unfreeze: Sequence[Unfreeze] = (),
    held: Mapping[str, tuple[str, ...]] | None = None,
) -> optax.GradientTransformation:
    """Penalties, clipping, the named optimizer, and decay and factors by pattern; `paths` are all of the model's.

    The transformation is over keys: paths, but for those `held` together as one array with a first axis of layers.
    """
    held = held or {}
    rate = learning_rate(section, steps)
    groups = first_match([g.match for g in section.groups], paths, "optim.groups")
    depths, factors, decays = _depths(paths), {}, {}
    for path, number in groups.items():
        group = None if number is None else section.groups[number]
        scale = None if group is None else group.lr_scale
        decay = None if group is None else group.weight_decay
        factors[path] = (1.0 if scale is None else scale) * section.layer_decay ** depths[path]
        decays[path] = section.weight_decay if decay is None else decay
    starts = {**(found := starts_of(unfreeze, steps, paths)), **{key: found[inside[0]] for key, inside in held.items()}}
    before = []
    if section.penalty.l1 or section.penalty.l2:
        penalised = _penalised_paths(section, paths)
        penalised |= {key for key, inside in held.items() if inside[0] in penalised}
        before.append(_penalised(section.penalty, penalised))
    if any(starts.values()):
        before.append(_held_back(starts))
    if section.clip:
        before.append(optax.clip_by_global_norm(section.clip))
    return optax.chain(*before, _by_start(section, rate, starts), _by_path(rate, factors, decays, starts, held))


def kinds(
    section: OptimSection, steps: int, paths: Sequence[str], unfreeze: Sequence[Unfreeze]
) -> dict[str, tuple[int, bool]]:
    """What must be the same of layers for one array to hold them: when training begins, and whether size costs."""
    starts, penalised = starts_of(unfreeze, steps, paths), _penalised_paths(section, paths)
    return {path: (starts[path], path in penalised) for path in paths}


def _penalised_paths(section: OptimSection, paths: Sequence[str]) -> frozenset[str]:
    if not (section.penalty.l1 or section.penalty.l2):
        return frozenset()
    return select([section.penalty.match], paths, "optim.penalty.match")


def by_element(section: OptimSection) -> bool:
    """Whether the named optimizer does to several layers in one array what it does to each: LAMB, for one, does not.

    Tried out on two layers, as no list of names would know the options.
    """
    optimizer = _named(section, optax.constant_schedule(section.lr))
    wave = jax.numpy.sin(jax.numpy.arange(2.0 * 128 * 130).reshape(2, 128, 130)) * jax.numpy.array([[[1.0]], [[9.0]]])

    def moved(params: Any) -> Any:
        gradients, state = jax.tree.map(jax.numpy.cos, params), optimizer.init(params)
        for _ in range(2):  # the first step of some is that of others
            updates, state = optimizer.update(gradients, state, params)
            params, gradients = optax.apply_updates(params, updates), jax.tree.map(jax.numpy.sin, gradients)
        return updates

    together = jax.jit(moved)({"kernel": wave})["kernel"]
    apart = [jax.jit(moved)({"kernel": layer})["kernel"] for layer in wave]
    return bool(jax.numpy.allclose(together, jax.numpy.stack(apart), rtol=1e-5, atol=0))


def _depths(paths: Sequence[str]) -> dict[str, int]:
    """How far below the head each path stands: 0 the head, 1 the last block, one more the embeddings."""
    found = {path: _BLOCK.match(path) for path in paths}
    places = {path: (int(block["stage"] or 0), int(block["number"])) for path, block in found.items() if block}
    blocks = {place: number for number, place in enumerate(sorted(set(places.values())))}
    count = len(blocks)
    below = {path: count - blocks[place] for path, place in places.items()}
    return {path: below.get(path, count + 1 if path.startswith("embed/") else 0) for path in paths}


def starts_of(unfreeze: Sequence[Unfreeze], steps: int, paths: Sequence[str]) -> dict[str, int]:
    """The step from which on each path is trained: the number of steps before it."""
    found = first_match([u.match for u in unfreeze], paths, "train.unfreeze")
    at = [first_step(u, steps) for u in unfreeze]
    late = [f"'{u.match}' begins at step {n}, and the run has {steps}" for u, n in zip(unfreeze, at, strict=True)]
    if problems := [text for text, number in zip(late, at, strict=True) if number >= steps]:
        raise ConfigError(listing("train.unfreeze: never trained; begin sooner, or freeze it", problems))
    return {path: 0 if number is None else at[number] for path, number in found.items()}


def first_step(unfreeze: Unfreeze, steps: int) -> int:
    """The steps before what a pattern fits begins to be trained."""
    return int(unfreeze.at) if unfreeze.at >= 1 else round(unfreeze.at * steps)


def _named(section: OptimSection, rate: optax.Schedule) -> optax.GradientTransformation:
    known = {name: found for name in dir(optax) if (found := _arguments(name))}
    if section.name not in known:
        hint = did_you_mean(names.value(section.name, known) or section.name, known)
        raise ConfigError(f"optim.name: optax has no optimizer '{section.name}'{hint} (known: {', '.join(known)})")
    arguments = known[section.name]
    options = dict(section.options)
    reserved = {
        "learning_rate": "optim.lr",
        "weight_decay": "optim.weight_decay",
        "mask": "optim.groups",
    }
    for key in options:
        if key in reserved:
            raise ConfigError(f"optim.options.{key}: is set by {reserved[key]}; set it there")
        if key not in arguments:
            known_options = [a for a in arguments if a not in reserved]
            raise ConfigError(
                f"optim.options.{key}: {section.name} has no such argument{did_you_mean(key, known_options)} "
                f"(known: {', '.join(known_options)})"
            )
    if "weight_decay" in arguments:
        options["weight_decay"] = 0.0  # `_by_path` does it, for every optimizer alike
    try:
        made = _OURS.get(section.name, getattr(optax, section.name))(learning_rate=rate, **options)
        specimen = {"p": jax.ShapeDtypeStruct((2, 2), jax.numpy.float32)}
        jax.eval_shape(lambda p: made.update(p, made.init(p), p), specimen)  # as a step will call it
        return made
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optim.name: {section.name} cannot be used here ({reason(error)}); name another, or mend optim.options"
        ) from None


def _arguments(name: str) -> tuple[str, ...]:
    """The arguments of an optimizer of optax; nothing for what is not an optimizer."""
    found = getattr(optax, name)
    if not inspect.isfunction(found) or name.startswith(("_", "scale_by_")):
        return ()
    arguments = tuple(inspect.signature(found).parameters)
    return arguments if arguments[:1] == ("learning_rate",) else ()


def _penalised(penalty: Penalty, paths: frozenset[str]) -> optax.GradientTransformation:
    """Adds the gradient of the penalties; the loss that is reported stays that of the data."""

    def update(updates, params):
        def coupled(path: str, gradient: jax.Array) -> jax.Array:
            value = params[path]
            return gradient + penalty.l1 * jax.numpy.sign(value) + 2 * penalty.l2 * value

        return {path: coupled(path, g) if path in paths else g for path, g in updates.items()}

    return optax.stateless(update)


def _held_back(starts: Mapping[str, int]) -> optax.GradientTransformation:
    """No gradient for what is not trained yet, so that it has no part in the clip norm either."""

    def update(updates, count, params):
        return {path: _since(starts[path], count, u, jax.numpy.zeros_like(u)) for path, u in updates.items()}

    return _counting(update)


def _by_start(section: OptimSection, rate: optax.Schedule, starts: Mapping[str, int]) -> optax.GradientTransformation:
    """The named optimizer; what begins later has one of its own, whose moments and bias correction begin then too."""
    if not any(starts.values()):
        return _named(section, rate)
    named = {start: _named(section, lambda k, s=start: rate(k + s)) for start in sorted(set(starts.values()))}

    def parts(tree: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        found = {start: {p: leaf for p, leaf in tree.items() if starts[p] == start} for start in named}
        return {start: part for start, part in found.items() if part}

    def init(params):
        inner = {str(start): named[start].init(part) for start, part in parts(params).items()}
        return {"count": jax.numpy.zeros((), jax.numpy.int32), "from": inner}

    def update(updates, state, params=None):
        assert params is not None, "an optimizer may need the parameters"
        count, after, theirs = state["count"], {}, parts(params)
        moved: dict[str, Any] = {}
        for start, part in parts(updates).items():
            before = state["from"][str(start)]
            found: Any
            found, later = named[start].update(part, before, theirs[start])
            after[str(start)] = jax.tree.map(lambda new, old, s=start: _since(s, count, new, old), later, before)
            moved |= found
        return {path: moved[path] for path in updates}, {"count": optax.safe_increment(count), "from": after}

    return optax.GradientTransformation(init, update)


def _by_path(
    rate: optax.Schedule,
    factors: Mapping[str, float],
    decays: Mapping[str, float],
    starts: Mapping[str, int],
    held: Mapping[str, tuple[str, ...]],
) -> optax.GradientTransformation:
    """Adds decoupled decay to updates and multiplies both by the path's factor; nothing for what is not trained yet."""

    def own(numbers: Mapping[str, float], key: str, like: jax.Array) -> Any:
        each = [numbers[path] for path in held.get(key, (key,))]
        if len(each) == 1 or len({*each}) == 1:
            return each[0]
        return jax.numpy.asarray(each, like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def update(updates, count, params):
        now = rate(count)
        scaled = {path: u - now * own(decays, path, u) * params[path] for path, u in updates.items()}
        moved = {path: own(factors, path, u) * u for path, u in scaled.items()}
        # x + -0.0 is x bit for bit, even where x is -0.0.
        return {p: _since(starts[p], count, u, jax.numpy.full_like(u, -0.0)) for p, u in moved.items()}

    return _counting(update)


def _counting(update: Callable[..., Any]) -> optax.GradientTransformation:
    """A transformation by (updates, number of the step, parameters) that has no other state than the number."""

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jax.numpy.zeros((), jax.numpy.int32))

    def counted(updates, state, params=None):
        assert params is not None, "decay needs the parameters"
        return update(updates, state.count, params), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, counted)


def _since(start: int, count: jax.Array, then: jax.Array, before: jax.Array) -> jax.Array:
    return jax.numpy.where(count >= start, then, before) if start else then
