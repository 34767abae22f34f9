"""Losses are torch's: values and gradients with respect to the outputs, for every setting that torch has."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import torch

from sft_jax.tasks import losses

ROWS, SLOTS, CLASSES = 4, 3, 5
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.0, 3.0], np.float32)
REAL = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], np.float32)  # 6 documents, the rest is filler


def outputs_of(seed: int, scale: float, *shape: int) -> np.ndarray:
    """Random outputs; those of filler are random as well."""
    return np.random.default_rng(seed).normal(0, scale, (ROWS, SLOTS, *shape)).astype(np.float32)


def agree(loss, reference, outputs: np.ndarray) -> None:
    """The same value, and the same gradient, which is 0 at filler; `reference` sees the documents alone."""
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x).value))(outputs)
    real = torch.tensor(outputs[REAL > 0], requires_grad=True)
    expected = reference(real)
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=2e-6)
    np.testing.assert_allclose(gradient[REAL > 0], real.grad.numpy(), rtol=2e-5, atol=1e-7)
    assert not np.asarray(gradient)[REAL == 0].any()


def documents(values: np.ndarray, kind: "torch.dtype") -> "torch.Tensor":
    """The entries of documents, without filler."""
    return torch.tensor(values[REAL > 0]).to(kind)


@pytest.mark.parametrize(("smoothing", "weights"), [*itertools.product([0.0, 0.1], [None, WEIGHTS])])
def test_cross_entropy(smoothing, weights):
    """C1: as `CrossEntropyLoss(weight, label_smoothing)`: the weighted mean over the documents of a ragged batch."""
    label = np.random.default_rng(1).choice([0, 1, 2, 4], (ROWS, SLOTS))
    ours = {"class_weights": weights, "smoothing": smoothing}
    theirs = torch.nn.CrossEntropyLoss(None if weights is None else torch.tensor(weights), label_smoothing=smoothing)
    agree(
        lambda x: losses.cross_entropy(x, label, REAL, **ours),
        lambda x: theirs(x, documents(label, torch.long)),
        outputs_of(0, 3, CLASSES),
    )


@pytest.mark.parametrize(("gamma", "weights"), [*itertools.product([0.5, 3.0], [None, WEIGHTS])])
def test_focal_loss_of_classes(gamma, weights):
    """C1: as equation 5 of arXiv 1708.02002 written out in float64, alpha being the weight of the class."""
    label = np.random.default_rng(2).choice([0, 1, 2, 4], (ROWS, SLOTS))
    alpha = torch.tensor(np.ones(CLASSES) if weights is None else weights, dtype=torch.float64)

    def written_out(x):
        number = documents(label, torch.long)
        p = torch.softmax(x.double(), dim=-1).gather(1, number[:, None])[:, 0]
        return -(alpha[number] * (1 - p) ** gamma * p.log()).sum() / alpha[number].sum()

    agree(
        lambda x: losses.cross_entropy(x, label, REAL, class_weights=weights, gamma=gamma),
        written_out,
        outputs_of(1, 2, CLASSES),
    )


@pytest.mark.parametrize(
    ("smoothing", "weights", "gamma"), [*itertools.product([0.0, 0.2], [None, WEIGHTS], [0.0, 2.0])]
)
def test_binary_cross_entropy(smoothing, weights, gamma):
    """C1: as `BCEWithLogitsLoss(pos_weight)` of smoothed targets; focal as written out in float64."""
    label = np.random.default_rng(3).integers(0, 2, (ROWS, SLOTS, CLASSES))
    positive = torch.tensor(np.ones(CLASSES) if weights is None else weights, dtype=torch.float64)

    def reference(x):
        target = documents(label, torch.float64) * (1 - smoothing) + smoothing / 2
        if not gamma:
            return torch.nn.BCEWithLogitsLoss(pos_weight=positive)(x.double(), target)
        p = torch.sigmoid(x.double())
        yes, no = (1 - p) ** gamma * p.log(), p**gamma * (1 - p).log()
        return -(positive * target * yes + (1 - target) * no).mean()

    settings = {"positive_weights": weights, "smoothing": smoothing, "gamma": gamma}
    agree(lambda x: losses.binary_cross_entropy(x, label, REAL, **settings), reference, outputs_of(2, 2, CLASSES))


@pytest.mark.parametrize("delta", [None, 0.3, 1.0, 4.0])
def test_errors_of_numbers(delta):
    """C1: as `MSELoss` and `HuberLoss(delta)`, on errors well within and well beyond delta."""
    label = outputs_of(4, 2)
    theirs = torch.nn.MSELoss() if delta is None else torch.nn.HuberLoss(delta=delta)

    def ours(x):
        return losses.squared_error(x, label, REAL) if delta is None else losses.huber_error(x, label, REAL, delta)

    agree(ours, lambda x: theirs(x, documents(label, torch.float32)), outputs_of(3, 2))


def test_divergence_of_classes():
    """As R-Drop's `compute_kl_loss`: the mean of both directions of `kl_div`, summed over classes."""
    other = outputs_of(6, 2, CLASSES)

    def published(p):
        q = torch.tensor(other[REAL > 0])
        logs, probabilities = torch.nn.functional.log_softmax, torch.nn.functional.softmax
        forth = torch.nn.functional.kl_div(logs(p, -1), probabilities(q, -1), reduction="none")
        back = torch.nn.functional.kl_div(logs(q, -1), probabilities(p, -1), reduction="none")
        return (forth.sum() + back.sum()) / 2 / len(p)

    agree(lambda x: losses.class_divergence(x, other, REAL), published, outputs_of(5, 2, CLASSES))


def test_divergence_of_labels():
    """The same of the Bernoulli distribution of each label, by `torch.distributions`, the mean over labels."""
    other = outputs_of(8, 2, CLASSES)

    def reference(x):
        p, q = (torch.distributions.Bernoulli(logits=v.double()) for v in (x, torch.tensor(other[REAL > 0])))
        kl = torch.distributions.kl_divergence
        return ((kl(p, q) + kl(q, p)) / 2).mean()

    agree(lambda x: losses.label_divergence(x, other, REAL), reference, outputs_of(7, 2, CLASSES))


def test_weighing_by_the_mean_would_be_seen():
    """Negative control: dividing by the number of documents, and not by their weights, is not torch's mean."""
    label = np.random.default_rng(1).choice([0, 1, 2, 4], (ROWS, SLOTS))
    found = losses.cross_entropy(jnp.asarray(outputs_of(0, 3, CLASSES)), label, REAL, class_weights=WEIGHTS)
    theirs = torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS))
    expected = float(theirs(documents(outputs_of(0, 3, CLASSES), torch.float32), documents(label, torch.long)))
    assert float(found.value) == pytest.approx(expected, rel=2e-6)
    assert abs(float(found.total) / REAL.sum() - expected) > 0.1 * expected
