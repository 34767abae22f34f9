"""Sequence classification: labels and their numbers, columns, messages about bad rows, and the way to disk and back."""

import io
import json

import numpy as np
import pytest
from conftest import WORDS, examples, one, write_tokenizer
from datasets import ClassLabel, Dataset, Features, Value
from rich.console import Console
from sklearn.utils.class_weight import compute_class_weight

from sft_jax import console, inputs
from sft_jax.config.tasks import SequenceClassification
from sft_jax.data.rows import Rows, refuse
from sft_jax.data.text import load_tokenizer
from sft_jax.errors import ConfigError, DataError, ModelError
from sft_jax.tasks.classes import ClassCounts, balanced_weights
from sft_jax.tasks.labels import doubts
from sft_jax.tasks.metrics import BINS, Calibration
from sft_jax.tasks.sequence_classification import restore
from sft_jax.tasks.task import Ratio, Task, build_task, restore_task

WHERE = "data.source.train"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer over the words of the tests."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory)


def section(**settings) -> SequenceClassification:
    """The section of a configuration."""
    return SequenceClassification(kind="sequence_classification", **settings)


def labelled(labels, names: list[str] | None = None) -> Dataset:
    """Rows with these labels; with `names` their column is a ClassLabel."""
    columns = {"text": [f"bara {n}" for n in range(len(labels))], "label": labels}
    if names is None:
        return Dataset.from_dict(columns)
    return Dataset.from_dict(columns, Features({"text": Value("string"), "label": ClassLabel(names=names)}))


def task_of(rows: Dataset, **settings) -> Task:
    """The task on these training rows."""
    return build_task(section(**settings), {"train": Rows(rows, WHERE)})


def numbers_of(task: Task, rows: Dataset, where: str = WHERE) -> list[int]:
    """The labels of rows as numbers; bad ones are refused."""
    found = task.targets(Rows(rows, where))
    refuse(where, [found.bad[row] for row in sorted(found.bad)])
    return found.values


def message_of(action) -> str:
    """The message of the DataError that an action raises."""
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "labels", "numbers"),
    [
        ([2, 0, 1, 0], ("0", "1", "2"), [2, 0, 1, 0]),
        ([5, 3, 10], ("3", "5", "10"), [1, 0, 2]),
        ([-1, 1, 1], ("-1", "1"), [0, 1, 1]),
        (["pos", "neg", "pos"], ("neg", "pos"), [1, 0, 1]),
        (["10", "9"], ("10", "9"), [0, 1]),
        ([True, False], ("False", "True"), [1, 0]),
    ],
)
def test_labels_are_the_sorted_values(values, labels, numbers):
    """Without names from elsewhere, numbers sort as numbers and words as words, and each row gets its place."""
    rows = labelled(values)
    task = task_of(rows)
    assert task.labels == labels and task.head.size == len(labels)
    assert numbers_of(task, rows) == numbers


def test_labels_of_the_source_keep_their_order():
    """A ClassLabel column gives its names in its order, those that no row has included."""
    rows = labelled([2, 0, 2], ["great", "awful", "meh"])
    task = task_of(rows)
    assert task.labels == ("great", "awful", "meh")
    assert numbers_of(task, rows) == [2, 0, 2]


def test_numbers_of_a_source_are_not_taken_for_its_names():
    """C25: stars called '1' to '5' and stored as 0 to 4 keep their classes, though 1 is also a name."""
    rows = labelled([0, 1, 2, 3, 4], ["1", "2", "3", "4", "5"])
    task = task_of(rows)
    assert numbers_of(task, rows) == [0, 1, 2, 3, 4]


def test_splits_may_number_the_same_names_otherwise():
    """C25: a validation split whose ClassLabel lists the names in another order is read by name."""
    task = task_of(labelled([0, 1], ["neg", "pos"]))
    assert numbers_of(task, labelled([0, 1, 1], ["pos", "neg"]), "data.validation") == [1, 0, 0]
    assert numbers_of(task, labelled(["pos", "neg"]), "data.test") == [1, 0]


