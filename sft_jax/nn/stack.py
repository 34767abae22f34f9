"""A stack of equal blocks: the one place that decides how depth is run.

Blocks are looped over, or, where a template holds what equal ones have as one array, scanned over: one body is compiled
however many there are. Paths name layers (`blocks/3/...`) either way, and so do dropout keys, so that results are the
same. Blocks that take turns, such as near and far attention, are scanned a turn at a time. Either way a block may be
computed again for its gradient instead of kept (`remat`).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sft_jax.nn.devices import Over, by_rows
from sft_jax.nn.kernels import ATTENDED
from sft_jax.nn.random import Key, split
from sft_jax.nn.template import Layer, Moving, Template

_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _products(primitive: Any, *arrays: Any, **settings: Any) -> Any:
    attended = "attention" in primitive.name or (primitive.name == "name" and settings["name"] == ATTENDED)
    return attended or _dots(primitive, *arrays, **settings)


# What is kept of a block for its gradient besides what it took: nothing, its products (what kernels of attention give
# counts as one: cuDNN's by the name of the primitive, others' by a name that they give it), or these in the host's
# memory.
_elsewhere = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
POLICIES = {"full": None, "dots": _products, "offload": _elsewhere}
LONGEST_TURN = 12  # blocks that may take turns


class Stack(nnx.List):
    """`count` blocks, each made by `build` of its number; called with what every block takes beside the activations."""

    remat = "none"
    over: Over | None = None  # several devices

    def __init__(self, count: int, build: Callable[[int], nnx.Module]):
        super().__init__([build(number) for number in range(count)])

    def __iter__(self) -> Iterator[Any]:
        """The blocks, each with arrays of its own."""
        return map(_alone, super().__iter__())

    def __call__(self, x: Float[Array, "..."], *shared: Any, key: Key | None = None) -> Float[Array, "..."]:
        blocks, keys, at = list(super().__iter__()), split(key, len(self)), 0
        while at < len(blocks):
            count, turn = _held_from(blocks, at)
            after = at + count * turn
            if count == 1:
                x = self._block(blocks[at], x, shared, keys[at])
            else:
                x = self._scanned(blocks[at : at + turn], x, shared, keys[at:after])
            at = after
        return by_rows(x, self.over)

    def _scanned(self, turn: list[Any], x: Any, shared: tuple[Any, ...], keys: list[Key | None]) -> Any:
        """The blocks of a turn, and of all turns after it that the same arrays hold."""
        leaves, trees = zip(*map(jax.tree.flatten, turn), strict=True)
        held = [[layer.held for layer in layers] for layers in leaves]
        streams = None if keys[0] is None else jnp.stack(keys).reshape(-1, len(turn), 2)  # type: ignore[arg-type]

        def body(x: Any, item: Any) -> tuple[Any, None]:
            arrays, own = item
            for number, (tree, values) in enumerate(zip(trees, arrays, strict=True)):
                block = jax.tree.unflatten(tree, values)
                x = self._block(block, x, shared, None if own is None else own[number], in_loop=True)
            return x, None

        return jax.lax.scan(body, x, (held, streams))[0]

    def _block(self, block: Any, x: Any, shared: tuple[Any, ...], key: Key | None, *, in_loop: bool = False) -> Any:
        x = by_rows(x, self.over)
        if self.remat == "none":
            return block(x, *shared, key=key)
        leaves, tree = jax.tree.flatten(block)
        moving = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Moving)}
        arrays = [leaf.moved if n in moving else leaf for n, leaf in enumerate(leaves)]

        def again(arrays: list[Any], x: Any, key: Key | None) -> Any:
            inside = {n: Moving(arrays[n]) for n in moving}
            out = jax.tree.unflatten(tree, [inside.get(n, a) for n, a in enumerate(arrays)])(x, *shared, key=key)
            return out, {n: found.moved for n, found in inside.items()}

        # A loop keeps what is computed again apart from what was computed; elsewhere XLA must be told not to merge.
        out, moved = jax.checkpoint(again, policy=POLICIES[self.remat], prevent_cse=not in_loop)(arrays, x, key)
        for number, found in moved.items():
            moving[number].moved = found
        return out

    def cached(self, x: Float[Array, "..."], states: Sequence[Any], *shared: Any) -> tuple[Float[Array, "..."], tuple]:
        """The same of blocks that remember: each takes its state and gives back the next one."""
        kept = []
        for block, state in zip(self, states, strict=True):
            x, state = block.cached(x, state, *shared)
            kept.append(state)
        return x, tuple(kept)


def rematerialise(module: nnx.Module, how: str) -> None:
    """Have every block of a module, which may not be bound yet, computed again for its gradient."""
    for stack in _stacks(module):
        inner = [found for block in stack for found in _stacks(block)]
        if not inner:
            stack.remat = how
        for found in inner:
            found.remat = how


def divide(module: nnx.Module, over: Over | None) -> None:
    """Have each of several devices compute its own rows in every stack of a module, which may not be bound yet."""
    for stack in _stacks(module):
        for found in (stack, *(inner for block in stack for inner in _stacks(block))):
            found.over = over


def alike(template: Template, label: Callable[[str], Hashable], least: int) -> list[tuple[str, ...]]:
    """Groups of paths that can be held as one array: of blocks in turn whose structure, shapes and labels are the same.

    Of stacks of at least so many blocks. A block that has running statistics is like no other: passes move them.
    """
    module = jax.tree.unflatten(template.treedef, template.leaves)
    groups = []
    for stack in _stacks(module):
        blocks = list(stack)
        if len(blocks) < least:
            continue
        kinds, at = _kinds(template, blocks, label), 0
        while at < len(kinds):
            count, turn = _turns(kinds, at)
            if count > 1:
                for place in range(at, at + turn):
                    leaves = [jax.tree.leaves(block) for block in blocks[place : place + count * turn : turn]]
                    groups += zip(*leaves, strict=True)
            at += count * turn
    return groups


def most_blocks(template: Template) -> int:
    """How many blocks the longest stack has."""
    return max((len(stack) for stack in _stacks(jax.tree.unflatten(template.treedef, template.leaves))), default=0)


def _stacks(module: Any) -> list[Stack]:
    found = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, Stack))
    return [node for node in found if isinstance(node, Stack)]


def _kinds(template: Template, blocks: list[Any], label: Callable[[str], Hashable]) -> list[int]:
    """A number for each block, the same where they are alike."""
    known: list[Any] = []
    numbers = []
    for block in blocks:
        paths, tree = jax.tree.flatten(block)
        kind = (tree, [(template.shapes[path], label(path)) for path in paths])
        moves = not template.stats.isdisjoint(paths)
        known += [kind] if moves or kind not in known else []
        numbers.append(len(known) - 1 if moves else known.index(kind))
    return numbers


def _turns(kinds: Sequence[int], at: int) -> tuple[int, int]:
    """(how often, how many blocks) of the turn that repeats over most of what follows; of equals the shortest."""
    best = (1, 1)
    for turn in range(1, min(LONGEST_TURN, (len(kinds) - at) // 2) + 1):
        first, count = kinds[at : at + turn], 1
        while kinds[at + count * turn : at + (count + 1) * turn] == first:
            count += 1
        if count > 1 and count * turn > best[0] * best[1]:
            best = (count, turn)
    return best


def _held_from(blocks: list[Any], at: int) -> tuple[int, int]:
    """(how often, how many blocks) of the turn whose arrays begin at this block; once one, of arrays of its own."""
    numbers = [next((leaf.number for leaf in jax.tree.leaves(b) if isinstance(leaf, Layer)), None) for b in blocks[at:]]
    if numbers[0] is None:
        return 1, 1
    turn = numbers.index(1)
    layer = next(leaf for leaf in jax.tree.leaves(blocks[at]))
    return len(jax.tree.leaves(layer.held)[0]), turn


def _alone(block: Any) -> Any:
    leaves, tree = jax.tree.flatten(block)
    if not any(isinstance(leaf, Layer) for leaf in leaves):
        return block
    return jax.tree.unflatten(tree, [leaf.value if isinstance(leaf, Layer) else leaf for leaf in leaves])
