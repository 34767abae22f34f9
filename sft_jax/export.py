"""A trained model as a Hugging Face directory: weights, `config.json`, tokenizer and model card.

The directory appears whole or not at all, and `transformers` reads it without our help.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax import assets
from sft_jax.adapt import peft
from sft_jax.config.data import Clean
from sft_jax.data.clean import RULES
from sft_jax.data.text import NAMED, SETTINGS, SPECIAL, TEMPLATE
from sft_jax.models.family import Model
from sft_jax.nn.heads import ON_VOCABULARY
from sft_jax.tasks.task import Task
from sft_jax.weights.files import new_directory, write_checkpoint, write_config
from sft_jax.weights.table import save

# What a config.json says of the program that wrote it, and of another head.
STALE = (
    "transformers_version",
    "torch_dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
)

PIPELINES = {
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "causal_lm": "text-generation",
    "image_classification": "image-classification",
    "seq2seq": "text2text-generation",
}  # kind of head -> what `transformers` calls its use
WITHOUT_PIPELINE = ("question_answering", "seq2seq")  # it has none any more
AUTO = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "causal_lm": "AutoModelForCausalLM",
    "image_classification": "AutoModelForImageClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}  # kind of head -> what reads it there


@dataclass(frozen=True)
class About:
    """What stands in an export beside its weights, and where it is from."""

    base_config: Mapping[str, Any]
    task: Task
    tokenizer_from: Path
    max_length: int
    card: str
    clean: Clean | None = None
    tokenizer: Any = None  # that of training, where it is at hand
    last: Collection[int] = ()  # the ids that documents of training end with


def export_model(
    out: Path,
    model: Model,
    params: Mapping[str, np.ndarray],
    about: About,
    *,
    replace: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a directory that `transformers` and `sft-jax predict` load, in float32; `check` may refuse it."""
    tensors = save(model.table, {p: np.asarray(a, np.float32) for p, a in params.items()})
    with new_directory(out, replace=replace) as fresh:
        config = described(model, about)
        write_checkpoint(fresh, config, tensors)
        _write_beside(fresh, about, model, config)
        if check:
            check(fresh)


def export_adapter(
    out: Path,
    model: Model,
    params: Mapping[str, Any],
    about: About,
    *,
    whole: Collection[str],
    base: str,
    root: bool,
    replace: bool = False,
) -> None:
    """Write a directory that `peft` and `sft-jax predict --adapter` load beside the base: adapters, and what else was
    trained (`whole`). `params` are all of the adapted model's; `base` and `root` as in `adapt.peft.write`."""
    with new_directory(out, replace=replace) as fresh:
        peft.write(fresh, model.table, model.adapters, params, whole, kind=about.task.head.kind, base=base, root=root)
        config = described(model, about)
        write_config(fresh, config)
        _write_beside(fresh, about, model, config)


def described(model: Model, about: About) -> dict[str, Any]:
    """The `config.json` of an export."""
    task, clean = about.task, about.clean
    config = {k: v for k, v in about.base_config.items() if k not in STALE} | task.to_hf()
    name = model.family.classes[config["model_type"]] + model.family.heads[task.head.kind]
    config |= {"architectures": [name], "dtype": "float32"}
    if "causal_lm" in model.family.heads and not _is_id(config.get("pad_token_id"), config):
        config["pad_token_id"] = _padding(config, about)
    rules = clean.model_dump(mode="json", include=set(RULES)) if clean else {}
    config["sft_jax_task"] = {**config["sft_jax_task"], "max_length": about.max_length, "clean": rules}
    return config


def _write_beside(fresh: Path, about: About, model: Model, config: Mapping[str, Any]) -> None:
    """What stands beside the weights of an export: tokenizer, settings of answers, model card."""
    more = about.task.files(about.tokenizer_from)
    for name, content in _padded(about.task.reader.files(about.tokenizer_from), about, model, config).items():
        if TEMPLATE not in more or not name.startswith(f"{NAMED}/"):  # one that was given stands for all
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_bytes(content)
    for name, content in more.items():
        (fresh / name).write_text(content, encoding="utf-8")
    (fresh / "README.md").write_text(about.card, encoding="utf-8")


def _is_id(number: Any, config: Mapping[str, Any]) -> bool:
    """Whether this is the number of a token."""
    return type(number) is int and 0 <= number < config["vocab_size"]


