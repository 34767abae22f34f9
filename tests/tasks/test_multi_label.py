"""Several labels: lists, joined texts and columns of 0 and 1; messages about bad rows; records and reviews."""

import json

import numpy as np
import pytest
from conftest import examples, one
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.model_selection import train_test_split

from sft_jax.config.data import Split
from sft_jax.config.tasks import MultiLabelClassification
from sft_jax.data.batch import Encoded, Shape, collate
from sft_jax.data.prepare import cut
from sft_jax.data.rows import Rows
from sft_jax.errors import ConfigError, DataError
from sft_jax.tasks.multi_label_classification import RARE, combinations
from sft_jax.tasks.task import Task, build_task, restore_task

WHERE = "data.source.train"


def rows_of(features: Features | None = None, **columns) -> Rows:
    """Rows with these columns beside a text."""
    count = len(next(iter(columns.values())))
    return Rows(Dataset.from_dict({"text": ["bara"] * count, **columns}, features), WHERE)


def task_of(rows: Rows | None = None, **settings) -> Task:
    """The task on these training rows."""
    section = MultiLabelClassification(kind="multi_label_classification", **settings)
    return build_task(section, {} if rows is None else {"train": rows})


@pytest.mark.parametrize(
    ("values", "labels", "answers"),
    [
        ([["joy", "fear"], [], ["joy"]], ("fear", "joy"), [(1, 1), (0, 0), (0, 1)]),
        (["joy, fear", "", " joy ", ",fear,"], ("fear", "joy"), [(1, 1), (0, 0), (0, 1), (1, 0)]),
        ([[10, 2], [2], []], ("2", "10"), [(1, 1), (1, 0), (0, 0)]),
        ([3, 1, 3], ("1", "3"), [(0, 1), (1, 0), (0, 1)]),
    ],
)
def test_labels_are_lists_or_joined_texts(values, labels, answers):
    """C25: lists and texts give the sorted names and a 0 or 1 for each; blanks are no labels, and none is allowed."""
    rows = rows_of(labels=values)
    task = task_of(rows)
    found = task.targets(rows)
    assert (task.labels, task.head.size) == (labels, len(labels))
    assert found.values == answers and not found.bad
    assert task.label_counts(found.values) == dict(zip(labels, np.sum(answers, axis=0).tolist(), strict=True))


@pytest.mark.parametrize(
    "cell", ["['fear', 'joy']", '["fear", "joy"]', "['fear' 'joy']", "('fear', 'joy')", "fear,joy", " fear , joy "]
)
def test_lists_in_cells_are_lists(cell):
    """K: the repr of a list in a cell is the list, and not labels such as `['fear'`; a broken one is a bad row."""
    rows = rows_of(labels=[cell, "joy", "[]", "[fear, joy]", "['fear' 'joy', 'joy']"])
    task = task_of(rows)
    assert task.labels == ("fear", "joy")
    found = task.targets(rows)
    assert found.values == [(1, 1), (0, 1), (0, 0), None, None] and found.bad.keys() == {3, 4}
    assert "is no list or object that can be read" in found.bad[3].text and "blanks between" in found.bad[4].text


def test_a_column_inside_of_objects():
    """F6: `meta.labels` is read, also where it is lists of a ClassLabel; a missing one is a message."""
    named = Features({"text": Value("string"), "meta": {"labels": List(ClassLabel(names=["x", "y"]))}})
    rows = rows_of(named, meta=[{"labels": [1]}, {"labels": [0, 1]}])
    task = task_of(rows, label="meta.labels")
    assert task.labels == ("x", "y") and task.targets(rows).values == [(0, 1), (1, 1)]
    with pytest.raises(DataError, match=r"no column 'labels'; the rows have: text, meta$"):
        task_of(rows)


def test_another_separator():
    """What joins labels is a setting; a comma is then a part of a name."""
    rows = rows_of(labels=["a, b|c", "c"])
    assert task_of(rows, separator="|").labels == ("a, b", "c")
    with pytest.raises(ConfigError, match=r"task\.separator: is empty; give what joins the labels"):
        task_of(rows, separator="")


