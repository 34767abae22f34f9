"""One run of the peer: Hugging Face `Trainer` on the rows and the recipe that it is given.

Owns how the peer is set up (`default` as it comes, `tuned` as a careful user would set it) and how
its figures are taken. One process is one run and writes one JSON file. Knows nothing of sft_jax:
`text_classification.py` starts it and compares.
"""

import argparse
import csv
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

# Both are read when transformers is imported. The peer must never reach for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

MODES = ("default", "tuned", "tuned_bf16")
# What is learned from a text: one label, several, or a number; and what transformers calls that.
KINDS = {
    "one": "single_label_classification",
    "several": "multi_label_classification",
    "number": "regression",
}
# The first steps pay for allocation, autotuning and compilation; steady state begins after them.
SKIPPED_STEPS = 10
# The model families spell their dropout rates differently; whichever of these a config has is set.
DROPOUT_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
    "hidden_dropout",
    "pooler_dropout",
)

Rows = list[dict[str, str]]
Features = list[dict[str, Any]]


def main() -> None:
    """Train, test, and write the figures."""
    options = parse_options()
    set_seed(options.seed)
    train_rows, test_rows = (read_rows(paths, options.max_rows) for paths in (options.train, options.test))
    classes = read_classes(train_rows, options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train_features, test_features = (featurize(rows, classes, tokenizer, options) for rows in (train_rows, test_rows))
    clock = StepClock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=load_model(options, max(1, len(classes))),
            args=training_arguments(options, directory),
            train_dataset=train_features,  # pyright: ignore[reportArgumentType]
            processing_class=tokenizer,
            callbacks=[clock],
        )
        tokens = count_tokens(trainer)
        train_seconds = timed(trainer.train)
        # A fine-tuning run is not done before its model is on disk; sft_jax writes one too.
        trainer.save_model()
        evaluation_seconds, test = evaluate(trainer, test_features, options.kind)
    figures = {
        "mode": options.mode,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "train_rows": len(train_rows),
        "train_seconds": train_seconds,
        "evaluation_seconds": evaluation_seconds,
        "to_first_step_seconds": clock.first_step,
        "compile_seconds": compile_seconds() if options.compile else 0.0,
        **steady_state(clock, tokens, options.compile),
        **peak_memory(),
        "test": test,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "options": vars(options),
        "wall_seconds": process_age(),
    }
    Path(options.out).write_text(json.dumps(figures, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of the checkpoint")
    parser.add_argument("--train", required=True, nargs="+", help="CSV files to train on")
    parser.add_argument("--test", required=True, nargs="+", help="CSV files to test on")
    parser.add_argument("--text", default="text", help="column of the text")
    parser.add_argument("--text-pair", help="column of a second text")
    parser.add_argument("--label", default="label", help="column of the label")
    parser.add_argument("--kind", choices=KINDS, default="one", help="what is learned: one label, several, a number")
    parser.add_argument("--separator", default=",", help="what joins several labels")
    parser.add_argument("--mode", choices=MODES, default="default")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--workers", type=int, help="processes that prepare batches (tuned modes)")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--warmup-share", type=float, default=0.0, help="share of all steps")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--clip", type=float, default=0.0, help="largest gradient norm; 0 = none")
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--dropout", type=float, help="every dropout rate; left out: as saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-rows", type=int, default=0, help="first rows of a split; 0 = all")
    parser.add_argument("--out", required=True, help="JSON file to write")
    return parser.parse_args()


def read_rows(paths: list[str], max_rows: int) -> Rows:
    """The rows of all files."""
    rows: Rows = []
    for path in paths:
        with open(path, newline="", encoding="utf-8") as lines:
            rows.extend(csv.DictReader(lines))
    return rows[:max_rows] if max_rows else rows


def read_classes(rows: Rows, options: argparse.Namespace) -> list[str]:
    """Names of the labels; none for a number."""
    if options.kind == "number":
        return []
    labels = (row[options.label] for row in rows)
    several = (name for label in labels for name in split_labels(label, options))
    return sorted(set(several))


def split_labels(label: str, options: argparse.Namespace) -> list[str]:
    """The labels in a cell."""
    if options.kind != "several":
        return [label]
    return [name.strip() for name in label.split(options.separator) if name.strip()]


def featurize(
    rows: Rows, classes: list[str], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> Features:
    """Token ids in a plain list: it is fetched from faster than a `datasets.Dataset`."""
    number = {name: index for index, name in enumerate(classes)}

    def target(row: dict[str, str]) -> Any:
        if options.kind == "number":
            return float(row[options.label])
        held = {number[name] for name in split_labels(row[options.label], options)}
        return [float(i in held) for i in range(len(classes))] if options.kind == "several" else held.pop()

    texts = [[row[name] for row in rows] for name in (options.text, options.text_pair) if name]
    encoded = tokenizer(*texts, truncation=True, max_length=options.max_length)
    columns = [encoded[name] for name in encoded]
    return [
        {**dict(zip(encoded, values, strict=True)), "labels": target(row)}
        for row, *values in zip(rows, *columns, strict=True)
    ]


def load_model(options: argparse.Namespace, outputs: int) -> PreTrainedModel:
    """The checkpoint with a fresh head, its dropout rates replaced where the recipe says so."""
    config = AutoConfig.from_pretrained(options.model, num_labels=outputs, problem_type=KINDS[options.kind])
    if options.dropout is not None:
        for field in DROPOUT_FIELDS:
            if hasattr(config, field):
                setattr(config, field, options.dropout)
    return AutoModelForSequenceClassification.from_pretrained(options.model, config=config, dtype=torch.float32)


def training_arguments(options: argparse.Namespace, directory: str) -> TrainingArguments:
    """The recipe, which both sides share, and what the mode adds to it."""
    return TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup_share,  # below 1 Trainer takes it as a share
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **mode_arguments(options),
    )


def mode_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What a mode changes; `default` changes nothing.

    Compilation stays a flag of its own: on a CPU it costs minutes and the steps gain nothing.
    """
    if options.mode == "default":
        return {"torch_compile": options.compile}
    on_gpu = torch.cuda.is_available()
    # Without a GPU a worker takes its core from the arithmetic, and ready token ids need no help.
    workers = options.workers if options.workers is not None else (2 if on_gpu else 0)
    return {
        "train_sampling_strategy": "group_by_length",
        "optim": "adamw_torch_fused",
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "bf16": options.mode == "tuned_bf16",
        # XLA multiplies float32 in TF32 on a GPU that has it; the tuned peer may as well.
        "tf32": True if on_gpu else None,
        "torch_compile": options.compile,
    }


class StepClock(TrainerCallback):
    """Reads the clock where each step begins and ends."""

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.first_step = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begins.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A GPU runs behind the host. Waiting at every step would slow the peer down, so only the
        # marks that open and close a measured span wait.
        if torch.cuda.is_available() and len(self.ends) + 1 in (1, SKIPPED_STEPS, state.max_steps):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.first_step = self.first_step or process_age()


def count_tokens(trainer: Trainer) -> list[tuple[torch.Tensor, int]]:
    """Make the trainer note real and padded tokens of each batch; returns the list it fills.

    Counted where a step receives its batch: a collator that counts would do so ahead of the steps,
    and out of sight where workers run it. The sums stay on the device, so nothing waits for them.
    """
    counts: list[tuple[torch.Tensor, int]] = []
    step = trainer.training_step

    def counting_step(model: Any, inputs: Any, *rest: Any, **named: Any) -> torch.Tensor:
        mask = inputs["attention_mask"]
        counts.append((mask.sum(), mask.numel()))
        return step(model, inputs, *rest, **named)

    trainer.training_step = counting_step
    return counts


def steady_state(clock: StepClock, counts: list[tuple[torch.Tensor, int]], compiled: bool) -> dict[str, Any]:
    """Real tokens per second after the first steps, and the share of padding over the whole run.

    A step lasts from the end of the step before to its own end, so that waiting for data counts;
    the `inside` figures stop the clock between steps. A new shape compiles again wherever in the
    run it appears, which is no steady state: a compiled run is judged by its median step.
    """
    real = [int(total) for total, _ in counts]
    skipped = min(SKIPPED_STEPS, len(real) - 1)
    measured = real[skipped:]
    marks = [clock.begins[0], *clock.ends][skipped:]
    whole = [after - before for before, after in itertools.pairwise(marks)]
    spans = zip(clock.begins, clock.ends, strict=True)
    inside = [end - begin for begin, end in spans][skipped:]
    total, median = sum(measured) / sum(whole), median_rate(measured, whole)
    return {
        "steps": len(real),
        "measured_steps": len(measured),
        "tokens_per_second": median if compiled else total,
        "tokens_per_second_total": total,
        "tokens_per_second_median_step": median,
        "tokens_per_second_inside": sum(measured) / sum(inside),
        "tokens_per_second_inside_median_step": median_rate(measured, inside),
        "padding_share": 1 - sum(real) / sum(padded for _, padded in counts),
    }


def median_rate(tokens: list[int], seconds: list[float]) -> float:
    """Median over steps of tokens per second."""
    return statistics.median(count / spent for count, spent in zip(tokens, seconds, strict=True))


def evaluate(trainer: Trainer, features: Features, kind: str) -> tuple[float, dict[str, float]]:
    """Seconds and scores of one pass over the test rows."""
    started = time.perf_counter()
    output = trainer.predict(features)  # pyright: ignore[reportArgumentType]
    seconds = time.perf_counter() - started
    # Rows may come back in another order, the labels beside them in the same one.
    return seconds, {**scores(kind, output.predictions, output.label_ids), "loss": float(output.metrics["test_loss"])}


def scores(kind: str, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What sft_jax reports under the same names."""
    if kind == "number":
        found = outputs[:, 0]
        rmse = float(np.sqrt(np.mean((found - labels) ** 2)))
        return {"pearson": float(pearsonr(found, labels).statistic), "rmse": rmse}
    predicted = outputs > 0 if kind == "several" else outputs.argmax(-1)
    averages = ("micro", "macro")
    f1 = {f"f1_{average}": float(f1_score(labels, predicted, average=average)) for average in averages}
    return {"accuracy": float(accuracy_score(labels, predicted)), **f1}


def timed(work: Any) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compile_seconds() -> float:
    """Seconds that torch spent in its compiler, or 0 where this version does not tell."""
    try:
        from torch._dynamo.utils import calculate_time_spent

        return float(calculate_time_spent().get("total_wall_time", 0.0))
    except ImportError:
        return 0.0


def peak_memory() -> dict[str, int]:
    """Largest resident size of this process, and largest allocation on the GPU (0 without one)."""
    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_process_bytes": kilobytes * 1024, "peak_device_bytes": on_device}


def process_age() -> float:
    """Seconds since this process was started, interpreter and imports included (Linux)."""
    # The name of the program, in brackets, may itself hold spaces and brackets.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


if __name__ == "__main__":
    main()
