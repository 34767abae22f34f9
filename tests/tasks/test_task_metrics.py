"""Loss and metrics: equal to scikit-learn and scipy on the whole data, however it was cut into batches."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from sft_jax.config.tasks import MultiLabelClassification, Regression, SequenceClassification
from sft_jax.tasks import metrics
from sft_jax.tasks.classes import ClassCounts
from sft_jax.tasks.metrics import classification, per_class
from sft_jax.tasks.task import Ratio, build_task

SCORES = {"precision": reference.precision_score, "recall": reference.recall_score, "f1": reference.f1_score}
ROWS, SLOTS = 3, 4  # of a batch in these tests
CLASSES = {k: [f"class {c}" for c in range(k)] for k in (2, 3, 7)}
SINGLE = {
    k: build_task(SequenceClassification(kind="sequence_classification", labels=names), {})
    for k, names in CLASSES.items()
}
SEVERAL = build_task(MultiLabelClassification(kind="multi_label_classification", labels=CLASSES[7]), {})
NUMBER = build_task(Regression(kind="regression"), {})
COUNT = {id(task): jax.jit(task.count) for task in (*SINGLE.values(), SEVERAL, NUMBER)}


def quietly(score, *arguments, **settings) -> float:
    """A score of scikit-learn, which warns where it is not defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return score(*arguments, **settings)


def confusion_of(truth, predicted, classes: int) -> np.ndarray:
    """Counts of each pair of truth and prediction."""
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (truth, predicted), 1)
    return confusion


def expected(truth, predicted) -> dict[str, float]:
    """Every metric by scikit-learn."""
    found = {
        "accuracy": reference.accuracy_score(truth, predicted),
        "matthews": quietly(reference.matthews_corrcoef, truth, predicted),
    }
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
        each = score(truth, predicted, average=None, labels=range(classes), zero_division=0)
        np.testing.assert_allclose(values, each, rtol=1e-12)
    assert support.tolist() == [list(truth).count(c) for c in range(classes)]


def test_metrics_of_nothing_are_zero():
    """A split without a prediction scores 0 rather than NaN, and warns of nothing."""
    assert set(classification(np.zeros((3, 3))).values()) == {0.0}


def counted(task, outputs, answers, sizes, seed: int):
    """The counts of the documents in batches of these sizes, strewn over the slots; the rest is filler of garbage."""
    draw = np.random.default_rng(seed)
    begin, parts = 0, []
    for size in sizes:
        slots = draw.permutation(ROWS * SLOTS)[:size]
        values = draw.normal(0, 100, (ROWS * SLOTS, outputs.shape[1])).astype(np.float32)
        label = draw.integers(0, 2, (ROWS * SLOTS, *answers.shape[1:])).astype(answers.dtype)
        weight = np.zeros(ROWS * SLOTS, np.float32)
        values[slots], label[slots] = outputs[begin : begin + size], answers[begin : begin + size]
        weight[slots] = 1
        batch = {"label": label.reshape(ROWS, SLOTS, *label.shape[1:]), "weight": weight.reshape(ROWS, SLOTS)}
        parts.append(COUNT[id(task)](values.reshape(ROWS, SLOTS, -1), batch))
        begin += size
    return jax.tree.map(lambda *leaves: sum(leaves), *parts)


def scored(task, outputs, answers, sizes, seed: int = 0) -> dict[str, float]:
    """Every metric of a task, as a split is scored."""
    counts = counted(task, outputs, answers, sizes, seed)
    found = {**task.metrics(counts), **task.row_metrics(outputs, examples(label=answers))}
    assert tuple(found) == task.metric_names and np.isfinite(list(found.values())).all()
    return found


SIZES = st.lists(st.integers(0, ROWS * SLOTS), min_size=1, max_size=8).filter(any)


