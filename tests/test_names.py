"""Names of other libraries: each stands for something that is there, is known to messages, and is on a page."""

import ast
import dataclasses
import importlib.util
import re
import typing
from pathlib import Path

import peft
import pytest
import transformers

import sft_jax
import sft_jax.assets.fetch  # whose mistakes have a code of their own
from sft_jax import errors, names
from sft_jax.config.read import known_keys, read_config
from sft_jax.errors import ConfigError
from sft_jax.paths import matches, unmatched
from sft_jax.tasks.task import TASKS
from sft_jax.train import directory

HOME = Path(sft_jax.__file__).parent
GOOD = ("model.source=m", "task.kind=sequence_classification", "data.source.kind=files", "data.split.validation=0.1")
FIELDS = {
    names.TRAINING: {field.name for field in dataclasses.fields(transformers.TrainingArguments)},
    names.PEFT: {field.name for field in dataclasses.fields(peft.LoraConfig)},
}
each = pytest.mark.parametrize("name", names.SETTINGS, ids=lambda name: name.theirs)


def said(tmp_path: Path, *overrides: str) -> str:
    """What is said of a configuration that is good but for these overrides."""
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    with pytest.raises(ConfigError) as caught:
        read_config([], [*GOOD, f"data.source.train={tmp_path}/rows.csv", *overrides])
    return str(caught.value)


def test_ours_are_there():
    """newcomer 20: what a name of others is said to be is a setting of ours, with a value that it takes."""
    fields: dict[str, list[typing.Any]] = {}
    for key, field, _ in known_keys():
        fields.setdefault(key, []).append(field)
    for name in names.SETTINGS:
        if name.ours is None:
            assert name.note
            continue
        key, _, value = name.ours.partition(": ")
        inside = key.startswith("optim.options.")
        assert inside or key in fields, name
        literals = [choice for field in fields.get(key, ()) for choice in _choices(field.annotation)]
        assert not value or value in literals, name


def _choices(annotation: typing.Any) -> list[typing.Any]:
    return list(typing.get_args(annotation)) if typing.get_origin(annotation) is typing.Literal else []


def test_theirs_are_there():
    """newcomer 20: a name that is not said to be older is one of the installed library's."""
    for name in names.SETTINGS:
        if name.library in FIELDS:
            assert (name.theirs in FIELDS[name.library]) != name.older, name
    assert len({name.theirs for name in names.SETTINGS}) == len(names.SETTINGS)


@each
def test_a_name_of_others_is_understood(name: names.Name):
    """newcomer 20: wherever it is written, the message says what it is here, or why there is no such setting."""
    hint = f"did you mean '{name.ours}'?" if name.ours else "there is no such setting, "
    assert hint in names.setting(name.theirs) and hint in names.setting(f"--{name.theirs.replace('_', '-')}")


def test_messages_know_them(tmp_path: Path):
    """newcomer 20: all that newcomers wrote, each with its remedy; `adapter.r` was answered with 'optim.lr'."""
    wrong = {
        "optim.learning_rate=1": "optim.lr",
        "train.learning_rate=1": "optim.lr",
        "train.per_device_train_batch_size=1": "train.batch_size",
        "train.weight_decay=1": "optim.weight_decay",
        "train.bf16=true": "train.compute_dtype: bfloat16",
        "train.gradient_checkpointing=true": "train.remat: full",
        "adapter.r=4": "adapter.rank",
        "adapter.load_in_4bit=true": "adapter.base: nf4",
        "data.max_seq_length=4": "data.max_length",
        "packing=true": "data.layout.kind: packed",
        "optim.schedule.kind=constant_with_warmup": "constant",
        "train.attention=sdpa": "xla",
        "eval.best_metric=f1macro": "f1_macro",
    }
    text = said(tmp_path, *wrong) + said(tmp_path, "eval.best_metric=eval_f1")
    for override, ours in wrong.items():
        key = override.partition("=")[0]
        if key != "eval.best_metric":
            assert re.search(rf"- {re.escape(key)}: .*did you mean '{re.escape(ours)}'\?", text), key
    assert "sequence_classification has no metric 'eval_f1'; did you mean 'f1_macro'? (known: loss, " in text
    assert "did you mean 'f1_macro'?" in said(tmp_path, "eval.best_metric=f1macro")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *((theirs, kind) for kind, found in names.TASKS.items() for theirs in found),
        ("text-classification", "sequence_classification"),
        ("token-classification", "token_classification"),
        ("text-generation", "causal_lm"),
        ("AutoModelForSequenceClassification", "sequence_classification"),
        ("AutoModelForCausalLM", "causal_lm"),
        ("SEQ_CLS", "sequence_classification"),
    ],
)
def test_kinds_of_tasks(theirs: str, ours: str):
    """newcomer 20: what others call a task; `text_classification` was answered with 'token_classification'."""
    assert names.task(theirs) == ours and ours in TASKS


