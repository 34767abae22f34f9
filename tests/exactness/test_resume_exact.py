"""A run that was stopped and resumed is the run that was not, bit for bit."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exact_runs import differing, metrics_lines, settings, small_model, train_until

from sft_jax.config.schema import Config
from sft_jax.errors import Interrupted
from sft_jax.jobs import evaluate, train, trained
from sft_jax.run import open_run, prepare
from sft_jax.train.checkpoint import Checkpoints
from sft_jax.train.meter import Meter

FREEZES = {"full": ["train.freeze=[]"], "frozen": ["train.freeze=['embed/**','blocks/0/**']"]}
# Everything that a step may remember of the steps before it.
FREEZES["regularised"] = [
    "train.ema=0.9",
    "train.r_drop=0.5",
    "train.non_finite=skip",
    "train.spikes={window: 3, sigma: 0.5}",
    "train.unfreeze=[{match: 'embed/**', at: 5}]",
    "model.embedding_noise=5",
    "optim.penalty={l1: 1e-3, l2: 1e-3}",
    "data.augment={token_dropout: 0.1, swap: 0.1, delete: 0.1}",
]
HARD = ("model.dropout=0.1", "data.layout.kind=packed", "train.accumulate=2", "eval.every=4")
MIDDLES = {"the middle of epoch 1": 3, "the middle of epoch 2": 10}


@pytest.fixture(scope="module", params=FREEZES)
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path, rows: Path):
    """(configuration for a directory, finished run, its state): dropout, packed, accumulated, full and frozen."""
    home = tmp_path_factory.mktemp(f"uninterrupted-{request.param}")

    def make(directory: Path, *overrides: str) -> Config:
        return settings(directory, tiny, rows, *HARD, *FREEZES[request.param], *overrides)

    train(prepare(make(home / "run")))
    return make, home / "run", final_state(home / "run")


def final_state(directory: Path):
    """The training state after the last step, read back from the run directory."""
    return trained(open_run(directory), "latest")[0]


def weights(directory: Path) -> bytes:
    """The exported tensors as they are on disk."""
    return (directory / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("middle", MIDDLES)
def test_stop_and_resume_is_as_if_nothing_had_been(uninterrupted, tmp_path: Path, middle: str):
    """C11, R1, R20: stopped by a signal at step k and resumed, every leaf, loss and exported byte is the same."""
    make, whole, state = uninterrupted
    config = make(tmp_path / "run")
    train_until(config, MIDDLES[middle])
    assert [line["step"] for line in metrics_lines(tmp_path / "run") if line["kind"] == "train"][-1] == MIDDLES[middle]
    train(prepare(config))
    assert state.step == 14
    assert differing(state, final_state(tmp_path / "run")) == []
    assert metrics_lines(whole) == metrics_lines(tmp_path / "run")
    assert weights(whole) == weights(tmp_path / "run")


def test_a_stop_between_two_lines_leaves_no_trace(tmp_path: Path, tmp_path_factory, rows: Path, monkeypatch):
    """R54, R56: with a line each third step, a run that a signal stopped at step 8 of 14 has the same lines."""

    def make(name: str) -> Config:
        return settings(tmp_path / name, small_model(tmp_path_factory), rows, "train.log_every=3", "eval.every=5")

    train(prepare(make("whole")))
    with monkeypatch.context() as patch:
        add = Meter.add

        def stopping(self: Meter, step: int, metrics: Any) -> None:
            add(self, step, metrics)
            if step == 8:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(Meter, "add", stopping)
        with pytest.raises(Interrupted, match="stopped and saved at step 8 of 14"):
            train(prepare(make("parts")))
    assert metrics_lines(tmp_path / "parts")[-1]["partial"]
    train(prepare(make("parts")))
    assert metrics_lines(tmp_path / "parts") == metrics_lines(tmp_path / "whole")
    steps = [line["step"] for line in metrics_lines(tmp_path / "whole") if line["kind"] == "train"]
    assert steps == [3, 5, 6, 9, 10, 12, 14]


def test_the_comparison_sees_wrong_batches(uninterrupted, tmp_path: Path):
    """C11, R1: negative control; a resume that reads other batches ends elsewhere."""
    make, whole, state = uninterrupted
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "14")
    run = prepare(make(tmp_path / "run"))
    other = replace(run.batches.order, seed=run.batches.order.seed + 1)
    train(replace(run, batches=replace(run.batches, order=other)))
    assert len(differing(state.params, final_state(tmp_path / "run").params)) > 5
    assert metrics_lines(whole)[-2:] != metrics_lines(tmp_path / "run")[-2:]


def test_training_a_finished_run_again_changes_nothing(uninterrupted, tmp_path: Path):
    """R1, R56: the command of a finished run takes no step, and leaves metrics, checkpoints and model as they were."""
    make, whole, _ = uninterrupted
    shutil.copytree(whole, tmp_path / "run")
    result = train(prepare(make(tmp_path / "run")))
    assert (result.steps, result.best_step) == (14, Checkpoints(whole / "checkpoints", 2).progress(14).best_step)
    assert metrics_lines(tmp_path / "run") == metrics_lines(whole)
    assert weights(whole) == weights(tmp_path / "run")
    scores, _ = evaluate(open_run(tmp_path / "run"), "test")
    assert result.test is not None and scores.metrics == result.test.metrics
