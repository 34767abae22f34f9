"""Writes `docs/reference.md` and `docs/coming-from-hf.md` from the package: python docs/make_reference.py"""

from pathlib import Path

from sft_jax import names
from sft_jax.config.metrics import HEADLINES, METRICS
from sft_jax.errors import EXITS
from sft_jax.train import directory

HOME = Path(__file__).parent
REFERENCE = """\
# Reference

What a run directory holds, what is measured, and what `sft-jax` leaves with. Settings are in
[configuration.md](configuration.md). This page is made from the package by `python docs/make_reference.py`.

## A run directory

| file | what |
|---|---|
{files}

A line of `predictions.jsonl` has `row` (from 1), `place` (file and line), the row's `id` where it has one, `truth`, and
what `predict` says of the row: `label` and `scores`, `labels`, `score`, `tags` and `entities`, `answer`, or `loss`.

## Exit codes

| code | meaning |
|---|---|
{exits}

## Metrics

Any of them may stand as `eval.best_metric`; without one, the one in bold picks the best step. It is picked on the
validation split, and of equals the earlier step is the best.
{metrics}
"""
COMING = """\
# Coming from Hugging Face

What `TrainingArguments`, PEFT and TRL call a setting, and what it is here; where a name of theirs is written in a
configuration, the message says the same. Values are in [configuration.md](configuration.md). This page is made from
`sft_jax/names.py` by `python docs/make_reference.py`.

One batch size: `train.batch_size` is the number of documents of a step, over all devices and microbatches, so it is
`per_device_train_batch_size` x `gradient_accumulation_steps` x devices. One place for an experiment: `run.dir`; the
same command goes on where it stopped.

{settings}
## Kinds of tasks

| there | `task.kind` |
|---|---|
{tasks}

## Parameters and layers

Patterns (`train.freeze`, `train.unfreeze`, `optim.groups`, `adapter.match`, `adapter.also`) are over our paths, which
are the same in all families; `sft-jax model show SOURCE` lists those of a model beside its own names. `*` is one part
of a path, `**` any number of them, `{{8..11}}` numbers and `{{q,v}}` alternatives.

| last part of the name there | here |
|---|---|
{modules}
"""


def reference() -> str:
    """The page of files, exit codes and metrics."""
    rows = [line.split(maxsplit=1) for line in (directory.__doc__ or "").splitlines()[2:] if line.strip()]
    metrics = ["\n".join([f"\n### `{kind}`\n", "| metric | what |", "|---|---|", *_metrics(kind)]) for kind in METRICS]
    return REFERENCE.format(
        files="\n".join(f"| `{name}` | {what} |" for name, what in rows),
        exits="\n".join(f"| {code} | {meaning} |" for code, meaning in EXITS.items()),
        metrics="\n".join(metrics),
    )


def _metrics(kind: str) -> list[str]:
    return [
        f"| {f'**`{name}`**' if name == HEADLINES[kind] else f'`{name}`'} | {what} |"
        for name, what in METRICS[kind].items()
    ]


def coming() -> str:
    """The page of other libraries' names."""
    tables = []
    for library in (names.TRAINING, names.PEFT, names.TRL):
        rows = [
            f"| `{found.theirs}` | {f'`{found.ours}`' if found.ours else ''} | {found.note} |"
            for found in names.SETTINGS
            if found.library == library
        ]
        tables.append("\n".join([f"## {library}\n", "| there | here | |", "|---|---|---|", *rows, ""]))
    return COMING.format(
        settings="\n".join(tables),
        tasks="\n".join(
            f"| {', '.join(f'`{n}`' for n in theirs)} | `{ours}` |" for ours, theirs in names.TASKS.items()
        ),
        modules="\n".join(f"| {', '.join(f'`{n}`' for n in n_s)} | `{ours}` |" for ours, n_s in names.MODULES.items()),
    )


PAGES = {"reference.md": reference, "coming-from-hf.md": coming}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HOME / name).write_text(page(), encoding="utf-8")
