"""Loss and metrics from counts: equal to scikit-learn on the whole data, however it was cut into batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from sft_jax.tasks.metrics import classification, per_class
from sft_jax.tasks.sequence_classification import ClassCounts, count, finish, loss
from sft_jax.tasks.task import Ratio

SCORES = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
ROWS, SLOTS = 3, 4  # of a batch in these tests
COUNT = jax.jit(count)


def confusion_of(truth, predicted, classes: int) -> np.ndarray:
    """Counts of each pair of truth and prediction."""
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (truth, predicted), 1)
    return confusion


def expected(truth, predicted) -> dict[str, float]:
    """Every metric by scikit-learn."""
    found = {"accuracy": accuracy_score(truth, predicted)}
    for name, score in SCORES.items():
        for average in ("macro", "micro", "weighted"):
            found[f"{name}_{average}"] = score(truth, predicted, average=average, zero_division=0)
    return found


@st.composite
def predictions(draw):
    """(classes, truth, prediction), often with classes that occur in neither or in one of them."""
    classes = draw(st.integers(2, 9))
    used = st.sampled_from(draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=classes)))
    pairs = draw(st.lists(st.tuples(used, used), min_size=1, max_size=80))
    return classes, *zip(*pairs, strict=True)


@given(predictions())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_metrics_equal_those_of_scikit_learn(drawn):
    """Accuracy and each average of precision, recall and F1 are scikit-learn's, absent classes included."""
    classes, truth, predicted = drawn
    assert classification(confusion_of(truth, predicted, classes)) == pytest.approx(expected(truth, predicted))


@given(predictions())
@settings(deadline=None, max_examples=100, derandomize=True)
def test_figures_of_each_class_equal_those_of_scikit_learn(drawn):
    """Precision, recall, F1 and support of every class are scikit-learn's, 0 where there is nothing to divide by."""
    classes, truth, predicted = drawn
    *found, support = per_class(confusion_of(truth, predicted, classes))
    for values, score in zip(found, SCORES.values(), strict=True):
        reference = score(truth, predicted, average=None, labels=range(classes), zero_division=0)
        np.testing.assert_allclose(values, reference, rtol=1e-12)
    assert support.tolist() == [list(truth).count(c) for c in range(classes)]


def test_metrics_of_nothing_are_zero():
    """A split without a prediction scores 0 rather than NaN, and warns of nothing."""
    assert set(classification(np.zeros((3, 3))).values()) == {0.0}


def batches_of(logits, labels, sizes, seed: int):
    """The documents in batches of these sizes, strewn over the slots; what is left is filler full of garbage."""
    draw = np.random.default_rng(seed)
    begin = 0
    for size in sizes:
        slots = draw.permutation(ROWS * SLOTS)[:size]
        values = draw.normal(0, 100, (ROWS * SLOTS, logits.shape[1])).astype(np.float32)
        numbers = draw.integers(0, logits.shape[1], ROWS * SLOTS).astype(np.int32)
        weight = np.zeros(ROWS * SLOTS, np.float32)
        values[slots], numbers[slots] = logits[begin : begin + size], labels[begin : begin + size]
        weight[slots] = 1
        batch = {"label": numbers.reshape(ROWS, SLOTS), "weight": weight.reshape(ROWS, SLOTS)}
        yield values.reshape(ROWS, SLOTS, -1), batch
        begin += size


@given(
    sizes=st.lists(st.integers(0, ROWS * SLOTS), min_size=1, max_size=8).filter(any),
    classes=st.sampled_from([2, 3, 7]),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_counts_over_any_batches_equal_the_whole(sizes, classes, seed):
    """C16: counts summed over batches of any size, filler ignored, give scikit-learn's metrics and the exact mean."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 3, (sum(sizes), classes)).astype(np.float32)
    labels = draw.integers(0, classes, len(logits)).astype(np.int32)
    parts = [COUNT(*batch) for batch in batches_of(logits, labels, sizes, seed)]
    counts = jax.tree.map(lambda *leaves: sum(leaves), *parts)

    assert counts.loss.weight == len(logits) == np.asarray(counts.confusion).sum()
    found = finish(counts)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    mean = -log_probabilities[np.arange(len(labels)), labels].mean()
    assert found.pop("loss") == pytest.approx(mean, rel=1e-5)
    assert found == pytest.approx(expected(labels, logits.argmax(axis=1)))


def test_filler_that_were_counted_would_show():
    """C16: the control: the same batch with weight 1 on its filler gives other counts."""
    logits = np.zeros((5, 2), np.float32)
    ((values, batch),) = batches_of(logits, np.zeros(5, np.int32), [5], 0)
    assert np.asarray(count(values, batch).confusion).sum() == 5
    wrong = count(values, {**batch, "weight": np.ones_like(batch["weight"])})
    assert np.asarray(wrong.confusion).sum() == ROWS * SLOTS and wrong.loss.total > 2 * 5 * np.log(2)


def test_ratios_add_totals_and_weights():
    """C1: ragged parts summed as ratios give the mean of all, which the mean of their means does not."""
    draw = np.random.default_rng(0)
    parts = [draw.normal(2, 1, size) for size in (1, 9, 3)]
    ratios = [Ratio(jnp.float32(p.sum()), jnp.float32(len(p))) for p in parts]
    added = jax.tree.map(lambda *leaves: sum(leaves), *ratios)
    whole = np.concatenate(parts).mean()
    assert added.weight == 13 and float(added.value) == pytest.approx(whole, rel=1e-6)
    assert abs(np.mean([float(r.value) for r in ratios]) - whole) > 0.01


def test_a_ratio_of_nothing_is_zero_with_a_finite_gradient():
    """C9: no weight gives 0, and a gradient of 0 rather than NaN."""
    nothing = jnp.zeros(())
    assert Ratio(nothing, nothing).value == 0
    batch = {"label": jnp.zeros((2, 1), jnp.int32), "weight": jnp.zeros((2, 1))}
    gradient = jax.grad(lambda logits: loss(logits, batch).value)(jnp.ones((2, 1, 3)))
    assert not gradient.any()


def test_filler_has_no_gradient():
    """C16: the loss does not pull on the logits of filler, and pulls on each document alike."""
    batch = {"label": jnp.array([[0, 1]]), "weight": jnp.array([[1.0, 0.0]])}
    gradient = jax.grad(lambda logits: loss(logits, batch).total)(jnp.zeros((1, 2, 2)))
    np.testing.assert_allclose(gradient, [[[-0.5, 0.5], [0, 0]]])


def test_the_loss_is_summed_in_float32():
    """Outputs in bfloat16 lose no precision of the loss beyond their own."""
    logits = np.random.default_rng(1).normal(0, 2, (4, 8, 5))
    half = jnp.asarray(logits, jnp.bfloat16)
    batch = {"label": jnp.ones((4, 8), jnp.int32), "weight": jnp.ones((4, 8))}
    found = loss(half, batch)
    assert found.total.dtype == jnp.float32
    assert float(found.total) == pytest.approx(float(loss(half.astype(jnp.float32), batch).total), rel=1e-7)


def test_counts_start_from_zero():
    """The counts of an empty batch are zeros that add nothing to those of others."""
    empty = count(jnp.ones((2, 2, 3)), {"label": jnp.zeros((2, 2), jnp.int32), "weight": jnp.zeros((2, 2))})
    assert isinstance(empty, ClassCounts)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(empty))
    assert set(finish(empty).values()) == {0.0}
