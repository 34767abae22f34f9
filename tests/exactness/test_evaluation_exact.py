"""Evaluation counts every row once, on any number of devices, and its metrics are scikit-learn's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import write_rows
from exact_runs import settings, small_model
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from sft_jax.data.batch import Shape, collate
from sft_jax.data.loader import EvalBatches
from sft_jax.run import Run, eval_program, initial, prepare
from sft_jax.train.evaluate import evaluate

MESHES = {
    "1": ["mesh.data=1"],
    "2": ["mesh.data=2"],
    "4": ["mesh.data=4"],
    "2x2 with tensor": ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"],
}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Run]:
    """`ready("key=value", ...)`: a run with 3 classes, 21 validation rows and evaluation batches of 8."""
    home, model = tmp_path_factory.mktemp("evaluation"), small_model(tmp_path_factory)
    for seed, (split, count) in enumerate((("train", 24), ("validation", 21))):
        write_rows(home / f"{split}.csv", count, seed, labels=3)
    files = [f"data.source.{split}={home / split}.csv" for split in ("train", "validation")]
    return lambda *more: prepare(settings(home / "run", model, rows, *files, "data.source.test=null", *more))


def counted(run: Run, batches: EvalBatches):
    """The counts of the validation split at the initial parameters."""
    state, frozen = initial(run)
    program = eval_program(run, state.params, frozen)
    return evaluate(program, state.params, frozen, batches, run.put, 2).counts


@pytest.fixture(scope="module")
def one_by_one(ready) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(truth, predictions, losses) of the validation rows, each alone in a batch of one."""
    run = ready()
    params, encoded = initial(run)[0].params, run.data["validation"]
    shape = Shape(1, run.evals["validation"].shape.length, 1)
    forward = jax.jit(lambda params, batch: run.model.template.bind(params)(batch)[0, 0])
    logits = np.array([forward(params, collate(encoded, [[row]], shape)) for row in range(len(encoded))], np.float64)
    truth = encoded.documents["label"]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(truth)), truth]
    return truth, logits.argmax(axis=1), losses


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("mesh", MESHES)
def test_metrics_are_those_of_single_predictions(ready, one_by_one, mesh: str, layout: str):
    """C16: 21 rows in batches of 8 on 1, 2 and 4 devices: n is 21, metrics are scikit-learn's on single rows."""
    truth, predicted, losses = one_by_one
    run = ready(f"data.layout.kind={layout}", *MESHES[mesh])
    batches = run.evals["validation"]
    assert len(batches) > 1 and sum((b["weight"] == 0).sum() for b in map(batches.__getitem__, range(len(batches)))) > 0
    counts = counted(run, batches)
    assert counts.confusion.sum() == counts.loss.weight == 21
    metrics = run.task.metrics(counts)
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    for average in ("macro", "micro", "weighted"):
        names = [f"{what}_{average}" for what in ("precision", "recall", "f1")]
        wanted = precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)[:3]
        assert [metrics[name] for name in names] == pytest.approx(list(wanted), abs=1e-12)


@dataclass(frozen=True)
class _FillerCounts(EvalBatches):
    """The mistake: filler rows weigh as much as real ones."""

    def __getitem__(self, number: int):
        batch = super().__getitem__(number)
        return {**batch, "weight": np.ones_like(batch["weight"])}


def test_counting_filler_would_be_seen(ready):
    """C16: negative control; with weight 1 on filler rows the count is 24."""
    run = ready("data.layout.kind=padded")
    batches = run.evals["validation"]
    wrong = _FillerCounts(batches.encoded, batches.rows, batches.shape)
    assert counted(run, wrong).confusion.sum() == 24
