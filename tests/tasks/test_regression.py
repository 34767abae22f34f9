"""Regression: numbers and texts of numbers, messages about bad rows, records and reviews."""

import numpy as np
import pytest
from conftest import examples, one
from datasets import Dataset

from sft_jax.config.data import Split
from sft_jax.config.tasks import Regression
from sft_jax.data.prepare import cut
from sft_jax.data.rows import Rows
from sft_jax.errors import DataError
from sft_jax.tasks.regression import tenths
from sft_jax.tasks.task import Task, build_task, restore_task


def rows_of(scores: list) -> Rows:
    """Rows with these scores."""
    return Rows(Dataset.from_dict({"text": ["bara"] * len(scores), "score": scores}), "data.source.train")


def task_of(**settings) -> Task:
    """The task; it needs no rows."""
    return build_task(Regression(kind="regression", **settings), {})


@pytest.mark.parametrize("scores", [[1, -2, 3], [1.0, -2.0, 3.0], ["1", " -2.0", "3e0"]])
def test_numbers_and_texts_of_numbers(scores):
    """C25: whole numbers, fractions and what a CSV holds as text are the same numbers."""
    found = task_of().targets(rows_of(scores))
    assert found.values == [1.0, -2.0, 3.0] and not found.bad
    assert task_of().label_counts(found.values) == {"lowest": -2.0, "mean": 0.6667, "highest": 3.0}


@pytest.mark.parametrize(
    "scores", [[1, None], ["1", ""], ["1", "good"], ["1", "nan"], ["1", "inf"], [1.0, float("nan")], [1.0, 1e39]]
)
def test_what_is_no_number_is_named(scores):
    """C25: a gap, a word, NaN, infinity and what float32 cannot hold are named by row; the others are read."""
    found = task_of().targets(rows_of(scores))
    assert list(found.bad) == [1] and found.values == [1.0, None]
    assert found.bad[1].place == "row 2" and found.bad[1].text == f"score is {scores[1]!r}, expected a finite number"


@pytest.mark.parametrize("value", [True, [1.0], {"a": 1}])
def test_truths_and_lists_are_no_numbers(value):
    """C25: a truth value would be 1 in silence, and a list is several numbers."""
    assert 0 in task_of().targets(rows_of([value])).bad
    with pytest.raises(DataError, match="no column 'stars'; the rows have: text, score"):
        task_of(label="stars").targets(rows_of([1.0]))


def test_tenths_are_divided_alike():
    """A stratified split keeps the spread of the numbers: each tenth of them is divided in the same shares."""
    targets = np.random.default_rng(0).lognormal(size=400).tolist()
    classes = np.array(tenths(targets))
    assert np.bincount(classes).tolist() == [40] * 10
    assert max(t for t, c in zip(targets, classes, strict=True) if c == 0) <= np.quantile(targets, 0.1)
    parts = cut(classes.tolist(), Split(test=0.1), seed=3)
    assert np.bincount(classes[parts["test"]]).tolist() == [4] * 10
    assert len(set(tenths([5.0] * 30))) == 1 and len(set(tenths([1.0]))) == 1


def test_a_record_is_the_number_and_comes_back_from_its_config_json():
    """R57: `predict` gives the output as it is, and `config.json` names the one output."""
    task = task_of(label="stars", text="review")
    assert one(task, np.array([2.5], np.float32)) == {"score": 2.5}
    written = task.to_hf()
    assert (written["id2label"], written["problem_type"]) == ({"0": "stars"}, "regression")
    again = restore_task({"architectures": ["X"], **written}, "here")
    assert again.columns == ("review", "stars") and again.to_hf() == written


def test_a_review_puts_the_largest_error_first():
    """Each document has its number, what was said, and how far off that is; no number is simply right."""
    found = task_of().review(np.array([[1.0], [4.0]], np.float32), examples(label=np.array([1.5, 2.0], np.float32)))
    assert (found.truth, found.predicted) == (["1.5", "2"], ["1", "4"])
    assert found.loss.tolist() == [0.5, 2.0] and not found.right.any() and found.confidence is None


@pytest.mark.parametrize(
    ("settings", "total"),
    [({}, 9.25), ({"loss": "huber"}, 0.125 + 2.5), ({"loss": "huber", "huber_delta": 10.0}, 4.625)],
)
def test_the_loss_is_the_one_asked_for(settings, total):
    """C26: squared error, or Huber's with its delta; mean errors are the same under both."""
    outputs, batch = np.array([[[1.0], [4.0]]]), {"label": np.array([[1.5, 1.0]]), "weight": np.ones((1, 2))}
    task = task_of(**settings)
    assert float(task.loss(outputs, batch).total) == pytest.approx(total)
    assert task.metrics(task.count(outputs, batch))["mae"] == pytest.approx(1.75)


def test_errors_are_shown_by_where_the_truth_lies():
    """Rows, mean error and mean absolute error stand beside the parts of the training numbers, filler left out."""
    task = task_of().fit(examples(label=np.array([1, 1, 2, 2, 3, 3], np.float32)).encoded)
    batch = {"label": np.array([[1.0, 1.0, 3.0, 9.0]]), "weight": np.array([[1, 1, 1, 0]], np.float32)}
    counts = task.count(np.array([[[2.0], [0.5], [2.0], [0.0]]], np.float32), batch)
    assert task.tables(counts)["error by truth"][1:] == [["up to 1", 2, 0.25, 0.75], ["up to 3", 1, -1.0, 1.0]]
    alone = task_of().tables(
        task_of().count(np.zeros((1, 1, 1)), {"label": np.ones((1, 1)), "weight": np.ones((1, 1))})
    )
    assert alone["error by truth"][1:] == [["all", 1, -1.0, 1.0]]


def test_numbers_to_predict_are_none(tmp_path):
    """Documents without a target have a 0 in its place, in float32."""
    from conftest import write_tokenizer

    from sft_jax.data.text import load_tokenizer

    write_tokenizer(tmp_path)
    encoded = task_of().encode([["bara", "cela"]], None, load_tokenizer(tmp_path), 8)
    assert encoded.documents["label"].dtype == np.float32 and not encoded.documents["label"].any()
