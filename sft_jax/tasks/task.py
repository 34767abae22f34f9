"""What a task is, and the list of those there are.

A task is one file: from rows to encoded documents, from outputs to a loss and counts, from counts to metrics, from
outputs to records. It asks a model for a kind of head and knows no family.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from datasets import Dataset
from jaxtyping import Array, Float

from sft_jax.config.schema import SequenceClassification
from sft_jax.data.batch import Encoded
from sft_jax.errors import ModelError
from sft_jax.models.family import Head

Counts = Any  # a pytree of arrays that add up over batches
Rows = Mapping[str, Dataset]  # split -> rows


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
class Task:
    """One task on one data set, as plain functions."""

    kind: str
    head: Head
    labels: tuple[str, ...]
    encode: Callable[[Dataset, Any, int, str, bool], Encoded]  # (rows, tokenizer, max_length, where, labelled)
    classes: Callable[[Dataset, str], Sequence[int]]  # what a stratified split is stratified by
    loss: Callable[[Any, Mapping[str, Array]], Ratio]  # (outputs, batch)
    count: Callable[[Any, Mapping[str, Array]], Counts]  # (outputs, batch), on device
    metrics: Callable[[Counts], dict[str, float]]  # on the host
    metric_names: tuple[str, ...]
    tables: Callable[[Counts], dict[str, list[list[Any]]]]  # title -> rows, the first is the heading
    decode: Callable[[np.ndarray], dict[str, Any]]  # outputs of one document -> record
    columns: tuple[str, ...]  # columns of the rows that are read
    to_hf: Callable[[], dict[str, Any]]  # what `config.json` says of the task


# Kind in the configuration -> the file in this folder. One line a task. The file has `build(section, rows)`, which
# makes the task, and `restore(config)`, which makes the section again from the `config.json` that `to_hf` wrote.
TASKS = {"sequence_classification": "sequence_classification"}


def build_task(section: SequenceClassification, rows: Rows) -> Task:
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
