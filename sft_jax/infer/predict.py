"""Offline prediction from an exported directory, by the same tokenisation and arithmetic as training."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import jax
import numpy as np
from datasets import Dataset
from pydantic import ValidationError

from sft_jax import assets
from sft_jax.config.data import Clean, Layout
from sft_jax.config.generation import Generation
from sft_jax.config.read import read_settings
from sft_jax.data.batch import Encoded, collect, lay_out, one_row, room_for, slots_for
from sft_jax.data.clean import clean
from sft_jax.data.images import encode_plain
from sft_jax.data.loader import EvalBatches
from sft_jax.data.rows import Bad, Rows
from sft_jax.data.text import SETTINGS
from sft_jax.errors import ConfigError, DataError, ModelError, RunError
from sft_jax.infer.generate import Generator
from sft_jax.infer.inputs import of_texts, read_inputs
from sft_jax.infer.lengths import declared, fewer_rows, sizes
from sft_jax.infer.records import TRUNCATED, Answers
from sft_jax.models.family import NO_LIMIT, Model, build_model, load_model, settled
from sft_jax.nn.template import Params
from sft_jax.tasks.task import Examples, Record, Task, Texts, build_task, renamed, restore_section, written
from sft_jax.weights.files import CONFIG, Checkpoint, find, open_checkpoint, read_json

__all__ = ["Predictor", "load_predictor", "make_predictor", "of_texts", "read_inputs"]
CONTEXTS = 384  # tokens of a window of a context, of a model of others: as their pipeline has it
MOST_WARMED = 2048  # tokens of the longest text that is warmed up for, unless it is said

Encode = Callable[[Texts, int], Encoded]  # (texts, the most tokens)


@dataclass(frozen=True)
class Predictor(Answers):
    """A loaded model: rows in, records out; see `Answers`."""

    task: Task
    tokenizer: Any
    max_length: int
    clean: Clean  # what was done to the texts of training
    forward: Callable[[dict[str, np.ndarray]], jax.Array]
    generate: Callable[..., Iterator[Any]] | None = None  # (prompts, at a time), of what answers in words
    columns: Mapping[str, str] = field(default_factory=dict)  # names of the input for those that the model reads
    room: int = NO_LIMIT  # tokens that a prompt may have beside its answer
    lock: Any = field(default_factory=RLock)  # tokenizers are set anew for each call

    @property
    def longest(self) -> int:
        """The most tokens that are read of a row."""
        return self._most(generates=self.generate is not None)

    def read(self, rows: Rows) -> dict[int, Bad]:
        """What is wrong with rows, by their numbers."""
        return self.task.read(rows)[1]

    def answered(self, rows: Rows, batch_size: int, *, raw: bool, score: bool, first: int) -> list[Record | Bad]:
        """The record of each row, or why it has none."""
        columns, bad = self.task.read(rows)
        good = [row for row in range(len(rows)) if row not in bad]
        texts = [clean([column[row] for row in good], self.clean) for column in columns]
        generates = self.generate is not None and not score
        with self.lock:
            tokens = _tokens(texts, self._encode(generates), self._most(generates))
        found: dict[int, Record | Bad] = dict(bad)
        found |= {good[text]: Bad(rows.place(good[text]), "refused", why) for text, why in tokens.refused.items()}
        kept = [good[text] for text in tokens.texts]
        records: Iterator[tuple[int, Record]] = iter(())
        if tokens.encoded is not None and generates:
            records = self._said(tokens.encoded, batch_size, first + np.asarray(kept))
        elif tokens.encoded is not None:
            those = [[column[text] for text in tokens.texts] for column in texts]
            records = self._predicted(Examples(tokens.encoded, those), batch_size, raw=raw)
        for number, record in records:
            found[kept[number]] = {**record, **({TRUNCATED: True} if number in tokens.cut else {})}
        nothing = "nothing of it is left for the model"
        return [found.get(row) or Bad(rows.place(row), "no tokens", nothing) for row in range(len(rows))]

    def warm_up(self, longest: int | None = None, batch_size: int = 1) -> int:
        """Compile for texts of up to `longest` tokens, by default the model's own length or 2,048, so many at a time.

        Gives the number of lengths. What else is met later is compiled when it is met.
        """
        generates = self.generate is not None
        most = self._most(generates)
        sample = self._encode(generates)(self.task.read(_sample(self.task))[0], most)
        lengths = [1] if sample.lazy else sizes(min(most, longest or MOST_WARMED))
        for size in lengths:
            whole = sample if sample.lazy else _stretched(sample, min(size, most))
            rows = whole.select(np.zeros(batch_size, np.int64))
            if self.generate is not None:
                list(self.generate(rows, batch_size, most=most))
            else:
                self._outputs(rows, batch_size, alone=True)
        return len(lengths)

    def _encode(self, generates: bool) -> Encode:
        if not generates:
            return lambda texts, length: self.task.encode(texts, None, self.tokenizer, length)
        prompt = self.task.prompt
        assert prompt
        return lambda texts, length: prompt(texts, self.tokenizer, length)

    def _most(self, generates: bool) -> int:
        """The most tokens of a document."""
        return min(self.max_length, self.room) if generates else self.max_length

    def _predicted(self, examples: Examples, batch_size: int, *, raw: bool) -> Iterator[tuple[int, Record]]:
        """The records of texts, each with its number."""
        kept = self._outputs(examples.encoded, batch_size)
        answered = np.unique(examples.encoded.rows).tolist()
        for number, (row, record) in enumerate(zip(answered, self.task.decode(kept, examples), strict=True)):
            logits = {"logits": kept[number].tolist()} if raw and self.task.grain == "document" else {}
            yield row, {**record, **logits}

    def _said(self, prompts: Encoded, batch_size: int, numbers: np.ndarray) -> Iterator[tuple[int, Record]]:
        """What is said to prompts, each with its number."""
        assert self.generate
        found = self.generate(prompts, batch_size, numbers=numbers, most=self._most(generates=True))
        for row, answer in enumerate(found):
            yield row, answer.record(self.tokenizer)

    def _outputs(self, encoded: Encoded, batch_size: int, *, alone: bool = False) -> np.ndarray:
        """What the task keeps of the outputs, in the order of the documents, by declared shapes; `alone`: one a row."""
        shape = one_row(Layout(), encoded)
        if not encoded.lazy:
            length = declared(shape.length, self.max_length)
            shape = shape._replace(length=length, slots=slots_for(length))
        rows = [[d] for d in range(len(encoded))] if alone else lay_out(encoded, range(len(encoded)), shape)
        at_a_time = -(-batch_size * len(rows) // len(encoded))  # so that these hold about as many documents
        batches = EvalBatches(encoded, rows, shape._replace(rows=fewer_rows(min(at_a_time, len(rows)), batch_size)))
        kept: np.ndarray | None = None
        for number in range(len(batches)):
            batch = batches[number]
            outputs = self.forward(batch)
            kept = room_for(outputs, encoded, self.task.grain) if kept is None else kept
            collect(kept, batch, outputs, encoded, self.task.grain)
        assert kept is not None
        return kept


class Loaded(NamedTuple):
    """A model in memory, with its task and what reads its inputs."""

    task: Task
    model: Model
    params: Params  # float32
    tokenizer: Any
    max_length: int
    clean: Clean


def load_predictor(
    source: str, settings: Sequence[str] = (), columns: Mapping[str, str] | None = None, *, chats: bool = False
) -> Predictor:
    """The model in a directory that `export` wrote, or any of the supported ones with a head of a known task.

    A run directory stands for the model that it exported. `settings` such as `num_beams=4` say otherwise than the
    export how answers are written; `columns` such as `{"text": "body"}` which columns of the input are read instead;
    `chats` that conversations are answered, also by a decoder of others that has a template for them.
    """
    names = columns or {}
    loaded = load_model_of(find_model(source), lambda config, where: section_of(config, where, names, chats=chats))
    return make_predictor(loaded, settings, names)


def load_model_of(directory: Path, section: Callable[[Mapping[str, Any], str], Any]) -> Loaded:
    """The model in a directory, for the task of the section that is made of its `config.json`."""
    checkpoint = open_checkpoint(directory)
    task = build_task(section(checkpoint.config, str(directory)), {})
    checkpoint = settled(checkpoint, task.head)
    say_remarks(checkpoint)
    model = build_model(checkpoint.config, task.head, str(directory))
    matched, arrays = load_model(model, checkpoint)
    if matched.initialised:
        raise DataError(
            f"{directory}: holds no head for {task.kind} ({', '.join(matched.initialised)} missing); fine-tune it first"
        )
    params = {path: jax.numpy.asarray(array, jax.numpy.float32) for path, array in arrays.items()}
    return loaded_as(checkpoint.config, directory, task, model, params)


def say_remarks(checkpoint: Checkpoint) -> None:
    """Tell what a checkpoint says twice and differently."""
    for remark in checkpoint.remarks:
        print(f"{checkpoint.directory}: {remark}", file=sys.stderr)


def loaded_as(config: Mapping[str, Any], directory: Path, task: Task, model: Model, params: Params) -> Loaded:
    """A model with these parameters; what reads its inputs is that of a directory and its `config.json`."""
    rules = _rules(written(config).get("clean", {}), str(directory))
    return Loaded(task, model, params, task.reader.load(directory), _longest(config, directory, task, model), rules)


def section_of(config: Mapping[str, Any], where: str, columns: Mapping[str, str], *, chats: bool) -> Any:
    """The section of the task of a `config.json`, with other columns, and for conversations if so asked."""
    ours = written(config)
    if chats and ours and (ours.get("kind"), ours.get("format")) != ("causal_lm", "chat"):
        kind = f"{ours.get('kind')}, format {ours['format']}" if "format" in ours else ours.get("kind")
        raise ConfigError(f"{where}: was trained for {kind}, not to chat; ask it by sft-jax predict")
    section = restore_section(config, where)
    if chats and not ours:
        if section.kind != "causal_lm":
            raise ConfigError(f"{where}: is for {section.kind}, not to chat; ask it by sft-jax predict")
        section = section.model_copy(update={"format": "chat"})
    return renamed(section, columns)


def find_model(source: str) -> Path:
    """The place of a model by its name; of a run directory, that of the model that it exported."""
    place = Path(source).expanduser()
    if (place / "config.yaml").is_file() and not (place / CONFIG).is_file():
        if not (place / "model" / CONFIG).is_file():
            raise RunError(
                f"{source}: is a run that has exported no model yet; let it end, or write one: "
                f"sft-jax export {source} NEW_DIRECTORY"
            )
        return place / "model"
    return find(assets.resolve(source))


def make_predictor(loaded: Loaded, settings: Sequence[str], columns: Mapping[str, str]) -> Predictor:
    """What answers by a model in memory; settings and columns as in `load_predictor`."""
    task, model, params, tokenizer = loaded[:4]
    forward = jax.jit(lambda params, batch: task.keep(model.template.bind(params)(batch), batch))
    section = _generation(task, settings)
    generator = Generator(model, section, tuple(task.stops(tokenizer)), task.rules(tokenizer)) if section else None
    return Predictor(
        task=task,
        tokenizer=tokenizer,
        max_length=loaded.max_length,
        clean=loaded.clean,
        forward=lambda batch: forward(params, batch),
        generate=partial(generator, params) if generator else None,
        columns=columns,
        room=max(generator.room, 1) if generator else NO_LIMIT,
    )


def _longest(config: Mapping[str, Any], directory: Path, task: Task, model: Model) -> int:
    """The most tokens of a document: as in training; of a model of others, those that it has positions for.

    That is where the pipelines of `transformers`, which cut nothing, end in an error. A model without a table of
    positions takes what its tokenizer says, if that says anything.
    """
    given = written(config).get("max_length")
    if given is None:
        if task.images:
            return 1
        if task.kind == "question_answering":
            return min(CONTEXTS, model.max_length)
        if model.max_length < NO_LIMIT:
            return model.max_length
        said = read_json(directory / SETTINGS).get("model_max_length") if (directory / SETTINGS).is_file() else None
        return int(said) if isinstance(said, int | float) and 1 <= said < NO_LIMIT else NO_LIMIT
    if type(given) is not int or given < 1:
        raise ModelError(f"{directory}: sft_jax_task.max_length is {given!r:.60}; export the model again")
    return min(given, model.max_length)


def _generation(task: Task, settings: Sequence[str]) -> Generation | None:
    """How a task's answers are written, with these settings; None of a task that does not answer in words."""
    for setting in settings:
        name, _, value = setting.partition("=")
        if name in task.columns and name not in Generation.model_fields:
            raise ConfigError(f"--set {setting}: {name} is a column that the model reads; say --columns {name}={value}")
    if task.generation is None:
        if settings:
            raise ConfigError(f"--set {settings[0]}: {task.kind} does not answer in words; leave it out")
        return None
    changed = read_settings(Generation, "--set", settings)
    return Generation.model_validate({**task.generation.model_dump(), **changed})