def test_a_kind_of_task_is_suggested(tmp_path: Path):
    """newcomer 20: in the message, too."""
    assert "did you mean 'sequence_classification'?" in said(tmp_path, "task.kind=text_classification")
    assert "did you mean 'hub'?" in said(tmp_path, "data.source.kind=huggingface")


BLOCKS = [f"blocks/{n}/{part}" for n in range(12) for part in ("attn/q", "attn/v", "attn/o", "mlp/up", "mlp/down")]
PARAMETERS = [*(f"{path}/kernel" for path in BLOCKS), "embed/word/embedding", "head/dense/kernel", "head/out/kernel"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("q_proj", "**/attn/q/**"),
        ("*.q_proj", "**/attn/q/**"),
        ("vit.encoder.layer.*", "blocks/*/**"),
        ("bert.encoder.layer.11", "blocks/11/**"),
        ("bert.encoder.layer.11.attention.self.query.weight", "blocks/11/attn/q/**"),
        ("model.layers.3.mlp.down_proj", "blocks/3/mlp/down/**"),
        ("transformer.h.0", "blocks/0/**"),
        ("encoder", "blocks/**"),
        ("embeddings", "embed/**"),
        ("model.embed_tokens", "embed/word/**"),
        ("classifier", "head/**"),
        ("bert.pooler", "head/dense/**"),
    ],
)
def test_names_of_modules(theirs: str, ours: str):
    """newcomer 20: a module's name is answered with our pattern, which fits; `vit.encoder.layer.*` was with
    `norm/scale`."""
    assert unmatched(theirs, PARAMETERS) == f"'{theirs}' matches no parameter; did you mean '{ours}'?"
    assert any(matches(ours, path) for path in PARAMETERS)


def test_layers_for_adapters():
    """newcomer 2: `q_proj` is answered with our pattern, anything else with the layers that there are."""
    assert unmatched("q_proj", BLOCKS, "layer") == "'q_proj' matches no layer; did you mean '**/attn/q'?"
    there = "blocks/*/attn/q, blocks/*/attn/v, blocks/*/attn/o, blocks/*/mlp/up, blocks/*/mlp/down"
    assert unmatched("nothing", BLOCKS, "layer") == f"'nothing' matches no layer; there are {there}"


def test_exit_codes_are_those_of_the_program():
    """newcomer 20: every code that a mistake, a signal or the file system leaves with has a meaning on the page."""
    kinds = [errors.SftError, *errors.SftError.__subclasses__()]
    found = {kind.exit_code for kind in kinds}
    for file in (HOME / "__main__.py", HOME / "train" / "loop.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "exit":
                found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "codes":
                found |= {value.value for value in node.value.values}
    assert {0, *found} == set(errors.EXITS) and {130, 42} <= found


def test_pages_are_up_to_date():
    """C26: the committed pages are what the package says; if not: python docs/make_reference.py"""
    docs = HOME.parent / "docs"
    spec = importlib.util.spec_from_file_location("make_reference", docs / "make_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, page in module.PAGES.items():
        assert (docs / name).read_text(encoding="utf-8") == page()


def test_the_files_of_a_run_are_listed():
    """newcomer 20: every file that the code writes into a run directory by name is in the list of them."""
    listed = {line.split()[0].rstrip("/") for line in (directory.__doc__ or "").splitlines()[2:] if line.strip()}
    written = set()
    for file in (
        "jobs.py",
        "grid.py",
        "train/directory.py",
        "report/predictions.py",
        "report/page.py",
        "train/ledger.py",
    ):
        text = (HOME / file).read_text()
        written |= set(re.findall(r'(?:directory|home|FILE|FILE =) ?/? ?"([a-z]+(?:\.[a-z]+)?)"', text))
    assert {"summary.json", "predictions.jsonl", "metrics.jsonl", "grid.json", "model"} <= written
    assert written - {"checkpoints"} <= listed


def test_values_are_ours():
    """newcomer 20: what a value of others is said to be is one that some setting takes."""
    choices = {str(c) for _, field, _ in known_keys() for part in _parts(field.annotation) for c in _choices(part)}
    assert names.VALUES.keys() <= choices | {"adamw"}


def _parts(annotation: typing.Any) -> list[typing.Any]:
    inner = typing.get_args(annotation)
    return [annotation, *(part for a in inner for part in _parts(a))]