def test_lists_of_the_source_keep_their_names():
    """C25: a list of ClassLabels gives its names in its order, and stores numbers of them."""
    names = ClassLabel(names=["sad", "glad", "mad"])
    rows = rows_of(Features({"text": Value("string"), "labels": List(names)}), labels=[[2, 0], [1]])
    task = task_of(rows)
    assert task.labels == ("sad", "glad", "mad") and task.targets(rows).values == [(1, 0, 1), (0, 1, 0)]
    assert task_of(rows, labels=["mad", "glad", "sad"]).targets(rows).values == [(1, 0, 1), (0, 1, 0)]


@pytest.mark.parametrize("one", [1, True, "1", "true", " True", 1.0])
def test_columns_of_zeros_and_ones(one):
    """C25: a column for each label, however its zeros and ones are written; they name the labels unless others do."""
    zero = {bool: False, str: "0", float: 0.0}.get(type(one), 0)
    rows = rows_of(toxic=[one, zero], rude=[one, one], other=[7, 7])
    task = task_of(rows, label=["toxic", "rude"])
    assert (task.labels, task.columns) == (("toxic", "rude"), ("text", "toxic", "rude"))
    assert task.targets(rows).values == [(1, 1), (0, 1)]
    named = task_of(rows, label=["toxic", "rude"], labels=["Toxic!", "Rude!"])
    assert named.labels == ("Toxic!", "Rude!") and named.targets(rows).values == [(1, 1), (0, 1)]
    with pytest.raises(DataError, match="no column 'nude'; the rows have: text, toxic, rude, other"):
        task_of(rows, label=["toxic", "nude"]).targets(rows)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"labels": [["joy"], ["jo"]]}, {}, "labels has 'jo'; did you mean 'joy'?; expected one of the 2 labels (fear"),
        ({"labels": ["joy", "joy,fera"]}, {}, "labels has 'fera'; did you mean 'fear'?; expected one of the 2 labels"),
        (
            {"labels": [["joy"], None]},
            {},
            "labels is None; expected a list of labels, or a text of labels joined by ','",
        ),
        ({"labels": [[1, 0], [0, 0]]}, {}, "labels is [0, 0]; expected each label once; zeros and ones of each label"),
        ({"labels": [[0], [2]]}, {}, "labels has 2; expected one of the 2 labels (fear, joy) or a number from 0 to 1"),
        ({"fear": [0, 2], "joy": [1, 1]}, {"label": ["fear", "joy"]}, "fear is 2, expected 0 or 1"),
        ({"fear": [0, 1], "joy": [1, None]}, {"label": ["fear", "joy"]}, "joy is None, expected 0 or 1"),
    ],
)
def test_bad_labels_are_named(columns, settings, message):
    """C25: what is no label is named by row, with the nearest that is; the other rows are read."""
    rows = rows_of(**columns)
    found = task_of(rows, labels=["fear", "joy"], **settings).targets(rows)
    assert list(found.bad) == [1] and found.values[1] is None and found.values[0] is not None
    assert found.bad[1].place == "row 2" and found.bad[1].text.startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": []}, "task.labels: []; give one label or more, each once"),
        ({"labels": ["a", "a"]}, "task.labels: ['a', 'a']; give one label or more, each once"),
        ({"label": ["a", "b"], "labels": ["x"]}, "task.labels: ['x'] for 2 columns in task.label; give as many"),
        (
            {"labels": ["a"], "class_weights": {"b": 2.0}},
            "task.class_weights: 1 problem\n  - 'b' is no label (known: a)",
        ),
    ],
)
def test_useless_settings_are_refused(settings, message):
    """C25: names twice or too few, and weights of what is no label, are refused as the task is built."""
    with pytest.raises(ConfigError) as caught:
        task_of(**settings)
    assert str(caught.value) == message


def test_a_column_without_a_label_is_refused():
    """Nothing can be learned from a column in which no row has a label."""
    with pytest.raises(DataError, match=f"{WHERE}: column 'labels' holds no label; expected lists of labels, or texts"):
        task_of(rows_of(labels=["", " "]))


