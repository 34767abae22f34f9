"""Run directories made by hand: what a report is made of, without any training.

`kind` is how rows are answered: `labels` (one of several, with a confidence), `several` (any number of labels) or
`numbers`. Every text that comes from data holds markup, so that a page which does not escape one is found out.
"""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset

from sft_jax.data.prepare import Prepared
from sft_jax.data.rows import Rows
from sft_jax.report.review import summarise
from sft_jax.tasks.task import Review

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"
LABELS = ["awful", f"so {EVIL} so", "good $x_1$"]
WORDS = ["a", "film", "that", "is", "not", "quite", "as", "good", "the", "book", "it", "was", "made", "of", "minute"]
CONFIG = """\
run: {dir: runs/made}
model: {source: "<b>bert</b>"}
task: {kind: made_up}
eval: {best_metric: f1_macro}
optim: {lr: 0.001}
"""


def prepared(rows: int, draw: np.random.Generator) -> Prepared:
    """Rows of two columns of texts, some long, some with markup, from a file with an odd name."""
    one = [" ".join(draw.choice(WORDS, size=int(draw.integers(1, 40)))) for _ in range(rows)]
    one[0], one[1] = f"{EVIL} {'very ' * 600}", "wordswithoutblanks" * 40
    other = [f"{EVIL} {i} שלום עולם \ud800" for i in range(rows)]
    table = Dataset.from_dict({"text": one, "other": [text.replace("\ud800", "?") for text in other]})
    places = np.zeros(rows, np.int32), np.arange(2, rows + 2)
    return Prepared(
        Rows(table, "data.source.test", (f"{EVIL}.csv, line",), *places), (one, other), [0] * rows, np.arange(rows)
    )


def review(kind: str, rows: int, draw: np.random.Generator) -> tuple[Review, list]:
    """(how rows were answered, the task's tables)."""
    if kind == "numbers":
        truth = draw.normal(size=rows)
        predicted = truth + 0.5 * draw.normal(size=rows)
        loss = (predicted - truth) ** 2
        return Review([f"{t:.4f}" for t in truth], [f"{p:.4f}" for p in predicted], loss < 0.1, None, loss), []
    if kind == "several":
        truth, predicted = (draw.random((rows, len(LABELS))) < 0.4 for _ in range(2))
        names = [
            [", ".join(n for n, on in zip(LABELS, row, strict=True) if on) for row in s] for s in (truth, predicted)
        ]
        shares = draw.random((len(LABELS), 3)).round(4).tolist()
        table = [["label", "precision", "recall", "F1", "rows"]]
        table += [[name, *share, 7] for name, share in zip(LABELS, shares, strict=True)]
        return Review(*names, (truth == predicted).all(axis=1), None, draw.random(rows)), [["per label", table]]
    truth, confidence = draw.integers(len(LABELS), size=rows), draw.random(rows) ** 0.3
    predicted = np.where(draw.random(rows) < confidence, truth, draw.integers(len(LABELS), size=rows))
    confusion = np.zeros((len(LABELS), len(LABELS)), int)
    np.add.at(confusion, (truth, predicted), 1)
    tables = [
        [
            "confusion matrix",
            [["truth \\ predicted", *LABELS], *([n, *c.tolist()] for n, c in zip(LABELS, confusion, strict=True))],
        ],
        ["per class", [["label", "precision", "F1", "rows"], *([name, 0.5, 0.25, 9] for name in LABELS)]],
    ]
    names = [[LABELS[i] for i in side] for side in (truth, predicted)]
    return Review(*names, truth == predicted, confidence, -np.log(draw.random(rows))), tables


def make_run(home: Path, kind: str = "labels", rows: int = 300, seed: int = 0, *, finished: bool = True) -> Path:
    """A run directory as `jobs.train` leaves it, model and checkpoints left out."""
    draw = np.random.default_rng(seed)
    home.mkdir(parents=True)
    (home / "config.yaml").write_text(CONFIG.replace("0.001", str(0.001 * (1 + seed))) + f"extra: {json.dumps(EVIL)}\n")
    versions = {"jax": "0.10", EVIL: EVIL}
    data = {split: {"rows": rows + seed, "sha256": f"{seed}abc" * 16} for split in ("train", "test")}
    put(home / "manifest.json", {"schema": 1, "data": data, "versions": versions, "attempts": [{"started": seed}]})
    events = []
    for step in range(10, 410, 10):
        figures = {
            "loss": 2 / step**0.5 + 0.05 * draw.random(),
            "lr": 1e-3 * (1 - step / 410),
            "grad_norm": draw.random(),
        }
        events.append({"kind": "train", "step": step, **figures, "tokens_per_second": 1e4})
        if step % 100 == 0:
            scores = {"loss": 2.2 / step**0.5, "f1_macro": 1 - 3 / step**0.5, "accuracy": 0.5}
            events.append({"kind": "validation", "step": step, "split": "validation", **scores})
    (home / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if not finished:
        return home
    groups = {EVIL: {"accuracy": 0.25, "f1_macro": 0.5}, "other": {"accuracy": 0.75, "f1_macro": 0.125}}
    summary = {
        "steps": 400,
        "best_step": 300,
        "tokens_per_second": 12345.6 + seed,
        "seconds": {"train": 61.0, "total": 70.0},
        "peak_memory_bytes": 3e9,
        "validation": {"f1_macro": 0.8268, "loss": 0.11},
        "test": {"accuracy": 0.8125 - seed / 8, "f1_macro": 0.75, "loss": 0.5, "groups": groups},
        "baselines": {"majority class": 0.5, "TF-IDF + logistic regression": 0.6875},
    }
    put(home / "summary.json", summary)
    found, tables = review(kind, rows, draw)
    names = [EVIL if number % 2 else "other" for number in range(rows)]
    short = summarise(found, prepared(rows, draw), ("text", "other"), draw.integers(3, 60, rows), names, 20)
    put(home / "review.json", {**short, "headline": "accuracy", "tables": tables})
    put(home / "data.json", data_report(rows))
    return home


def data_report(rows: int) -> dict:
    """Something like a data report: counts by split, by reason, by label, and rows that were dropped."""
    split = {"read": rows, "dropped": {"no text": 3, EVIL: 1}, "labels": {EVIL: 5, "good": 7}, "tokens": {"median": 26}}
    dropped = [{"place": f"{EVIL}, line {i}", "reason": "no text"} for i in range(70)]
    return {
        "splits": {"train": split, "test": split},
        "leakage": {"rows": 2},
        "dropped": dropped,
        "columns": [EVIL, "b"],
    }


def put(file: Path, content: object) -> None:
    """Plain data into a file."""
    file.write_text(json.dumps(content))
