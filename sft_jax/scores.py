"""What labelled rows come to under a task: the scores of a split of a run, and of a finished model on other rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax import checks
from sft_jax.config.data import Layout
from sft_jax.config.read import read_config
from sft_jax.config.schema import Config
from sft_jax.config.training import EvalSection
from sft_jax.data.batch import one_row
from sft_jax.data.clean import clean
from sft_jax.data.loader import EvalBatches
from sft_jax.data.prepare import Prepared
from sft_jax.data.rows import Bad, refuse
from sft_jax.data.sources import load_files
from sft_jax.errors import DataError
from sft_jax.infer.answered import Answered, answering
from sft_jax.infer.predict import Loaded, find_model, load_model_of
from sft_jax.inputs import grouped
from sft_jax.report.predictions import predictions
from sft_jax.tasks.task import Examples, Record, Table, Task, renamed, restore_section
from sft_jax.train.evaluate import Evaluated, evaluate
from sft_jax.train.step import Program, abstract, make_eval_step

WHERE = "--data"


@dataclass(frozen=True)
class Scores:
    """What a split came to."""

    metrics: dict[str, float]
    groups: dict[str, dict[str, float]]  # group -> metrics; those that have no row are left out
    tables: dict[str, Table]
    kept: np.ndarray  # what the task keeps of the outputs, [documents, k] or [tokens, k]
    answers: list[str] = field(default_factory=list)  # in words, to the first rows that were answered so

    def values(self) -> dict[str, Any]:
        """The metrics as an event carries them, groups and all."""
        return {**self.metrics, **({"groups": self.groups} if self.groups else {})}

    def plain(self) -> dict[str, Any]:
        """All that is for people, as JSON has it."""
        return {"metrics": self.metrics, "groups": self.groups, "tables": self.tables}


@dataclass(frozen=True)
class Scored:
    """What a model came to on the rows of some files."""

    scores: Scores
    bad: list[Bad]  # rows that could not be scored
    task: Task
    examples: Examples
    rows: Prepared

    def plain(self) -> dict[str, Any]:
        """What there is to say, as JSON has it."""
        bad = [{"place": one.place, "reason": one.reason, "text": one.text} for one in self.bad]
        return {"rows": len(self.rows), "bad_rows": bad, **self.scores.plain()}

    def records(self) -> Iterator[Record]:
        """A record for each row, as a run keeps those of its test split."""
        return predictions(self.task, self.scores.kept, self.examples, self.rows, self.scores.answers)


def scores_of(
    task: Task, found: Evaluated, examples: Examples, groups: Sequence[str] = (), answered: Answered | None = None
) -> Scores:
    """What a task says of evaluated documents, those of each group apart, and of what was answered."""
    by_group = {}
    for number, (name, counts) in enumerate(zip(groups, found.groups, strict=True)):
        members = np.flatnonzero(examples.documents["group"] == number)
        if len(members):
            picked = members if task.grain == "document" else examples.encoded.places(members)
            by_group[name] = {**task.metrics(counts), **task.row_metrics(found.kept[picked], examples.select(members))}
    of_answers = answered.metrics if answered else {}
    metrics = {**task.metrics(found.counts), **task.row_metrics(found.kept, examples), **of_answers}
    tables = {**task.tables(found.counts), **task.row_tables(found.kept, examples)}
    return Scores(metrics, by_group, tables, found.kept, answered.answers if answered else [])


def score_files(source: str, files: Sequence[str], columns: Mapping[str, str], *, drop: bool = False) -> Scored:
    """The scores of a finished model, or of the model that a run exported, on labelled rows.

    Rows are read as the run reads its own, with its columns and groups, and its arithmetic; labels are those of the
    model. Raises DataError for rows that cannot be scored, unless they are to be dropped.
    """
    config = _run_of(source)
    loaded = load_model_of(find_model(source), lambda found, where: _section(found, where, config, columns))
    task, section = loaded.task, config.eval if config else EvalSection()
    given = load_files(files, WHERE)
    texts, without_text = task.read(given)
    targets = task.targets(given)
    by_row = targets.bad | without_text
    bad = [*given.bad, *(by_row[row] for row in sorted(by_row))]
    if not drop:
        refuse(WHERE, bad)
    good = [row for row in range(len(given)) if row not in by_row]
    if not good:
        refuse(WHERE, bad)
        raise DataError(f"{WHERE}: {', '.join(files)} holds no row; give files with some")
    texts = tuple(clean([column[row] for row in good], loaded.clean) for column in texts)
    numbers = np.asarray(good, np.int64)
    prepared = {WHERE: Prepared(given.select(good), texts, [targets.values[row] for row in good], numbers)}
    encoded = task.encode(texts, prepared[WHERE].targets, loaded.tokenizer, loaded.max_length)
    checks.documents({WHERE: encoded}, prepared, drop=drop)
    checks.ids(loaded.model, {WHERE: encoded})
    checks.target_length(loaded.model, {WHERE: encoded}, source)
    groups, data = grouped(section.group, prepared, {WHERE: encoded})
    examples = Examples(data[WHERE], texts, prepared[WHERE].targets)
    dtype = jnp.dtype(config.train.compute_dtype if config else "float32")
    found = _evaluated(loaded, examples, len(groups), dtype, section.batch_size)
    reader, length = loaded.tokenizer, loaded.max_length
    how = {"scored": section.answers, "shown": 0, "batch_size": section.batch_size}
    asked = np.unique(encoded.rows).tolist()
    answers = answering(loaded.model, task, reader, prepared[WHERE], asked, length, dtype, **how)
    scores = scores_of(task, found, examples, groups, answers(loaded.params) if answers else None)
    return Scored(scores, bad, task, examples, prepared[WHERE])


def _run_of(source: str) -> Config | None:
    """The configuration of a run; None of a model."""
    file = Path(source).expanduser() / "config.yaml"
    return read_config([file]) if file.is_file() else None


def _section(config: Mapping[str, Any], where: str, run: Config | None, columns: Mapping[str, str]) -> Any:
    """The section of the task: the run's, with the labels of its model, or what the model's `config.json` tells."""
    section = restore_section(config, where)
    if run:
        own = {"labels": section.labels} if "labels" in type(section).model_fields else {}
        own |= {"template": None} if "template" in type(section).model_fields else {}  # the model has it
        section = run.task.model_copy(update=own)
    return renamed(section, columns)


def _evaluated(loaded: Loaded, examples: Examples, groups: int, dtype: Any, batch_size: int) -> Evaluated:
    """One pass over all documents, on the first device."""
    function = make_eval_step(loaded.model.template, loaded.task, groups=groups, compute_dtype=dtype)
    weights = abstract(loaded.params)

    def specimen(batch: Mapping[str, Any]) -> tuple[Any, ...]:
        tally, _ = jax.eval_shape(function, weights, {}, abstract(batch), None)
        return weights, {}, abstract(batch), tally

    program = Program(jax.jit(function, donate_argnums=3), specimen)
    batches = EvalBatches.of(examples.encoded, one_row(Layout(), examples.encoded), batch_size, 1)
    put = jax.device_put
    return evaluate(program, loaded.params, {}, batches, put, 2, loaded.task.grain)