def _padding(config: Mapping[str, Any], about: About) -> Any:
    """What a decoder without a padding id is padded with: `transformers` classifies no batch without one.

    It takes the last token that has not this id for the last of a text, so no text of training ends with it: the
    tokenizer's own, or the end of texts, or whichever token there is.
    """
    ends = config.get("eos_token_id")
    own = [about.tokenizer.id(f"{name}_token") for name in ("pad", "unk", "bos")] if about.tokenizer else []
    tried = [*own[:1], *(ends if isinstance(ends, list) else [ends]), *own[1:], *range(config["vocab_size"])]
    known = (number for number in tried if _is_id(number, config))
    return next((number for number in known if number not in about.last), None)


def _padded(files: dict[str, bytes], about: About, model: Model, config: Mapping[str, Any]) -> dict[str, bytes]:
    """A tokenizer's files, so that `transformers` gives batches the logits that it gives each text alone.

    A decoder's head on labels knows padding by the model's id, so the tokenizer pads with that token; positions that
    are looked up in a table are counted from the first token of a row, so padding stands behind.
    """
    changes = {}
    labels = "causal_lm" in model.family.heads and about.task.head.kind not in ON_VOCABULARY
    if labels and about.tokenizer and about.tokenizer.id("pad_token") != config["pad_token_id"]:
        changes["pad_token"] = about.tokenizer.fast.id_to_token(config["pad_token_id"])
    if any(path.endswith("embed/position/embedding") for path in model.template.leaves):
        changes["padding_side"] = "right"
    changed = {}
    for name in (SETTINGS, SPECIAL):
        said = json.loads(files[name]) if name in files else {}
        own = {k: v for k, v in changes.items() if v is not None and (k in said if name == SPECIAL else True)}
        if own.get("padding_side") == said.get("padding_side", "right"):
            own.pop("padding_side", None)
        if own:
            changed[name] = (json.dumps({**said, **own}, indent=2, ensure_ascii=False) + "\n").encode()
    return {**files, **changed}


def base_name(source: str, directory: Path) -> str:
    """The name by which others find the base of an adapter: a hub name, or the whole path of a directory.

    That of an asset is where it was unpacked to.
    """
    local = Path(source).expanduser()
    if source.startswith(assets.SCHEME):
        return str(directory.absolute())
    return str(local.absolute()) if local.exists() else source


def with_peft(task: Task, base: str) -> list[str]:
    """How `peft` is asked for an exported adapter."""
    labels = f", num_labels={len(task.labels)}" if task.labels else ""
    return [
        "import peft",
        "import transformers",
        f'base = transformers.{AUTO[task.head.kind]}.from_pretrained("{base}"{labels})',
        'model = peft.PeftModel.from_pretrained(base, "this directory")',
    ]


def in_python(task: Task, directory: str) -> str:
    """How `transformers` is asked for an exported model; for some kinds it has no pipeline any more."""
    if task.head.kind in WITHOUT_PIPELINE:
        return f'transformers.{AUTO[task.head.kind]}.from_pretrained("{directory}")'
    return f'transformers.pipeline("{PIPELINES[task.head.kind]}", model="{directory}")'


def model_card(
    base: str, task: Task, facts: Mapping[str, str], metrics: Mapping[str, float], *, adapter_of: str | None = None
) -> str:
    """The README of an exported model, or of the adapter of a base: what it came from, how it was trained, what it
    scored."""
    plain = ["import transformers", in_python(task, "this directory")]
    scores = [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    lines = [
        "---",
        f"library_name: {'peft' if adapter_of else 'transformers'}",
        "tags: [sft_jax]",
        f"pipeline_tag: {PIPELINES[task.head.kind]}",
        "---",
        f"# {Path(base).name or base}, {'an adapter' if adapter_of else 'fine-tuned'}",
        "",
        f"`{base}` fine-tuned for {task.kind.replace('_', ' ')} with sft_jax.",
        *([f"{'Labels' if len(task.labels) > 1 else 'Output'}: {', '.join(task.labels)}."] if task.labels else []),
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        *(["| metric on held-out rows | value |", "|---|---|", *scores, ""] if scores else []),
        "```python",
        *(with_peft(task, adapter_of) if adapter_of else plain),
        "```",
        "",
    ]
    return "\n".join(lines)