@given(sizes=SIZES, classes=st.sampled_from([*SINGLE]), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_metrics_of_one_label(sizes, classes, seed):
    """C16: over batches of any size, filler ignored, every metric of one label is scikit-learn's on the whole."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 3, (sum(sizes), classes)).astype(np.float32)
    label = draw.integers(0, classes, len(logits)).astype(np.int32)
    found = scored(SINGLE[classes], logits, label, sizes, seed)
    odds = np.exp(logits.astype(np.float64))
    p, predicted = odds / odds.sum(axis=1, keepdims=True), logits.argmax(axis=1)
    loss = reference.log_loss(label, p, labels=range(classes))
    wanted = {"loss": loss, "log_loss": loss, **expected(label, predicted)}

    bins = np.ceil(p.max(axis=1) * 15)
    groups = [bins == number for number in np.unique(bins)]
    gaps = [abs((label == predicted)[g].mean() - p.max(axis=1)[g].mean()) * g.sum() for g in groups]
    wanted["ece"] = sum(gaps) / len(label)

    truth = (label[:, None] == np.arange(classes))[:, 1 if classes == 2 else 0 :]
    ranked = p[:, 1 if classes == 2 else 0 :]
    both = truth.any(axis=0) & ~truth.all(axis=0)
    areas = [reference.roc_auc_score(t, r) for t, r in zip(truth.T[both], ranked.T[both], strict=True)]
    some = truth.any(axis=0)
    heights = [reference.average_precision_score(t, r) for t, r in zip(truth.T[some], ranked.T[some], strict=True)]
    wanted |= {"roc_auc": np.mean(areas or [0]), "average_precision": np.mean(heights or [0])}
    if classes > 5:
        best = np.argsort(-logits, axis=1)[:, :5]
        wanted["top5_accuracy"] = (best == label[:, None]).any(axis=1).mean()
    assert found == pytest.approx(wanted, rel=1e-5)
    if both.all() and classes > 2:
        assert found["roc_auc"] == pytest.approx(reference.roc_auc_score(label, p, multi_class="ovr"))


@given(sizes=SIZES, seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_metrics_of_several_labels(sizes, seed):
    """C16: so is every metric of several labels, those without a row and rows without a label included."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(-1, 3, (sum(sizes), 7)).astype(np.float32)
    label = (draw.random((len(logits), 7)) < draw.random(7)).astype(np.int32)
    found, said = scored(SEVERAL, logits, label, sizes, seed), (logits >= 0).astype(int)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    loss = reference.log_loss(label.ravel(), p.ravel(), labels=[0, 1])
    wanted = {
        "loss": loss,
        "log_loss": loss,
        "subset_accuracy": reference.accuracy_score(label, said),
        "hamming_loss": reference.hamming_loss(label, said),
    }
    for name, score in SCORES.items():
        for average in ("macro", "micro", "weighted", "samples"):
            wanted[f"{name}_{average}"] = score(label, said, average=average, zero_division=0)
    some = label.any(axis=0)
    both = some & ~label.all(axis=0)
    for name, score, kept in (
        ("roc_auc", reference.roc_auc_score, both),
        ("average_precision", reference.average_precision_score, some),
    ):
        wanted[name] = score(label[:, kept], p[:, kept], average="macro") if kept.any() else 0.0
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@given(sizes=SIZES, seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_metrics_of_a_number(sizes, seed):
    """C16: so is every metric of numbers, ties among them; correlations are scipy's."""
    draw = np.random.default_rng(seed)
    values = draw.normal(2, 2, (sum(sizes), 1)).astype(np.float32).round(1)
    truth = draw.integers(0, 6, len(values)).astype(np.float32)
    found, given_values = scored(NUMBER, values, truth, sizes, seed), values[:, 0].astype(np.float64)
    squared = reference.mean_squared_error(truth, given_values)
    wanted = {
        "loss": squared,
        "mse": squared,
        "rmse": squared**0.5,
        "mae": reference.mean_absolute_error(truth, given_values),
    }
    varies = np.ptp(truth) > 0 and np.ptp(given_values) > 0
    wanted["r2"] = reference.r2_score(truth, given_values) if np.ptp(truth) > 0 else 0.0
    wanted["pearson"] = stats.pearsonr(truth, given_values)[0] if varies else 0.0
    wanted["spearman"] = stats.spearmanr(truth, given_values)[0] if varies else 0.0
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("task", [SINGLE[2], SINGLE[3], SEVERAL, NUMBER], ids=lambda task: f"{task.kind}")
def test_a_metric_is_always_a_finite_number(task):
    """C18: a single row, one answer throughout, the same output throughout, and no row at all score numbers."""
    shape = (12, task.head.size)
    answers = {"regression": np.ones(12, np.float32), "multi_label_classification": np.ones(shape, np.int32)}
    label = answers.get(task.kind, np.ones(12, np.int32))
    for outputs in (np.zeros(shape, np.float32), np.full(shape, -1e4, np.float32), np.eye(*shape, dtype=np.float32)):
        scored(task, outputs, label, [12])
        scored(task, outputs[:1], label[:1], [1])
        scored(task, outputs[:0], label[:0], [0])


def test_outputs_that_are_not_finite_rank_nothing():
    """A model that broke scores 0 where outputs are ranked, instead of an error of a library."""
    broken = np.full((4, 1), np.nan)
    assert set(metrics.ranking(broken, np.eye(4, 1) > 0).values()) == {0.0}
    assert set(metrics.correlation(broken[:, 0], np.arange(4.0)).values()) == {0.0}


def test_counts_are_integers():
    """Counts that grow with the rows are int32: float32 stops counting at 2^24."""
    for task, label in ((SINGLE[3], np.zeros(4, np.int32)), (SEVERAL, np.zeros((4, 7), np.int32))):
        counts = counted(task, np.zeros((4, task.head.size), np.float32), label, [4], 0)
        found = {str(path[0]): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(counts)}
        exact = {n for n, kind in found.items() if kind == np.int32}
        assert exact >= ({".confusion"} if task is SINGLE[3] else {".rows", ".same", ".hits", ".predicted", ".support"})


def test_filler_that_were_counted_would_show():
    """C16: the control: the same batch with weight 1 on its filler gives other counts."""
    batch = {"label": np.zeros((ROWS, SLOTS), np.int32), "weight": np.zeros((ROWS, SLOTS), np.float32)}
    batch["weight"][0, :3] = batch["weight"][1, :2] = 1
    logits = np.zeros((ROWS, SLOTS, 2), np.float32)
    assert np.asarray(SINGLE[2].count(logits, batch).confusion).sum() == 5
    wrong = SINGLE[2].count(logits, {**batch, "weight": np.ones_like(batch["weight"])})
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
    gradient = jax.grad(lambda logits: SINGLE[3].loss(logits, batch).value)(jnp.ones((2, 1, 3)))
    assert not gradient.any()


def test_filler_has_no_gradient():
    """C16: the loss does not pull on the logits of filler, and pulls on each document alike."""
    batch = {"label": jnp.array([[0, 1]]), "weight": jnp.array([[1.0, 0.0]])}
    gradient = jax.grad(lambda logits: SINGLE[2].loss(logits, batch).total)(jnp.zeros((1, 2, 2)))
    np.testing.assert_allclose(gradient, [[[-0.5, 0.5], [0, 0]]])


def test_the_loss_is_summed_in_float32():
    """Outputs in bfloat16 lose no precision of the loss beyond their own."""
    logits = np.random.default_rng(1).normal(0, 2, (4, 8, 5))
    half = jnp.asarray(logits, jnp.bfloat16)
    batch = {"label": jnp.ones((4, 8), jnp.int32), "weight": jnp.ones((4, 8))}
    found = SINGLE[3].loss(half, batch)
    assert found.total.dtype == jnp.float32
    assert float(found.total) == pytest.approx(float(SINGLE[3].loss(half.astype(jnp.float32), batch).total), rel=1e-7)


def test_counts_start_from_zero():
    """The counts of an empty batch are zeros that add nothing to those of others."""
    empty = counted(SINGLE[3], np.zeros((0, 3), np.float32), np.zeros(0, np.int32), [0], 0)
    assert isinstance(empty, ClassCounts)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(empty))
    assert set(SINGLE[3].metrics(empty).values()) == {0.0}
