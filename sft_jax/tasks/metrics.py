"""Metrics from counts that add up: nothing here ever sees all the predictions at once.

Definitions are scikit-learn's: averages are over the classes that occur in truth or prediction, and a division by
nothing is 0. Letters: c classes.
"""

from typing import Any

import numpy as np

Confusion = np.ndarray  # [c, c] counts, truth by row, prediction by column


def classification(confusion: Confusion) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 in macro, micro and weighted average."""
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
    return metrics


def per_class(confusion: Confusion) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 and support of each class, each [c]."""
    confusion = np.asarray(confusion, np.float64)
    hits, support, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return (
        _ratio(hits, predicted),
        _ratio(hits, support),
        _ratio(2 * hits, support + predicted),
        support,
    )


def _ratio(above: Any, below: Any) -> np.ndarray:
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)
