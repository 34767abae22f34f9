"""How the arrays of a pass are divided over several devices: by rows, and within attention by heads."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Over:
    """Several devices, and the axes of their mesh that rows and heads are divided over."""

    mesh: Mesh
    rows: tuple[str, ...]
    heads: str

    def of_rows(self, rows: int) -> tuple[str, ...]:
        """The axes for so many rows; none where these do not divide them."""
        return self.rows if rows % self._count(self.rows) == 0 else ()

    def parts(self, rows: int) -> int:
        """How many devices have rows of their own, of so many; the others have copies of one of them."""
        return self._count(self.of_rows(rows))

    def of_heads(self, heads: int) -> str | None:
        """The axis for so many heads; none where it does not divide them."""
        return self.heads if heads % self.mesh.shape[self.heads] == 0 else None

    def _count(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)


def by_rows(x: Float[Array, "r ..."], over: Over | None) -> Float[Array, "r ..."]:
    """The same, each device with its own rows and all that belongs to them.

    Without it XLA may divide activations as it finds a kernel divided, and move them instead of the kernel.
    """
    if over is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(over.mesh, P(over.of_rows(x.shape[0]))))


def apart(x: Float[Array, "r t e"], over: Over | None) -> Float[Array, "p n e"]:
    """The tokens of rows by the device that has them; one part of all where there is one device."""
    return x.reshape(1 if over is None else over.parts(x.shape[0]), -1, x.shape[-1])


def kept_apart(x: Float[Array, "p ..."], over: Over | None) -> Float[Array, "p ..."]:
    """What each part has of its own, such as a sum that is not yet one over all devices; other axes lie as they do."""
    if over is None:
        return x
    free = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(over.mesh, P(over.of_rows(x.shape[0]), *free)))
