"""The state of training, and its split into what is trained and what is not.

Frozen parameters ride beside the state: they are never differentiated, have no moments and are not in a checkpoint.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from sft_jax.config.training import TrainSection, Unfreeze
from sft_jax.errors import ConfigError, listing
from sft_jax.mesh import fitting, like_params, param_shardings, put, replicated
from sft_jax.nn.quantised import Kind, Quantised, abstract
from sft_jax.nn.template import Init, Params, Template, draw
from sft_jax.paths import first_match, matches, select
from sft_jax.train.guard import Guard


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes: all of it is in a checkpoint, and nothing else is needed to go on.

    The same tree also holds shapes, or shardings, in place of the arrays.
    """

    step: Any  # int32 []: steps done
    params: Any  # Params: trainable ones alone, float32
    opt: Any  # optimizer state over the same paths
    ema: Any = None  # Params: moving average of `params`, where there is one
    guard: Any = None  # Guard, where steps may be skipped
    stats: Any = None  # Params: running statistics that are not frozen, float32, where a model has some

    @property
    def weights(self) -> Any:
        """What is evaluated and exported: the moving average of parameters where there is one, and statistics."""
        return {**(self.params if self.ema is None else self.ema), **(self.stats or {})}


# (trainable parameters, statistics that are not frozen) -> the state at step 0
Begin = Callable[[Params, Params], TrainState]


@dataclass(frozen=True)
class Placement:
    """Where everything lies on the mesh."""

    mesh: Mesh
    params: dict[str, NamedSharding]  # all of them
    state: TrainState  # of shardings


def frozen_paths(
    patterns: Sequence[str],
    template: Template,
    beside: frozenset[str] = frozenset(),
    later: Mapping[str, Sequence[str]] | None = None,
) -> frozenset[str]:
    """The paths that are never trained: those of the patterns, statistics too, but not what is trained `later`, and
    those `beside` adapters; something must be left."""
    freed = {path for paths in (later or {}).values() for path in paths}
    frozen = (select(patterns, template.keys, "train.freeze") - freed) | beside
    if not set(template.keys) - template.stats - frozen:
        raise ConfigError("train.freeze: every parameter is frozen; leave something to train, such as head/**")
    return frozen


def unfrozen(
    unfreeze: Sequence[Unfreeze], template: Template, beside: frozenset[str] = frozenset()
) -> dict[str, list[str]]:
    """Pattern of `train.unfreeze` -> the paths that it holds still at first; each must have some.

    Statistics are none of them, so that a norm which is frozen stays in evaluation mode.
    """
    parameters = [path for path in template.keys if path not in template.stats]
    numbers = first_match([u.match for u in unfreeze], parameters, "train.unfreeze")
    found = {
        u.match: [path for path in parameters if numbers[path] == place and path not in beside]
        for place, u in enumerate(unfreeze)
    }
    problems = [_idle(match, beside) for match, paths in found.items() if not paths]
    if problems:
        raise ConfigError(listing("train.unfreeze", problems))
    return found


def _idle(match: str, beside: Collection[str]) -> str:
    if any(matches(match, path) for path in beside):
        return f"'{match}' fits only what stands still beside adapters; name it in adapter.also, or leave it out"
    return f"'{match}' fits only what an earlier pattern fits; put it first, or leave it out"


def place(
    mesh: Mesh, template: Template, axes: Mapping[str, tuple[str, ...]], frozen: frozenset[str], begin: Begin
) -> Placement:
    """Shardings of parameters and all state, explicit: otherwise the step would compile twice."""
    named = template.of_keys(axes)
    named = {key: ("layers", *names) if key in template.held else names for key, names in named.items()}
    params = param_shardings(mesh, named, template.shapes)
    state = like_params(abstract_state(template, frozen, begin), params, template.shapes, mesh)
    return Placement(mesh, params, state)


def lying(placement: Placement, params: Mapping[str, Any]) -> dict[str, Any]:
    """The sharding of every array of these parameters: a quantised one is several; what has no place is whole."""
    whole = replicated(placement.mesh)
    return {
        path: jax.tree.map(lambda a, p=path: fitting(placement.params.get(p, whole), a.shape), held)
        for path, held in params.items()
    }


