"""What must fit together across rooms before a run begins: task, rows, tokenizer, checkpoint and model.

Each check looks at two or three of them and raises what the user can mend. Builds nothing, and sees no device.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sft_jax import machine
from sft_jax.adapt.peft import read as read_adapter
from sft_jax.config.adapter import AdapterSection
from sft_jax.config.data import Augment, DataSection, Images
from sft_jax.config.metrics import unknown_metric
from sft_jax.config.schema import ModelSection, RunSection
from sft_jax.config.training import TrainSection
from sft_jax.data.answers import AS_ASKED, CUT, WEIGHTLESS
from sft_jax.data.batch import Encoded
from sft_jax.data.clean import RULES
from sft_jax.data.prepare import Prepared
from sft_jax.data.rows import MOST_SHOWN
from sft_jax.data.text import TextTokenizer
from sft_jax.data.turns import OTHERWISE
from sft_jax.errors import ConfigError, DataError, ModelError, listing
from sft_jax.models.family import NO_LIMIT, Model
from sft_jax.tasks.labels import names_in
from sft_jax.tasks.task import Audit, Examples, Task
from sft_jax.weights.files import CONFIG, find, read_config, some
from sft_jax.weights.table import Anew, Arrays

OF_TEXTS = ("clean", "augment", "max_length", "layout")  # settings of `data`
MOST_LOST = 0.5  # share of the documents of a split; if more are lost, it is the length or the rows that are wrong


def determinism(section: RunSection, platform: str) -> None:
    """What is to be the same each time must have been asked of the compiler, which reads its settings only once."""
    if section.deterministic and platform in ("gpu", "cuda") and not machine.is_deterministic():
        flag = f"--{machine.DETERMINISTIC.name}={machine.DETERMINISTIC.value}"
        raise ConfigError(f"run.deterministic: XLA_FLAGS lacks {flag}; set it before Python starts")


def metric(name: str, task: Task, answers: int) -> None:
    """The metric that picks the best step must be one that evaluation gives (C18), which answers so many rows."""
    if name not in task.metric_names:
        raise ConfigError(f"eval.best_metric: {unknown_metric(task.kind, name, task.metric_names)}")
    if name in task.answer_metric_names and not answers:
        raise ConfigError(
            f"eval.answers: 0, but the best step is picked by {name}, which is of answers; raise it, or set "
            f"eval.best_metric=loss"
        )


def changes(section: DataSection, task: Task) -> None:
    """Texts must stay as they are where targets are places in them, tokens where they are answers; images are none."""
    if task.images:
        given = [name for name in OF_TEXTS if getattr(section, name) != DataSection.model_fields[name].get_default()]
        if given:
            raise ConfigError(listing(f"data: {task.kind} reads images; leave out what is of texts", given))
    elif section.images != Images():
        raise ConfigError(f"data.images: {task.kind} reads no images; leave it out")
    changed = [rule for rule in RULES if getattr(section.clean, rule)]
    if changed and not task.cleans:
        raise ConfigError(f"data.clean.{changed[0]}: {task.kind} needs texts as they are written; leave it out")
    if section.augment != Augment() and not task.moves:
        raise ConfigError(f"data.augment: {task.kind} needs tokens where they are; leave it out")


def documents(data: Mapping[str, Encoded], rows: Mapping[str, Prepared], most: float) -> None:
    """Most rows of each split must have become documents (C9), and all that nobody asked to leave out but for a share
    of at most `most`."""
    for split, encoded in data.items():
        lost = sum(encoded.lost.values())
        if not len(encoded) or lost > MOST_LOST * (lost + len(encoded)):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in encoded.lost.items())
            few = f"only {len(encoded)}" if len(encoded) else "none"
            first = next((f"; the first is {lines[0]}" for lines in lost_places(encoded, rows[split]).values()), "")
            raise DataError(
                f"data.{split}: of {len(rows[split])} rows {few} made a document ({reasons}); {_remedy(encoded)}{first}"
            )
        wrong = {why: count for why, count in encoded.lost.items() if why in encoded.lost_rows and why not in AS_ASKED}
        if sum(wrong.values()) > most * len(rows[split]):
            places = lost_places(encoded, rows[split])
            shown = [f"{place}: {why}" for why in wrong for place in places[why]]
            more = sum(wrong.values()) - len(shown[:MOST_SHOWN])
            what = f"data.{split}: {sum(wrong.values())} of {len(rows[split])} rows become no documents"
            raise DataError(
                listing(what, shown[:MOST_SHOWN], more=more)
                + f"\n{_remedy(encoded)}; or leave these rows out with data.bad_rows=drop data.most_bad=1"
            )


def lost_places(encoded: Encoded, rows: Prepared) -> dict[str, list[str]]:
    """Where the first of the rows stand that became no documents, by the reason."""
    return {why: [rows.rows.place(row) for row in found] for why, found in encoded.lost_rows.items()}


def _remedy(encoded: Encoded) -> str:
    """What helps against what most rows were lost for."""
    most = max(encoded.lost, key=lambda why: encoded.lost[why], default=CUT)
    if most == WEIGHTLESS:
        return "give rows or answers a weight above 0"
    if most == OTHERWISE:
        return "name another template by task.template, or learn all of the text by task.loss_on=all"
    if most in encoded.lost_rows and most != CUT:
        return "mend the rows, name another template by task.template, or learn last answers alone by task.loss_on=last"
    return "raise max_length, or give other rows"


def audit(task: Task, train: Examples, tokenizer: TextTokenizer) -> Audit | None:
    """What a task finds supervised; whatever it finds wrong stops the run (C4, C5, C7)."""
    found = task.audit(train, tokenizer)
    if found and found.problems:
        raise DataError(listing("data.train: the audit of what is supervised", found.problems))
    return found


def length(longest: int, model: Model, source: str) -> None:
    """The model must have a position for each token of the longest document."""
    if longest > model.max_length:
        raise ConfigError(
            f"data.max_length: {longest} tokens, but {source} has positions for {model.max_length}; lower it"
        )


def ids(model: Model, data: Mapping[str, Encoded]) -> None:
    """Tokenizer and model must fit: a lookup beyond a table would be NaN, and nobody would know why."""
    for split, found in data.items():
        tokens = {**found.tokens, **(found.target.tokens if found.target else {})}
        for name, limit in model.limits.items():
            largest = int(tokens[name].max()) if name in tokens else 0
            if largest >= limit:
                raise DataError(
                    f"data.{split}: the tokenizer gives {name} up to {largest}, the model has {limit} of them; "
                    f"use the tokenizer that belongs to the model"
                )


def target_length(model: Model, data: Mapping[str, Encoded], source: str) -> None:
    """An encoder-decoder must have a position for each token of the longest target."""
    most = model.limits.get("decoder_position_ids", NO_LIMIT)
    longest = max((int(found.target.lengths.max()) for found in data.values() if found.target), default=0)
    if longest > most:
        raise ConfigError(
            f"task.max_target_length: a target has {longest} tokens, but {source} has positions for {most}; lower it"
        )


def features(section: TrainSection, recomputed: str | None) -> None:
    """What needs features that are computed once must have them."""
    asked = "train.head_grid" if section.head_grid else "train.cache_features"
    if recomputed is not None and (section.head_grid or section.cache_features == "always"):
        raise ConfigError(f"{asked}: features would not be computed once, for {recomputed}; freeze all below the head")


def profile(section: TrainSection, steps: int) -> None:
    """The steps of a trace must be steps of the run."""
    if section.profile and section.profile[1] > steps:
        raise ConfigError(f"train.profile: ends at step {section.profile[1]}, but the run has {steps}; end it earlier")


def begins_anew(section: ModelSection, model: Model, config: Mapping[str, Any]) -> Anew:
    """What of a checkpoint is left where it is: all by request; its head by request, or if its class is for others."""
    classes = config.get("architectures")
    other = isinstance(classes, list) and not all(model.is_class(str(name)) for name in classes)
    if section.weights == "random":
        return "all"
    return "head" if section.head == "new" or other else "nothing"


def adapter_source(section: AdapterSection, model: Model, task: Task) -> Arrays:
    """The arrays of the adapter that a run goes on from, which must be the one that the section describes."""
    if section.source is None:
        return {}
    directory = find(section.source)
    found = read_adapter(directory, model.table, model.template.looped.shapes)
    wanted, given = dict(model.adapters), found.plan
    problems = [
        *(f"{path}: has an adapter there, and none here" for path in given if path not in wanted),
        *(f"{path}: has no adapter there, and one here" for path in wanted if path not in given),
        *(
            f"{path}: {given[path]} there, {wanted[path]} here"
            for path in wanted
            if path in given and not given[path].is_like(wanted[path])
        ),
    ]
    if problems:
        raise ConfigError(
            some(f"adapter.source: {section.source} is of another form; set kind, match and rank", problems)
        )
    if (directory / CONFIG).is_file():
        head(task, found.arrays, read_config(directory))
    return found.arrays


def head(task: Task, loaded: Collection[str], config: Mapping[str, Any]) -> None:
    """A head that was trained for other labels, or for these in another order, must not be taken for this one."""
    if "head/out/kernel" not in loaded or not task.labels:
        return
    theirs, ours = config.get("problem_type"), task.to_hf().get("problem_type")
    if theirs not in (None, ours):
        raise ModelError(f"model.head: the checkpoint's head is for {theirs}, the task is {ours}; set model.head=new")
    names = names_in(config) if config.get("id2label") else []
    plain = [f"LABEL_{number}" for number in range(len(names))]  # what transformers calls them for want of names
    if len(task.labels) > 1 and names not in ([], plain, list(task.labels)):
        raise ModelError(
            f"model.head: the checkpoint's head is for {', '.join(names)}, the task has {', '.join(task.labels)}; "
            f"set task.labels to the checkpoint's, or model.head=new"
        )
