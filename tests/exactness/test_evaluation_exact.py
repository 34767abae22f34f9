"""Evaluation counts every row once, on any number of devices, and its metrics are scikit-learn's and scipy's."""

import csv
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from bounds import SAME, in_double, widened
from conftest import WORDS
from exact_runs import settings, small_model
from scipy import stats
from sklearn import metrics as reference

from sft_jax.data.batch import Shape, collate
from sft_jax.data.loader import EvalBatches
from sft_jax.jobs import Scores, score
from sft_jax.run import Run, eval_program, initial, prepare
from sft_jax.train.evaluate import evaluate

ROWS = 21  # of the validation split, in batches of about 8
GROUPS = ("red", "blue", "green")
TASKS = {
    "sequence_classification": ["task.class_weights=balanced", "task.label_smoothing=0.1", "task.loss=focal"],
    "multi_label_classification": ["task.class_weights={a: 3}", "task.label=[a, b, c, d]"],
    "regression": ["task.loss=huber", "eval.best_metric=pearson"],
}
# Each layout on 1, 2 and 4 devices, or with a tensor axis.
LAYOUTS = {
    "packed on 1": ["mesh.data=1"],
    "padded on 2": ["data.layout.kind=padded", "mesh.data=2"],
    "packed on 2x2 with tensor": ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"],
    "padded on 4": ["data.layout.kind=padded", "mesh.data=4"],
}
Answers = tuple[np.ndarray, np.ndarray]  # (outputs, labels), [rows, ...]


def write_rows(file: Path, count: int, seed: int) -> Path:
    """Ragged texts with a class, four labels, a number and a group each."""
    draw = np.random.default_rng(seed)
    with open(file, "w", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["text", "label", *"abcd", "score", "colour"])
        for _ in range(count):
            text = " ".join(draw.choice(WORDS, size=int(draw.integers(1, 20))))
            bits = (draw.random(4) < 0.4).astype(int)
            writer.writerow([text, draw.integers(3), *bits, round(draw.normal(1), 2), GROUPS[draw.integers(3)]])
    return file


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Run]:
    """`ready(kind, "key=value", ...)`: a run of this task with 21 validation rows and evaluation batches of 8."""
    home, model = tmp_path_factory.mktemp("evaluation"), small_model(tmp_path_factory)
    files = [
        f"data.source.{split}={write_rows(home / f'{split}.csv', count, seed)}"
        for seed, (split, count) in enumerate((("train", 24), ("validation", ROWS)))
    ]
    plain = [*files, "data.source.test=null", "eval.group=colour"]

    def make(kind: str, *more: str) -> Run:
        return prepare(settings(home / "run", model, rows, *plain, f"task.kind={kind}", *TASKS[kind], *more))

    return make


@pytest.fixture(scope="module")
def one_by_one(ready) -> Callable[[str], Answers]:
    """(outputs, labels) of the validation rows, each alone in a batch of one, by kind of task."""
    found: dict[str, Answers] = {}

    def answers(kind: str) -> Answers:
        if kind not in found:
            run = ready(kind)
            params, encoded = initial(run)[0].params, run.data["validation"]
            shape = Shape(1, run.evals["validation"].shape.length, 1)
            forward = jax.jit(lambda params, batch: run.model.template.bind(params)(batch)[0, 0])
            with in_double():
                batches = [widened(collate(encoded, [[row]], shape)) for row in range(len(encoded))]
                outputs = np.array([forward(widened(params), batch) for batch in batches])
            found[kind] = outputs, encoded.documents["label"]
        return found[kind]

    return answers


