"""The list of tasks: what the configuration offers, what the folder holds and what a task promises agree."""

import importlib
import json
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import examples

from sft_jax import tasks
from sft_jax.config.metrics import HEADLINES, METRICS, metric_names
from sft_jax.config.schema import Config
from sft_jax.config.tasks import (
    CausalLM,
    ImageClassification,
    MultiLabelClassification,
    QuestionAnswering,
    Regression,
    Seq2Seq,
    SequenceClassification,
    TokenClassification,
)
from sft_jax.data.batch import Encoded
from sft_jax.models.family import FAMILIES, find_family
from sft_jax.nn.heads import LazyLogits
from sft_jax.tasks.task import PROBLEMS, TASKS, Examples, Ratio, Task, build_task, restore_task

# Files of the folder that are no task.
OTHERS = {
    "__init__",
    "forms",
    "lm_rows",
    "task",
    "texts",
    "labels",
    "label_columns",
    "tag_schemes",
    "answer_columns",
    "spans",
    "span_columns",
    "squad",
    "losses",
    "vocabulary",
    "audits",
    "classes",
    "next_token",
    "answer_scores",
    "word_table",
    "metrics",
    "baselines",
}
NAMES = ["a", "b", "c"]
EACH = {
    task.kind: task
    for task in (
        build_task(SequenceClassification(kind="sequence_classification", labels=NAMES), {}),
        build_task(MultiLabelClassification(kind="multi_label_classification", labels=NAMES), {}),
        build_task(Regression(kind="regression"), {}),
        build_task(TokenClassification(kind="token_classification", labels=["O", "B-X", "I-X"]), {}),
        build_task(QuestionAnswering(kind="question_answering", no_answer=True), {}),
        build_task(CausalLM(kind="causal_lm"), {}),
        build_task(ImageClassification(kind="image_classification", labels=NAMES), {}),
        build_task(Seq2Seq(kind="seq2seq"), {}),
    )
}
each_task = pytest.mark.parametrize("task", EACH.values(), ids=EACH)


def sections() -> dict[str, type]:
    """Kind -> section of the configuration, one for each member of the union (or the one there is)."""
    annotation = Config.model_fields["task"].annotation
    members = typing.get_args(annotation) or (annotation,)
    return {typing.get_args(member.model_fields["kind"].annotation)[0]: member for member in members}


def batch_of(task: Task) -> tuple[Any, dict[str, np.ndarray]]:
    """(outputs, batch) of two documents; on a vocabulary, of two tokens each."""
    if task.head.kind in ("causal_lm", "seq2seq"):
        return lazy_batch()
    if task.grain == "token":
        return token_batch(task.head.size)
    answers = {"multi_label_classification": np.array([[[0, 1, 1], [0, 0, 0]]]), "regression": np.array([[0.5, 2.0]])}
    label = answers.get(task.kind, np.array([[0, 1]]))
    outputs = np.random.default_rng(0).normal(size=(1, 2, task.head.size)).astype(np.float32)
    return outputs, {"label": label, "weight": np.ones((1, 2), np.float32)}