def test_labels_of_the_configuration_rule():
    """Names in `task.labels` are in the order of their numbers, for columns of names, numbers and ClassLabels."""
    names = ["neg", "pos"]
    for rows in (labelled(["pos", "neg"]), labelled([1, 0]), labelled([1, 0], ["0", "1"])):
        task = task_of(rows, labels=names)
        assert task.labels == ("neg", "pos")
        assert numbers_of(task, rows) == [1, 0]


@pytest.mark.parametrize(
    ("values", "shown"),
    [([0.5, 1.5], "0.5"), ([None, float("nan"), 2.5], "2.5"), ([[0, 1], [1]], "[0, 1]"), (["['a']", "b"], "\"['a']\"")],
)
def test_values_that_are_no_labels_are_refused(values, shown):
    """Scores and lists are not labels; the message shows one and says where to name another column."""
    assert message_of(lambda: task_of(labelled(values))) == (
        f"data.source.train: column 'label' holds values such as {shown}, not labels; name another column in task.label"
    )


@pytest.mark.parametrize(("values", "count"), [([1, 1, 1], 1), (["a", None], 1), ([None, None], 0)])
def test_fewer_than_two_labels_are_refused(values, count):
    """A column with one label or none cannot be learned, and says so."""
    expected = f"data.source.train: column 'label' holds {count} label; classification needs two or more"
    assert message_of(lambda: task_of(labelled(values))) == expected


@pytest.mark.parametrize("labels", [[], ["only"], ["same", "same"], ["a", "b", "a"]])
def test_useless_names_of_labels_are_refused(labels):
    """C25: fewer than two names, or one twice, would merge classes in silence."""
    with pytest.raises(ConfigError) as caught:
        task_of(labelled([0, 1]), labels=labels)
    assert str(caught.value) == f"task.labels: {labels}; give two labels or more, each once"


def test_a_bad_label_is_named_with_row_value_range_and_near_miss():
    """C25: the message has the row, the value, the labels there are, their numbers and the closest spelling."""
    task = task_of(labelled(["negative", "neutral", "positive"]))
    message = message_of(lambda: numbers_of(task, labelled(["positive", "postive", "neutral"]), "data.validation"))
    assert message == (
        "data.validation: 1 problem\n"
        "  - row 2: label is 'postive'; did you mean 'positive'?; expected one of the 3 labels "
        "(negative, neutral, positive)"
    )


def test_label_9_of_9_classes_is_refused():
    """C25: a number just past the range is refused on the host, and one within it is not."""
    names = [f"topic {letter}" for letter in "abcdefghi"]
    task = task_of(labelled([0, 8]), labels=names)
    assert numbers_of(task, labelled([8, 0])) == [8, 0]
    message = message_of(lambda: numbers_of(task, labelled([3, 9, -1])))
    assert message.startswith(f"{WHERE}: 2 problems\n  - row 2: label is 9; expected one of the 9 labels (topic a, ")
    assert "\n  - row 3: label is -1; " in message and message.endswith(" or a number from 0 to 8")


def test_a_number_that_no_label_is_called_is_refused():
    """C25: with labels 1, 2 and 3 in training, a 0 elsewhere is a mistake and not the first class."""
    task = task_of(labelled([1, 2, 3]))
    message = message_of(lambda: numbers_of(task, labelled([3, 0]), "data.test"))
    assert message == "data.test: 1 problem\n  - row 2: label is 0; expected one of the 3 labels (1, 2, 3)"


@pytest.mark.parametrize("labels", [("None", "a"), ("nan", "a"), ("a", "b")])
def test_a_missing_label_is_no_label(labels):
    """C25: a row without a label is refused, even where a label is called None."""
    task = task_of(labelled([*labels]))
    assert "row 2: label is not there, expected a label" in message_of(
        lambda: numbers_of(task, labelled([labels[0], None]))
    )


def test_an_unlabelled_row_of_the_hub_is_refused():
    """C25: -1, which test splits on the hub have for a hidden label, is out of range."""
    rows = labelled([0, -1, 1], ["neg", "pos"])
    assert "row 2: label is -1; " in message_of(lambda: numbers_of(task_of(rows), rows))


