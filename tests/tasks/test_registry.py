"""The list of tasks: what the configuration offers, what the folder holds and what a task promises agree."""

import importlib
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

from sft_jax import tasks
from sft_jax.config.schema import Config, SequenceClassification
from sft_jax.models.family import FAMILIES, find_family
from sft_jax.tasks.task import TASKS, Ratio, build_task

OTHERS = {"__init__", "task", "metrics", "baselines"}  # files of the folder that are no task


def sections() -> dict[str, type]:
    """Kind -> section of the configuration, one for each member of the union (or the one there is)."""
    annotation = Config.model_fields["task"].annotation
    members = typing.get_args(annotation) or (annotation,)
    return {typing.get_args(member.model_fields["kind"].annotation)[0]: member for member in members}


def a_task():
    """A task with three labels that needs no rows."""
    section = SequenceClassification(kind="sequence_classification", labels=["a", "b", "c"])
    return build_task(section, {})


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
def test_every_family_knows_heads_of_known_tasks_only(family):
    """A head that no task asks for would be an option that does nothing (C26)."""
    assert set(find_family({"model_type": family}, "here").heads) <= set(TASKS)


def test_a_task_is_named_by_its_kind():
    """Kind, head and what `config.json` says agree on the name."""
    task = a_task()
    assert task.kind in TASKS and task.head.kind == task.kind
    assert task.to_hf()["sft_jax_task"]["kind"] == task.kind


def test_metric_names_are_those_of_the_metrics():
    """C18: the names that a configuration may ask for are exactly those that evaluation gives."""
    task = a_task()
    batch = {"label": np.array([[0, 1]]), "weight": np.ones((1, 2), np.float32)}
    counts = task.count(np.zeros((1, 2, 3), np.float32), batch)
    assert tuple(task.metrics(counts)) == task.metric_names
    assert all(isinstance(value, float) for value in task.metrics(counts).values())


def test_losses_and_counts_add_up():
    """C1: a loss is a Ratio, and counts are a pytree of arrays of which two can be added."""
    task = a_task()
    batch = {"label": np.array([[0, 1]]), "weight": np.ones((1, 2), np.float32)}
    logits = np.random.default_rng(0).normal(size=(1, 2, 3)).astype(np.float32)
    assert isinstance(task.loss(logits, batch), Ratio)
    counts = task.count(logits, batch)
    twice = jax.tree.map(lambda a, b: a + b, counts, counts)
    assert task.metrics(twice) == pytest.approx(task.metrics(counts))
