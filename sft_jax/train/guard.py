"""Which steps are taken and which are skipped: a loss or gradient that is not finite, and spikes of the loss.

The decision is made on the device, from what is in the training state alone, so it costs no synchronisation and is the
same after a resume (R24). A skipped step leaves parameters, moments and averages as they were, and is counted.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sft_jax.config.training import TrainSection


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """What the decision depends on; part of the training state."""

    skipped: Int[Array, ""]  # steps in all
    in_row: Int[Array, ""]  # of them, up to now without one between that was taken
    taken: Int[Array, ""]
    losses: Float[Array, " window"]  # of the last steps taken, the k-th at place k modulo the window

    @classmethod
    def begin(cls, window: int) -> "Guard":
        """The guard at step 0."""
        zero = jnp.zeros((), jnp.int32)
        return cls(skipped=zero, in_row=zero, taken=zero, losses=jnp.zeros(window, jnp.float32))

    def judge(
        self, loss: Float[Array, ""], norm: Float[Array, ""], section: TrainSection
    ) -> tuple[Bool[Array, ""], "Guard"]:
        """(whether to take the step with this mean loss and gradient norm, the guard after it)."""
        take = jnp.isfinite(loss) & jnp.isfinite(norm) if section.non_finite == "skip" else jnp.asarray(True)
        window = self.losses.shape[0]
        if section.spikes is not None:
            limit = self.losses.mean() + section.spikes.sigma * self.losses.std()
            take &= ~((self.taken >= window) & (loss > limit))
        after = Guard(
            skipped=self.skipped + ~take,
            in_row=jnp.where(take, 0, self.in_row + 1),
            taken=self.taken + take,
            losses=jnp.where(take, self.losses.at[self.taken % window].set(loss), self.losses),
        )
        return take, after