def test_many_bad_labels_are_counted_and_five_shown():
    """C25: the heading counts all of them, five are written out, and the rest are summed up."""
    task = task_of(labelled([0, 1]))
    lines = message_of(lambda: numbers_of(task, labelled([0] + [7] * 100))).split("\n")
    assert lines[0] == f"{WHERE}: 100 problems" and lines[-1] == "  - and 95 more"
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"  - row {n}" for n in range(2, 7)]


def test_many_labels_are_not_all_listed():
    """C25: with many labels the message shows the first ten, and the whole range."""
    task = task_of(labelled([f"kind {n:02d}" for n in range(30)] * 2))
    message = message_of(lambda: numbers_of(task, labelled(["other"])))
    assert "kind 09, …)" in message and "kind 10" not in message and message.endswith("or a number from 0 to 29")


def test_documents_have_tokens_and_labels(tokenizer):
    """C7: documents have the tokens of their texts in order, their labels, and the count of those that were cut."""
    task = task_of(labelled(["b", "a"]))
    encoded = task.encode([["bara bare bari", "bara"]], [1, 0], tokenizer, 4)
    assert encoded.tokens["input_ids"].tolist() == [2, 5, 6, 3, 2, 5, 3]
    assert encoded.lengths.tolist() == [4, 3] and encoded.truncated == 1
    assert encoded.documents["label"].tolist() == [1, 0] and encoded.documents["label"].dtype == np.int32


def test_texts_to_predict_need_no_label(tokenizer):
    """Without targets the tokens are the same."""
    task, texts = task_of(labelled(["b", "a"])), [["bara", "cela doro"]]
    plain, known = task.encode(texts, None, tokenizer, 8), task.encode(texts, [1, 0], tokenizer, 8)
    assert np.array_equal(plain.tokens["input_ids"], known.tokens["input_ids"]) and len(plain.documents["label"]) == 2


def test_two_text_columns_make_pairs(tokenizer):
    """C7: the second column follows the first after a separator, with type 1, under whatever names they have."""
    rows = Dataset.from_dict({"premise": ["bara bare"], "hypothesis": ["cela"], "answer": [0]})
    task = task_of(rows, text="premise", text_pair="hypothesis", label="answer", labels=["no", "yes"])
    assert task.texts == ("premise", "hypothesis") and task.columns == ("premise", "hypothesis", "answer")
    encoded = task.encode([["bara bare"], ["cela"]], [0], tokenizer, 16)
    assert encoded.tokens["input_ids"].tolist() == [2, 5, 6, 3, 10, 3]
    assert encoded.tokens["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]


def test_a_missing_label_column_is_named():
    """C21: a column that is not there is named beside those there are."""
    rows = Dataset.from_dict({"text": ["bara"], "other": [0]})
    message = message_of(lambda: numbers_of(task_of(rows, labels=["no", "yes"]), rows))
    assert message == f"{WHERE}: no column 'label'; the rows have: text, other"


def test_balanced_weights_are_those_of_scikit_learn():
    """`balanced` is n / (k * n_c); a label without a row weighs 1, and does not dilute the others."""
    label = np.array([0, 0, 0, 0, 2, 2, 4])
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 4]), y=label)
    found = balanced_weights(label, 5)
    np.testing.assert_allclose(found[[0, 2, 4]], expected, rtol=1e-6)
    assert found[1] == found[3] == 1


