"""Optimizer, learning-rate schedule, decay and clipping from the configuration, as one optax transformation.

Parameters are a flat dictionary, so what differs by pattern is a number for each path. Decay is decoupled for every
optimizer alike: `lr * weight_decay * parameter` is taken off beside the optimizer's own update, as AdamW does.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence

import jax
import optax

from sft_jax.config.schema import OptimSection, Schedule
from sft_jax.errors import ConfigError, did_you_mean, reason
from sft_jax.paths import first_match


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


def build_optimizer(section: OptimSection, steps: int, paths: Sequence[str]) -> optax.GradientTransformation:
    """Clipping, the named optimizer, and decay and factors by pattern; `paths` are all of the model's."""
    rate = learning_rate(section, steps)
    groups = first_match([g.match for g in section.groups], paths, "optim.groups")
    factors, decays = {}, {}
    for path, number in groups.items():
        group = None if number is None else section.groups[number]
        scale = None if group is None else group.lr_scale
        decay = None if group is None else group.weight_decay
        factors[path] = 1.0 if scale is None else scale
        decays[path] = section.weight_decay if decay is None else decay
    clip = [optax.clip_by_global_norm(section.clip)] if section.clip else []
    return optax.chain(*clip, _named(section, rate), _by_path(rate, factors, decays))


def _named(section: OptimSection, rate: optax.Schedule) -> optax.GradientTransformation:
    known = {name: found for name in dir(optax) if (found := _arguments(name))}
    if section.name not in known:
        hint = did_you_mean(section.name, known)
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
        made = getattr(optax, section.name)(learning_rate=rate, **options)
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


def _by_path(
    rate: optax.Schedule, factors: Mapping[str, float], decays: Mapping[str, float]
) -> optax.GradientTransformation:
    """Adds decoupled decay to updates and multiplies both by the path's factor."""

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jax.numpy.zeros((), jax.numpy.int32))

    def update(updates, state, params=None):
        assert params is not None, "decay needs the parameters"
        now = rate(state.count)
        moved = {path: factors[path] * (u - now * decays[path] * params[path]) for path, u in updates.items()}
        return moved, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
