"""A model as a pytree: parameters declared by shape, and the static half that turns a flat dictionary into a module.

Modules declare parameters with `param`; nothing is allocated. A `Template` is what is left of a module without its
arrays: the tree, the paths, the shapes and how each leaf begins. Knows no checkpoint, mesh or task.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

Params = dict[str, jax.Array]  # flat, sorted by path: "blocks/3/attn/q/kernel" -> array
Init = Callable[[PRNGKeyArray, tuple[int, ...]], Float[Array, "..."]]


@dataclass(frozen=True)
class Normal:
    """Normal distribution around 0."""

    std: float

    def __call__(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.std * jax.random.normal(key, shape, jnp.float32)


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


@dataclass(frozen=True, eq=False)
class Template:
    """The static half of a module; hashable, so it can be closed over by jitted functions."""

    treedef: Any
    keys: tuple[str, ...]  # in the order of the tree's leaves
    shapes: dict[str, tuple[int, ...]]
    inits: dict[str, Init]
    stats: frozenset[str]  # those of the keys that are running statistics
    leaves: tuple[str, ...]  # of the whole module, of which this may be the template of a part

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
        return Template(self.treedef, keys, shapes, inits, self.stats & {*keys}, self.leaves)

    def bind(self, params: Mapping[str, Any]) -> Any:
        """The module with these arrays in place; a pure function of `params`, cheap under jit."""
        own = {*self.keys}
        return jax.tree.unflatten(self.treedef, [params[key] if key in own else None for key in self.leaves])

    def initial(self, key: PRNGKeyArray, paths: Iterable[str]) -> Params:
        """Initial values of some paths, float32. Each depends on the key and its own path alone (C23, R19)."""
        return {p: self.inits[p](jax.random.fold_in(key, crc(p)), self.shapes[p]) for p in sorted(paths)}


def crc(name: str) -> int:
    """A number below 2^31 for a name, the same in every process and version: names random streams."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def _path(entries: tuple[Any, ...]) -> str:
    words = [str(getattr(e, "name", getattr(e, "idx", getattr(e, "key", e)))) for e in entries]
    return "/".join(words)
