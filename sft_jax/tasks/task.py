"""What a task is, and the list of those there are.

A task is one file: from rows to targets, from texts and targets to encoded documents, from outputs to a loss and
counts, from counts to metrics, from outputs to records. It asks a model for a kind of head and knows no family.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import ValidationError

from sft_jax.config.generation import ANYTHING, Generation, Rules
from sft_jax.data.batch import Encoded, Grain
from sft_jax.data.rows import Bad, Rows
from sft_jax.data.text import load_tokenizer, tokenizer_files
from sft_jax.errors import ConfigError, ModelError, did_you_mean, listing
from sft_jax.models.family import Head
from sft_jax.tasks.labels import names_in

Counts = Any  # a pytree of arrays that add up over batches
Table = list[list[Any]]  # rows of cells, the first is the heading
Texts = Sequence[Sequence[Any]]  # columns of texts, or of tuples of words
Documents = Mapping[str, np.ndarray]  # what each document has besides tokens: [documents] or [documents, k]
Record = dict[str, Any]


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

    values: Sequence[Any]
    bad: dict[int, Bad]  # row -> what is wrong with its target


@dataclass(frozen=True)
class Examples:
    """Documents, with the texts and targets of the rows that they are of; in `predict` there are no targets."""

    encoded: Encoded
    texts: Texts
    targets: Sequence[Any] | None = None

    @property
    def documents(self) -> Documents:
        """What each document has besides tokens."""
        return self.encoded.documents

    def select(self, documents: np.ndarray) -> "Examples":
        """These documents alone; rows stay where they are."""
        return replace(self, encoded=self.encoded.select(documents))


@dataclass(frozen=True)
class Audit:
    """What is supervised, as the tokens say it, before anything is trained."""

    rows: list[list[tuple[str, bool]]]  # of a few rows, their pieces and whether these are supervised
    facts: dict[str, str]
    problems: list[str]  # any of them stops the run


class Token(NamedTuple):
    """A token of a document, and what it counts for in the loss."""

    id: int
    text: str
    weight: float
    label: str | None = None  # what it is to be told by, where that is not the token itself


@dataclass(frozen=True)
class Review:
    """How each row was answered, for people; every field has an entry a row."""

    truth: list[str]
    predicted: list[str]
    right: np.ndarray  # bool; a number is never right, only nearer
    confidence: np.ndarray | None  # probability of what was predicted, where there is such a thing
    loss: np.ndarray  # how wrong the answer is; the worst mistakes have most
    rows: np.ndarray | None = None  # which row of the split each entry is of; None: of all rows, in order


class Reader(NamedTuple):
    """What reads what a model is given, a tokenizer or a processor of images, by the files beside the weights."""

    load: Callable[[Path], Any]  # directory -> what `encode` gets
    files: Callable[[Path], dict[str, bytes]]  # of a directory: those that `load` reads, and that an export has


TEXTS = Reader(load_tokenizer, tokenizer_files)


@dataclass(frozen=True)
class Task:
    """One task on one data set, as plain functions.

    What the head makes of a batch are its outputs: float32 [r, n, c] of a head on documents, [r, t, c] of one on
    tokens, `LazyLogits` of one on a vocabulary. `keep` makes of them what stays on the host, [r, n, k] or [r, t, k],
    which is put together over a split as [documents, k] or [tokens, k].
    """

    kind: str
    head: Head
    labels: tuple[str, ...]  # names of the c outputs; of a number, its column
    texts: tuple[str, ...]  # columns of texts
    columns: tuple[str, ...]  # columns of the rows that are read, texts first
    read: Callable[[Rows], tuple[tuple[Sequence[Any], ...], dict[int, Bad]]]  # texts, and what is wrong with some
    targets: Callable[[Rows], Targets]
    classes: Callable[[Sequence[Any]], Sequence[int]]  # of targets: what a stratified split is stratified by
    label_counts: Callable[[Sequence[Any]], dict[str, int | float]]  # of targets, for people: rows of each label, say
    encode: Callable[[Texts, Sequence[Any] | None, Any, int], Encoded]  # (texts, targets, tokenizer, max_length)
    fit: Callable[[Encoded], "Task"]  # the same task, knowing its training documents: class weights
    loss: Callable[[Any, Mapping[str, Array]], Ratio]  # (outputs, batch)
    divergence: Callable[[Any, Any, Mapping[str, Array]], Ratio]  # of two passes over a batch, for R-Drop
    count: Callable[[Any, Mapping[str, Array]], Counts]  # (outputs, batch), on device
    metrics: Callable[[Counts], dict[str, float]]  # on the host
    row_metrics: Callable[[np.ndarray, Examples], dict[str, float]]  # (kept, examples): those that need all at once
    metric_names: tuple[str, ...]  # of both
    least_is_best: frozenset[str]  # those of them of which less is better
    headline: str  # the one that is compared with baselines
    tables: Callable[[Counts], dict[str, Table]]  # title -> table
    review: Callable[[np.ndarray, Examples], Review]  # (kept, examples)
    baselines: Callable[[Examples, Examples], dict[str, float]]  # (train, test) -> headline metric
    decode: Callable[[np.ndarray, Examples], list[Record]]  # (kept, examples) -> a record for each row, in order
    to_hf: Callable[[], dict[str, Any]]  # what `config.json` says of the task
    doubts: Callable[[Mapping[str, int | float]], list[str]] = lambda counts: []  # what to say of `label_counts`
    row_tables: Callable[[np.ndarray, Examples], dict[str, Table]] = lambda kept, examples: {}  # as `row_metrics`
    reader: Reader = TEXTS
    images: bool = False  # whether it reads images in place of texts
    grain: Grain = "document"  # what `keep` has an entry for
    keep: Callable[[Any, Mapping[str, Array]], Array] = lambda outputs, batch: outputs  # (outputs, batch), on device
    cleans: bool = True  # whether texts may be cleaned; not where targets are places in them
    moves: bool = True  # whether tokens of a document may be moved and left out: augmentation
    audit: Callable[[Examples, Any], Audit | None] = lambda train, tokenizer: None
    # The tokens of each document, in order, where tokens are what is supervised.
    supervision: Callable[[Encoded, Any], Iterator[list[Token]]] | None = None  # (documents, tokenizer)
    # Of what answers in words: how, (texts, tokenizer, max_length) -> what is to be gone on with, and where that stops.
    generation: Generation | None = None
    prompt: Callable[[Texts, Any, int], Encoded] | None = None
    stops: Callable[[Any], list[int]] = lambda tokenizer: []
    rules: Callable[[Any], Rules] = lambda tokenizer: ANYTHING  # which tokens may stand where, by the tokenizer's place
    answer_metrics: Callable[[Sequence[str], Sequence[Any]], dict[str, float]] | None = None  # (answers, targets)
    answer_metric_names: tuple[str, ...] = ()  # those of `metric_names` that are of answers
    files: Callable[[Path], dict[str, str]] = lambda directory: {}  # (of the tokenizer) -> more files of an export
    told: str = ""  # what was told by the columns of the rows, rather than by the configuration
    asked: Callable[[Texts, int], str] = lambda texts, row: str(texts[0][row])  # what is given of a row, for people

    @property
    def unit(self) -> str:
        """What a run is fast or slow at."""
        return "images" if self.images else "tokens"


# Kind in the configuration -> the file in this folder. One line a task. The file has `build(section, rows)`, which
# makes the task, and `restore(config)`, which makes the section again from the `config.json` that `to_hf` wrote.
TASKS = {
    "sequence_classification": "sequence_classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
    "token_classification": "token_classification",
    "question_answering": "question_answering",
    "causal_lm": "causal_lm",
    "image_classification": "image_classification",
    "seq2seq": "seq2seq",
}
# How the class of a model ends that answers in a kind of its own name.
ENDINGS = {"lmheadmodel": "causal_lm", "mtmodel": "seq2seq", "forconditionalgeneration": "seq2seq"}
# What `transformers` calls the problems that it solves with one and the same kind of head.
PROBLEMS = {
    "single_label_classification": "sequence_classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
}


def build_task(section: Any, rows: Mapping[str, Rows]) -> Task:
    """The task that a configuration describes, on these rows."""
    return _file(section.kind).build(section, rows)


def restore_task(config: Mapping[str, Any], where: str) -> Task:
    """The task that a model was trained for, by its `config.json`; by its class and problem if others trained it."""
    return build_task(restore_section(config, where), {})


def restore_section(config: Mapping[str, Any], where: str) -> Any:
    """The section of the task that a `config.json` tells of."""
    kind = str(written(config).get("kind") or _foreign_kind(config))
    if kind not in TASKS:
        raise ModelError(
            f"{where}: its config.json names no task that is known ({', '.join(TASKS)}); "
            f"give a directory that `sft-jax export` wrote"
        )
    try:
        section = _file(kind).restore(config)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ModelError(listing(f"{where}: config.json: sft_jax_task; export the model again", problems)) from None
    return section


def renamed(section: Any, columns: Mapping[str, str]) -> Any:
    """A section that reads other columns in place of some of its own; `id`, which names rows, is of no task."""
    columns = {name: column for name, column in columns.items() if name != "id"}
    known = build_task(section, {}).columns
    problems = [f"{name}{did_you_mean(name, known)}" for name in columns if name not in known]
    if problems:
        raise ConfigError(
            f"--columns: the model reads {', '.join(known)}, not {', '.join(problems)}; name one of those"
        )
    fields = {name: getattr(section, name) for name, field in type(section).model_fields.items() if _is_column(field)}
    changed = {
        name: [columns.get(one, one) for one in value] if isinstance(value, list) else columns.get(value, value)
        for name, value in fields.items()
        if value is not None
    }
    return section.model_copy(update=changed)


def _is_column(field: Any) -> bool:
    """Whether an option of a task names a column, as its documentation says."""
    return (field.description or "").startswith("Column")


def written(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an export of ours says of its task in a `config.json`; nothing in that of others."""
    ours = config.get("sft_jax_task")
    return ours if isinstance(ours, Mapping) else {}


def _foreign_kind(config: Mapping[str, Any]) -> str | None:
    classes = config.get("architectures")
    ending = "".join(map(str, classes if isinstance(classes, list) else [])).lower()
    named = {**ENDINGS, **{f"for{kind.replace('_', '')}": kind for kind in TASKS}}
    kind = next((kind for name, kind in named.items() if ending.endswith(name)), None)
    if kind != "sequence_classification":
        return kind
    alone = len(names_in(config)) == 1  # which `transformers` takes for a number
    problem = config.get("problem_type") or ("regression" if alone else "single_label_classification")
    return PROBLEMS.get(str(problem))


def _file(kind: str) -> Any:
    return importlib.import_module(f"sft_jax.tasks.{TASKS[kind]}")