@pytest.mark.parametrize(
    ("weights", "shares"), [(None, [0.75, 0.25]), ({"b": 9.0}, [0.25, 0.75]), ("balanced", [0.5, 0.5])]
)
def test_class_weights_weigh_the_loss(weights, shares):
    """C1: rows count in the loss by the weight of their label, by name or by how often training has it."""
    task = task_of(labelled(["a", "b"]), class_weights=weights).fit(examples(label=np.array([0, 0, 0, 1])).encoded)
    logits = np.array([[[2.0, -1.0]]] * 4, np.float32)
    batch = {"label": np.array([[0], [0], [0], [1]]), "weight": np.ones((4, 1), np.float32)}
    found = task.loss(logits, batch)
    losses = np.log1p(np.exp([-3.0, 3.0]))
    assert float(found.value) == pytest.approx(np.dot(shares, losses), rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"postive": 2.0, "negative": 1.0},
            "task.class_weights: 1 problem\n  - 'postive' is no label; did you mean 'positive'? (known: negative, posi",
        ),
        ({"negative": 0.0, "positive": 0.0}, "task.class_weights: every label weighs 0"),
    ],
)
def test_weights_of_unknown_labels_are_refused(weights, message):
    """C25: a weight for what is no label, and weights that leave nothing to learn, are refused as the task is built."""
    with pytest.raises(ConfigError) as caught:
        task_of(labelled(["negative", "positive"]), class_weights=weights)
    assert str(caught.value).startswith(message)


def test_rows_are_counted_by_label():
    """For people: how many rows have each label, those that none has included."""
    assert task_of(labelled([0, 1, 2])).label_counts([0, 2, 2]) == {"0": 1, "1": 0, "2": 2}


def test_a_review_says_what_was_taken_for_what():
    """Each document has its truth, what was said instead, how surely, and the cross-entropy of the truth."""
    task = task_of(labelled(["a", "b"]))
    found = task.review(np.array([[0.0, 2.0], [0.0, 2.0]], np.float32), examples(label=np.array([0, 1])))
    assert (found.truth, found.predicted, found.right.tolist()) == (["a", "b"], ["b", "b"], [False, True])
    assert found.confidence == pytest.approx([1 / (1 + np.exp(-2))] * 2)
    assert found.loss == pytest.approx(np.log1p(np.exp([2.0, -2.0])))


def test_a_record_has_the_most_probable_label_and_all_probabilities():
    """Scores are the softmax of the outputs, stable however large they are, and the label is the largest."""
    task = task_of(labelled(["a", "b", "c"]))
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    record = one(task, logits)
    expected = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    assert record["label"] == "b" and list(record["scores"]) == ["a", "b", "c"]
    assert list(record["scores"].values()) == pytest.approx(expected, abs=1e-6)
    assert one(task, np.array([1e4, 0, -1e4], np.float32))["scores"] == {"a": 1.0, "b": 0.0, "c": 0.0}
    json.dumps(record)


def test_tables_show_the_counts():
    """The confusion matrix and the figures of each class stand under the names of the labels."""
    nothing, bins = Ratio(np.float32(0), np.float32(7)), np.zeros(BINS)
    counts = ClassCounts(nothing, nothing, np.array([[3, 1], [0, 3]], np.int32), Calibration(bins, bins, bins))
    found = task_of(labelled(["no", "yes"])).tables(counts)
    assert found["confusion matrix"] == [["truth \\ predicted", "no", "yes"], ["no", 3, 1], ["yes", 0, 3]]
    assert found["per class"][0] == ["label", "precision", "recall", "F1", "rows"]
    assert found["per class"][1] == ["no", 1.0, 0.75, pytest.approx(6 / 7, abs=1e-4), 4]
    assert found["per class"][2] == ["yes", 0.75, 1.0, pytest.approx(6 / 7, abs=1e-4), 3]


@pytest.mark.parametrize(
    "settings",
    [
        {"labels": ["neg", "pos"]},
        {"text": "premise", "text_pair": "hypothesis", "labels": [f"l{n}" for n in range(12)]},
        {"text": "satz", "labels": ["schlecht", "gut", "übel"]},
    ],
)
def test_a_task_comes_back_from_its_config_json(settings):
    """R57: written to `config.json` and read again, a task asks for the same head, columns and records."""
    task = build_task(section(**settings), {})
    written = json.loads(json.dumps({"model_type": "bert", "architectures": ["Whatever"], **task.to_hf()}))
    again = restore_task(written, "here")
    assert (again.kind, again.head, again.labels) == (task.kind, task.head, task.labels)
    assert again.columns[:-1] == task.columns[:-1]
    assert again.to_hf() == task.to_hf()
    logits = np.random.default_rng(0).normal(size=len(task.labels))
    assert one(again, logits) == one(task, logits)
    assert restore(written).labels == list(task.labels)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "XLMRobertaForSequenceClassification"])
