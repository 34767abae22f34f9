"""A model as a pytree: parameters declared by shape, and the static half that turns a flat dictionary into a module.

Modules declare parameters with `param`; nothing is allocated. A `Template` is what is left of a module without its
arrays: the tree, the paths, the shapes and how each leaf begins. What equal layers have may be held as one array with
a first axis of layers, under a key that reads as a pattern over their paths: `blocks/{0..11}/attn/q/kernel`. Paths are
what people name, keys are what state and checkpoints hold. Knows no checkpoint, mesh or task.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

Label = TypeVar("Label")
Params = dict[str, jax.Array]  # flat, sorted by path: "blocks/3/attn/q/kernel" -> array
Init = Callable[[PRNGKeyArray, tuple[int, ...]], Float[Array, "..."]]


@dataclass(frozen=True)
class Normal:
    """Normal distribution around 0."""

    std: float

    def __call__(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.std * jax.random.normal(key, shape, jnp.float32)


@dataclass(frozen=True)
class Constant:
    """The same everywhere."""

    value: float

    def __call__(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return jnp.full(shape, self.value, jnp.float32)


def zeros(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """All 0: biases."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """All 1: the scales of norms."""
    return jnp.ones(shape, jnp.float32)


def param(shape: tuple[int, ...], init: Init) -> nnx.Param:
    """A float32 parameter of this shape that begins as `init` says, if no checkpoint holds it."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), init=init)


class Stat(nnx.Variable):
    """A running statistic: loaded, saved and frozen like a parameter, and moved by passes instead of gradients."""


def stat(shape: tuple[int, ...], init: Init) -> Stat:
    """A float32 running statistic of this shape that begins as `init` says, if no checkpoint holds it."""
    return Stat(jax.ShapeDtypeStruct(shape, jnp.float32), init=init)


class Moving:
    """A statistic that a pass in training may move; bound in the place of its array (`Template.bind`)."""

    def __init__(self, value: Float[Array, "..."]):
        self.value, self.moved = value, value


@dataclass(frozen=True)
class Layer:
    """One layer's share of what is held for several; bound in the place of its array (`Template.bind`)."""

    held: Any  # [layers, ...], or a tree of such
    number: int

    @property
    def value(self) -> Any:
        """The layer's own."""
        return jax.tree.map(lambda array: array[self.number], self.held)


