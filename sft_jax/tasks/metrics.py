"""Metrics: those from counts that add up, so that nothing sees all predictions at once, and those that need them all.

Definitions are scikit-learn's and scipy's. What is not defined is 0, so that a metric is always a finite number: a
division by nothing, a ranking without both answers, a correlation with what does not vary, outputs that are not finite.
Letters: d documents, c classes or labels, b bins.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sft_jax.tasks.task import Ratio

BINS = 15  # of confidence, of equal width, as in arXiv 1706.04599
RANKING = ("roc_auc", "average_precision")
CORRELATION = ("pearson", "spearman", "r2")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Calibration:
    """How often answers of about the same confidence are right."""

    rows: Int[Array, " b"]
    hits: Int[Array, " b"]
    confidence: Float[Array, " b"]  # sum


def count_calibration(
    confidence: Float[Array, "r n"], right: Bool[Array, "r n"], weight: Float[Array, "r n"]
) -> Calibration:
    """The counts of a batch, on device; a bin is open below and closed above."""
    number = jnp.clip(jnp.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(jnp.int32)
    member = jax.nn.one_hot(number, BINS) * weight[..., None]
    hits, total = (jnp.einsum("rnb,rn->b", member, values) for values in (right.astype(jnp.float32), confidence))
    rows = member.sum(axis=(0, 1))
    return Calibration(rows.astype(jnp.int32), hits.astype(jnp.int32), total)


def calibration_error(found: Calibration) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy. Source: arXiv 1706.04599."""
    gaps = np.abs(np.asarray(found.hits, np.float64) - np.asarray(found.confidence, np.float64))
    return float(_ratio(gaps.sum(), np.asarray(found.rows).sum()))


def mean(ratio: Ratio) -> float:
    """The value of a ratio on the host, 0 where there is no weight."""
    return float(_ratio(ratio.total, ratio.weight))


def classification(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, precision, recall and F1 in each average, and Matthews' coefficient, of [c, c] counts.

    Truth by row, prediction by column. Averages are over the classes that occur in either.
    """
    confusion = np.asarray(confusion, np.float64)
    precision, recall, f1, support = per_class(confusion)
    occurs = (support + confusion.sum(axis=0)) > 0
    total = support.sum()
    accuracy = _ratio(np.trace(confusion), total)
    metrics = {"accuracy": float(accuracy)}
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        metrics[f"{name}_macro"] = float(values[occurs].mean()) if occurs.any() else 0.0
        metrics[f"{name}_micro"] = float(accuracy)  # one label a row: every miss is one false alarm elsewhere
        metrics[f"{name}_weighted"] = float(_ratio((values * support).sum(), total))
    return metrics | {"matthews": matthews(confusion)}


def matthews(confusion: np.ndarray) -> float:
    """Correlation of truth and prediction, for any number of classes. Source: Gorodkin, 2004."""
    confusion = np.asarray(confusion, np.float64)
    truth, predicted, total = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    above = np.trace(confusion) * total - truth @ predicted
    return float(_ratio(above, np.sqrt((total**2 - truth @ truth) * (total**2 - predicted @ predicted))))


def per_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 and support of each class, each [c]."""
    confusion = np.asarray(confusion, np.float64)
    hits, support, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return (*precision_recall_f1(hits, predicted, support), support)


def precision_recall_f1(hits: Any, predicted: Any, support: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of what was right, what was said and what is true, each a count or several."""
    hits, predicted, support = (np.asarray(count, np.float64) for count in (hits, predicted, support))
    return _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, predicted + support)


def averaged(hits: Any, predicted: Any, support: Any) -> dict[str, float]:
    """Precision, recall and F1 of several labels in each average, of counts [c]; all labels are in the macro one."""
    each = precision_recall_f1(hits, predicted, support)
    whole = precision_recall_f1(np.sum(hits), np.sum(predicted), np.sum(support))
    metrics = {}
    for name, values, of_all in zip(("precision", "recall", "f1"), each, whole, strict=True):
        metrics[f"{name}_macro"] = float(values.mean())
        metrics[f"{name}_micro"] = float(of_all)
        metrics[f"{name}_weighted"] = float(_ratio((values * support).sum(), np.sum(support)))
    return metrics


def ranking(scores: Float[np.ndarray, "d c"], truth: Bool[np.ndarray, "d c"]) -> dict[str, float]:
    """Area under the ROC curve and average precision, the mean over the columns for which each is defined."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if not np.isfinite(scores).all():
        return dict.fromkeys(RANKING, 0.0)
    some, none = truth.any(axis=0), ~truth.all(axis=0)
    areas = [roc_auc_score(truth[:, c], scores[:, c]) for c in np.flatnonzero(some & none)]
    precisions = [average_precision_score(truth[:, c], scores[:, c]) for c in np.flatnonzero(some)]
    return {name: float(np.mean(found or [0.0])) for name, found in zip(RANKING, (areas, precisions), strict=True)}


def correlation(values: Float[np.ndarray, " d"], truth: Float[np.ndarray, " d"]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and R2."""
    from scipy.stats import rankdata

    values, truth = values.astype(np.float64), truth.astype(np.float64)
    if not np.isfinite(values).all():
        return dict.fromkeys(CORRELATION, 0.0)
    found = pearson(values, truth), pearson(rankdata(values), rankdata(truth)), explained(values, truth)
    return dict(zip(CORRELATION, found, strict=True))


def explained(values: Float[np.ndarray, " d"], truth: Float[np.ndarray, " d"]) -> float:
    """Share of the variance of the truth that is explained (R2), 0 where it does not vary."""
    if len(truth) == 0 or np.ptp(truth) == 0:
        return 0.0
    return float(1 - np.square(truth - values).sum() / np.square(truth - truth.mean()).sum())


def pearson(one: Float[np.ndarray, " d"], other: Float[np.ndarray, " d"]) -> float:
    """Pearson's correlation, 0 where one of the two does not vary."""
    if len(one) == 0 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    a, b = one - one.mean(), other - other.mean()
    return float(np.clip(a / np.linalg.norm(a) @ (b / np.linalg.norm(b)), -1, 1))


def _ratio(above: Any, below: Any) -> np.ndarray:
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)
