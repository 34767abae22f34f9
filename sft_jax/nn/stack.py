"""A stack of equal blocks: the one place that decides how depth is run.

Today the blocks are looped over. Scanning over stacked storage belongs here too, and nowhere else: paths name layers
(`blocks/3/...`) whatever the storage, so patterns, checkpoints and exports will not see the difference.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from sft_jax.nn.random import Key, split


class Stack(nnx.List):
    """`count` blocks, each made by `build` of its number; called with what every block takes beside the activations."""

    def __init__(self, count: int, build: Callable[[int], nnx.Module]):
        super().__init__([build(number) for number in range(count)])

    def __call__(self, x: Float[Array, "..."], *shared: Any, key: Key | None = None) -> Float[Array, "..."]:
        for block, block_key in zip(self, split(key, len(self)), strict=True):
            x = block(x, *shared, key=block_key)
        return x

    def cached(self, x: Float[Array, "..."], states: Sequence[Any], *shared: Any) -> tuple[Float[Array, "..."], tuple]:
        """The same of blocks that remember: each takes its state and gives back the next one."""
        kept = []
        for block, state in zip(self, states, strict=True):
            x, state = block.cached(x, state, *shared)
            kept.append(state)
        return x, tuple(kept)
