"""What a task is, and the list of those there are.

A task is one file: from rows to targets, from texts and targets to encoded documents, from outputs to a loss and
counts, from counts to metrics, from outputs to records. It asks a model for a kind of head and knows no family.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sft_jax.data.batch import Encoded
from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import ModelError
from sft_jax.models.family import Head

Counts = Any  # a pytree of arrays that add up over batches
Table = list[list[Any]]  # rows of cells, the first is the heading
Texts = Sequence[Sequence[str]]  # one or two columns of texts
Documents = Mapping[str, np.ndarray]  # what each document has besides tokens: [documents] or [documents, k]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ratio:
    """A total and the weight it was summed over: adds up exactly over microbatches, devices and batches."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """The mean, 0 where there is no weight: the one division."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1)


@dataclass(frozen=True)
class Targets:
    """What rows are to be answered with: a hashable value a row, None where there is none to be had."""

    values: list[Any]
    bad: dict[int, Bad]  # row -> what is wrong with its target


@dataclass(frozen=True)
class Review:
    """How each document was answered, for people; every field has an entry a document."""

    truth: list[str]
    predicted: list[str]
    right: np.ndarray  # bool
    confidence: np.ndarray | None  # probability of what was predicted, where there is such a thing
    loss: np.ndarray  # how wrong the answer is; the worst mistakes have most


@dataclass(frozen=True)
class Task:
    """One task on one data set, as plain functions. Outputs are float32 [r, n, c] on device, [documents, c] on host."""

    kind: str
    head: Head
    labels: tuple[str, ...]  # names of the c outputs
    texts: tuple[str, ...]  # columns of texts
    columns: tuple[str, ...]  # columns of the rows that are read, texts first
    targets: Callable[[Rows], Targets]
    classes: Callable[[Sequence[Any]], Sequence[int]]  # of targets: what a stratified split is stratified by
    label_counts: Callable[[Sequence[Any]], dict[str, int]]  # of targets, for the data report
    encode: Callable[[Texts, Sequence[Any] | None, Any, int], Encoded]  # (texts, targets, tokenizer, max_length)
    fit: Callable[[Documents], "Task"]  # the same task, knowing its training documents: class weights
    loss: Callable[[Any, Mapping[str, Array]], Ratio]  # (outputs, batch)
    divergence: Callable[[Any, Any, Mapping[str, Array]], Ratio]  # of two passes over a batch, for R-Drop
    count: Callable[[Any, Mapping[str, Array]], Counts]  # (outputs, batch), on device
    metrics: Callable[[Counts], dict[str, float]]  # on the host
    row_metrics: Callable[[np.ndarray, Documents], dict[str, float]]  # those that need all outputs at once
    metric_names: tuple[str, ...]  # of both
    least_is_best: frozenset[str]  # those of them of which less is better
    headline: str  # the one that is compared with baselines
    tables: Callable[[Counts], dict[str, Table]]  # title -> table
    review: Callable[[np.ndarray, Documents], Review]
    baselines: Callable[[Texts, Documents, Texts, Documents], dict[str, float]]  # (train, test) -> headline metric
    decode: Callable[[np.ndarray], dict[str, Any]]  # outputs of one document -> record
    to_hf: Callable[[], dict[str, Any]]  # what `config.json` says of the task


# Kind in the configuration -> the file in this folder. One line a task. The file has `build(section, rows)`, which
# makes the task, and `restore(config)`, which makes the section again from the `config.json` that `to_hf` wrote.
TASKS = {"sequence_classification": "sequence_classification"}


def build_task(section: Any, rows: Mapping[str, Rows]) -> Task:
    """The task that a configuration describes, on these rows."""
    return _file(section.kind).build(section, rows)


def restore_task(config: Mapping[str, Any], where: str) -> Task:
    """The task that a model was trained for, by its `config.json`."""
    kinds = {name.replace("_", ""): name for name in TASKS}
    written = config.get("sft_jax_task", {}).get("kind")
    ending = "".join(config.get("architectures") or []).lower()
    kind = written or next((kinds[k] for k in kinds if ending.endswith(f"for{k}")), None)
    if kind not in TASKS:
        raise ModelError(
            f"{where}: its config.json names no task that is known ({', '.join(TASKS)}); "
            f"give a directory that `sft-jax export` wrote"
        )
    return build_task(_file(kind).restore(config), {})


def _file(kind: str) -> Any:
    return importlib.import_module(f"sft_jax.tasks.{TASKS[kind]}")