@dataclass(frozen=True, eq=False)
class Template:
    """The static half of a module; hashable, so it can be closed over by jitted functions."""

    treedef: Any
    keys: tuple[str, ...]  # what is held, in the order of the tree's leaves
    shapes: dict[str, tuple[int, ...]]  # by key
    inits: dict[str, Init]  # by key
    stats: frozenset[str]  # those of the keys that are running statistics
    leaves: tuple[str, ...]  # the paths of the whole module, of which this may be the template of a part
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)  # key of several layers -> their paths, in order

    @classmethod
    def of(cls, module: nnx.Module) -> "Template":
        """The template of a module made of `param` leaves; a module used in two places is refused."""
        variables, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda node: isinstance(node, nnx.Variable))
        assert len({id(v) for _, v in variables}) == len(variables), "a parameter is shared by reference"
        keys = tuple(_path(path) for path, _ in variables)
        treedef = jax.tree.structure(module)
        shapes = {k: tuple(v.get_value().shape) for k, (_, v) in zip(keys, variables, strict=True)}
        inits = {k: v.get_metadata()["init"] for k, (_, v) in zip(keys, variables, strict=True)}
        stats = frozenset(k for k, (_, v) in zip(keys, variables, strict=True) if isinstance(v, Stat))
        return cls(treedef, keys, shapes, inits, stats, keys)

    def part(self, path: str) -> "Template":
        """Of what stands below a path alone: all else of the module is bound as None."""
        keys = tuple(key for key in self.keys if key.startswith(f"{path}/"))
        shapes, inits = {key: self.shapes[key] for key in keys}, {key: self.inits[key] for key in keys}
        return replace(self, keys=keys, shapes=shapes, inits=inits, stats=self.stats & {*keys}, held={})

    def stacked(self, groups: Sequence[tuple[str, ...]]) -> "Template":
        """The same with each group of paths, which are alike in all but a number, held as one array."""
        held = {_key(paths): paths for paths in groups}
        first = {paths[0]: key for key, paths in held.items()}
        inside = {path for paths in groups for path in paths[1:]}
        names = {first.get(path, path): path for path in self.keys if path not in inside}
        shapes = {k: (len(held[k]), *self.shapes[p]) if k in held else self.shapes[p] for k, p in names.items()}
        inits = {key: self.inits[path] for key, path in names.items()}
        return replace(self, keys=tuple(names), shapes=shapes, inits=inits, held=held)

    @property
    def looped(self) -> "Template":
        """The same with each layer held for itself."""
        if not self.held:
            return self
        shapes, inits = self.of_paths(self.shapes), self.of_paths(self.inits)
        shapes = {path: shapes[path][1:] if path in self._inside else shapes[path] for path in shapes}
        return replace(self, keys=tuple(p for p in self.leaves if p in shapes), shapes=shapes, inits=inits, held={})

    @property
    def _inside(self) -> frozenset[str]:
        return frozenset(path for paths in self.held.values() for path in paths)

    def paths(self, keys: Iterable[str]) -> list[str]:
        """The paths that these keys hold."""
        return [path for key in keys for path in self.held.get(key, (key,))]

    def of_paths(self, labels: Mapping[str, Label]) -> dict[str, Label]:
        """What is said of keys, by path."""
        return {path: label for key, label in labels.items() for path in self.held.get(key, (key,))}

    def of_keys(self, labels: Mapping[str, Label]) -> dict[str, Label]:
        """What is said of paths, by key, where it is the same of all that a key holds."""
        return {key: labels[self.held.get(key, (key,))[0]] for key in self.keys}

    def gather(self, key: str, arrays: Mapping[str, Any]) -> Any:
        """What a key holds, of host arrays, or trees of such, by path."""
        if key not in self.held:
            return arrays[key]
        return jax.tree.map(lambda *layers: np.stack(layers), *(arrays[path] for path in self.held[key]))

    def unstack(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by key -> by path."""
        layers = {p: Layer(params[key], n) for key in self.held.keys() & params.keys() for n, p in self._numbered(key)}
        return {**{p: a for p, a in params.items() if p not in self.held}, **{p: a.value for p, a in layers.items()}}

    def bind(self, params: Mapping[str, Any]) -> Any:
        """The module with these arrays in place; a pure function of `params`, cheap under jit."""
        own = {key: params[key] for key in self.keys if key not in self.held}
        layers = {path: Layer(params[key], number) for key in self.held for number, path in self._numbered(key)}
        return jax.tree.unflatten(self.treedef, [layers.get(path, own.get(path)) for path in self.leaves])

    def _numbered(self, key: str) -> Iterable[tuple[int, str]]:
        return enumerate(self.held[key])

    def initial(self, key: PRNGKeyArray, names: Iterable[str]) -> Params:
        """Initial values of some keys, float32. Each layer's depend on the key and its own path alone (C23, R19)."""
        return {name: draw(self.inits[name], self.shapes[name], key, self.streams(name)) for name in sorted(names)}

    def streams(self, name: str) -> np.ndarray:
        """The random stream of a key, or of each layer that it holds, [] or [n]."""
        held = self.held.get(name)
        return np.asarray([crc(path) for path in held] if held else crc(name), np.uint32)


def draw(init: Init, shape: tuple[int, ...], key: PRNGKeyArray, streams: np.ndarray | Array) -> Float[Array, "..."]:
    """Initial values of one key, by its random streams, uint32 [] or [n]."""
    if not streams.ndim:
        return init(jax.random.fold_in(key, streams), shape)
    return jax.vmap(lambda stream: init(jax.random.fold_in(key, stream), shape[1:]))(streams)


def _key(paths: Sequence[str]) -> str:
    """The key of several layers: their paths as one pattern."""
    words = [path.split("/") for path in paths]
    place = next(n for n, column in enumerate(zip(*words, strict=True)) if len({*column}) > 1)
    numbers = [int(word[place]) for word in words]
    in_turn = all(after == before + 1 for before, after in pairwise(numbers))
    inside = f"{numbers[0]}..{numbers[-1]}" if in_turn else ",".join(map(str, numbers))
    return "/".join([*words[0][:place], f"{{{inside}}}", *words[0][place + 1 :]])


def crc(name: str) -> int:
    """A number below 2^31 for a name, the same in every process and version: names random streams."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def _path(entries: tuple[Any, ...]) -> str:
    words = [str(getattr(e, "name", getattr(e, "idx", getattr(e, "key", e)))) for e in entries]
    return "/".join(words)