def token_batch(outputs: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(outputs, batch) of two documents of two tokens each, all of which answer."""
    ones = np.ones((1, 4), np.float32)
    tokens = {"segment_ids": np.array([[1, 1, 2, 2]]), "label": np.array([[0, 1, 2, 0]])}
    tokens |= {"starts": np.array([[0, 2]]), "answer": np.array([[[1, 1], [0, 0]]])}  # of documents
    draw = np.random.default_rng(0).normal(size=(1, 4, outputs)).astype(np.float32)
    return draw, {**tokens, "token_weight": ones, "answers": ones, "weight": np.ones((1, 2), np.float32)}


def kept_of(task: Task) -> tuple[np.ndarray, Examples]:
    """(what is kept, examples) of the two documents."""
    outputs, batch = batch_of(task)
    kept = np.asarray(task.keep(outputs, batch))[0]
    if task.grain == "document":
        return kept, examples(label=batch["label"][0][:2])
    tokens = {name: values[0] for name, values in batch.items() if name not in ("weight", "starts", "answer")}
    places = {"begin": np.array([-1, 0, -1, 0]), "end": np.array([-1, 1, -1, 1])}
    beside, fields = {"word": np.array([0, 1, 0, 1]), **places}, {"answer": batch["answer"][0]}
    encoded = Encoded(tokens, np.array([0, 2, 4]), fields, beside=beside)
    if task.kind == "question_answering":
        return kept, Examples(encoded, (["what", "who"], ["a", "b"]), [((0, "a"),), ()])
    return kept, Examples(encoded, ([("a", "b"), ("c", "d")],), [(0, 1), (2, 0)])


def lazy_batch() -> tuple[LazyLogits, dict[str, np.ndarray]]:
    """(logits on a vocabulary of seven, batch): of each document the second token is to be told."""
    draw = np.random.default_rng(0)
    hidden, embedding = (draw.normal(size=shape).astype(np.float32) for shape in ((1, 4, 3), (7, 3)))
    tokens = {"segment_ids": [[1, 1, 2, 2]], "label": [[5, 0, 6, 0]]}
    tokens["position_ids"] = [[0, 1, 0, 1]]
    tokens |= {f"decoder_{name}": tokens[name] for name in ("segment_ids", "position_ids")}
    batch = {name: np.asarray(values, np.int32) for name, values in tokens.items()}
    weights = {"token_weight": np.float32([[1, 0, 1, 0]]), "weight": np.ones((1, 2), np.float32)}
    return LazyLogits(jax.numpy.asarray(hidden), jax.numpy.asarray(embedding)), {**batch, **weights}


def moved(outputs: Any) -> Any:
    """Other outputs."""
    return jax.tree.map(lambda leaf: 1 - 2 * leaf, outputs)


def test_every_task_has_a_section_and_every_section_a_task():
    """C26: no kind can be configured that does not exist, and none exists that cannot be configured."""
    assert sections().keys() == TASKS.keys()


def test_every_task_has_a_file_and_every_file_a_task():
    """Each file of the folder that is a task is listed, and has the two functions that make one."""
    folder = Path(tasks.__file__).parent
    assert {file.stem for file in folder.glob("*.py")} - OTHERS == set(TASKS.values())
    for name in TASKS.values():
        module = importlib.import_module(f"sft_jax.tasks.{name}")
        assert callable(module.build) and callable(module.restore)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_head_is_asked_for(family):
    """A head that no task asks for would be an option that does nothing (C26)."""
    assert set(find_family({"model_type": family}, "here").heads) <= {task.head.kind for task in EACH.values()}


@each_task
def test_a_task_is_named_by_its_kind(task):
    """Kind and what `config.json` says agree on the name, and the same task comes back from there."""
    written = {"architectures": ["Whatever"], **task.to_hf()}
    assert EACH.keys() == TASKS.keys()
    assert task.images or "problem_type" not in written or PROBLEMS[written["problem_type"]] == task.kind
    again = restore_task(written, "here")
    assert (again.kind, again.head, again.labels) == (task.kind, task.head, task.labels)


@each_task
def test_metric_names_are_those_of_the_metrics(task):
    """C18: the names that a configuration may ask for are exactly those that evaluation gives, in their order."""
    outputs, batch = batch_of(task)
    answered = task.answer_metrics(["a b", ""], ["a c", "d"]) if task.answer_metrics else {}
    found = {**task.metrics(task.count(outputs, batch)), **task.row_metrics(*kept_of(task)), **answered}
    assert tuple(found) == task.metric_names and tuple(answered) == task.answer_metric_names
    assert all(type(value) is float for value in found.values())
    assert task.headline in found and task.least_is_best < set(found) and task.headline not in task.least_is_best


@each_task
def test_losses_and_counts_add_up(task):
    """C1: a loss and a divergence are Ratios, and counts are a pytree of arrays of which two can be added."""
    outputs, batch = batch_of(task)
    assert isinstance(task.loss(outputs, batch), Ratio)
    assert isinstance(task.divergence(outputs, moved(outputs), batch), Ratio)
    counts = task.count(outputs, batch)
    twice = jax.tree.map(lambda a, b: a + b, counts, counts)
    assert task.metrics(twice) == pytest.approx(task.metrics(counts))


@each_task
def test_filler_has_no_part_in_the_loss(task):
    """C16: the loss does not pull on the outputs of filler, and pulls on those of documents."""
    outputs, batch = batch_of(task)
    batch["weight"][0, 1] = 0
    for loss in (task.loss, lambda x, b: task.divergence(x, moved(outputs), b)):
        gradient = jax.grad(lambda x, f=loss: f(x, batch).value)(outputs)
        gradient = gradient.hidden if isinstance(gradient, LazyLogits) else gradient
        half = gradient.shape[1] // 2  # what belongs to the first document
        assert gradient[0, :half].any() and not gradient[0, half:].any()


@each_task
def test_a_record_is_json(task):
    """What `predict` writes for a document goes through JSON unchanged."""
    records = task.decode(*kept_of(task))
    assert len(records) == 2 and json.loads(json.dumps(records)) == records


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_are_known_before_there_are_rows(kind: str):
    """newcomer 20: the metrics that a configuration may name, and those of the page, are those that tasks compute."""
    task = EACH[kind]
    few = kind in ("sequence_classification", "image_classification")  # three labels have no five likeliest
    listed = [name for name in METRICS[kind] if not (few and name == "top5_accuracy")]
    assert sorted(listed) == sorted(task.metric_names) and HEADLINES[kind] == task.headline
    without = {"token_classification": {"scheme": "none", "labels": ["O", "B-X", "I-X"]}, "question_answering": {}}
    if kind in without:
        section = sections()[kind](kind=kind, **without[kind])
        assert sorted(metric_names(section)) == sorted(build_task(section, {}).metric_names) != sorted(listed)
