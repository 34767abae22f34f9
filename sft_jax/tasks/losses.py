"""Losses over the documents of a batch: totals and weights in float32, filler at weight 0. Equal to torch's.

All of them stay finite, and so do their gradients, for any finite outputs: probabilities are never taken the logarithm
of. Letters: r rows of the batch, t tokens in a row, n document slots in a row, c classes or labels.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sft_jax.tasks.task import Ratio

Weights = np.ndarray | None  # float32 [c]; None is 1 for each


def cross_entropy(
    logits: Float[Array, "r n c"],
    label: Int[Array, "r n"],
    weight: Float[Array, "r n"],
    *,
    class_weights: Weights = None,
    smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Ratio:
    """Cross-entropy as `torch.nn.CrossEntropyLoss(weight, label_smoothing)`, which weighs by the class of the label.

    With `gamma` it is the focal loss (arXiv 1708.02002, equation 5) of the smoothed target.
    """
    logits = logits.astype(jnp.float32)
    each = -jax.nn.log_softmax(logits)  # of every class, were it the label
    if gamma:
        each = each * jnp.exp(gamma * _log_complement(logits))
    scale = weight
    if class_weights is not None:
        by_class = jnp.asarray(class_weights, jnp.float32)
        each, scale = each * by_class, weight * by_class[label]
    loss = jnp.take_along_axis(each, label[..., None], axis=-1)[..., 0]
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * each.mean(axis=-1)
    return Ratio((loss * weight).sum(), scale.sum())


def binary_cross_entropy(
    logits: Float[Array, "r n c"],
    label: Int[Array, "r n c"],
    weight: Float[Array, "r n"],
    *,
    positive_weights: Weights = None,
    smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Ratio:
    """Mean over documents and labels, as `torch.nn.BCEWithLogitsLoss(pos_weight)` of the smoothed targets.

    With `gamma` it is the focal loss of each label (arXiv 1708.02002).
    """
    logits = logits.astype(jnp.float32)
    target = (1 - smoothing) * label.astype(jnp.float32) + smoothing / 2
    yes, no = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    if gamma:  # 1 - p is sigmoid(-logit), so its power needs no root near 0
        yes, no = yes * jnp.exp(-gamma * no), no * jnp.exp(-gamma * yes)
    if positive_weights is not None:
        yes = yes * jnp.asarray(positive_weights, jnp.float32)
    each = target * yes + (1 - target) * no
    return Ratio((each * weight[..., None]).sum(), weight.sum() * logits.shape[-1])


def squared_error(values: Float[Array, "r n"], label: Float[Array, "r n"], weight: Float[Array, "r n"]) -> Ratio:
    """Squared error, as `torch.nn.MSELoss`."""
    return Ratio((jnp.square(values.astype(jnp.float32) - label) * weight).sum(), weight.sum())


def absolute_error(values: Float[Array, "r n"], label: Float[Array, "r n"], weight: Float[Array, "r n"]) -> Ratio:
    """Absolute error, as `torch.nn.L1Loss`."""
    return Ratio((jnp.abs(values.astype(jnp.float32) - label) * weight).sum(), weight.sum())


def huber_error(
    values: Float[Array, "r n"], label: Float[Array, "r n"], weight: Float[Array, "r n"], delta: float
) -> Ratio:
    """Half the squared error up to `delta`, linear beyond, as `torch.nn.HuberLoss(delta)`."""
    return Ratio((optax.huber_loss(values.astype(jnp.float32), label, delta=delta) * weight).sum(), weight.sum())


def class_divergence(one: Float[Array, "r n c"], other: Float[Array, "r n c"], weight: Float[Array, "r n"]) -> Ratio:
    """Kullback-Leibler divergence of two passes, the mean of both directions. Source: R-Drop, arXiv 2106.14448."""
    p, q = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (one, other))
    each = 0.5 * ((jnp.exp(p) - jnp.exp(q)) * (p - q)).sum(axis=-1)
    return Ratio((each * weight).sum(), weight.sum())


def label_divergence(one: Float[Array, "r n c"], other: Float[Array, "r n c"], weight: Float[Array, "r n"]) -> Ratio:
    """The same of each label's Bernoulli distribution, the mean over labels as in `binary_cross_entropy`."""
    a, b = one.astype(jnp.float32), other.astype(jnp.float32)
    each = 0.5 * (jax.nn.sigmoid(a) - jax.nn.sigmoid(b)) * (a - b)  # log p - log(1 - p) is the logit
    return Ratio((each * weight[..., None]).sum(), weight.sum() * a.shape[-1])


def token_weights(batch: Mapping[str, Array]) -> Float[Array, "r t"]:
    """What each token counts for: its own weight times that of its document, 0 for filler."""
    document = jnp.maximum(batch["segment_ids"] - 1, 0)
    of_document = jnp.take_along_axis(batch["weight"], document, axis=1)
    return batch["token_weight"] * of_document * (batch["segment_ids"] > 0)


def _log_complement(logits: Float[Array, "r n c"]) -> Float[Array, "r n c"]:
    """log(1 - softmax): of the largest by what the others come to, since 1 - p would be 0 near 1."""
    largest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(largest, -jnp.inf, logits), axis=-1, keepdims=True)
    of_largest = others - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.where(largest, of_largest, jnp.log1p(-jnp.where(largest, 0, jax.nn.softmax(logits))))