def test_combinations_are_divided_alike():
    """A stratified split keeps the share of each common combination, and of rare ones by how many labels they have."""
    draw = np.random.default_rng(0)
    common = [(0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)]
    targets = [common[i] for i in draw.choice(3, 400, p=[0.6, 0.3, 0.1])] + [(0, 0, 1, 1), (0, 1, 1, 0)] * 4
    classes = np.array(combinations(targets))
    assert len(set(classes)) == 4, "two rare combinations of two labels each are one class"
    assert all(len({classes[i] for i, t in enumerate(targets) if t == c}) == 1 for c in common)
    assert len(set(combinations(targets[: RARE - 1]))) <= 3
    parts = cut(classes.tolist(), Split(validation=0.25), seed=1)
    for number in set(classes):
        assert np.sum(classes[parts["validation"]] == number) == round(0.25 * np.sum(classes == number))
    train_test_split(np.arange(len(classes)), stratify=classes)  # scikit-learn takes them for classes, too


def test_balanced_weights_are_negatives_over_positives():
    """`balanced` makes positives weigh as much as negatives; a label that all have, or none, is left alone."""
    task = task_of(labels=[*"abcd"], class_weights="balanced")
    label = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
    batch = {"label": label[None], "weight": np.ones((1, 4), np.float32)}
    zeros = np.zeros((1, 4, 4), np.float32)
    weights = np.array([3.0, 1.0, 1.0, 1 / 3])
    expected = (label * weights + (1 - label)).sum() * np.log(2)
    assert float(task.fit(examples(label=label).encoded).loss(zeros, batch).total) == pytest.approx(expected, rel=1e-6)
    assert float(task.loss(zeros, batch).total) == pytest.approx(16 * np.log(2), rel=1e-6)


@pytest.mark.parametrize(("threshold", "labels"), [(0.0, ["a", "b", "c"]), (0.5, ["b", "c"]), (0.9, ["c"]), (1.0, [])])
def test_a_record_has_the_labels_from_the_threshold_on(threshold, labels):
    """A label is said from the threshold on, in records as in counts; scores are each label's probability."""
    task, logits = task_of(labels=["a", "b", "c"], threshold=threshold), np.array([-1.0, 0.0, 1e4], np.float32)
    record = one(task, logits)
    assert record["labels"] == labels
    assert list(record["scores"].values()) == pytest.approx([1 / (1 + np.e), 0.5, 1.0], abs=1e-6)
    batch = {"label": np.zeros((1, 1, 3), np.int32), "weight": np.ones((1, 1), np.float32)}
    assert np.asarray(task.count(logits[None, None], batch).predicted).tolist() == [int(n in labels) for n in "abc"]
    again = restore_task(json.loads(json.dumps({"architectures": ["X"], **task.to_hf()})), "here")
    assert one(again, logits) == record


def test_a_review_says_which_labels_were_taken_for_which():
    """Each document has its labels, those said instead, the chance of just these, and the mean cross-entropy."""
    found = task_of(labels=["a", "b"]).review(
        np.array([[0.0, -2.0], [9.0, 1.0]]), examples(label=np.array([[0, 0], [1, 1]]))
    )
    assert (found.truth, found.predicted, found.right.tolist()) == (["none", "a, b"], ["a", "a, b"], [False, True])
    no = 1 / (1 + np.exp(-2.0))
    assert found.confidence is not None and found.confidence[0] == pytest.approx(0.5 * no)
    assert found.loss[0] == pytest.approx((np.log(2) - np.log(no)) / 2) and found.loss[1] < found.loss[0]


def test_tables_show_each_label():
    """Precision, recall, F1 and rows of each label stand under its name."""
    task = task_of(labels=["a", "b"])
    batch = {"label": np.array([[[1, 0], [1, 0], [0, 0]]]), "weight": np.ones((1, 3), np.float32)}
    (table,) = task.tables(task.count(np.array([[[1.0, -1], [-1, 1], [1, -1]]], np.float32), batch)).values()
    assert table[1:] == [["a", 0.5, 0.5, 0.5, 2, 2], ["b", 0.0, 0.0, 0.0, 0, 1]]


def test_answers_of_several_labels_are_laid_out_by_document():
    """C7: each slot of a batch has the labels of its document, and filler has none."""
    label = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1]], np.int32)
    encoded = Encoded({"input_ids": np.arange(5)}, np.array([0, 2, 3, 5]), {"label": label})
    batch = collate(encoded, [[2, 0], [1]], Shape(3, 6, 2))
    assert batch["label"].tolist() == [[[1, 1, 1], [1, 0, 1]], [[0, 1, 1], [0, 0, 0]], [[0, 0, 0]] * 2]
    assert np.array_equal(label[2], [1, 1, 1]), "the documents are unchanged"