class Tokens(NamedTuple):
    """Texts in tokens, as far as they can be."""

    encoded: Encoded | None  # of those that can
    texts: list[int]  # which they are
    refused: dict[int, str]  # why others cannot
    cut: set[int]  # which of `texts` are longer than the model reads


def _tokens(texts: Texts, encode: Encode, most: int) -> Tokens:
    """Texts as documents of at most so many tokens; one that is refused costs no other."""
    every = list(range(len(texts[0])))
    if not every:
        return Tokens(None, [], {}, set())
    try:
        refused, encoded = dict[int, str](), encode(texts, most)
    except DataError:
        refused, encoded = _refused(lambda those: encode(those, most), texts, every), None
    kept = [text for text in every if text not in refused]
    those = [[column[text] for text in kept] for column in texts]
    if encoded is None and kept:
        encoded = encode(those, most)
    return Tokens(encoded, kept, refused, _cut(encode, those, encoded, most) if encoded else set())


def _refused(encode: Callable[[Texts], Encoded], texts: Texts, chosen: list[int]) -> dict[int, str]:
    """Why some of the chosen texts cannot be encoded."""
    try:
        encode([[column[text] for text in chosen] for column in texts])
    except DataError as error:
        if len(chosen) == 1:
            return {chosen[0]: str(error).partition(": ")[2] or str(error)}
        half = len(chosen) // 2
        return _refused(encode, texts, chosen[:half]) | _refused(encode, texts, chosen[half:])
    return {}