def test_models_that_others_trained_bring_their_labels(name):
    """A foreign `config.json` gives label names in the order of their numbers, and the column is called text."""
    numbers = {str(n): f"LABEL_{n}" for n in (10, 2, 1, 0, 9, 3, 4, 5, 6, 7, 8)}
    task = restore_task({"architectures": [name], "id2label": numbers}, "here")
    assert task.labels == tuple(f"LABEL_{n}" for n in range(11)) and task.columns[0] == "text"
    assert restore_task({"architectures": [name]}, "here").labels == ("0", "1"), "two labels where none are named"


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": ["BertForMaskedLM"]}])
def test_a_config_json_of_no_known_task_is_refused(config):
    """A model for something else is named, with what would help."""
    with pytest.raises(ModelError) as caught:
        restore_task(config, "some/dir")
    assert str(caught.value) == (
        "some/dir: its config.json names no task that is known (sequence_classification, "
        "multi_label_classification, regression, token_classification, question_answering, causal_lm, "
        "image_classification, seq2seq); give a directory that `sft-jax export` wrote"
    )


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"id2label": {"0": "LABEL_0"}}, "regression"),
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 3}, "sequence_classification"),
        ({"problem_type": "regression", "id2label": {"0": "stars"}}, "regression"),
        ({"problem_type": "multi_label_classification", "num_labels": 1}, "multi_label_classification"),
        ({"problem_type": "single_label_classification"}, "sequence_classification"),
    ],
)
def test_foreign_models_are_told_apart_by_their_problem(config, kind):
    """Outputs are read as `transformers` reads them: by the kind of problem, else one output is a number."""
    assert restore_task({"architectures": ["BertForSequenceClassification"], **config}, "here").kind == kind


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"problem_type": "regression", "num_labels": 3}, "with 3 outputs is not supported"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "names 1 label, expected two or more"),
        ({"problem_type": "ranking"}, "names no task that is known"),
        (
            {"id2label": {"0": "a", "2": "b"}},
            "id2label is {'0': 'a', '2': 'b'}; expected a name for each number from 0",
        ),
        ({"id2label": ["a", "b"]}, "id2label is"),
        ({"id2label": {}}, "id2label is {}"),
        ({"num_labels": "many"}, "id2label is None"),
        ({"sft_jax_task": {"kind": "regression", "text": 3}, "num_labels": 1}, "sft_jax_task; export the model again"),
    ],
)
def test_a_config_json_that_cannot_be_read_is_refused(config, message):
    """Numbers of outputs that do not fit, names with gaps and damaged settings are a ModelError, never a traceback."""
    with pytest.raises(ModelError) as caught:
        restore_task({"architectures": ["BertForSequenceClassification"], **config}, "here")
    assert message in str(caught.value)


def test_labels_of_other_peoples_files_are_what_they_mean():
    """A label is trimmed, a whole number that pandas wrote as a fraction is one, and a gap is a row without a label."""
    task = task_of(labelled(["Billing", " Billing ", "Other", "Other "]))
    assert task.labels == ("Billing", "Other")
    rows = labelled([1.0, 2.0, None, float("nan")])
    task = task_of(rows)
    assert task.labels == ("1", "2") and numbers_of(task, labelled([2.0, 1])) == [1, 0]
    message = message_of(lambda: numbers_of(task, rows))
    assert "row 3: label is not there, expected a label" in message
    assert "row 4: label is NaN, expected a label" in message or message.count("is not there") == 2
    for empty in ("", "  "):
        texts = labelled(["a", "b", empty])
        assert task_of(texts).labels == ("a", "b"), "an empty label is no class"
        assert "row 3: label is empty, expected a label" in message_of(
            lambda rows=texts: numbers_of(task_of(rows), rows)
        )


