"""A whole tiny run of each task: trained, tested beside baselines, exported, evaluated again, and asked for records."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_SHAPE, SMALL, WORDS, write_model

from sft_jax import jobs, run
from sft_jax.infer.predict import load_predictor

SPLITS = ("train", "validation", "test")
TASKS = {
    "multi_label_classification": ("task.class_weights=balanced", "eval.best_metric=f1_micro"),
    "regression": ("task.label=score", "task.loss=huber", "eval.best_metric=pearson"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer."""
    return write_model(tmp_path_factory.mktemp("models") / "small", SMALL)


def write_rows(home: Path) -> list[str]:
    """Texts of two columns whose words tell two labels and a number, as overrides that name the files."""
    draw = np.random.default_rng(0)
    for split, count in zip(SPLITS, (64, 17, 19), strict=True):
        with open(home / f"{split}.csv", "w", newline="") as sink:
            writer = csv.writer(sink)
            writer.writerow(["text", "second", "labels", "score"])
            for _ in range(count):
                first, second = draw.integers(2, size=2)
                texts = [" ".join(draw.choice(WORDS[20 * k : 20 * k + 20], size=6)) for k in (first, second)]
                writer.writerow([*texts, ", ".join([*["late"] * first, *["blue"] * second]), 2.5 + first - second / 2])
    return [f"data.source.{split}={home / split}.csv" for split in SPLITS]


@pytest.mark.parametrize("kind", TASKS)
def test_a_whole_run(kind, configure, model, tmp_path):
    """R57, C16: loss falls, scores beat the commonest answer, evaluation repeats them, and records agree."""
    settings = ("train.epochs=12", "optim.lr=5e-3", "data.max_length=16", "eval.baselines=true", ONE_SHAPE)
    task = (f"task.kind={kind}", "task.text_pair=second", *TASKS[kind])
    built = run.prepare(configure(f"model.source={model}", *write_rows(tmp_path), *task, *settings))
    result = jobs.train(built)
    home, headline = result.directory, built.task.headline
    assert result.test is not None and result.test.metrics[headline] > 0.9
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] / 2
    commonest, linear = result.baselines.values()
    assert commonest < result.test.metrics[headline] and linear > 0.9, "the second text is read, too"

    again, _ = jobs.evaluate(run.open_run(home), "test")
    assert again.metrics == pytest.approx(result.test.metrics, rel=1e-5)
    records = list(load_predictor(str(home / "model"))(built.rows["test"].rows, raw=True))
    np.testing.assert_allclose([r["logits"] for r in records], again.kept, atol=1e-4)
    review = built.task.review(again.kept, built.examples("test"))
    said = [r["labels"] if "labels" in r else r["score"] for r in records]
    shown = [", ".join(s) or "none" if isinstance(s, list) else f"{s:.4g}" for s in said]
    assert sum(a == b for a, b in zip(shown, review.predicted, strict=True)) >= len(shown) - 1, "but for rounding"
    card = (home / "model" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and 'pipeline("text-classification"' in card
