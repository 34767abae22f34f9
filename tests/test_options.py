"""Every option of the schema does something: it is set, and what it is for is seen to change.

Most is seen in what `prepare` lays out, before anything is compiled; a few options need a tiny training run. An option
without an entry in EFFECTS fails the test, so no option can be added that does nothing.
"""

import csv
import dataclasses
import itertools
import json
import tempfile
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chats import CHATML, QWEN3, said, write_decoder
from conftest import ONE_SHAPE, SMALL, WORDS, one, write_model
from datasets import Dataset
from pictures import VIT, coloured, encode, write_vision
from pydantic import BaseModel
from translations import write_marian, write_pairs

from sft_jax import grid, inputs, jobs, machine
from sft_jax import run as runs
from sft_jax.adapt import peft
from sft_jax.config.adapter import AdapterSection
from sft_jax.config.data import Tfds
from sft_jax.config.read import known_keys, write_config
from sft_jax.data import sources
from sft_jax.data.prepare import prepare as prepare_rows
from sft_jax.data.rows import Rows, numbered
from sft_jax.data.text import load_tokenizer
from sft_jax.errors import ConfigError, DataError, RunError, SftError
from sft_jax.infer.search import search
from sft_jax.models.family import Head, build_model
from sft_jax.nn import kernels
from sft_jax.nn.lora import is_adapter
from sft_jax.run import Run
from sft_jax.train import directory, trackers
from sft_jax.train.checkpoint import Checkpoints, Progress
from sft_jax.train.resume import resume
from sft_jax.train.state import TrainState, abstract_state
from sft_jax.weights.files import open_checkpoint

See = Callable[[Run], Any]
FREE = kernels.Needs(64)  # nothing that a kernel could not do


@dataclass(frozen=True)
class Effect:
    """An option set to another value, and what must then differ; `base` is what it needs to matter at all."""

    value: str
    see: See
    base: tuple[str, ...] = ()


def options() -> dict[str, str]:
    """`Section.field` -> dotted key, for every option that is no section itself."""
    found = {}
    for key, field, section in known_keys():
        name = next(name for name, other in section.model_fields.items() if other is field)
        if not _is_section(field.annotation):
            found.setdefault(f"{section.__name__}.{name}", key)  # a section that stands in two places, by the first
    return found


def _is_section(annotation: Any) -> bool:
    whole = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return whole or any(_is_section(part) for part in typing.get_args(annotation))


# What is looked at.


def step_text(run: Run) -> str:
    """The training step as the compiler receives it."""
    program = _step(run)
    return program._jitted.lower(*program.specimen(run.batches[0])).as_text()


def stream(run: Run) -> np.ndarray:
    """What the training step is given to draw dropout from."""
    return np.asarray(_step(run)._last())


def _step(run: Run) -> Any:
    trainable = abstract_state(run.model.template, run.frozen, run.begin)
    shapes = run.model.template.shapes
    frozen = {path: jax.ShapeDtypeStruct(shapes[path], run.dtype) for path in sorted(run.frozen)}
    return runs.train_program(run, trainable, frozen)