def beginning(optimizer: optax.GradientTransformation, section: TrainSection) -> Begin:
    """What makes a state at step 0 of trainable parameters, with what the settings need besides."""
    guard = section.spikes is not None or section.non_finite == "skip"

    def begin(params: Params, stats: Params) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt=optimizer.init(params),
            ema=None if section.ema is None else jax.tree.map(jnp.copy, params),
            guard=Guard.begin(section.spikes.window if section.spikes else 1) if guard else None,
            stats=stats or None,
        )

    return begin


def abstract_state(template: Template, frozen: frozenset[str], begin: Begin) -> TrainState:
    """The state as shapes and types alone."""
    shapes = {p: jax.ShapeDtypeStruct(template.shapes[p], jnp.float32) for p in sorted(template.keys)}
    return jax.eval_shape(begin, *_moving(shapes, template, frozen))


def abstract_frozen(
    template: Template, frozen: frozenset[str], compute_dtype: Any, few: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """What stands beside the state, as shapes and types alone; `few` are the paths of what is quantised, and how."""
    types = {p: jnp.float32 if p in template.stats else compute_dtype for p in sorted(frozen)}
    plain = {p: jax.ShapeDtypeStruct(template.shapes[p], dtype) for p, dtype in types.items()}
    kinds: dict[str, Kind] = (
        {p: few[path] for p in plain for path in template.paths([p])[:1] if path in few} if few else {}
    )
    return plain | {p: abstract(template.shapes[p], kind).astype(types[p]) for p, kind in kinds.items()}


def _moving(params: Mapping[str, Any], template: Template, frozen: frozenset[str]) -> tuple[dict, dict]:
    """(those that are trained, the statistics that passes move) of all that a model has."""
    free = {p: a for p, a in params.items() if p not in frozen}
    kinds = {kind: {p: a for p, a in free.items() if (p in template.stats) is kind} for kind in (False, True)}
    return kinds[False], kinds[True]


def initial_state(
    template: Template,
    loaded: Mapping[str, Any],  # by path
    frozen: frozenset[str],
    begin: Begin,
    placement: Placement,
    seed: int,
    compute_dtype: jnp.dtype,
) -> tuple[TrainState, Params]:
    """(state, frozen parameters) at step 0: loaded where a checkpoint had them, else drawn from the seed.

    Trainable parameters and statistics are float32 (C20); frozen parameters have the type of the arithmetic, or are
    quantised where they come so.
    """
    whole = [key for key in template.keys if all(path in loaded for path in template.paths([key]))]
    missing = [key for key in template.keys if key not in whole]
    types = {p: like.dtype for p, like in abstract_frozen(template, frozen, compute_dtype).items()}
    drawn = _drawn(template, missing, placement, types, jax.random.key(seed))
    held = {}
    for key in whole:  # one after another, so that neither host nor device holds a second copy of all of them
        given = template.gather(key, loaded)
        given = {key: given if isinstance(given, Quantised) else np.asarray(given, np.float32)}
        array = put(given, lying(placement, given))[key]
        held[key] = array.astype(types[key]) if key in frozen else array
    params = {p: (drawn | held)[p] for p in sorted(template.keys)}
    fixed = {p: params[p].astype(dtype) for p, dtype in types.items()}
    return jax.jit(begin, out_shardings=placement.state)(*_moving(params, template, frozen)), fixed


def _drawn(
    template: Template, keys: list[str], placement: Placement, types: Mapping[str, Any], key: jax.Array
) -> Params:
    """`Template.initial` where it will lie, in these types; what is alike is drawn by one program, which takes less
    compiling.
    """
    programs, found = {}, {}
    for name in keys:
        like = (template.inits[name], template.shapes[name], types.get(name, jnp.float32))
        lies = placement.params[name]
        if (*like, lies) not in programs:
            programs[*like, lies] = jax.jit(partial(_draw, *like), out_shardings=lies)
        found[name] = programs[*like, lies](key, template.streams(name))
    return found


def _draw(init: Init, shape: tuple[int, ...], dtype: Any, key: jax.Array, streams: Any) -> jax.Array:
    return draw(init, shape, key, streams).astype(dtype)