def of_classes(logits: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """The metrics of one label by scikit-learn."""
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    said, sure = p.argmax(axis=1), p.max(axis=1)
    found = {
        "log_loss": reference.log_loss(label, p, labels=[0, 1, 2]),
        "accuracy": reference.accuracy_score(label, said),
        "matthews": reference.matthews_corrcoef(label, said),
    }
    for average in ("macro", "micro", "weighted"):
        wanted = reference.precision_recall_fscore_support(label, said, average=average, zero_division=0)
        found |= {f"{name}_{average}": wanted[i] for i, name in enumerate(("precision", "recall", "f1"))}
    bins = np.digitize(sure, np.arange(16) / 15, right=True)
    parts = [bins == number for number in np.unique(bins)]
    found["ece"] = sum(part.mean() * abs((said == label)[part].mean() - sure[part].mean()) for part in parts)
    if len(set(label)) == 3:
        truth = np.eye(3)[label]
        found["roc_auc"] = reference.roc_auc_score(label, p, multi_class="ovr")
        found["average_precision"] = reference.average_precision_score(truth, p, average="macro")
    return found


def of_labels(logits: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """The metrics of several labels by scikit-learn."""
    p, said = 1 / (1 + np.exp(-logits)), (logits >= 0).astype(int)
    found = {
        "log_loss": reference.log_loss(label.ravel(), p.ravel(), labels=[0, 1]),
        "subset_accuracy": reference.accuracy_score(label, said),
        "hamming_loss": reference.hamming_loss(label, said),
    }
    for average in ("macro", "micro", "weighted", "samples"):
        wanted = reference.precision_recall_fscore_support(label, said, average=average, zero_division=0)
        found |= {f"{name}_{average}": wanted[i] for i, name in enumerate(("precision", "recall", "f1"))}
    if label.any(axis=0).all() and not label.all(axis=0).any():
        found["roc_auc"] = reference.roc_auc_score(label, p, average="macro")
        found["average_precision"] = reference.average_precision_score(label, p, average="macro")
    return found


def of_numbers(outputs: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """The metrics of numbers by scikit-learn and scipy."""
    values, squared = outputs[:, 0], reference.mean_squared_error(label, outputs[:, 0])
    return {
        "mae": reference.mean_absolute_error(label, values),
        "mse": squared,
        "rmse": squared**0.5,
        "pearson": stats.pearsonr(label, values)[0],
        "spearman": stats.spearmanr(label, values)[0],
        "r2": reference.r2_score(label, values),
    }


BY_LIBRARY = dict(zip(TASKS, (of_classes, of_labels, of_numbers), strict=True))


@dataclass(frozen=True)
class _Widened(EvalBatches):
    """The same batches in float64."""

    def __getitem__(self, number: int):
        return widened(super().__getitem__(number))


def scores_of(run: Run) -> Scores:
    """The scores of the validation split at the initial parameters, by the run's own program in float64.

    So nothing hangs on rounding: a group of five rows may have a correlation near 0, which is a difference of sums.
    """
    batches, given = run.evals["validation"], initial(run)
    run = replace(run, evals={"validation": _Widened(batches.encoded, batches.rows, batches.shape)})
    with in_double():
        state, frozen = widened(given)
        return score(run, "validation", eval_program(run, state.params, frozen), state.params, frozen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TASKS)
def test_metrics_are_those_of_single_predictions(ready, one_by_one, kind: str, layout: str):
    """C16: 21 rows in batches of 8 on 1, 2 and 4 devices: each metric of each task is a library's on single rows."""
    outputs, label = one_by_one(kind)
    run = ready(kind, *LAYOUTS[layout])
    batches = run.evals["validation"]
    assert len(batches) > 1 and sum((b["weight"] == 0).sum() for b in map(batches.__getitem__, range(len(batches)))) > 0
    found = scores_of(run)
    np.testing.assert_allclose(found.kept, outputs, rtol=SAME, atol=SAME)

    wanted = BY_LIBRARY[kind](outputs, label)
    assert {*wanted, "loss"} == set(run.task.metric_names) == set(found.metrics)
    assert {name: found.metrics[name] for name in wanted} == pytest.approx(wanted, rel=SAME, abs=SAME)
    with in_double():
        loss = float(run.task.loss(outputs[:, None], {"label": label[:, None], "weight": np.ones((ROWS, 1))}).value)
    assert found.metrics["loss"] == pytest.approx(loss, rel=SAME)

    colours = np.array(run.rows["validation"].rows.column("colour"))
    assert sorted(found.groups) == sorted(set(colours)) and len(found.groups) == len(GROUPS)
    for name, metrics in found.groups.items():
        wanted = BY_LIBRARY[kind](outputs[colours == name], label[colours == name])
        assert {n: metrics[n] for n in wanted} == pytest.approx(wanted, rel=SAME, abs=SAME), name


@dataclass(frozen=True)
class _FillerCounts(EvalBatches):
    """The mistake: filler rows weigh as much as real ones."""

    def __getitem__(self, number: int):
        batch = super().__getitem__(number)
        return {**batch, "weight": np.ones_like(batch["weight"])}


def test_counting_filler_would_be_seen(ready):
    """C16: negative control; with weight 1 on filler rows the count is 24."""
    run = ready("sequence_classification", "data.layout.kind=padded", "mesh.data=2")
    batches, (state, frozen) = run.evals["validation"], initial(run)
    wrong = _FillerCounts(batches.encoded, batches.rows, batches.shape)
    program = eval_program(run, state.params, frozen)
    assert [
        evaluate(program, state.params, frozen, given, run.put, 2, "document").counts.confusion.sum()
        for given in (batches, wrong)
    ] == [ROWS, 24]


def device_memory(run: Run, times: int, *, hoard: bool = False) -> int:
    """The most bytes of device arrays that are alive at any batch of an evaluation of the rows, repeated."""
    batches = run.evals["validation"]
    batches = EvalBatches(batches.encoded, list(batches.rows) * times, batches.shape)
    state, frozen = initial(run)
    program = eval_program(run, state.weights, frozen)
    held, kept = [], []

    gc.collect()  # what earlier tests left

    def put(batch):
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        found = run.put(batch)
        kept.extend([found] if hoard else [])
        return found

    evaluate(program, state.weights, frozen, batches, put, 2, "document")
    assert len(held) == len(batches)
    return max(held)


def test_memory_does_not_grow_with_the_rows(ready):
    """C15: ten times the rows hold not a byte more on the device; the control, which keeps what it saw, holds more."""
    run = ready("sequence_classification", "data.layout.kind=padded")
    few, many = device_memory(run, 3), device_memory(run, 30)
    assert many == few
    assert device_memory(run, 30, hoard=True) > few