def updates(run: Run) -> np.ndarray:
    """What the optimizer makes of the same gradients in six steps."""
    params = {path: jnp.full((2, 2), 0.5) for path in ("blocks/0/attn/q/kernel", "head/out/bias", "head/out/kernel")}
    state, seen = run.optimizer.init(params), []
    for step in range(6):
        gradients = jax.tree.map(lambda p, s=step: p * jnp.array([[1.0, -2.0], [3.0, 0.1]]) * (1 + s), params)
        moved, state = run.optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, moved)
        seen += [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return np.stack(seen)


def initial_head(run: Run) -> np.ndarray:
    """The head at step 0."""
    return np.asarray(runs.initial(run)[0].params["head/out/kernel"])


def tokens(run: Run) -> list[int]:
    """The training documents in tokens."""
    return run.data["train"].tokens["input_ids"].tolist()


def targets(run: Run) -> list[int]:
    """What the training documents are answered with, in tokens."""
    target = run.data["train"].target
    assert target
    return target.tokens["label"].tolist()


def answered(run: Run) -> int:
    """How many validation rows are answered and scored."""
    scored: list[int] = []
    task = dataclasses.replace(run.task, answer_metrics=lambda said, expected: scored.append(len(said)) or {})
    run = dataclasses.replace(run, task=task)
    state, frozen = runs.initial(run)
    answer_rows = jobs.answers_to(run, "validation")
    assert answer_rows
    answer_rows({**state.weights, **frozen})
    return scored[0]


def supervised(run: Run) -> list[float]:
    """What the tokens of the training documents weigh."""
    return run.data["train"].tokens["token_weight"].tolist()


def labels(run: Run) -> tuple[list[int], tuple[str, ...]]:
    """The training labels and what they are called."""
    return run.data["train"].documents["label"].tolist(), run.task.labels


def loss(run: Run) -> float:
    """The loss of the training documents, were every output 0.5 or, every other time, -2."""
    label = run.data["train"].documents["label"][None]
    outputs = np.resize(np.float32([0.5, -2, -2, 0.5, 0.5]), (*label.shape[:2], run.task.head.size))
    return float(run.task.loss(outputs, {"label": label, "weight": np.ones(label.shape[:2], np.float32)}).value)


def labels_of_tokens(run: Run) -> tuple[list[int], tuple[str, ...]]:
    """The labels of the training tokens and what they are called."""
    return run.data["train"].tokens["label"].tolist(), run.task.labels


def token_loss(run: Run) -> float:
    """The loss of the training tokens on outputs that say one thing and another."""
    batch = run.batches[0]
    outputs = np.resize(np.float32([0.5, -2, 1, 0.5, 0.5]), (*batch["segment_ids"].shape, run.task.head.size))
    return float(run.task.loss(outputs, batch).value)


def answer(run: Run, seed: int = 3) -> tuple[list[int], int]:
    """What is said by a model whose next token depends on the last one alone, and how much of it counts."""
    table = jnp.asarray(np.random.default_rng(seed).normal(size=(9, 9)), jnp.float32)
    first = jnp.zeros(1, jnp.int32)
    found = search(
        lambda t, p, n, c: (table[t], c), table[:1], jnp.zeros((1, 1)), first, first, run.task.generation, [8]
    )
    return found.tokens[0].tolist(), int(found.lengths[0])


def record(run: Run) -> dict[str, Any]:
    """What is said of outputs that are just above the middle."""
    return one(run.task, np.full(run.task.head.size, 0.1, np.float32))


def pixels(run: Run) -> np.ndarray:
    """The images of the first batch."""
    return run.batches[0]["pixel_values"]


def order(run: Run) -> list[int]:
    """The documents of the first batch."""
    return sorted(run.batches[0]["index"].ravel().tolist())


def shapes(run: Run) -> list[str]:
    """The declared shapes."""
    return [str(shape) for shape in run.batches.shapes]


def rows(run: Run) -> dict[str, list[str]]:
    """The rows of each split."""
    return {split: found.texts[0] for split, found in run.rows.items()}


def batch(run: Run) -> list[list[int]]:
    """The tokens of the first batch."""
    return run.batches[0]["input_ids"].tolist()


def on_bad_rows(run: Run) -> str:
    """What becomes of a row without a text."""
    found = Rows(Dataset.from_dict({"text": ["bara", "", "cela"], "label": [0, 1, 1]}), "data.source.train")
    task, section = run.task, run.config.data
    functions = (task.read, task.targets, task.classes, task.label_counts)
    try:
        return str(prepare_rows({"train": found}, section, *functions, 0)[1])
    except DataError as error:
        return str(error)


def kept_tokens(run: Run) -> int:
    """How many entries an empty cache has once the run's rows are tokenised."""
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_JAX_CACHE", home)
        inputs.encode(run.config, run.task, run.rows, load_tokenizer(run.checkpoint.directory))
        return len(list(Path(home).glob("tokens/*")))


def on_mesh(run: Run) -> list[str]:
    """Where the parameters lie, and on how many devices."""
    return [f"{path} {sharding.spec} {dict(sharding.mesh.shape)}" for path, sharding in run.placement.params.items()]


def refusal(run: Run) -> str:
    """What is said of going on in a directory that holds this run, and of beginning in an empty one."""
    said = []
    for name, write in (("used", True), ("empty", False)):
        home = run.directory / name
        home.mkdir(parents=True, exist_ok=True)
        if write:
            (home / "config.yaml").write_text(write_config(run.config))
        try:
            directory.check(run.config, home)
            said.append("")
        except SftError as error:
            said.append(str(error).removeprefix(str(home)))
    return "\n".join(said)


def lengthened(run: Run) -> bool:
    """Whether a run that was to have an epoch less may go on in its directory as this one."""
    run.directory.mkdir(parents=True, exist_ok=True)
    shorter = run.config.train.model_copy(update={"epochs": run.config.train.epochs - 1})
    (run.directory / "config.yaml").write_text(write_config(run.config.model_copy(update={"train": shorter})))
    try:
        directory.check(run.config, run.directory)
    except RunError:
        return False
    return True


def went_on(run: Run) -> int | None:
    """The step that a run with checkpoints of steps 1 and 2 goes on from."""
    checkpoints, toy = Checkpoints(run.directory / "checkpoints", 2), TrainState(jnp.int32(0), {}, ())
    for step in (1, 2):
        checkpoints.save(toy, Progress(step=step))
    checkpoints.wait()
    place = jax.tree.map(lambda leaf: leaf.sharding, toy)
    found = resume(checkpoints, run.config.run, lambda step: checkpoints.restore(toy, place, step), lambda text: None)
    return found and found[1].step


def failed_save(run: Run) -> str:
    """What becomes of a run whose checkpoint cannot be saved."""
    run.directory.mkdir(parents=True)
    (run.directory / "checkpoints").touch()
    try:
        jobs._checkpoints(run, lambda text: None).save(TrainState(jnp.int32(0), {}, ()), Progress(step=1))
    except RunError:
        return "halted"
    return "went on"


def answers_said(run: Run) -> list[dict[str, Any]]:
    """The records of training rows of which every token has logits drawn at random."""
    found = run.examples("train")
    logits = np.random.default_rng(0).normal(size=(int(found.encoded.offsets[-1]), 2)).astype(np.float32)
    return run.task.decode(logits, found)


def held_bytes(run: Run) -> int:
    """The memory that the frozen parameters take."""
    return sum(array.nbytes for array in runs.initial(run)[1].values())


def adapters_begin(run: Run) -> list[float]:
    """What the adapters of a run begin as, in a number each."""
    params = runs.initial(run)[0].params
    return [float(jnp.abs(params[path]).sum()) for path in run.trainable if is_adapter(path)]


# What is looked at after a tiny training run.


@dataclass
class Trained:
    """What a training run left, and what it was seen to do."""

    logged: list[int]  # steps that have a line of metrics
    validated: list[int]  # steps after which there was a validation
    saved: list[tuple[int, int | None, float | None]]  # step, best step so far and its value, of each checkpoint
    kept: list[int]  # steps that have a checkpoint at the end
    baselines: list[str]  # what the scores are compared with
    mistakes: int  # how many are kept for the report
    ahead: set[int]  # how many batches are asked for in advance
    traced: bool


def trained(what: str) -> See:
    """One thing of a training run."""

    def see(run: Run) -> Any:
        changed = {key: value for key, value in run.config.model_dump(mode="json").items() if key != "run"}
        name = json.dumps(changed, sort_keys=True)
        if name not in TRAINED:
            TRAINED[name] = train(run)
        return getattr(TRAINED[name], what)

    return see


def train(run: Run) -> Trained:
    """Train, and write down what is seen."""
    saved, ahead = [], set()
    save, options = Checkpoints.save, grain.ReadOptions

    def noted_save(self: Checkpoints, state: Any, progress: Any) -> None:
        saved.append((progress.step, progress.best_step, progress.best_value))
        save(self, state, progress)

    def noted_options(**given: Any) -> Any:
        ahead.add(given["prefetch_buffer_size"])
        return options(**given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", noted_save)
        patch.setattr(grain, "ReadOptions", noted_options)
        home = jobs.train(run).directory
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    steps = {kind: [line["step"] for line in lines if line["kind"] == kind] for kind in ("train", "validation")}
    kept = sorted(int(found.name) for found in (home / "checkpoints").iterdir())
    compared = sorted(json.loads((home / "summary.json").read_text())["baselines"])
    mistakes = len(json.loads((home / "review.json").read_text())["mistakes"])
    traced = (home / "profile").exists()
    return Trained(steps["train"], steps["validation"], saved, kept, compared, mistakes, ahead, traced)


def wandb_project(run: Run) -> str | None:
    """The project that a client of Weights & Biases would be told of."""
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "Wandb", lambda project, *given: asked.append(project))
        run.directory.mkdir(parents=True, exist_ok=True)
        jobs._files(run, 0)
    return asked[0] if asked else None


TRAINED: dict[str, Trained] = {}  # by configuration: most of the options below are changes of one and the same run
HEAD = ("model.source=HEAD",)
WIDE = ("data.source.train=WIDE", "data.source.validation=WIDE", "data.source.test=null")
SEVERAL = (*WIDE, "task.kind=multi_label_classification", "task.label=several", "eval.best_metric=loss")
NUMBER = (*WIDE, "task.kind=regression", "task.label=label", "eval.best_metric=loss")
TALKS = ("data.source.train=TALKS", "data.source.validation=TALKS", "data.source.test=null")
DECODING = ("model.source=DECODER", "task.kind=causal_lm", "data.max_length=120", "eval.best_metric=loss", *TALKS)
TAGS = ("data.source={kind: files, train: TAGS}", "data.source.test=null", "eval.every=never", "data.max_length=24")
TAGGING = ("task={kind: token_classification}", *TAGS)
PAIRS = ("data.source.train=PAIRS", "data.source.validation=PAIRS", "data.source.test=null", "eval.best_metric=loss")
TRANSLATING = ("model.source=MARIAN", "task.kind=seq2seq", "task.generate.max_new_tokens=3", *PAIRS)
DRAWING = (*DECODING, "task.generate.temperature=2.0")
COMPLETING, TALKING = (*DECODING, "task.format=completion"), (*DECODING, "task.format=chat")
INSTRUCTING = (*TALKING, "task.messages=")
DATED = (*TALKING, "task.template=TEMPLATE", "task.today=2025-01-01")
ASKED = ("data.source.train=ASKED", "data.source.validation=ASKED", "data.source.test=null", "data.max_length=12")
ASKING = (*ASKED, "task.kind=question_answering", "task.stride=4", "eval.best_metric=loss")
ADAPTED = ("adapter.rank=2",)
NONE = (*ASKING, "task.no_answer=true")
CUT = ("data.source.validation=null", "data.source.test=null", "eval.every=never")
SEEN = ("data.source.train=SEEN", "data.max_length=128", *CUT)
SEEING = ("model.source=EYE", "task={kind: image_classification}", *SEEN)
CROPPED = ("model.source=LENS", "task={kind: image_classification, size: 16}", *SEEN)
HUB = ("data.source={kind: hub, name: some/data, validation: valid}",)
TFDS = ("data.source={kind: tfds, name: reviews, validation: valid}",)
PARTS = """data.source.parts=[
  {name: one, weight: 1, source: {kind: files, train: TRAIN, validation: TEST}},
  {name: two, source: {kind: files, train: TEST}},
]"""
MIXED = ("data.source={kind: mixture, column: origin}", PARTS)
FROM_HUB = ("model.source=some/model",)
DIRTY = ("data.source.train=DIRTY", "data.source.validation=TEST", "data.source.test=DIRTY")
SIX = ("train.steps=6", "optim.lr=0.1")
WARM = (*SIX, "optim.schedule.warmup=2")
PLAIN = (*SIX, "optim.name=sgd")
DROPPING = ("model.dropout=0.5",)
HEAD_ALONE = ("train.freeze=['embed/**', 'blocks/**']",)
GRID = (*HEAD_ALONE, "train.head_grid.lr=[0.1, 0.2]")
SPIKES = ("train.spikes={window: 4}",)
LATE = "train.unfreeze=[{match: 'head/**', at: 3}]"
GROUP = "optim.groups=[{match: 'head/**', lr_scale: 2, weight_decay: 0.5}]"
TRAINING = (
    ONE_SHAPE,
    "train.steps=6",
    "eval.every=3",
    "checkpoint.every=2",
    "checkpoint.keep=1",
    "eval.best_metric=loss",
)
IMPATIENT = (*TRAINING, "eval.every=1", "train.steps=6")


def write_tagged(file: Path) -> Path:
    """Rows of words with tags, by two names each; one row is longer than a window."""
    rows = [(WORDS[:n], (["O", "B-A", "I-A"] * n)[:n]) for n in (3, 5, 30, 2)]
    lines = [{"tokens": w, "others": w[::-1], "tags": t, "kinds": t[::-1]} for w, t in rows]
    for line in lines:
        first = len(line["tokens"][0])
        line |= {"text": " ".join(line["tokens"]), "title": line["tokens"][0], "spans": [[0, first, "A"]]}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


EFFECTS = {
    "RunSection.dir": Effect("elsewhere", lambda run: run.directory.name),
    "RunSection.resume": Effect("never", refusal),
    "RunSection.resume_step": Effect("1", went_on),
    "RunSection.extend": Effect("true", lengthened),
    "RunSection.deterministic": Effect(
        "true", lambda run: machine.flags("cuda", (0, 12), deterministic=run.config.run.deterministic)
    ),
    "Seeds.init": Effect("1", initial_head),
    "Seeds.data": Effect("1", order),
    "Seeds.dropout": Effect("1", stream, ("model.dropout=0.5",)),
    "Seeds.split": Effect("1", rows, (*CUT, "data.split.validation=0.25")),
    "ModelSection.source": Effect("HEAD", lambda run: run.checkpoint.digest()),
    "ModelSection.revision": Effect("abc123", lambda run: CALLS[-1], FROM_HUB),
    "ModelSection.weights": Effect("random", lambda run: sorted(run.matched.loaded)),
    "ModelSection.head": Effect("new", lambda run: run.matched.initialised, HEAD),
    "ModelSection.dropout": Effect("0.5", step_text),
    "ModelSection.embedding_noise": Effect("5", step_text),
    "SequenceClassification.text": Effect("other", tokens, WIDE),
    "SequenceClassification.text_pair": Effect("other", tokens, WIDE),
    "SequenceClassification.label": Effect("second", labels, WIDE),
    "SequenceClassification.labels": Effect("[no, yes]", lambda run: run.task.to_hf()["id2label"]),
    "SequenceClassification.loss": Effect("focal", loss),
    "SequenceClassification.focal_gamma": Effect("0.5", loss, ("task.loss=focal",)),
    "SequenceClassification.label_smoothing": Effect("0.1", loss),
    "SequenceClassification.class_weights": Effect("balanced", loss),
    "MultiLabelClassification.text": Effect("other", tokens, SEVERAL),
    "MultiLabelClassification.text_pair": Effect("other", tokens, SEVERAL),
    "MultiLabelClassification.label": Effect("second", labels, SEVERAL),
    "MultiLabelClassification.separator": Effect("';'", labels, SEVERAL),
    "MultiLabelClassification.labels": Effect("[b, a]", labels, SEVERAL),
    "MultiLabelClassification.threshold": Effect("0.6", record, SEVERAL),
    "MultiLabelClassification.loss": Effect("focal", loss, SEVERAL),
    "MultiLabelClassification.focal_gamma": Effect("0.5", loss, (*SEVERAL, "task.loss=focal")),
    "MultiLabelClassification.label_smoothing": Effect("0.1", loss, SEVERAL),
    "MultiLabelClassification.class_weights": Effect("{a: 3}", loss, SEVERAL),
    "Regression.text": Effect("other", tokens, NUMBER),
    "Regression.text_pair": Effect("other", tokens, NUMBER),
    "Regression.label": Effect("second", labels, NUMBER),
    "Regression.loss": Effect("huber", loss, NUMBER),
    "Regression.huber_delta": Effect("0.2", loss, (*NUMBER, "task.loss=huber")),
    "TokenClassification.words": Effect("others", tokens, TAGGING),
    "TokenClassification.tags": Effect("kinds", labels_of_tokens, TAGGING),
    "TokenClassification.labels": Effect("[I-A, O, B-A]", labels_of_tokens, TAGGING),
    "TokenClassification.spans": Effect("spans", labels_of_tokens, TAGGING),
    "TokenClassification.text": Effect("title", tokens, (*TAGGING, "task.spans=spans")),
    "TokenClassification.scheme": Effect("none", lambda run: run.task.headline, TAGGING),
    "TokenClassification.align": Effect("average", lambda run: sorted(run.data["train"].tokens), TAGGING),
    "TokenClassification.stride": Effect("2", lambda run: run.data["train"].offsets.tolist(), TAGGING),
    "TokenClassification.loss": Effect("focal", token_loss, TAGGING),
    "TokenClassification.focal_gamma": Effect("5", token_loss, (*TAGGING, "task.loss=focal")),
    "TokenClassification.label_smoothing": Effect("0.2", token_loss, TAGGING),
    "TokenClassification.class_weights": Effect("{O: 0.1}", token_loss, TAGGING),
    "Generation.max_new_tokens": Effect("3", answer, DECODING),
    "Generation.temperature": Effect("3.0", answer, DECODING),
    "Generation.top_k": Effect("1", answer, DRAWING),
    "Generation.top_p": Effect("0.01", answer, DRAWING),
    "Generation.num_beams": Effect("4", lambda run: answer(run, seed=4), DECODING),
    "Generation.length_penalty": Effect("-3.0", answer, (*DECODING, "task.generate.num_beams=3")),
    "Generation.early_stopping": Effect("true", answer, (*DECODING, "task.generate.num_beams=3")),
    "Generation.seed": Effect("5", answer, DRAWING),
    "CausalLM.format": Effect("completion", tokens, DECODING),
    "CausalLM.text": Effect("prompt", tokens, DECODING),
    "CausalLM.prompt": Effect("text", tokens, COMPLETING),
    "CausalLM.completion": Effect("text", tokens, COMPLETING),
    "CausalLM.messages": Effect("others", tokens, TALKING),
    "CausalLM.tools": Effect("''", tokens, TALKING),
    "CausalLM.system": Effect("briefing", tokens, TALKING),
    "CausalLM.input": Effect("beside", tokens, INSTRUCTING),
    "CausalLM.history": Effect("earlier", tokens, INSTRUCTING),
    "CausalLM.learned": Effect("asked", supervised, (*DECODING, "task.format=tokens", "task.text=ids")),
    "CausalLM.weight": Effect("counts", supervised, TALKING),
    "CausalLM.chat_template_kwargs": Effect("{brief: true}", tokens, (*TALKING, "task.template=BRIEF")),
    "CausalLM.loss_on": Effect("last", supervised, TALKING),
    "CausalLM.mask": Effect("[scaffold]", supervised, (*TALKING, "task.template=THINKING")),
    "CausalLM.template": Effect("TEMPLATE", tokens, (*TALKING, "task.today=2025-01-01")),
    "CausalLM.today": Effect("2026-12-31", tokens, DATED),
    "CausalLM.label_smoothing": Effect("0.1", step_text, DECODING),
    "ImageClassification.image": Effect("other", pixels, SEEING),
    "ImageClassification.label": Effect("second", labels, SEEING),
    "ImageClassification.labels": Effect("[red, green, blue]", labels, SEEING),
    "ImageClassification.size": Effect("24", lambda run: pixels(run).shape, SEEING),
    "ImageClassification.whole": Effect("true", pixels, CROPPED),
    "ImageClassification.loss": Effect("focal", loss, SEEING),
    "ImageClassification.focal_gamma": Effect("0.5", loss, (*SEEING, "task.loss=focal")),
    "ImageClassification.label_smoothing": Effect("0.1", loss, SEEING),
    "ImageClassification.class_weights": Effect("{red: 3}", loss, SEEING),
    "Seq2Seq.source": Effect("target", tokens, TRANSLATING),
    "Seq2Seq.target": Effect("source", targets, TRANSLATING),
    "Seq2Seq.prefix": Effect("bara ", tokens, TRANSLATING),
    "Seq2Seq.max_target_length": Effect("2", targets, TRANSLATING),
    "Seq2Seq.label_smoothing": Effect("0.1", step_text, TRANSLATING),
    "QuestionAnswering.question": Effect("second", tokens, ASKING),
    "QuestionAnswering.context": Effect("passage", tokens, ASKING),
    "QuestionAnswering.answers": Effect("others", lambda run: run.rows["train"].targets, ASKING),
    "QuestionAnswering.answer_text": Effect("said", lambda run: run.rows["train"].targets, ASKING),
    "QuestionAnswering.no_answer": Effect("true", lambda run: run.task.metric_names, ASKING),
    "QuestionAnswering.null_threshold": Effect("-9", answers_said, NONE),
    "QuestionAnswering.stride": Effect("2", tokens, ASKING),
    "QuestionAnswering.n_best": Effect("3", answers_said, ASKING),
    "QuestionAnswering.max_answer_tokens": Effect("1", answers_said, ASKING),
    "Files.encoding": Effect("cp1252", rows, ("data.source.train=EITHER", *CUT)),
    "Files.delimiter": Effect(";", rows, ("data.source.train=EITHER", *CUT)),
    "Files.train": Effect("[TRAIN, TEST]", rows),
    "Files.validation": Effect("TEST", rows),
    "Files.test": Effect("null", rows),
    "Hub.name": Effect("other/data", lambda run: CALLS[-1], HUB),
    "Hub.config": Effect("english", lambda run: CALLS[-1], HUB),
    "Hub.revision": Effect("abc123", lambda run: CALLS[-1], HUB),
    "Hub.train": Effect("'train[:50%]'", lambda run: CALLS[-2:], HUB),
    "Hub.validation": Effect("dev", lambda run: CALLS[-1], HUB),
    "Hub.test": Effect("test", lambda run: sorted(run.rows), HUB),
    "Tfds.name": Effect("other", lambda run: CALLS[-1], TFDS),
    "Tfds.data_dir": Effect("/elsewhere", lambda run: CALLS[-1], TFDS),
    "Tfds.train": Effect("'train[:50%]'", lambda run: CALLS[-2:], TFDS),
    "Tfds.validation": Effect("dev", lambda run: CALLS[-1], TFDS),
    "Tfds.test": Effect("test", lambda run: sorted(run.rows), TFDS),
    "Part.name": Effect(PARTS.replace("two", "three"), lambda run: run.rows["train"].rows.column("origin"), MIXED),
    "Part.weight": Effect(PARTS.replace("weight: 1", "weight: 9"), order, MIXED),
    "Mixture.column": Effect("source", lambda run: run.rows["train"].rows.names, MIXED),
    "Split.validation": Effect("0.5", rows, (*CUT, "data.split.validation=0.25")),
    "Split.test": Effect("0.25", rows, CUT),
    "Clean.html": Effect("true", rows, DIRTY),
    "Clean.unicode": Effect("NFKC", rows, DIRTY),
    "Clean.whitespace": Effect("true", rows, DIRTY),
    "Clean.min_chars": Effect("6", rows, DIRTY),
    "Clean.max_chars": Effect("20", rows, DIRTY),
    "Augment.token_dropout": Effect("0.5", batch),
    "Augment.swap": Effect("0.5", batch),
    "Augment.delete": Effect("0.5", batch),
    "Images.flip": Effect("0.9", pixels, SEEING),
    "Images.crop": Effect("0.3", pixels, SEEING),
    "Images.pad": Effect("2", pixels, SEEING),
    "Images.rand_augment": Effect("2", pixels, SEEING),
    "Images.magnitude": Effect("20", pixels, (*SEEING, "data.images.rand_augment=2")),
    "Images.mixup": Effect("0.5", pixels, SEEING),
    "Images.cutmix": Effect("0.5", pixels, SEEING),
    "DataSection.workers": Effect("2", lambda run: run.batches.workers),
    "DataSection.bad_rows": Effect("drop", on_bad_rows, ("data.most_bad=0.5",)),
    "DataSection.most_bad": Effect("0.5", on_bad_rows, ("data.bad_rows=drop",)),
    "DataSection.duplicates": Effect("drop", rows, DIRTY),
    "DataSection.conflicts": Effect("drop", rows, DIRTY),
    "DataSection.leakage": Effect("drop", rows, ("data.source.train=[DIRTY, TRAIN]", *DIRTY[1:])),
    "DataSection.per_class": Effect("3", rows),
    "DataSection.cache": Effect("false", kept_tokens),
    "DataSection.max_length": Effect("8", lambda run: run.data["train"].truncated),
    "DataSection.max_rows": Effect("16", rows),
    "DataSection.prefetch": Effect("1", trained("ahead"), TRAINING),
    "Layout.kind": Effect("bucketed", shapes),
    "Layout.length": Effect("40", shapes),
    "Layout.buckets": Effect("1", shapes),
    "Schedule.kind": Effect("cosine", updates, SIX),
    "Schedule.warmup": Effect("2", updates, SIX),
    "Schedule.end": Effect("0.5", updates, SIX),
    "Schedule.decay": Effect("0.9", updates, (*SIX, "optim.schedule.kind=wsd")),
    "Group.match": Effect(GROUP.replace("head/**", "**/bias"), updates, (*SIX, GROUP)),
    "Group.lr_scale": Effect(GROUP.replace("lr_scale: 2", "lr_scale: 3"), updates, (*SIX, GROUP)),
    "Group.weight_decay": Effect(GROUP.replace("weight_decay: 0.5", "weight_decay: 0.6"), updates, (*SIX, GROUP)),
    "OptimSection.name": Effect("lion", updates, SIX),
    "OptimSection.options": Effect("{b2: 0.5}", updates, SIX),
    "OptimSection.lr": Effect("0.2", updates, SIX),
    "OptimSection.weight_decay": Effect("0.5", updates, SIX),
    "OptimSection.clip": Effect("null", updates, PLAIN),
    "OptimSection.layer_decay": Effect("0.5", updates, SIX),
    "Penalty.l1": Effect("0.1", updates, SIX),
    "Penalty.l2": Effect("0.1", updates, SIX),
    "Penalty.match": Effect("'**/bias'", updates, (*SIX, "optim.penalty.l2=0.1")),
    "TrainSection.epochs": Effect("1.5", lambda run: len(run.batches)),
    "TrainSection.steps": Effect("5", lambda run: len(run.batches)),
    "TrainSection.batch_size": Effect("16", order),
    "TrainSection.accumulate": Effect("4", step_text),
    "TrainSection.compute_dtype": Effect("bfloat16", lambda run: "bf16" in step_text(run)),
    "TrainSection.cache_features": Effect("never", lambda run: run.recomputed, HEAD_ALONE),
    "HeadGrid.lr": Effect("[0.5]", lambda run: grid.tried(run.config), GRID),
    "HeadGrid.weight_decay": Effect("[0.5]", lambda run: grid.tried(run.config), GRID),
    "HeadGrid.seeds": Effect("[0, 1]", lambda run: grid.tried(run.config), GRID),
    "TrainSection.scan": Effect("always", lambda run: run.model.template.keys, ("model.source=DEEP",)),
    "TrainSection.remat": Effect("full", step_text),
    "TrainSection.freeze": Effect("['embed/**']", lambda run: run.trainable),
    "Unfreeze.match": Effect(LATE.replace("head", "blocks"), updates, (*SIX, LATE)),
    "Unfreeze.at": Effect(LATE.replace("3", "0.7"), updates, (*SIX, LATE)),
    "AdapterSection.kind": Effect("dora", lambda run: run.trainable, ADAPTED),
    "AdapterSection.match": Effect("['**/mlp/*']", lambda run: run.trainable, ADAPTED),
    "AdapterSection.rank": Effect("3", lambda run: [run.model.template.shapes[p] for p in run.trainable], ADAPTED),
    "AdapterSection.alpha": Effect("3.0", lambda run: dict(run.model.adapters), ADAPTED),
    "AdapterSection.scaling": Effect("root", lambda run: dict(run.model.adapters), ADAPTED),
    "AdapterSection.also": Effect("['**/scale']", lambda run: run.trainable, ADAPTED),
    "AdapterSection.base": Effect("nf4", held_bytes, ADAPTED),
    "AdapterSection.source": Effect("ADAPTER", adapters_begin, ADAPTED),
    "TrainSection.r_drop": Effect("0.5", step_text, DROPPING),
    "TrainSection.ema": Effect("0.9", step_text),
    "TrainSection.non_finite": Effect("skip", step_text),
    "Spikes.window": Effect("5", step_text, SPIKES),
    "Spikes.sigma": Effect("5", step_text, SPIKES),
    "TrainSection.max_skipped": Effect("3", lambda run: runs.plan(run).max_skipped),
    "TrainSection.log_every": Effect("2", trained("logged"), TRAINING),
    "TrainSection.attention": Effect(
        "xla",
        lambda run: kernels.choose(run.config.train.attention, kernels.Hardware("gpu", "bfloat16"), FREE),
    ),
    "TrainSection.profile": Effect("[1, 2]", trained("traced"), TRAINING),
    "EvalSection.every": Effect("2", trained("validated"), TRAINING),
    "EvalSection.batch_size": Effect("3", lambda run: str(run.evals["validation"].shape)),
    "EvalSection.best_metric": Effect("accuracy", trained("saved"), TRAINING),
    "EvalSection.best_mode": Effect("max", trained("saved"), TRAINING),
    "EvalSection.patience": Effect("1", trained("validated"), (*IMPATIENT, "eval.best_mode=max")),
    "EvalSection.min_delta": Effect("0.9", trained("validated"), (*IMPATIENT, "eval.patience=2", "optim.lr=1e-2")),
    "EvalSection.answers": Effect("7", answered, TRANSLATING),
    "EvalSection.samples": Effect("0", lambda run: jobs.answers_to(run, "validation") is None, DECODING),
    "EvalSection.group": Effect("second", lambda run: run.groups, WIDE),
    "EvalSection.baselines": Effect("true", trained("baselines"), TRAINING),
    "CheckpointSection.every": Effect("1", trained("saved"), TRAINING),
    "CheckpointSection.keep": Effect("3", trained("kept"), TRAINING),
    "CheckpointSection.on_error": Effect("warn", failed_save),
    "ReportSection.mistakes": Effect("1", trained("mistakes"), TRAINING),
    "ReportSection.wandb": Effect("some-project", wandb_project),
    "MeshSection.data": Effect("2", on_mesh),
    "MeshSection.fsdp": Effect("2", on_mesh),
    "MeshSection.tensor": Effect("2", on_mesh),
}
OPTIONS = options()
# An option with one choice tells its section apart: `kind: files`.
ONE_CHOICE = sorted(
    name
    for key, field, section in known_keys()
    for name in [f"{section.__name__}.kind"]
    if key.endswith(".kind") and len(typing.get_args(field.annotation)) == 1
)
CALLS: list[tuple[Any, ...]] = []  # what was asked of the hub


def asked_row(number: int) -> dict[str, Any]:
    """A question with columns that may stand for each other."""
    words = [*WORDS[number:], *WORDS[:number]][:14]
    context = " ".join(words)
    answers, others = ({"text": [word], "answer_start": [context.index(word)]} for word in (words[3], words[6]))
    texts = {"question": words[0], "second": " ".join(words[:2]), "context": context, "passage": f"{context} bara"}
    return {**texts, "answers": answers, "others": others, "said": words[2]}


def write_seen(home: Path) -> Path:
    """JSON lines with the paths of two images each, and two labels."""
    lines = []
    for number, (label, found) in enumerate(coloured(9)):
        (home / f"{number}.png").write_bytes(encode(found))
        other = str(home / f"{(number + 1) % 9}.png")
        lines.append({"image": str(home / f"{number}.png"), "other": other, "label": label, "second": number % 2})
    (home / "seen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return home / "seen.jsonl"


def write_adapter(directory: Path, base: Path) -> Path:
    """An adapter of rank 2 for a model, its numbers drawn, in PEFT's form."""
    directory.mkdir()
    head = Head("sequence_classification", 2)
    model = build_model(open_checkpoint(base).config, head, "tiny", adapter=AdapterSection(rank=2))
    params = model.template.initial(jax.random.key(9), model.template.keys)
    drawn = {path: array + 0.1 if is_adapter(path) else array for path, array in params.items()}
    peft.write(directory, model.table, model.adapters, drawn, [], kind=head.kind, base=str(base), root=False)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of one layer, the same with a head and other numbers, and rows with more columns than are needed."""
    home = tmp_path_factory.mktemp("options")
    with open(home / "wide.csv", "w", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["text", "other", "label", "second", "several"])
        for i, word in enumerate(WORDS):
            several = ("a,b", "b", "", "a")[i % 4]
            writer.writerow([f"{word} {WORDS[i // 2]}", WORDS[-i], i % 2, i % 3, several])
    with open(home / "dirty.csv", "w", newline="") as sink:
        texts = ["<b>bara</b>", "ｂare", " bari  baro ", "cela", "cela", "cele", "cele", "celi", "dora " * 9]
        csv.writer(sink).writerows([["text", "label"], *zip(texts, (0, 1, 0, 1, 1, 0, 1, 0, 1), strict=True)])
    talk = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    talks = [
        {"messages": talk[: 2 + 2 * (n % 2)], "others": talk[2:], "tools": [{"name": f"f{n}"}], "text": f"t{n}",
         "prompt": f"p{n}", "completion": f"c{n}", "briefing": f"b{n}", "beside": f"i{n}", "earlier": [["q", f"a{n}"]],
         "ids": [n, 1, 2, 3], "asked": [0, 0, 1, 1], "counts": 0.5} for n in range(16)
    ]  # fmt: skip
    (home / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    asked = "".join(json.dumps(asked_row(number)) + "\n" for number in range(len(WORDS)))
    (home / "asked.jsonl").write_text(asked)
    plain = write_model(home / "small", SMALL)
    either = [f"{word} é,{n % 2},a;{word};{n % 2};b" for n, word in enumerate(WORDS)]
    (home / "either.csv").write_text("\n".join(["text,label,a;text;label;b", *either]), encoding="utf-8")
    (home / "brief.jinja").write_text("{{ 'In short: ' if brief }}" + CHATML)
    (home / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    (home / "thinking.jinja").write_text(QWEN3)
    return {
        "DECODER": write_decoder(home / "decoder"),
        "TALKS": home / "talks.jsonl",
        "MARIAN": write_marian(home / "marian"),
        "PAIRS": write_pairs(home / "pairs.jsonl", 16),
        "ASKED": home / "asked.jsonl",
        "TAGS": write_tagged(home / "tagged.jsonl"),
        "TEMPLATE": home / "dated.jinja",
        "BRIEF": home / "brief.jinja",
        "THINKING": home / "thinking.jinja",
        "SMALL": plain,
        "ADAPTER": write_adapter(home / "adapter", plain),
        "HEAD": write_model(home / "head", SMALL, seed=1, head=2),
        "DEEP": write_model(home / "deep"),
        "WIDE": home / "wide.csv",
        "DIRTY": home / "dirty.csv",
        "EITHER": home / "either.csv",
        "EYE": write_vision(home / "eye", VIT),
        "LENS": write_vision(home / "lens", VIT, {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.5}),
        "SEEN": write_seen(home),
    }


@pytest.fixture
def hub(small, monkeypatch):
    """A hub and a TFDS that have every model and every data set, and note in CALLS what they were asked for."""
    CALLS.clear()
    real = datasets.load_dataset

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        CALLS.append((name, revision))
        return str(small["SMALL"])

    def load_dataset(path: str, name: str | None = None, *, split: str, revision: str | None = None, **more) -> Any:
        if "/" not in path:
            return real(path, split=split, **more)
        CALLS.append((path, name, split, revision))
        return Dataset.from_dict({"text": WORDS, "label": [i % 2 for i in range(len(WORDS))]})

    def load_tfds(source: Tfds, split: str, where: str) -> Rows:
        CALLS.append((source.name, source.data_dir, split))
        return numbered(Dataset.from_dict({"text": WORDS, "label": [i % 2 for i in range(len(WORDS))]}), where)

    monkeypatch.setattr(sources, "load_tfds", load_tfds)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(trackers, "check", lambda section: None)  # whether a package is installed
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture
def prepare(configure, small, hub, rows_of, tmp_path) -> Callable[..., Run]:
    """`prepare("key=value", ...)`: a run of its own directory; capital words stand for files."""
    numbers = itertools.count()

    def make(*overrides: str) -> Run:
        files = {**{name: str(path) for name, path in small.items()}, **rows_of}
        home = f"run.dir={tmp_path / f'run{next(numbers)}' / 'here'}"
        given = [home, "model.source=SMALL", *overrides]
        for word, path in files.items():
            given = [text.replace(word, path) for text in given]
        return runs.prepare(configure(*given))

    return make


@pytest.fixture
def rows_of(rows) -> dict[str, str]:
    """The shared files by the words that stand for them here."""
    return {split.upper(): str(rows / f"{split}.csv") for split in ("train", "test")}


def equal(one: Any, other: Any) -> bool:
    """Whether two things that were seen are the same."""
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def test_every_option_has_an_effect():
    """C26: the table has an entry for each option of the schema, and none for what is no option."""
    assert OPTIONS.keys() - EFFECTS.keys() - set(ONE_CHOICE) == set(), "without a known effect"
    assert EFFECTS.keys() - OPTIONS.keys() == set(), "no options"


@pytest.mark.parametrize("option", OPTIONS)
def test_option(prepare, option):
    """C26: setting the option changes what it is for, and preparing the same twice changes nothing."""
    if option in ONE_CHOICE:
        with pytest.raises(ConfigError, match=r"(task|data\.source): kind"):
            prepare(f"{OPTIONS[option]}=nonsense")
        return
    effect = EFFECTS[option]
    change = (
        effect.value if option.startswith(("Group.", "Unfreeze.", "Part.")) else f"{OPTIONS[option]}={effect.value}"
    )
    before, again, after = (effect.see(prepare(*effect.base, *more)) for more in ((), (), (change,)))
    assert equal(before, again), "changes by itself"
    assert not equal(before, after), f"{option} changes nothing that was looked at"


def test_one_seed_sets_all(prepare):
    """C26: `seed: 1` is all four seeds at 1; the split is that of `seed.data` where nothing else is said."""
    apart = prepare("seed.init=1", "seed.data=1", "seed.dropout=1")
    together = prepare("seed=1")
    assert apart.config.seed.split == 1 and prepare("seed.data=2", "seed.split=1").config.seed.split == 1
    assert together.config.seed == apart.config.seed and order(together) == order(apart)
    assert np.array_equal(initial_head(together), initial_head(apart))


def test_must_resume(prepare):
    """C26: `run.resume: must` refuses an empty directory, where the default begins in it."""
    with pytest.raises(RunError, match=r"holds no run, and run.resume is must; check run.dir"):
        prepare("run.resume=must")
