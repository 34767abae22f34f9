"""Adam and AdamW with exact bias corrections.

`1 - b2 ** t` in float32 is off by up to 6e-8 / (1 - b2): with the usual b2 of 0.999 the first steps of optax are too
long or too short by 1e-5, which the later ones carry on. All else is as optax has it, state and arguments included.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def adam(learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """`optax.adam`."""
    return optax.chain(scale_by_adam(**options), optax.scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 1e-4, **options: Any
) -> optax.GradientTransformation:
    """`optax.adamw`, without a mask."""
    decay, rate = optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    return optax.chain(scale_by_adam(**options), decay, rate)


def scale_by_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """`optax.scale_by_adam`; the algorithm of Kingma and Ba, 2015, with Nesterov's momentum that of Dozat, 2016."""
    init = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype).init

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        first, second = correction(b1, count), correction(b2, count)
        after = correction(b1, optax.safe_increment(count))

        def step(m: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
            ahead = b1 * m / after + (1 - b1) * g / first if nesterov else m / first
            return ahead / (jnp.sqrt(v / second + eps_root) + eps)

        moved = jax.tree.map(step, mu, nu, updates)
        kept = optax.tree.cast(mu, mu_dtype), optax.tree.cast_like(nu, state.nu)
        return moved, optax.ScaleByAdamState(count, *kept)

    return optax.GradientTransformation(init, update)


def correction(decay: float, count: jax.typing.ArrayLike) -> jax.Array:
    """1 - decay ** count, for a decay from 0 to below 1."""
    with np.errstate(divide="ignore"):
        return -jnp.expm1(jnp.asarray(count) * jnp.float32(np.log(np.float64(decay))))