def _cut(encode: Encode, texts: Texts, found: Encoded, most: int) -> set[int]:
    """Which of these texts are longer than the documents that they became: with more room they would be longer.

    Of texts that become windows each is looked at by itself.
    """
    if not found.truncated:
        return set()
    if len(np.unique(found.rows)) < len(found):
        return {text for text in range(len(texts[0])) if encode([[column[text]] for column in texts], most).truncated}
    longest = found.lengths.max()
    chosen = found.rows[found.lengths == longest].tolist()
    more = encode([[column[text] for text in chosen] for column in texts], most + 1)
    return {chosen[row] for row in more.rows[more.lengths > longest].tolist()}


def _stretched(sample: Encoded, length: int) -> Encoded:
    """A document of so many tokens, all of them some of the sample's."""
    places = np.resize(np.arange(sample.offsets[1]), length)
    tokens, beside = ({n: a[places] for n, a in group.items()} for group in (sample.tokens, sample.beside))
    fields = {name: values[:1] for name, values in sample.documents.items()}
    return Encoded(tokens, np.asarray([0, length]), fields, rows=np.zeros(1, np.int64), beside=beside)


def _sample(task: Task) -> Rows:
    """A row that any model of a task reads."""
    value: Any = {"bytes": encode_plain(np.zeros((8, 8, 3), np.uint8)), "path": None} if task.images else "a"
    return Rows(Dataset.from_dict({name: [value] for name in task.texts}), "input")


def _rules(written: Any, where: str) -> Clean:
    """The cleaning that a `config.json` asks for."""
    try:
        return Clean.model_validate(written)
    except ValidationError:
        raise ModelError(
            f"{where}: sft_jax_task.clean of its config.json is no set of rules; export the model again"
        ) from None
