"""Offline prediction from an exported directory, by the same tokenisation and arithmetic as training."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from datasets import Dataset
from pydantic import ValidationError

from sft_jax.config.data import Clean, Layout
from sft_jax.config.generation import Generation
from sft_jax.config.read import read_settings
from sft_jax.data.batch import Encoded, Shape, collect, one_row, room_for
from sft_jax.data.clean import clean
from sft_jax.data.folders import is_folder
from sft_jax.data.images import image_files
from sft_jax.data.loader import EvalBatches
from sft_jax.data.rows import Rows, refuse
from sft_jax.data.sources import load_files
from sft_jax.errors import ConfigError, DataError, ModelError, reason
from sft_jax.infer.generate import Answer, Generator
from sft_jax.models.family import Model, build_model, load_model, settled
from sft_jax.nn.template import Params
from sft_jax.tasks.task import Examples, Record, Task, Texts, restore_task, written
from sft_jax.weights.files import Checkpoint, find, open_checkpoint

DEFAULT_LENGTH = 128  # of a model that does not say which length it was trained with
WINDOW = 64  # batches of rows that are encoded and answered before the next


@dataclass(frozen=True)
class Predictor:
    """A loaded model: rows in, records out."""

    task: Task
    tokenizer: Any
    max_length: int
    clean: Clean  # what was done to the texts of training
    forward: Callable[[dict[str, np.ndarray]], jax.Array]
    generate: Callable[[Encoded, int], Iterator[Answer]] | None = None  # (prompts, at a time), of what answers in words

    def __call__(
        self, rows: Rows | Sequence[str], batch_size: int = 32, *, raw: bool = False, score: bool = False
    ) -> Iterator[Record]:
        """A record for each row (or text), in order, with its `id` where it has one; with `raw` the logits of each
        document at full precision besides.

        A model that answers in words gives its answers, or with `score` how likely it finds the texts.
        """
        rows = rows if isinstance(rows, Rows) else of_texts(self.task, rows)
        yield from (record for _, record in self.numbered(rows, batch_size, raw=raw, score=score))

    def numbered(
        self, rows: Rows, batch_size: int = 32, *, raw: bool = False, score: bool = False
    ) -> Iterator[tuple[int, Record]]:
        """The same with the number of each row."""
        if not len(rows):
            refuse(rows.where, rows.bad)
            return
        columns, bad = self.task.read(rows)
        refuse(rows.where, [*rows.bad, *bad.values()])
        texts = [clean(column, self.clean) for column in columns]
        names = _names(rows)
        if self.generate and not score:
            for row, record in enumerate(self._answers(texts, batch_size)):
                yield row, {**names[row], **record}
            return
        examples = Examples(self.task.encode(texts, None, self.tokenizer, self.max_length), texts)
        shape = one_row(Layout(), examples.encoded)._replace(rows=batch_size)
        # A window of rows at a time, each with all of its documents: outputs do not pile up.
        for begin in range(0, len(rows), WINDOW * batch_size):
            ends = np.searchsorted(examples.encoded.rows, (begin, begin + WINDOW * batch_size))
            part = examples.select(np.arange(*ends))
            kept = self._kept(part.encoded, shape, batch_size)
            answered = np.unique(part.encoded.rows).tolist()
            for number, (row, record) in enumerate(zip(answered, self.task.decode(kept, part), strict=True)):
                logits = {"logits": kept[number].tolist()} if raw and self.task.grain == "document" else {}
                yield row, {**names[row], **record, **logits}

    def _answers(self, texts: Texts, batch_size: int) -> Iterator[Record]:
        """What is said to each prompt."""
        assert self.generate and self.task.prompt
        prompts = self.task.prompt(texts, self.tokenizer, self.max_length)
        yield from (answer.record(self.tokenizer) for answer in self.generate(prompts, batch_size))

    def _kept(self, encoded: Encoded, shape: Shape, batch_size: int) -> np.ndarray:
        """What the task keeps of the outputs, in the order of the documents."""
        batches, kept = EvalBatches.of(encoded, shape, batch_size, 1), None
        for number in range(len(batches)):
            batch = batches[number]
            outputs = self.forward(batch)
            kept = room_for(outputs, encoded, self.task.grain) if kept is None else kept
            collect(kept, batch, outputs, encoded, self.task.grain)
        assert kept is not None
        return kept


def load_predictor(source: str, settings: Sequence[str] = ()) -> Predictor:
    """The model in a directory that `export` wrote, or any of the supported ones with a head of a known task.

    `settings` such as `num_beams=4` say otherwise than the export how answers are written.
    """
    directory = find(source)
    checkpoint = open_checkpoint(directory)
    task = restore_task(checkpoint.config, str(directory))
    checkpoint = settled(checkpoint, task.head)
    say_remarks(checkpoint)
    model = build_model(checkpoint.config, task.head, str(directory))
    matched, arrays = load_model(model, checkpoint)
    if matched.initialised:
        raise DataError(
            f"{directory}: holds no head for {task.kind} ({', '.join(matched.initialised)} missing); fine-tune it first"
        )
    params = {path: jax.numpy.asarray(array, jax.numpy.float32) for path, array in arrays.items()}
    return make_predictor(checkpoint.config, directory, task, model, params, settings)


def say_remarks(checkpoint: Checkpoint) -> None:
    """Tell what a checkpoint says twice and differently."""
    for remark in checkpoint.remarks:
        print(f"{checkpoint.directory}: {remark}", file=sys.stderr)


def make_predictor(
    config: Mapping[str, Any], directory: Path, task: Task, model: Model, params: Params, settings: Sequence[str]
) -> Predictor:
    """What answers by these parameters; tokenizer and settings are those of a directory and its `config.json`."""
    forward = jax.jit(lambda params, batch: task.keep(model.template.bind(params)(batch), batch))
    ours = written(config)
    length = ours.get("max_length", DEFAULT_LENGTH)
    if type(length) is not int or length < 1:
        raise ModelError(f"{directory}: sft_jax_task.max_length is {length!r:.60}; export the model again")
    tokenizer, section = task.reader.load(directory), _generation(task, settings)
    generator = Generator(model, section, tuple(task.stops(tokenizer)), task.rules(tokenizer)) if section else None
    return Predictor(
        task=task,
        tokenizer=tokenizer,
        max_length=min(length, model.max_length),
        clean=_rules(ours.get("clean", {}), str(directory)),
        forward=lambda batch: forward(params, batch),
        generate=partial(generator, params) if generator else None,
    )


def read_inputs(file: str, task: Task, lines: Sequence[str] | None = None) -> Rows:
    """Rows of a file of any kind that training reads, or the lines of a text file (or those given) as texts.

    For a model of images an image, a folder of some, or lines that are paths of some do as well; `id` is the name.
    """
    if (lines is None and is_folder(file)) or (task.images and image_files(Path(file))):
        return _of_folder(task, file)
    if lines is None and Path(file).suffix.lower() in (".txt", ""):
        try:
            lines = Path(file).read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text ({reason(error)})") from None
    if lines is None:
        return load_files([file], "input")
    texts = [line for line in lines if line.strip()]
    if all(line.lstrip().startswith("{") for line in texts) and texts:
        try:
            return Rows(Dataset.from_list([json.loads(line) for line in texts]), "input")
        except (ValueError, TypeError) as error:
            raise DataError(
                f"input: not JSON lines ({reason(error)}); give a text or a JSON object on each line"
            ) from None
    return of_texts(task, texts)


def _generation(task: Task, settings: Sequence[str]) -> Generation | None:
    """How a task's answers are written, with these settings; None of a task that does not answer in words."""
    if task.generation is None:
        if settings:
            raise ConfigError(f"--set {settings[0]}: {task.kind} does not answer in words; leave it out")
        return None
    changed = read_settings(Generation, "--set", settings)
    return Generation.model_validate({**task.generation.model_dump(), **changed})


def _names(rows: Rows) -> list[Record]:
    """What a record says of its row, so that it can be told apart: its `id`, where there is such a column."""
    names = rows.column("id") if "id" in rows.names else [None] * len(rows)
    return [{"id": name} if isinstance(name, str | int) else {} for name in names]


def _of_folder(task: Task, folder: str) -> Rows:
    """The rows of a folder, each with its place as its `id`."""
    images = image_files(Path(folder)) if task.images else []
    if images:
        named = {"id": [image.name for image in images], task.texts[0]: [str(image) for image in images]}
        return Rows(Dataset.from_dict(named), "input")
    rows = load_files([folder], "input")
    return replace(rows, table=rows.table.add_column("id", [rows.place(row) for row in range(len(rows))]))


def of_texts(task: Task, texts: Sequence[str]) -> Rows:
    """Texts as rows."""
    return Rows(Dataset.from_dict({task.texts[0]: list(texts)}), "input")


def _rules(written: Any, where: str) -> Clean:
    """The cleaning that a `config.json` asks for."""
    try:
        return Clean.model_validate(written)
    except ValidationError:
        raise ModelError(
            f"{where}: sft_jax_task.clean of its config.json is no set of rules; export the model again"
        ) from None