def test_a_number_among_names_is_no_label():
    """I: where most labels are names, a 1 in another row is not the second of them, and 5 is no class of its own."""
    written = Dataset.from_dict({"text": ["a"] * 4, "label": ['"neg"', '"pos"', "1", "5"]})
    rows = Rows(written, WHERE, written=frozenset({"label"}))
    task = build_task(section(), {"train": rows})
    found = task.targets(rows)
    assert task.labels == ("neg", "pos") and found.values == [0, 1, None, None] and found.bad.keys() == {2, 3}


def test_a_column_of_numbers_of_rows_is_no_label():
    """`task.label=id` makes every row a class of its own, which is what is said, not that shares are too small."""
    said = message_of(lambda: task_of(labelled(list(range(30)))))
    assert said.startswith(
        f"{WHERE}: column 'label' makes every row a class of its own, 30 in all; name another column"
    )


def test_what_is_odd_about_labels_is_said():
    """Names that are alike, rare ones and very many are said by name before training; clean ones are not."""
    found = doubts({"Billing": 400, "billing": 2, "N/A": 9, "NA": 8, "café": 7, "cafe\u0301": 7, "C": 9, "C++": 9})
    assert len(found) == 5 and "'Billing' (400), 'billing' (2)" in found[0] and "'N/A' (9), 'NA' (8)" in found[1]
    assert found[3] == "labels 'N/A' (9), 'NA' (8) may stand for no label; if they do, leave their cells empty"
    assert found[4] == "labels with fewer than 5 training rows: 'billing' (2); such a class is hardly learned"
    assert doubts({"pos": 5, "neg": 5, "-1": 5, "1": 5, "+": 5, "-": 5}) == []
    assert "there are 101 labels" in doubts({f"kind {n}": 5 for n in range(101)})[0]


def test_a_label_inside_of_objects_is_read_with_its_names():
    """F6: `meta.label` is the `label` of each object, names of a ClassLabel there included; a missing one is named."""
    kinds = Features({"text": Value("string"), "meta": {"label": ClassLabel(names=["neg", "pos"])}})
    rows = Dataset.from_dict({"text": ["a", "b"], "meta": [{"label": 1}, {"label": 0}]}, kinds)
    task = task_of(rows, label="meta.label")
    assert task.labels == ("neg", "pos") and numbers_of(task, rows) == [1, 0]
    plain = Dataset.from_dict({"text": ["a", "b"], "meta": [{"label": "x"}, {"label": "y"}]})
    assert task_of(plain, label="meta.label").labels == ("x", "y")
    for name, said in {
        "meta.lable": "no 'lable' in column 'meta'; the rows have: label; did you mean 'label'?",
        "lable": "no column 'lable'; the rows have: text, meta",
        "text.label": "no 'label' in column 'text'; it holds no objects",
    }.items():
        assert message_of(lambda name=name: task_of(plain, label=name)) == f"{WHERE}: {said}"


def test_warnings_are_in_the_report_and_on_the_screen(configure, tmp_path):
    """What is odd about files and labels is said before training, in the data report and on the console."""
    lines = [f",{word},{label}" for word, label in zip(WORDS, ["Spam", "spam", "ham"] * 20, strict=False)]
    (tmp_path / "rows.csv").write_text("\n".join([",text,label", *lines]))
    alone = ("data.source.validation=null", "data.source.test=null", "eval.every=never")
    _, _, report = inputs.read_rows(configure(f"data.source.train={tmp_path / 'rows.csv'}", *alone))
    assert len(report.warnings) == 2 and "column 1 has no name" in report.warnings[0]
    assert "labels 'Spam' (" in report.warnings[1] and report.plain()["warnings"] == report.warnings
    lists = [f"\"['{word}', 'a']\",{n % 2}" for n, word in enumerate(WORDS)]
    (tmp_path / "lists.csv").write_text("\n".join(["text,label", *lists]))
    told = inputs.read_rows(configure(f"data.source.train={tmp_path / 'lists.csv'}", *alone))[2].warnings
    assert len(told) == 1 and "column 'text' holds lists that are written out, such as \"['" in told[0]  # K
    screen = Console(file=io.StringIO(), width=300)
    console.show_data(screen, report)
    assert all(f"! {warning}" in screen.file.getvalue() for warning in report.warnings)
